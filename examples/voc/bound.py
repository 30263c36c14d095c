"""Folders of results that are bound to the settings that the results were made with."""

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from files import LOCK, ends_with, read_json, write_text

MOST = 8  # differences that a message names
RECORDS = ("settings.json", "source.json", "refinement.json", "made_from.json", "data.json", LOCK)
NOTHING: dict[str, Any] = {}


def label_image(name: str) -> list[str]:
    """The one file of an image in a folder of label images."""
    return [f"{name}.png"]


class Bound:
    """A folder for results of certain settings, which are kept in a file beside them.

    One that holds results of other settings is refused with a sentence, so that what is there can always be gone on
    with. Nothing is written before `make`. A folder that holds no results yet, of a start that failed, takes others.

    Args:
        path: of the folder, as given with --out.
        settings: all that the results depend on, as JSON can hold it; paths become text.
        record: name of the file.
        noted: kept there too, but free to differ the next time.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], *, record: str = "settings.json", noted: dict[str, Any] = NOTHING
    ) -> None:
        self.path, self.record = path, path / record
        settings = json.loads(json.dumps(settings, default=str))  # as they come back from the file
        self.content = settings | noted
        self._replaces = not self.record.exists()
        if self._replaces:
            return
        there = read_json(self.record)
        # Left by a start of this stage that failed; the settings of something else are not ours to replace.
        self._replaces = there.keys() == self.content.keys() and all(file.name in RECORDS for file in path.iterdir())
        if self._replaces:
            return
        found = {name: value for name, value in there.items() if name not in noted}
        told = differences(found, settings)
        if told:
            what = "; ".join(told[:MOST] + [f"{len(told) - MOST} more"] * (len(told) > MOST))
            raise SystemExit(f"{path} was made with other settings ({what}); choose another --out or remove the folder")

    def make(self) -> None:
        """Make the folder, with the settings in it, where it is not there."""
        with ends_with(f"--out {self.path}", "choose a folder that can be written to, or make room"):
            self.path.mkdir(parents=True, exist_ok=True)
            if self._replaces:
                write_text(self.record, json.dumps(self.content, indent=1))

    def todo(self, names: Iterable[str], files: Callable[[str], Iterable[str]] = label_image) -> list[str]:
        """The images of which not all files are there yet.

        Args:
            names: of the images.
            files: the names of an image's files.
        """
        return [name for name in names if not all((self.path / file).exists() for file in files(name))]


def differences(found: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Which settings differ, and how, at whatever depth."""
    told = []
    for name in [*asked, *(found.keys() - asked.keys())]:
        there, wanted = found.get(name), asked.get(name)
        if isinstance(wanted, dict):
            told += differences(there if isinstance(there, dict) else {}, wanted)
        elif there != wanted:
            told.append(f"{name}: {there if not isinstance(there, dict) else 'several'} there, {wanted} asked")
    return told


def source_commit() -> str | None:
    """The commit of this source, marked if the tree has changed since; None outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
