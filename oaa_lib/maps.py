"""The stored maps of all pairs: how large they are, how they are coded, where they lie."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from oaa_lib.pairs import IntArray, PairTable
from oaa_lib.storage import Arrays, MappedFile, Span

PER_PIXEL = ("maps", "missed", "latest")  # the tensors with a value per pixel of a pair's map; the others: one per pair


def decode(stored: Tensor) -> Tensor:
    """Stored maps to float32 in [0, 1]."""
    return stored / 255 if stored.dtype == torch.uint8 else stored.float()


def encode(attention: Tensor, dtype: torch.dtype) -> Tensor:
    """Float maps in [0, 1] to storage; 8 bits are rounded to the nearest step of 1/255."""
    if dtype != torch.uint8:
        return attention.to(dtype)
    return (attention * 255).round_().to(torch.int16).to(dtype)  # by way of 16 bits it is twice as fast on the CPU


def is_plain(tensor: Tensor) -> bool:
    """Whether this is a real tensor on the host: looking at it waits for nothing, and numpy is fast with its rows."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not is_in_torch_dispatch_mode()


def times_seen(counts: Tensor, missed: Tensor | None) -> Tensor:
    """How many maps have shown each pixel, from counts (K,): (K, H, W) less missed (K, H, W), or (K, 1, 1)."""
    times = counts[:, None, None]
    return times if missed is None else times - missed


