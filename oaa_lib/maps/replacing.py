"""Whole files or none: written under a name of their own beside the path, which they take once they are complete."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from oaa_lib.maps.locking import PathLike, fcntl, try_lock, unlock


@contextlib.contextmanager
def replacing(path: PathLike, *, new: bool = False) -> Iterator[BinaryIO]:
    """A file beside ``path`` that takes its place once it is complete and on the disk; or, if it must be new, fails.

    It is locked as long as it is being written: those that are not, and bear such a name, were left by processes that
    were killed, and are removed.
    """
    target = Path(path)
    if new and os.path.lexists(target):
        raise _exists(target)
    _remove_strays(target)
    partial, file = _begin(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while it is locked
                _name(partial, target, new=new)
                unlock(file)
        if fcntl is None:
            _name(partial, target, new=new)
    finally:
        partial.unlink(missing_ok=True)


def _begin(target: Path) -> tuple[Path, BinaryIO]:
    """A new file that nobody takes for a stray."""
    while True:
        partial = target.with_name(f"{target.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
        file = open(partial, "xb")  # noqa: SIM115 (the caller closes it)
        try:
            taken = try_lock(file)
        except OSError:  # without locks there is nobody who removes strays
            taken = True
        if taken and partial.exists():
            return partial, file
        file.close()  # it was taken for a stray just before it was locked


def _name(partial: Path, target: Path, *, new: bool) -> None:
    """Give a complete file its name, and wait until the disk has that, too."""
    with _locked(target.parent) as folder:
        if new and os.path.lexists(target):
            raise _exists(target)
        os.replace(partial, target)
        if folder is not None:
            with contextlib.suppress(OSError):
                os.fsync(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """A folder in which no other process names a file; None where folders cannot be opened, or locked."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.flock(number, fcntl.LOCK_EX)
        yield number
    finally:
        unlock(number)
        os.close(number)


def _remove_strays(target: Path) -> None:
    if fcntl is None:
        return
    name = re.compile(re.escape(target.name) + r"\.\d+\.[0-9a-f]{8}\.partial")
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                    if try_lock(file):
                        os.unlink(entry.path)


def _exists(path: Path) -> Exception:
    if not path.exists():
        return ValueError(f"expected path as that of a file, got {path}, a link to no file; remove the link")
    return FileExistsError(f"{path} exists; pass resume=True to go on with it, or take another path")
