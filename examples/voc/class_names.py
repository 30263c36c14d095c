"""Class files: a name a line, in the order of the ids. What is not certain is refused with its line."""

import re
from collections.abc import Sequence
from pathlib import Path

from texts import SEPARATORS, numbered_lines, same_form, shown, unprintable

MOST_CLASSES = 254  # in a label image of 8 bits 0 is the background and 255 is ignored
NUMBERED = re.compile(r"(\d{1,9})[\s,;:.)-]+(\S.*)")  # a class file's "1 person" or "1: person"


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
