"""The size of every stored map: one for all, or one for each image."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from oaa_lib.arguments import shown, whole_number
from oaa_lib.maps.pairs import IntArray, PairTable

LARGEST = 1 << 15  # pixels of a side: more is a mistake, and would overflow what counts them


class MapLayout:
    """The size of every map, and where it begins if all lie one after the other.

    Args:
        pairs: who owns the maps.
        map_size: (H, W), or N of them.

    Attributes:
        pairs: who owns the maps.
        size: (H, W), or None if images have sizes of their own.
        sizes: (N, 2) int64, or None.
        starts: (P + 1,) int64, the first pixel of each pair's map where all maps lie one after the other; or None.

    Raises:
        TypeError: not integers.
        ValueError: another shape, or a side below 1.
    """

    def __init__(self, pairs: PairTable, map_size: Any) -> None:
        sizes = _integers(map_size)
        if sizes is None:
            raise TypeError(
                f"expected map_size as two integers (H, W), or as two for each image, got {shown(map_size)}"
            )
        if sizes.shape not in ((2,), (pairs.num_images, 2)) or sizes.min() < 1:
            found = sizes.tolist() if sizes.size < 9 else f"shape {sizes.shape}, smallest side {sizes.min()}"
            raise ValueError(
                f"expected map_size (H, W) of at least (1, 1), or one for each of the {pairs.num_images} images, got "
                f"{tuple(found) if sizes.ndim == 1 else found}"
            )
        if sizes.max() > LARGEST:
            raise ValueError(f"expected map_size with sides of at most {LARGEST}, got {sizes.max()}")
        self.pairs = pairs
        self.size: tuple[int, int] | None = None
        self.sizes: IntArray | None = None
        self.starts: IntArray | None = None
        if sizes.ndim == 1:
            self.size = (int(sizes[0]), int(sizes[1]))
        else:
            self.sizes = sizes
            pixels = sizes.prod(1).repeat(np.diff(pairs.offsets))
            self.starts = np.concatenate([[0], np.cumsum(pixels)])

    @property
    def map_size(self) -> tuple[int, int] | IntArray:
        """(H, W), or (N, 2)."""
        if self.size is not None:
            return self.size
        assert self.sizes is not None
        return self.sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a tensor with a value for each pixel of each map: (P, H, W), or flat."""
        if self.size is not None:
            return (self.pairs.num_pairs, *self.size)
        assert self.starts is not None
        return (int(self.starts[-1]),)

    @property
    def largest_map(self) -> int:
        """Pixels of the largest map."""
        return int(np.prod(self.map_size, axis=-1).max())

    def size_of(self, images: IntArray) -> tuple[int, int]:
        """The one (H, W) of the maps of some images.

        Raises:
            ValueError: they have several.
        """
        if self.size is not None:
            return self.size
        assert self.sizes is not None
        height, width = self.sizes[images[0]].tolist()
        if (self.sizes[images] != (height, width)).any():
            raise ValueError(
                "expected a size: these images have maps of different sizes, "
                f"{self.sizes[images].tolist()}; call soft_labels(indices, size=(h, w))"
            )
        return height, width

    def group(self, images: IntArray) -> list[tuple[tuple[int, int], IntArray | slice]]:
        """Pairs by the size of their maps, from the image of each: a size, and which of the pairs have it."""
        if self.size is not None:
            return [(self.size, slice(None))]
        assert self.sizes is not None
        sizes, member_of = np.unique(self.sizes[images], axis=0, return_inverse=True)
        member_of = member_of.reshape(-1)
        return [((height, width), np.flatnonzero(member_of == i)) for i, (height, width) in enumerate(sizes.tolist())]

    def blocks(self, pixels: int) -> Iterator[tuple[IntArray, tuple[int, int]]]:
        """All rows in order, in blocks of one map size and about so many pixels."""
        offsets = self.pairs.offsets
        if self.size is not None:
            step = max(1, pixels // math.prod(self.size))
            for start in range(0, self.pairs.num_pairs, step):
                yield np.arange(start, min(start + step, self.pairs.num_pairs)), self.size
        else:
            assert self.sizes is not None
            for image in np.flatnonzero(np.diff(offsets)).tolist():
                height, width = self.sizes[image].tolist()
                yield np.arange(int(offsets[image]), int(offsets[image + 1])), (height, width)

    def groups(self, pixels: int) -> Iterator[list[tuple[IntArray, tuple[int, int]]]]:
        """All `blocks`, several together where they are small: about so many pixels in a group."""
        group: list[tuple[IntArray, tuple[int, int]]] = []
        left = pixels
        for rows, size in self.blocks(pixels):
            area = len(rows) * math.prod(size)
            if group and area > left:
                yield group
                group, left = [], pixels
            group.append((rows, size))
            left -= area
        yield group

    def difference(self, other: "MapLayout") -> str | None:
        """What tells the other layout and its owners from this one, in words; None if nothing does."""
        if (owners := self.pairs.difference(other.pairs)) is not None:
            return owners
        if np.array_equal(self.map_size, other.map_size):
            return None
        words = [str(layout.size or "one for each image") for layout in (self, other)]
        return f"expected map_size {words[0]}, got {words[1] if words[0] != words[1] else 'other sizes'}"


def checked_size(size: Any, name: str = "size", most: int = LARGEST) -> tuple[int, int]:
    """(h, w) that a user asks for.

    Raises:
        TypeError: no sequence, or one of something else than integers.
        ValueError: not two of them, or a side outside 1 .. ``most``.
    """
    if isinstance(size, (str, bytes)) or not isinstance(size, Sequence):
        raise TypeError(f"expected {name} as (height, width), got {shown(size)}")
    if len(size) != 2:
        raise ValueError(f"expected {name} as (height, width), got {shown(size)}")
    return whole_number(name, size[0], 1, most), whole_number(name, size[1], 1, most)


def _integers(values: Any) -> IntArray | None:
    """Integer numbers as int64, or None if these are none."""
    try:
        array = np.asarray(values.tolist() if isinstance(values, Tensor) else values)
    except (ValueError, TypeError, RuntimeError):
        return None
    return array.astype(np.int64) if array.dtype.kind in "iu" and array.ndim else None
