"""One writer: locks on files, which belong to one open file of one process, and whose turn it is among threads."""

import contextlib
import functools
import importlib.util
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

PathLike = str | os.PathLike[str]
Method = TypeVar("Method", bound=Callable[..., Any])

# Windows has no fcntl: there a second writer of one file goes unnoticed.
fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None


def in_turn(method: Method) -> Method:
    """A method of what keeps a store: one thread at a time, and for the whole of it."""

    @functools.wraps(method)
    def waiting(self: Any, *arguments: Any, **named: Any) -> Any:
        with self._store.turn.lock:
            return method(self, *arguments, **named)

    return cast(Method, waiting)


class Turn:
    """Whose turn it is among threads: who holds ``lock`` may take it again. A copy, or a forked child, has its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _OF_THIS_PROCESS.add(self)

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        return Turn, ()

    def forked(self) -> None:
        """Be free in a new process: the thread that held it does not exist there."""
        self.lock = threading.RLock()


def open_regular(path: PathLike, mode: str) -> BinaryIO:
    """An open file, unbuffered.

    Raises:
        ValueError: a FIFO, a device or the like, which is not waited for.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)
    file = open(path, mode, buffering=0, opener=lambda name, flags: os.open(name, flags | at_once))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{os.fspath(path)} is no accumulator file: it is no regular file")
    return cast(BinaryIO, file)


def try_lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed; False if somebody else has done so.

    The lock (flock) belongs to this open file: whoever opens it once more, in the same process too, is kept out, and
    closing that one does not release it.

    Raises:
        OSError: there are no locks here.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def unlock(file: BinaryIO | int) -> None:
    """Unlock a file at once: closing it is not enough where a child was forked meanwhile, which has it open, too."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


class FileLock:
    """Keeps all others out of a file for as long as it lives. A forked child does not have it.

    Args:
        path: the file.

    Raises:
        ValueError: no regular file.
        OSError: no file.
    """

    def __init__(self, path: PathLike) -> None:
        self.file = open_regular(path, "r+b")
        self.path, self._status = os.path.realpath(path), os.fstat(self.file.fileno())
        weakref.finalize(self, self.file.close)
        _OF_THIS_PROCESS.add(self)

    def take(self) -> None:
        """Lock the file.

        Raises:
            BlockingIOError: it is locked.
            OSError: the file system has no locks.
        """
        try:
            taken = try_lock(self.file)
        except OSError as error:
            raise OSError(
                error.errno, f"{self.path} cannot be locked ({error.strerror}); keep it on a local disk"
            ) from error
        if not taken:
            raise BlockingIOError(
                f"{self.path} is in use by another process, or by another accumulator of this one; "
                "give each a path of its own"
            )

    def map(self, *, copy: bool = False) -> mmap.mmap:
        """The file in memory, through an opening of its own: what a forked child keeps of it is not the lock.

        Args:
            copy: what is written into it stays in memory.

        Raises:
            FileNotFoundError: the file was replaced meanwhile.
        """
        with open_regular(self.path, "r+b") as file:
            if not os.path.samestat(os.fstat(file.fileno()), self._status):
                raise FileNotFoundError(f"{self.path} was replaced while it was being opened")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if copy else mmap.ACCESS_WRITE)

    def check(self) -> None:
        """Before each change: this process has the lock, and what is written will be found at the path.

        Raises:
            BlockingIOError: this process was forked from the one that has the lock.
            FileNotFoundError: the file was deleted, moved or replaced.
        """
        if self.file.closed:
            raise BlockingIOError(
                f"{self.path} is in use by another process, from which this one was forked; change the maps there"
            )
        if not self.is_at(self.path):
            raise FileNotFoundError(
                f"{self.path} was deleted, moved or replaced while its maps were in use; they are still here: save() "
                "them to another path"
            )

    def is_at(self, path: PathLike) -> bool:
        """Whether a path leads to this file."""
        try:
            return os.path.samestat(os.stat(path), self._status)
        except OSError:
            return False

    def forked(self) -> None:
        """Let go in a new process, so that the file is free once the one that has the lock ends."""
        self.file.close()


_OF_THIS_PROCESS: weakref.WeakSet[Turn | FileLock] = weakref.WeakSet()


def _forked() -> None:
    for each in list(_OF_THIS_PROCESS):
        each.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
