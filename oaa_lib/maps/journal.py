"""What is about to change in a mapped file, written down before it does: a change that was cut short is repeated.

The journal is a part of the file. It holds spans one after the other, each as two numbers (how many rows, how many
bytes each), then the offset of each row in the file, then the rows. Making the same changes twice does no harm.
"""

import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oaa_lib.maps.files import Bytes, as_bytes

SEAL = 0x7FFFFFFF


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

    @property
    def room(self) -> int:
        """Bytes that it takes in a journal."""
        return 16 + 8 * len(self.starts) + self.rows.nbytes


def note(journal: Bytes, spans: Iterable[Span], begin: dict[str, int]) -> int:
    """Write spans into a journal, from where each array begins in the file; how many bytes they take."""
    stop = 0
    for name, starts, rows in spans:
        values = as_bytes(rows).reshape(len(starts), -1)
        offsets = np.concatenate([[len(starts), values.shape[1]], begin[name] + starts])
        for part in (as_bytes(offsets), values.reshape(-1)):
            journal[stop : stop + len(part)] = part
            stop += len(part)
    return stop


def seal(journal: Bytes, end: int) -> int:
    """So many bytes of a journal and their checksum, in one number, which is written at once: that they are valid."""
    return end | (zlib.crc32(journal[:end].data) & SEAL) << 32


def unsealed(journal: Bytes, number: int) -> int:
    """How many bytes of a journal are valid.

    Raises:
        ValueError: their checksum does not fit.
    """
    end = number & 0xFFFFFFFF
    if end > len(journal) or number != (seal(journal, end) if end else 0):
        raise ValueError("its journal is damaged")
    return end


def replay(content: Bytes, journal: Bytes, end: int, first: int) -> None:
    """Make the changes that a journal holds. A damaged one changes nothing.

    Args:
        content: of the whole file.
        journal: the part of it that holds the changes.
        end: how many bytes of that are valid.
        first: where the arrays begin; nothing before that may change.
    """
    damaged = ValueError("its journal is damaged")
    if not 0 <= end <= len(journal):
        raise damaged
    changes, at = [], 0
    while at < end:
        count, length = journal[at : at + 16].view(np.int64).tolist()
        middle, stop = at + 16 + 8 * count, at + 16 + (8 + length) * count
        if min(count, length) < 1 or stop > end:
            raise damaged
        offsets, values = journal[at + 16 : middle].view(np.int64), journal[middle:stop].reshape(count, length)
        if offsets.min() < first or offsets.max() > len(content) - length:
            raise damaged
        changes.append((offsets.tolist(), values))
        at = stop
    for offsets, values in changes:
        for offset, value in zip(offsets, values, strict=True):
            content[offset : offset + len(value)] = value
