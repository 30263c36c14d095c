"""The one reader of lists and of folders of images. What is not certain is refused with its line."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from images import ENDINGS
from texts import SEPARATORS, numbered_lines, same_form, shown, unprintable

# "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png", as segmentation projects write lists
PATHS = re.compile(r"(?:\S*/)?JPEGImages/([^/]+?\.\w+)(?:\s+(?:\S*/)?SegmentationClass\w*/([^/]+)\.png)?")


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
