"""The file of a mapped store: made, and read whole; what a process that was killed had noted in it is repeated."""

import os
from typing import Any

import numpy as np

from oaa_lib.maps import files, state
from oaa_lib.maps.files import Arrays, Bytes, Entry, Shapes, array_at, as_bytes, blaming
from oaa_lib.maps.journal import replay, unsealed
from oaa_lib.maps.locking import PathLike, open_regular
from oaa_lib.maps.replacing import replacing
from oaa_lib.maps.seals import Seals, columns, of_owners


def create(path: PathLike, shapes: Shapes, plain: dict[str, Any], owners: Arrays, journal: int) -> None:
    """Make a file of zeros with the owners filled in; its disk space is reserved.

    Args:
        path: where.
        shapes: of what is kept.
        plain: what else the file says.
        owners: whose it is.
        journal: bytes of the journal.
    """
    pairs = len(owners["classes"])
    fixed = {**owners, "sealed": np.array([of_owners(owners, plain), 0])}
    shapes = {**shapes, **{name: (array.dtype, array.shape) for name, array in fixed.items()}}
    shapes["recorded"] = (np.dtype(np.int64), (1,))
    shapes["seals"] = (np.dtype(np.int64), (pairs, columns(shapes)))
    shapes["journal"] = (np.dtype(np.uint8), (journal,))
    header, entries = files.plan(shapes, plain, checked=False)
    with replacing(path, new=True) as file:
        size = max(entry.stop for entry in entries.values())
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # met later, a full disk would end the process
        else:
            file.truncate(size)
        file.write(header)
        for name, array in fixed.items():
            file.seek(entries[name].start)
            file.write(as_bytes(array).data)


def read(path: PathLike) -> dict[str, Any]:
    """A copy of the state in a file, whether `files.write_file` wrote it or it is a `MappedStore`'s.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a damaged one.
    """
    with open_regular(path, "rb") as file, blaming(path):
        entries, plain = files.parse(file)
        file.seek(0)
        content = np.fromfile(file, dtype=np.uint8)
        if "checksum" in entries:
            files.verify(content, entries.pop("checksum"))
        else:
            repeat(content, entries)
        arrays = {name: array_at(content, entry) for name, entry in entries.items()}
        if "seals" in arrays:
            Seals(state.read(state.from_file(arrays, plain)).layout, arrays, plain).check()
        return state.from_file({name: array.copy() for name, array in arrays.items()}, plain)


def repeat(content: Bytes, entries: dict[str, Entry]) -> None:
    """Make the changes that a killed process had noted."""
    journal, end = array_at(content, entries["journal"]), int(array_at(content, entries["recorded"])[0])
    if "seals" in entries:
        end = unsealed(journal, end)
    replay(content, journal, end, min(entry.start for entry in entries.values()))
