"""The checksums of a mapped file, by which damage is noticed: bits that flipped, blocks of a disk that went astray.

Each pair has one for each of its maps (CRC-32) and one for its numbers; owners and totals have one each. They are
written with what they are of, through the journal, which has one, too. Of zeros they are 0.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from oaa_lib.maps.files import Arrays, Bytes, as_bytes
from oaa_lib.maps.layout import MapLayout
from oaa_lib.maps.pairs import IntArray

Numbers: TypeAlias = npt.NDArray[np.int64]

MAPS = ("maps", "missed")
NUMBERS = {"counts": np.int64(0x1E3779B97F4A7C15), "synchronized": np.int64(0x42B2AE3D27D4EB4F)}  # odd, and far apart
TOTALS = ("offered", "skipped", "totals_then")
OWNERS = ("classes", "keys", "map_size", "offsets")
BLOCK = 1 << 20  # pixels that are compared at a time
ONES = 0xFFFFFFFF


def crc(values: Bytes) -> int:
    """CRC-32, begun with 0 so that it is 0 of zeros."""
    return zlib.crc32(values.data, ONES) ^ ONES


def columns(names: Mapping[str, Any]) -> int:
    """How many checksums each pair has that keeps these."""
    return 1 + sum(name in names for name in MAPS)


def of_owners(arrays: Arrays, plain: Mapping[str, Any]) -> int:
    """The checksum of who owns the maps of a file, and of its plain values."""
    text = np.frombuffer(json.dumps(plain, sort_keys=True).encode(), dtype=np.uint8)
    return crc(np.concatenate([text, *(as_bytes(arrays[name]) for name in OWNERS if name in arrays)]))


class Seals:
    """The checksums of a file, and what they are of.

    Args:
        layout: whose maps.
        arrays: of the file, by name: ``"seals"`` (P, columns) and ``"sealed"``, one of the owners and one of the
            totals, and all that they are of.
        plain: its plain values.

    Raises:
        ValueError: there are none, or of another shape.
    """

    def __init__(self, layout: MapLayout, arrays: Arrays, plain: Mapping[str, Any]) -> None:
        self._layout, self._arrays, self._plain = layout, arrays, plain
        self._maps = [name for name in MAPS if name in arrays]
        self.of_pairs, self.of_all = arrays["seals"], arrays["sealed"]
        expected = (layout.pairs.num_pairs, len(self._maps) + 1), (2,)
        if (self.of_pairs.shape, self.of_all.shape) != expected or self.of_pairs.dtype != np.int64:
            raise ValueError("its checksums are damaged")
        self.owners = of_owners(arrays, plain)

    def rows(self, numbers: IntArray, values: Arrays) -> Numbers:
        """(K, columns) checksums of pairs, some values of which change."""
        seals = self.of_pairs[numbers]
        for column, name in enumerate(self._maps):
            if name in values:
                seals[:, column] = _crcs(values[name])
        if not values.keys().isdisjoint(NUMBERS):
            seals[:, -1] = self._mixed({n: values[n] if n in values else self._arrays[n][numbers] for n in NUMBERS})
        return seals

    def totals(self, changed: Arrays) -> int:
        """The checksum of the totals, some of which change."""
        return crc(np.concatenate([as_bytes(changed.get(name, self._arrays[name])) for name in TOTALS]))

    def check(self) -> None:
        """Compare everything with its checksum.

        Raises:
            ValueError: some do not fit.
        """
        if self.of_all.tolist() != [of_owners(self._arrays, self._plain), self.totals({})]:
            raise ValueError("its labels or totals do not fit their checksums")
        wrong = self.of_pairs[:, -1] != self._mixed({name: self._arrays[name] for name in NUMBERS})
        for rows, size in self._layout.blocks(BLOCK):
            first, stop = int(rows[0]), int(rows[-1]) + 1
            for column, name in enumerate(self._maps):
                pixels, starts = self._arrays[name], self._layout.starts
                maps = pixels[first:stop] if starts is None else pixels[starts[first] : starts[stop]]
                crcs = _crcs(maps.reshape(stop - first, *size))
                wrong[first:stop] |= crcs != self.of_pairs[first:stop, column]
        if wrong.any():
            row = int(np.argmax(wrong))
            image = int(np.searchsorted(self._layout.pairs.offsets, row, "right")) - 1
            raise ValueError(
                f"{wrong.sum()} of its {len(wrong)} maps do not fit their checksums, first the one of image {image}, "
                f"class {self._layout.pairs.classes[row]}"
            )

    def _mixed(self, numbers: Arrays) -> Numbers:
        counts, synchronized = (numbers[name].astype(np.int64) * factor for name, factor in NUMBERS.items())
        mixed: Numbers = counts + synchronized
        return mixed


def _crcs(maps: Any) -> Numbers:
    flat, count = as_bytes(maps).data, len(maps)
    size = len(flat) // max(count, 1)
    starts = range(0, len(flat), size or 1)
    return np.fromiter((zlib.crc32(flat[at : at + size], ONES) for at in starts), np.int64, count) ^ ONES
