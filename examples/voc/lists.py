"""The one reader of lists and class files (tables: label_tables.py). What is not certain is refused with its line.

Names are compared in one Unicode form (NFC), so a list written on Linux fits files that were named on macOS.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from images import ENDINGS

MOST_CLASSES = 254  # in a label image of 8 bits 0 is the background and 255 is ignored
LONGEST = 5000  # characters of a line, far above any list of names and class ids
SEPARATORS = re.compile(r"[\s,;]+")
NUMBERED = re.compile(r"(\d{1,9})[\s,;:.)-]+(\S.*)")  # a class file's "1 person" or "1: person"
# "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png", as segmentation projects write lists
PATHS = re.compile(r"(?:\S*/)?JPEGImages/([^/]+?\.\w+)(?:\s+(?:\S*/)?SegmentationClass\w*/([^/]+)\.png)?")


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark; a byte order mark is no part of the text."""
    if path.exists() and not path.is_file():  # a FIFO would wait for ever
        raise SystemExit(f"{path} cannot be read as text: it is no regular file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SystemExit(f"{path} cannot be read as text ({error})") from error
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
        return text.replace("\n\ufeff", "\n")  # of a file that was put together from several
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SystemExit(f"{path}, line {line}: cannot be read as text ({error.reason}); save it as UTF-8") from error


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, each with its number, without their ends (Unix, Windows or old Macintosh)."""
    # not splitlines(), which would cut a name at a form feed or at U+2028
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in filled:
        if len(line) > LONGEST:
            raise SystemExit(f"{path}, line {number}: expected at most {LONGEST} characters, got {shown(line)}")
    return filled


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    return [line for _, line in numbered_lines(path)]


def same_form(name: str) -> str:
    """A name without spaces round it, in the one Unicode form."""
    return unicodedata.normalize("NFC", name.strip())


def shown(text: str) -> str:
    """A text as an error message shows it: quoted, on one line, not without end."""
    return repr(text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)")


def without_surrogates(text: object) -> str:
    """A text that can be printed: bytes of a file name that are no UTF-8 are spelled out."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def listing(items: Iterable[str], limit: int = 20) -> str:
    """The first items, one a line, and how many more there are."""
    lines = list(items)
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "".join(f"\n  {without_surrogates(line)}" for line in lines[:limit] + more)


def unprintable(text: str) -> bool:
    """Whether a text holds line ends, NUL or other control characters, or what cannot be written in UTF-8."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


# Classes


def read_classes(path: Path) -> list[str]:
    """A class file: one name a line, in the order of the ids from 0, without the background."""
    lines = numbered_lines(path)
    if not lines:
        raise SystemExit(f"{path} names no class; expected one a line")
    check_classes([(f"{path}, line {number}", line.strip()) for number, line in lines])
    return [same_form(line) for _, line in lines]


def check_classes(names: Sequence[tuple[str, str]]) -> None:
    """End where class names, each with the place it stands in, would not give every class its id.

    Args:
        names: (place, name) of each class, in the order of the ids.
    """
    seen: dict[str, str] = {}
    for place, name in names:
        plain = same_form(name)
        if unprintable(plain) or not plain:
            raise SystemExit(f"{place}: expected a class name, got {shown(name)}")
        if is_background(plain):
            raise SystemExit(
                f"{place}: {shown(name)} is no class; the background has the mask value 0 and no class id, so class "
                "ids and names begin after it: leave it out"
            )
        if plain in seen:
            raise SystemExit(f"{place}: class {shown(name)} is there twice, first in {seen[plain]}")
        seen[plain] = place
    if len(seen) == 1 and len(SEPARATORS.split(next(iter(seen)))) > 1:
        raise SystemExit(
            f"{names[0][0]}: {shown(names[0][1])} could be one class or several; expected one name a line (a single "
            "class is written without spaces and commas)"
        )
    if len(names) > MOST_CLASSES:
        raise SystemExit(
            f"{names[-1][0]}: expected at most {MOST_CLASSES} classes, got {len(names)}: masks have 8 bits"
        )
    check_numbers(names)


def check_numbers(names: Sequence[tuple[str, str]]) -> None:
    """End where every name has a number before it (from 0, from 1) that is not that of its place."""
    found = [NUMBERED.fullmatch(name) for _, name in names]
    if not all(found):
        return
    numbers = [int(match[1]) for match in found if match]
    first = numbers[0]
    if first > 1 or sorted(set(numbers)) != numbers:  # they count something else, such as "3 series"
        return
    for (place, name), number, expected in zip(names, numbers, range(first, first + len(numbers)), strict=True):
        if number != expected:
            raise SystemExit(
                f"{place}: {shown(name)} has the number {number} where {expected} is next; ids have no gaps here, so "
                "list the names without numbers and write the masks and labels anew"
            )


def is_background(name: str) -> bool:
    """Whether a class file means the background by a name, numbered or not."""
    match = NUMBERED.fullmatch(name)
    return (match[2] if match else name).strip("_ '\"").casefold() in ("background", "bg")


# Folders of images


class Images:
    """Which images a folder holds, by their names with and without ending. Hidden files are none.

    Args:
        folder: to look in.
        deep: in its sub-folders too, also where these are symbolic links.
        endings: of the files that count, in any case.
    """

    def __init__(self, folder: Path, *, deep: bool = False, endings: Sequence[str] = ENDINGS) -> None:
        self.folder = folder
        try:
            self._all = [name for name in _walk(folder, deep) if name.lower().endswith(tuple(endings))]
        except OSError as error:
            raise SystemExit(f"{folder} cannot be listed ({error})") from error
        self._files: dict[str, list[str]] = defaultdict(list)
        for name in self._all:
            for key in (same_form(name), without_ending(same_form(name))):
                self._files[key].append(name)

    @property
    def paths(self) -> list[Path]:
        """All of them, sorted."""
        return sorted(self.folder / name for name in self._all)

    def find(self, text: str) -> list[Path]:
        """The files that a name may mean."""
        return sorted(self.folder / name for name in self._files.get(same_form(text), []))

    def of(self, name: str) -> list[Path]:
        """The photographs with this name, whatever their ending; NAME.jpg alone, where it is there."""
        found = [file for file in self._files.get(name, []) if without_ending(same_form(file)) == name]
        plain = f"{name}.jpg"
        return [self.folder / file for file in ([plain] if plain in found else sorted(found))]

    def names(self, text: str) -> set[str]:
        """The names, without ending, that a word or a path of a list may mean; none if there is no such image."""
        found = self._files.get(same_form(text), [])
        match = None if found else PATHS.fullmatch(text.strip())
        if match:
            found = self._files.get(same_form(match[1]), [])
        names = {without_ending(same_form(name)) for name in found}
        return names & {same_form(match[2])} if match and match[2] is not None else names


def without_ending(name: str) -> str:
    """A file's name without the ending; dots within it stay."""
    return name.rpartition(".")[0]


def _walk(folder: Path, deep: bool, prefix: str = "", above: tuple[Path, ...] = ()) -> Iterator[str]:
    """Files that are not hidden, as FOLDER/NAME; a link back to a folder that is being walked is not followed."""
    here = folder.resolve()
    if here in above or not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if deep and entry.is_dir():
                yield from _walk(folder / entry.name, deep, f"{prefix}{entry.name}/", (*above, here))
            else:
                yield prefix + entry.name


# Lists


def read_names(path: Path, images: Images) -> dict[str, int]:
    """A list with one image name a line, each with the number of its line.

    A name may have spaces, dots, an ending, or be a path as in other projects' lists (/JPEGImages/NAME.jpg). Names of
    images that are not there are returned too, as they are written.
    """
    names: dict[str, int] = {}
    for number, line in numbered_lines(path):
        place = f"{path}, line {number}"
        found = images.names(line)
        if len(found) > 1:
            raise SystemExit(f"{place}: {shown(line.strip())} could be each of the images {sorted(found)}; rename one")
        name = found.pop() if found else checked_name(line, place)
        if name in names:
            raise SystemExit(f"{place}: {shown(line.strip())} is there twice, first in line {names[name]}")
        names[name] = number
    return names


def read_labels(path: Path, images: Images, num_classes: int) -> dict[str, tuple[int, list[int]]]:
    """A list of lines NAME ID [ID ...]: for each image the number of its first line, and its class ids, sorted.

    Ids are separated by spaces, commas or semicolons, or written as [ID, ID]; an image may have several lines. Where a
    name that ends in numbers leaves open what is an id, a tab between name and ids decides.
    """
    labels: dict[str, tuple[int, set[int]]] = {}
    for number, line in numbered_lines(path):
        place = f"{path}, line {number}"
        name, ids = _name_and_ids(line, images, place)
        wrong = [c for c in ids if c >= num_classes]
        if wrong:
            hint = "; do they count from 1?" if wrong == [num_classes] else ""
            raise SystemExit(f"{place}: {name} has the class ids {ids}; expected 0..{num_classes - 1}{hint}")
        first, known = labels.setdefault(name, (number, set(ids)))
        if bool(ids) != bool(known):
            raise SystemExit(f"{place}: {name} has {'no class' if not ids else 'classes'} here, unlike in line {first}")
        known.update(ids)
    return {name: (number, sorted(ids)) for name, (number, ids) in labels.items()}


def _name_and_ids(line: str, images: Images, place: str) -> tuple[str, list[int]]:
    """The only way to read a line of which the name is an image's; if there is no such image, the shortest name."""
    expected = "expected lines NAME ID [ID ...] with class ids from 0 and NAME of an image"
    readings = list(_readings(line))
    fitting = {name: ids for text, ids in readings for name in images.names(text)}
    if len(fitting) > 1:
        raise SystemExit(
            f"{place}: {shown(line.strip())} could be each of the images {sorted(fitting)}; put a tab "
            "before the ids, or rename one"
        )
    if fitting:
        return next(iter(fitting.items()))
    if not readings or (not readings[-1][1] and len(line.split()) > 1):
        raise SystemExit(f"{place}: {expected}, got {shown(line.strip())}")
    text, ids = readings[-1]
    return checked_name(text, place), ids


def _readings(line: str) -> Iterator[tuple[str, list[int]]]:
    """The ways to divide a line into a name and class ids, the longest name first."""
    if "\t" in line.strip("\r\n "):
        name, _, rest = line.strip("\r\n ").partition("\t")
        ids = _ids(rest)
        if ids is not None:
            yield name, ids
        return
    text = line.strip()
    yield text, []
    for gap in reversed(list(SEPARATORS.finditer(text))):
        rest = text[gap.end() :]
        ids = _ids(rest)
        if ids is not None:
            yield text[: gap.start()], ids
        elif not re.fullmatch(r"[\d\s,;\[\]]*", rest):
            return


def _ids(text: str) -> list[int] | None:
    """Class ids in any of the forms, or None."""
    bare = text.strip()
    if bare.startswith("[") and bare.endswith("]"):
        bare = bare[1:-1]
    words = [word for word in SEPARATORS.split(bare) if word]
    return [int(word) for word in words] if all(re.fullmatch("[0-9]{1,9}", word) for word in words) else None


def checked_name(text: str, place: str) -> str:
    """The name of an image that is not there, if results may be named after it: it must not lead out of a folder."""
    name = same_form(text)
    if not name or "/" in name or "\\" in name or name.startswith(".") or unprintable(name) or Path(name).name != name:
        raise SystemExit(f"{place}: expected the name of an image, without folders, got {shown(text.strip())}")
    return name
