"""Files of an accumulator: written whole by `save`, or mapped into memory and grown in place.

Both have the layout of safetensors, so that other programs can read the maps: eight bytes with the length of a JSON
header, the header, the arrays one after the other. Nothing in a file is ever run.
"""

import contextlib
import json
import math
import mmap
import os
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

try:
    import fcntl
except ImportError:  # Windows, where a second process on one file goes unnoticed
    fcntl = None  # type: ignore[assignment]

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
Shapes: TypeAlias = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
PathLike: TypeAlias = str | os.PathLike[str]

DTYPES = {"I64": np.int64, "I32": np.int32, "F32": np.float32, "F16": np.float16, "U8": np.uint8}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 1 << 20
JOURNAL_BYTES = 1 << 22


class Entry(NamedTuple):
    """Where an array lies in a file.

    Attributes:
        dtype: of the array.
        shape: of the array.
        start: first byte, from the beginning of the file.
        stop: byte after the last.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


class Span(NamedTuple):
    """Rows of one array that are about to change.

    Attributes:
        name: the array.
        starts: (K,) int64, the first byte of each row within the array.
        rows: (K, ...) what each row will be.
    """

    name: str
    starts: npt.NDArray[np.int64]
    rows: npt.NDArray[Any]


def write_file(path: PathLike, arrays: Arrays, plain: dict[str, Any]) -> None:
    """Arrays and plain (JSON) values to one file, which replaces an existing one once it is complete."""
    header, entries = _plan({name: (array.dtype, array.shape) for name, array in arrays.items()}, plain, checked=True)
    with _replacing(path) as file:
        checksum = zlib.crc32(header)
        file.write(header)
        for name in list(entries)[:-1]:
            content = _bytes(arrays[name]).data
            checksum = zlib.crc32(content, checksum)
            file.write(content)
        file.write(checksum.to_bytes(4, "little"))


def read_file(path: PathLike) -> tuple[Arrays, dict[str, Any]]:
    """A copy of what `write_file` wrote, or of what a `MappedFile` holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a damaged one.
    """
    with open(path, "rb") as file, naming(path):
        entries, plain = _parse(file)
        file.seek(0)
        content = np.fromfile(file, dtype=np.uint8)
        if "checksum" in entries:
            entry = entries.pop("checksum")
            if zlib.crc32(content[: entry.start].data) != int.from_bytes(content[entry.start :].tobytes(), "little"):
                raise ValueError("its checksum does not fit")
        else:
            _replay(content, entries)
        return {name: _array(content, entry).copy() for name, entry in entries.items()}, plain


class MappedFile:
    """Arrays that live in a file and survive the process.

    `record` writes what is about to change into the file's journal, `settle` says that the change is done. The process
    may be killed at any moment in between: whoever opens the file next repeats what was recorded.

    Args:
        path: a file made by `MappedFile.create`. Opening it changes nothing; call `lock` before the first change.

    Attributes:
        arrays: by name, on the file's own pages.
        plain: the plain values.
        capacity: how many bytes `record` takes at once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a truncated one.
    """

    def __init__(self, path: PathLike) -> None:
        self._file = open(path, "r+b")  # noqa: SIM115 (stays open: it holds the lock)
        weakref.finalize(self, self._file.close)
        with naming(path):
            self._entries, self.plain = _parse(self._file)
            if not {"journal", "recorded"} <= set(self._entries):
                raise ValueError("it was written by save(); read it with AttentionAccumulator.load")
            self._content = np.frombuffer(mmap.mmap(self._file.fileno(), 0), dtype=np.uint8)
            self.arrays = {name: _array(self._content, entry) for name, entry in self._entries.items()}
            self._journal, self._recorded = self.arrays.pop("journal"), self.arrays.pop("recorded")
            kinds = (self._journal.dtype, self._journal.ndim, self._recorded.dtype, self._recorded.shape)
            if kinds != (np.dtype(np.uint8), 1, np.dtype(np.int64), (1,)):
                raise ValueError("its journal is damaged")
        self.capacity = len(self._journal)

    @staticmethod
    def create(path: PathLike, shapes: Shapes, fixed: Arrays, plain: dict[str, Any], largest_change: int) -> None:
        """Make a file of zeros with some arrays filled in; its disk space is reserved.

        Args:
            path: where.
            shapes: (dtype, shape) of each array that will change.
            fixed: the arrays that will not.
            plain: plain (JSON) values.
            largest_change: the most bytes that must change together.

        Raises:
            FileExistsError: there is a file already.
            OSError: the disk is full, the folder is missing.
        """
        shapes = {**shapes, **{name: (array.dtype, array.shape) for name, array in fixed.items()}}
        shapes["recorded"] = (np.dtype(np.int64), (1,))
        shapes["journal"] = (np.dtype(np.uint8), (max(JOURNAL_BYTES, 2 * largest_change),))
        header, entries = _plan(shapes, plain, checked=False)
        with _replacing(path, new=True) as file:
            size = max(entry.stop for entry in entries.values())
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told now; met later it ends the process
            else:
                file.truncate(size)
            file.write(header)
            for name, array in fixed.items():
                file.seek(entries[name].start)
                file.write(_bytes(array).data)

    def lock(self, largest_change: int) -> None:
        """Keep other processes out until this one ends, and repeat what one that was killed had recorded.

        Args:
            largest_change: as it was for `create`.

        Raises:
            BlockingIOError: another process has locked the file.
            ValueError: its journal is damaged, or too short for the largest change.
        """
        self._claim()
        with naming(self._file.name):
            if self.capacity < 2 * largest_change:
                raise ValueError("its journal is too short")
            _replay(self._content, self._entries)
        self.settle()

    def _claim(self) -> None:
        if fcntl is not None:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BlockingIOError(
                    f"{self._file.name} is in use by another process; give every process a path of its own"
                ) from error

    def record(self, spans: Sequence[Span]) -> None:
        """Keep a copy of changes that are about to be made, `capacity` bytes at most.

        Raises:
            BlockingIOError: the file is in use by another process; it stays as it is.
        """
        self._claim()  # again, for the system unlocks a file once its process closes it anywhere, as after a `load`
        stop = 0
        for name, starts, rows in spans:
            values = _bytes(rows).reshape(len(starts), -1)
            places = np.concatenate([[len(starts), values.shape[1]], self._entries[name].start + starts])
            for part in (_bytes(places), values.reshape(-1)):
                self._journal[stop : stop + len(part)] = part
                stop += len(part)
        self._recorded[0] = stop  # from here on the changes are sure to happen

    def settle(self) -> None:
        """The changes have been made."""
        self._recorded[0] = 0

    def is_at(self, path: PathLike) -> bool:
        """Whether a path leads to this file."""
        return os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(self._file.fileno()))


def _replay(content: npt.NDArray[np.uint8], entries: dict[str, Entry]) -> None:
    """Make the changes that a file's journal holds; making them twice does no harm. A damaged one changes nothing."""
    journal, end = _array(content, entries["journal"]), int(_array(content, entries["recorded"])[0])
    damaged = ValueError("its journal is damaged")
    if not 0 <= end <= len(journal):
        raise damaged
    first, changes, at = min(entry.start for entry in entries.values()), [], 0
    while at < end:
        count, length = journal[at : at + 16].view(np.int64).tolist()
        middle, stop = at + 16 + 8 * count, at + 16 + (8 + length) * count
        if min(count, length) < 1 or stop > end:
            raise damaged
        places, values = journal[at + 16 : middle].view(np.int64), journal[middle:stop].reshape(count, length)
        if places.min() < first or places.max() > len(content) - length:
            raise damaged
        changes.append((places.tolist(), values))
        at = stop
    for places, values in changes:
        for place, value in zip(places, values, strict=True):
            content[place : place + len(value)] = value


