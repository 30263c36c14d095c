"""Files of ours: small ones appear whole or not at all, and what cannot be read or written ends in a sentence."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from texts import read_text

LOCK = "in_use.lock"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` once it is complete, and goes if it cannot be completed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several processes may write it
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def alone_in(folder: Path) -> None:
    """Lock a folder until this process ends, however it ends: two trainings would garble each other's files.

    Where there are no such locks (Windows, some file systems) nothing is refused.
    """
    try:
        import fcntl

        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    except (ImportError, OSError):
        return
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either says that it is locked
        raise SystemExit(f"{folder}: another process is at work there; wait for it, or stop it") from None
    except OSError:
        return


def write_text(path: Path, text: str) -> None:
    """A small file that appears whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_image(path: Path, image: Image.Image) -> None:
    """A PNG that appears whole or not at all."""
    with whole_file(path) as partial:
        image.save(partial, format="PNG")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of ours."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{path} cannot be read ({error}); remove {path.parent} to start its stage anew") from error
    if not isinstance(content, dict):
        raise SystemExit(f"{path} is not one of ours: expected settings by name; choose another folder")
    return content


@contextmanager
def ends_with(what: str, advice: str, *others: type[Exception]) -> Iterator[None]:
    """End with a sentence where a file cannot be read or written, a full disk included, or at other errors."""
    try:
        yield
    except (OSError, *others) as error:
        reason = str(error).split("\n")[0]
        raise SystemExit(f"{what}: {reason}; {advice}") from error
