"""The one reader of tables of labels: a folder of images, and a CSV that says what they show."""

import ast
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from class_names import check_classes, read_classes
from lists import Images
from texts import SEPARATORS, listing, read_text, same_form, shown


class Row(NamedTuple):
    """The rows of a table that are of one image.

    Attributes:
        line: of the first.
        image: as it is written.
        labels: the cells.
    """

    line: int
    image: str
    labels: list[str]


class Labelled(NamedTuple):
    """An image and what it shows.

    Attributes:
        path: of the file.
        name: its path below the folder, with ending.
        ids: of the classes that it shows, sorted.
    """

    path: Path
    name: str
    ids: list[int]


class LabelledFolder(NamedTuple):
    """What a folder of images and a table say.

    Attributes:
        classes: in the order of their ids.
        images: in the order of the table.
        unused: images without a row.
    """

    classes: list[str]
    images: list[Labelled]
    unused: list[Path]


def read_folder(folder: Path, table: Path, class_file: Path | None = None) -> LabelledFolder:
    """A folder of images and a CSV: a header image,labels, or rows FILE,LABELS without one.

    An image is a file below the folder; its ending may be left out. Labels are class names separated by ';', a JSON
    list, or one row for each class. A cell without ';' of several words is read as several classes only if each is
    known from other rows or from the class file.

    Args:
        folder: with the images, in sub-folders too.
        table: the CSV.
        class_file: class names in the order of their ids; without it the classes are those of the table, sorted.
    """
    images = Images(folder, deep=True)
    if not images.paths:
        raise SystemExit(f"--images {folder} is missing or holds no images")
    rows = read_table(table)
    classes = read_classes(class_file) if class_file else None
    labels, problems = _class_names(rows, classes)
    if classes is None:
        lines = {
            label: row.line for row, found in zip(reversed(rows), reversed(labels), strict=True) for label in found
        }
        classes = sorted(lines)
        if not problems and classes:
            check_classes([(f"{table}, line {lines[label]}", label) for label in classes])
    found: dict[Path, Labelled] = {}
    written: dict[Path, Row] = {}
    for row, shows in zip(rows, labels, strict=True):
        paths = images.find(row.image) if row.image else []
        if not paths:
            hint = " (a header would be image,labels)" if row is rows[0] else ""
            problems.append(f"line {row.line}: {row.image or '(empty)'}: no such image in {folder}{hint}")
        elif len(paths) > 1:
            problems.append(
                f"line {row.line}: {row.image}: {len(paths)} rows or files of this name: {', '.join(map(str, paths))}"
            )
        elif paths[0] in written:
            first = written[paths[0]]
            problems.append(
                f"{row.image}: 2 rows or files of this name: lines {first.line} ({first.image}), {row.line}"
            )
        else:
            written[paths[0]] = row
            ids = sorted({classes.index(label) for label in shows if label in classes})
            found[paths[0]] = Labelled(paths[0], same_form(paths[0].relative_to(folder).as_posix()), ids)
    if problems:
        raise SystemExit(f"{table} and {folder} do not fit ({len(problems)}; nothing was written):{listing(problems)}")
    return LabelledFolder(classes, list(found.values()), [path for path in images.paths if path not in found])


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV, those of one image together."""
    filled = _filled(path)
    head = [cell.lower() for cell in filled[0][1]] if filled else []
    image, labels, width = 0, 1, 2
    if {"image", "labels"} <= set(head):
        image, labels, width = head.index("image"), head.index("labels"), len(head)
        del filled[0]
    elif len(head) != 2:
        raise SystemExit(
            f"{path}: expected a header 'image,labels', or none and expected rows FILE,CLASS;CLASS;..., got "
            f"{str(filled[0][1])[:200] if filled else 'none'}"
        )
    if not filled:
        raise SystemExit(f"{path}: expected a row for each image below the header, got none")
    wrong = [f"line {line}: {str(cells)[:200]}" for line, cells in filled if len(cells) != width]
    if wrong:
        raise SystemExit(
            f"{path}: rows with fewer or more cells than the header or the first row; expected rows FILE,CLASS;CLASS;"
            f"... (separate labels by ';', not by commas):{listing(wrong)}"
        )
    return _together(path, [(line, same_form(cells[image]), cells[labels]) for line, cells in filled])


def _filled(path: Path) -> list[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its first line."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    filled: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells) or len(cells) > 1:
                filled.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:  # such as a quote that is never closed, which would swallow all further rows
        raise SystemExit(f"{path}, from line {line}: cannot be read as CSV ({error})") from error
    return filled


def _together(path: Path, rows: Sequence[tuple[int, str, str]]) -> list[Row]:
    """One row for each image, of the rows (line, image, labels)."""
    merged: dict[str, Row] = {}
    for line, name, cell in rows:
        row = merged.setdefault(name, Row(line, name, []))
        row.labels.append(cell)
        if len(row.labels) > 1 and not all(row.labels):
            has = "classes" if cell else "no class"
            raise SystemExit(f"{path}, line {line}: {name or '(empty)'} has {has} here, unlike in line {row.line}")
    return list(merged.values())


def _class_names(rows: Sequence[Row], classes: Sequence[str] | None) -> tuple[list[list[str]], list[str]]:
    """The classes of each row, and what is wrong with them, a sentence each."""
    problems: list[str] = []
    cells = [[_parts(cell, row.line, problems) for cell in row.labels] for row in rows]
    certain = {
        part for row in cells for parts, plain in row for part in parts if plain or len(SEPARATORS.split(part)) == 1
    }
    known = set(classes or certain)
    explicit = any(plain for row in cells for _, plain in row)
    labels: list[list[str]] = []
    for row, found in zip(rows, cells, strict=True):
        mine: list[str] = []
        for parts, plain in found:
            one_cell = not plain and parts
            mine += _divided(parts[0], known, explicit, row.line, problems) if one_cell else parts
        if classes is not None:
            unknown = [label for label in mine if label not in known]
            problems += [f"line {row.line}: class {label!r} is not in the class file" for label in unknown]
        labels.append(list(dict.fromkeys(mine)))
    return labels, problems


def _parts(cell: str, line: int, problems: list[str]) -> tuple[list[str], bool]:
    """The classes of a cell, and whether it is plain what they are: divided by ';', or a JSON list."""
    if cell.startswith("["):
        try:
            content = json.loads(cell)
        except (ValueError, RecursionError):
            content = _python_list(cell)
        if not isinstance(content, list) or not all(isinstance(entry, str | int) for entry in content):
            problems.append(f'line {line}: expected labels such as ["dog", "cat"] or dog;cat, got {shown(cell)}')
            return [], True
        return [name for name in (same_form(str(entry)) for entry in content) if name], True
    return [name for name in map(same_form, cell.split(";")) if name], ";" in cell


def _python_list(cell: str) -> object:
    """A list as pandas writes it, ['dog', 'cat']; nothing is run."""
    try:
        return ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _divided(cell: str, known: set[str], explicit: bool, line: int, problems: list[str]) -> list[str]:
    """A cell without ';': one class, or several known ones with commas or spaces between."""
    parts = [part for part in map(same_form, cell.split(",") if "," in cell else cell.split()) if part]
    if cell in known or len(parts) == 1:
        return [cell if cell in known else parts[0]]
    if not parts:
        problems.append(f"line {line}: expected labels, got {shown(cell)}")
        return []
    several = all(part in known for part in parts)
    if several != explicit:
        return parts if several else [cell]
    problems.append(
        f"line {line}: {shown(cell)} could be one class or several; write '{parts[0]};{parts[1]}' for several, "
        f"'{cell};' for one, or name all classes in a class file (--classes)"
    )
    return []