class MapLayout:
    """The size of every map: one for all, or one for each image.

    Args:
        pairs: who owns the maps.
        map_size: (H, W), or N of them.
        states: maps that the fusion keeps for each pair.

    Attributes:
        size: (H, W), or None if images have sizes of their own.
        sizes: (N, 2) int64, or None.
        starts: (P + 1,) int64, the first pixel of each pair's map where all maps lie one after the other; or None.

    Raises:
        TypeError: not integers.
        ValueError: another shape, or a side below 1.
    """

    def __init__(self, pairs: PairTable, map_size: Any, states: int = 1) -> None:
        sizes = _integers(map_size)
        if sizes is None:
            raise TypeError(f"expected map_size as two integers (H, W), or as two for each image, got {map_size!r}")
        if sizes.shape not in ((2,), (pairs.num_images, 2)) or sizes.min() < 1:
            found = sizes.tolist() if sizes.size < 9 else f"shape {sizes.shape}, smallest side {sizes.min()}"
            raise ValueError(
                f"expected map_size (H, W) of at least (1, 1), or one for each of the {pairs.num_images} images, got "
                f"{tuple(found) if sizes.ndim == 1 else found}"
            )
        self.num_pairs = pairs.num_pairs
        self.states = states
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

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of `PER_PIXEL`: (P, H, W), (P, S, H, W), or flat."""
        states = self.states if name == "maps" else 1
        if self.size is not None:
            return (self.num_pairs, *((states,) if states > 1 else ()), *self.size)
        assert self.starts is not None
        return (int(self.starts[-1]) * states,)

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
        """Pairs by the size of their maps, from the image of each: a size, and the places of the pairs that have it."""
        if self.size is not None:
            return [(self.size, slice(None))]
        assert self.sizes is not None
        sizes, member_of = np.unique(self.sizes[images], axis=0, return_inverse=True)
        member_of = member_of.reshape(-1)
        return [((height, width), np.flatnonzero(member_of == i)) for i, (height, width) in enumerate(sizes.tolist())]

    def blocks(self, pairs: PairTable, pixels: int) -> Iterator[tuple[IntArray, tuple[int, int]]]:
        """All rows in order, in blocks of one map size and about so many pixels."""
        if self.size is not None:
            step = max(1, pixels // math.prod(self.size))
            for start in range(0, self.num_pairs, step):
                yield np.arange(start, min(start + step, self.num_pairs)), self.size
        else:
            assert self.sizes is not None
            for image in np.flatnonzero(np.diff(pairs.offsets)).tolist():
                height, width = self.sizes[image].tolist()
                yield np.arange(pairs.offsets[image], pairs.offsets[image + 1]), (height, width)

    def largest_change(self, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
        """The most bytes that the change of one pair can take, and room for the totals."""
        pixels = int(np.prod(self.map_size, axis=-1).max())
        row = sum(pixels * self.states * shapes[name][0].itemsize for name in PER_PIXEL if name in shapes)
        return row + 32 * shapes["offered"][1][0] + 1024

    def difference(self, other: "MapLayout") -> str | None:
        """What tells the other layout from this one, in words; None if nothing does."""
        if np.array_equal(self.map_size, other.map_size):
            return None
        words = [str(layout.size or "one for each image") for layout in (self, other)]
        return f"expected map_size {words[0]}, got {words[1] if words[0] != words[1] else 'other sizes'}"


class Rows(NamedTuple):
    """Rows of a `PairStore`: as int64 numpy on the host and as an int64 tensor on the device of the maps."""

    host: IntArray
    device: Tensor


class Change(NamedTuple):
    """New values of some rows whose maps have one size."""

    rows: Rows
    size: tuple[int, int]
    values: dict[str, Tensor]


class PairStore:
    """What the pairs own, one tensor for each kind of value, read and written by rows; in memory or in a file.

    Args:
        layout: the size of every map.
        tensors: by name. Those of `PER_PIXEL` have the layout's shape, totals are (C,), the others (P,).
        hosts: numbers that the host keeps.
        file: where all of it lies, if not in memory.
    """

    def __init__(
        self, layout: MapLayout, tensors: dict[str, Tensor], hosts: Arrays, file: MappedFile | None = None
    ) -> None:
        self.layout = layout
        self.tensors = tensors
        self.hosts = hosts
        self.file = file

    def read(self, name: str, rows: Rows, size: tuple[int, int]) -> Tensor:
        """A copy of (K,) values, or of (K, H, W) or (K, S, H, W) maps of one size."""
        tensor = self.tensors[name]
        if name not in PER_PIXEL or self.layout.starts is None:
            return torch.from_numpy(tensor.numpy()[rows.host]) if is_plain(tensor) else tensor[rows.device]
        maps = [self._slice(name, row, size) for row in rows.host.tolist()]
        return torch.stack(maps) if maps else tensor.new_zeros((0, *size))

    def write(self, changes: Sequence[Change], totals: dict[str, Tensor], hosts: Arrays) -> None:
        """Replace values. In a file, a change whose process is killed half way is finished when it is opened again."""
        if self.file is None:
            self._apply(changes, totals, hosts)
            return
        whole = {**{name: total.numpy() for name, total in totals.items()}, **hosts}
        reserve = sum(values.nbytes for values in whole.values()) + 64 * (len(self.tensors) + len(self.hosts))
        parts = self._parts(changes, self.file.capacity - reserve)
        for part in parts:
            last = part is parts[-1]
            spans = [Span(name, np.zeros(1, dtype=np.int64), values[None]) for name, values in whole.items() if last]
            self.file.record([*self._spans(part), *spans])
            self._apply(part, totals if last else {}, hosts if last else {})
            self.file.settle()

    def _apply(self, changes: Sequence[Change], totals: dict[str, Tensor], hosts: Arrays) -> None:
        for rows, size, values in changes:
            for name, value in values.items():
                if name in PER_PIXEL and self.layout.starts is not None:
                    for row, pixels in zip(rows.host.tolist(), value, strict=True):
                        self._slice(name, row, size).copy_(pixels)
                elif is_plain(self.tensors[name]):
                    self.tensors[name].numpy()[rows.host] = value.numpy()
                else:
                    self.tensors[name].index_copy_(0, rows.device, value)
        for name, total in totals.items():
            self.tensors[name].copy_(total)
        for name, numbers in hosts.items():
            self.hosts[name][:] = numbers

    def _slice(self, name: str, row: int, size: tuple[int, int]) -> Tensor:
        """The map of one row where every image has a size of its own."""
        assert self.layout.starts is not None
        states = self.layout.states if name == "maps" else 1
        shape = (states, *size) if states > 1 else size
        start = int(self.layout.starts[row]) * states
        return self.tensors[name][start : start + math.prod(shape)].view(shape)

    def _parts(self, changes: Sequence[Change], capacity: int) -> list[list[Change]]:
        """Changes in parts that fit the journal; what belongs to one pair stays together."""
        parts: list[list[Change]] = [[]]
        left = capacity
        for rows, size, values in changes:
            row_bytes = sum(value.shape[1:].numel() * value.element_size() + 8 for value in values.values())
            start = 0
            while start < len(rows.host):
                if left < row_bytes:
                    parts.append([])
                    left = capacity
                chosen = slice(start, start + left // row_bytes)
                piece = Rows(rows.host[chosen], rows.device[chosen])
                parts[-1].append(Change(piece, size, {name: value[chosen] for name, value in values.items()}))
                left -= len(piece.host) * row_bytes + 16 * len(values)
                start += len(piece.host)
        return parts

    def _spans(self, changes: Sequence[Change]) -> Iterator[Span]:
        for rows, _, values in changes:
            for name, value in values.items():
                tensor = self.tensors[name]
                if name in PER_PIXEL and self.layout.starts is not None:
                    starts = self.layout.starts[rows.host] * (self.layout.states if name == "maps" else 1)
                else:
                    starts = rows.host * math.prod(tensor.shape[1:])
                yield Span(name, (starts * tensor.element_size()).astype(np.int64), value.numpy())


def _integers(values: Any) -> IntArray | None:
    """Integer numbers as int64, or None if these are none."""
    try:
        array = np.asarray(values.tolist() if isinstance(values, Tensor) else values)
    except ValueError:
        return None
    return array.astype(np.int64) if array.dtype.kind in "iu" and array.ndim else None
