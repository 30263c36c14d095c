"""Files of arrays and plain values, in the layout of safetensors, so that other programs can read them.

Eight bytes with the length of a JSON header, the header, the arrays one after the other. Nothing in a file is ever run.
This module knows nothing of what is stored.
"""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from oaa_lib.maps.locking import PathLike
from oaa_lib.maps.replacing import replacing

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Shapes: TypeAlias = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

DTYPES = {"I64": np.int64, "I32": np.int32, "F64": np.float64, "F32": np.float32, "F16": np.float16, "U8": np.uint8}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 1 << 20
FOREIGN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)  # what parsing may raise


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


def write_file(path: PathLike, arrays: Arrays, plain: dict[str, Any]) -> None:
    """Arrays and plain (JSON) values to one file, which replaces an existing one once it is complete."""
    header, entries = plan({name: (array.dtype, array.shape) for name, array in arrays.items()}, plain, checked=True)
    with replacing(path) as file:
        checksum = zlib.crc32(header)
        file.write(header)
        for name in list(entries)[:-1]:
            content = as_bytes(arrays[name]).data
            checksum = zlib.crc32(content, checksum)
            file.write(content)
        file.write(checksum.to_bytes(4, "little"))


def plan(shapes: Shapes, plain: dict[str, Any], *, checked: bool) -> tuple[bytes, dict[str, Entry]]:
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


def parse(file: BinaryIO) -> tuple[dict[str, Entry], dict[str, Any]]:
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


def verify(content: Bytes, checksum: Entry) -> None:
    """Compare the content of a whole file with the checksum that it ends with."""
    if zlib.crc32(content[: checksum.start].data) != int.from_bytes(content[checksum.start :].tobytes(), "little"):
        raise ValueError("its checksum does not fit")


def array_at(content: Bytes, entry: Entry) -> npt.NDArray[Any]:
    """An array on the content of a file."""
    return content[entry.start : entry.stop].view(entry.dtype).reshape(entry.shape)


def as_bytes(array: npt.NDArray[Any]) -> Bytes:
    """The bytes of an array, in its own memory if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@contextlib.contextmanager
def blaming(path: PathLike) -> Iterator[None]:
    """What the parsing of a foreign or damaged file raises becomes a ValueError that names it."""
    try:
        yield
    except FOREIGN as error:
        raise ValueError(f"{os.fspath(path)} is no accumulator file, or it is damaged: {error}") from error
