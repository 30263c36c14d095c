"""Files of an accumulator: written whole by `save`, or mapped into memory and grown in place.

Both have the layout of safetensors, so that other programs can read the maps: eight bytes with the length of a JSON
header, the header, the arrays one after the other. Nothing in a file is ever run.
"""

import contextlib
import json
import math
import mmap
import os
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
    with open(path, "rb") as file, _naming(path):
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
        with _naming(path):
            self._entries, self.plain = _parse(self._file)
            if not {"journal", "recorded"} <= set(self._entries):
                raise ValueError("it was written by save(); read it with AttentionAccumulator.load")
        self._content = np.frombuffer(mmap.mmap(self._file.fileno(), 0), dtype=np.uint8)
        self.arrays = {name: _array(self._content, entry) for name, entry in self._entries.items()}
        self._journal, self._recorded = self.arrays.pop("journal"), self.arrays.pop("recorded")
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
        if os.path.lexists(path):
            raise FileExistsError(f"{os.fspath(path)} exists; pass resume=True to go on with it, or take another path")
        shapes = {**shapes, **{name: (array.dtype, array.shape) for name, array in fixed.items()}}
        shapes["recorded"] = (np.dtype(np.int64), (1,))
        shapes["journal"] = (np.dtype(np.uint8), (max(JOURNAL_BYTES, 2 * largest_change),))
        header, entries = _plan(shapes, plain, checked=False)
        with _replacing(path) as file:
            size = max(entry.stop for entry in entries.values())
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told now; met later it ends the process
            else:
                file.truncate(size)
            file.write(header)
            for name, array in fixed.items():
                file.seek(entries[name].start)
                file.write(_bytes(array).data)

    def lock(self) -> None:
        """Keep other processes out until this one ends, and repeat what one that was killed had recorded.

        Raises:
            BlockingIOError: another process has locked the file.
        """
        if fcntl is not None:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BlockingIOError(
                    f"{self._file.name} is in use by another process; give every process a path of its own"
                ) from error
        with _naming(self._file.name):
            _replay(self._content, self._entries)
        self.settle()

    def record(self, spans: Sequence[Span]) -> None:
        """Keep a copy of changes that are about to be made, `capacity` bytes at most."""
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


def _replay(content: npt.NDArray[np.uint8], entries: dict[str, Entry]) -> None:
    """Make the changes that a file's journal holds; making them twice does no harm."""
    journal, end = _array(content, entries["journal"]), int(_array(content, entries["recorded"])[0])
    at = 0
    while at < end:
        count, length = journal[at : at + 16].view(np.int64).tolist()
        places = journal[at + 16 : at + 16 + 8 * count].view(np.int64)
        at += 16 + 8 * count
        values = journal[at : at + count * length].reshape(count, length)
        at += count * length
        if at > end or places.min() < 0 or places.max() + length > len(content):
            raise ValueError("its journal is damaged")
        for place, value in zip(places.tolist(), values, strict=True):
            content[place : place + length] = value


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
def _replacing(path: PathLike) -> Iterator[BinaryIO]:
    """A new file beside ``path`` that takes its place once it is complete and on the disk."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: PathLike) -> Iterator[None]:
    """Whatever a foreign or damaged file leads to becomes a ValueError that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} is no accumulator file, or it is damaged: {error}") from error