def _plan(shapes: Shapes, plain: dict[str, Any], *, checked: bool) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file, and where everything will lie: wide numbers first, so that all of them are aligned."""
    order = sorted(shapes, key=lambda name: -shapes[name][0].itemsize)
    shapes = {name: shapes[name] for name in order}
    if checked:
        shapes["checksum"] = (np.dtype(np.uint8), (4,))
    stop, spans = 0, {}
    for name, (dtype, shape) in shapes.items():
        spans[name] = (stop, stop + dtype.itemsize * math.prod(shape))
        stop = spans[name][1]
    header: dict[str, Any] = {
        name: {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": list(spans[name])}
        for name, (dtype, shape) in shapes.items()
    }
    header["__metadata__"] = {"oaa_lib": json.dumps(plain)}  # safetensors allows text only
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    begin = 8 + len(text)
    entries = {n: Entry(*shapes[n], begin + first, begin + last) for n, (first, last) in spans.items()}
    return len(text).to_bytes(8, "little") + text, entries


def _parse(file: BinaryIO) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Where the arrays of an open file lie, and its plain values; everything it claims is checked."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(LONGEST_HEADER, size - 8):
        raise ValueError("it has no header")
    header = json.loads(file.read(length))
    plain = json.loads(header.pop("__metadata__")["oaa_lib"])
    entries, stop = {}, 8 + length
    for name, entry in header.items():
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(int(side) for side in entry["shape"])
        start, stop = stop, stop + dtype.itemsize * math.prod(shape)
        if min(shape, default=0) < 0 or entry["data_offsets"] != [start - 8 - length, stop - 8 - length]:
            raise ValueError(f"the place of {name!r} does not fit its shape")
        entries[name] = Entry(dtype, shape, start, stop)
    if stop != size:
        raise ValueError(f"it has {size} bytes instead of {stop}")
    return entries, plain


def _array(content: npt.NDArray[np.uint8], entry: Entry) -> npt.NDArray[Any]:
    return content[entry.start : entry.stop].view(entry.dtype).reshape(entry.shape)


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@contextlib.contextmanager
def _replacing(path: PathLike, *, new: bool = False) -> Iterator[BinaryIO]:
    """A file beside ``path`` that takes its place once it is complete and on the disk; or, if it must be new, fails."""
    target = Path(path)
    if new and os.path.lexists(target):
        raise _exists(target)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            _link(partial, target)
        else:
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _link(partial: Path, target: Path) -> None:
    """Give a file its name, unless another process has made one of that name meanwhile."""
    try:
        os.link(partial, target)
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError:  # a file system without links, where that process goes unnoticed
        os.replace(partial, target)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists; pass resume=True to go on with it, or take another path")


@contextlib.contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Whatever a foreign or damaged file leads to becomes a ValueError that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} is no accumulator file, or it is damaged: {error}") from error
