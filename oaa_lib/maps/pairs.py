"""Who owns a map: the (image, target class) pairs of a data set, numbered in reading order."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from oaa_lib.arguments import shown

IntArray: TypeAlias = npt.NDArray[np.integer[Any]]


class PairSelection(NamedTuple):
    """The pairs of a batch, all on the host and of one length K.

    Attributes:
        rows: which stored map.
        positions: which place in the batch.
        classes: which class.
    """

    rows: IntArray
    positions: IntArray
    classes: IntArray


class PairTable:
    """The target classes of every image, in compressed rows: 8 bytes a pair and 8 an image.

    Everything here is numpy on the host, so that looking a pair up never waits for an accelerator.

    Args:
        offsets: (N + 1,) the pairs of image i are ``offsets[i] .. offsets[i + 1]``.
        classes: (P,) class of each pair.
        num_classes: C.
        keys: N names, or None.
    """

    def __init__(
        self, offsets: IntArray, classes: IntArray, num_classes: int, keys: Sequence[str] | None = None
    ) -> None:
        self.offsets = np.ascontiguousarray(offsets, dtype=np.int64)
        self.classes = np.ascontiguousarray(classes, dtype=np.int64)
        self.num_classes = int(num_classes)  # not numpy's
        self.keys = None if keys is None else _checked_keys(keys, self.num_images)
        self._position_of = None if self.keys is None else {key: i for i, key in enumerate(self.keys)}

    @classmethod
    def from_labels(cls, labels: Any, keys: Sequence[str] | None = None) -> "PairTable":
        """From (N, C) labels, each 0 or 1."""
        try:
            array = to_numpy(labels)
        except (TypeError, RuntimeError) as error:  # a sparse tensor, one on the meta device
            raise TypeError(f"expected labels as numbers that can be read, got {shown(labels)}") from error
        except ValueError as error:
            raise ValueError(
                "expected labels of shape (N, C), got rows of different lengths; pass one column per class, 1 where "
                "the image shows it"
            ) from error
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"expected labels of shape (N, C), N and C at least 1, got {array.shape}")
        if array.dtype != np.bool_:
            if array.dtype.kind not in "iuf":
                raise TypeError(f"expected labels as bool, integer or float 0/1, got {array.dtype}")
            if not np.isin(array, (0, 1)).all():
                raise ValueError(
                    f"expected labels of 0 and 1 only, got values such as {array[~np.isin(array, (0, 1))][0]}; "
                    "pass one column per class, 1 where the image shows it"
                )
        images, classes = np.nonzero(array)
        if not len(images):
            raise ValueError("expected at least one target class, got labels that are all 0")
        counts = np.bincount(images, minlength=len(array))
        return cls(np.concatenate([[0], np.cumsum(counts)]), classes, array.shape[1], keys)

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.classes)

    def images(self) -> IntArray:
        """(P,) the image of each pair."""
        return np.repeat(np.arange(self.num_images), np.diff(self.offsets))

    def positions(self, indices: Iterable[int | str] | Tensor | npt.NDArray[Any]) -> IntArray:
        """(B,) checked row numbers of images given by number or by name."""
        given: Any = indices
        if isinstance(indices, Tensor):
            if indices.device.type != "cpu":
                raise ValueError(
                    f"expected indices on the host, got a tensor on {indices.device}; reading it would wait for the "
                    "device, so keep the loader's own CPU tensor"
                )
            if indices.is_floating_point() or indices.is_complex() or indices.layout != torch.strided:
                raise TypeError(f"expected integer indices or names, got {indices.dtype}, {indices.layout}")
            values = np.array(indices.tolist(), dtype=str(indices.dtype).removeprefix("torch."))
        elif isinstance(indices, (set, frozenset)):
            raise TypeError("expected a sequence of indices, got a set, which has no order; pass a list")
        elif isinstance(indices, (str, bytes)) or not isinstance(indices, Iterable):
            raise TypeError(f"expected a sequence of indices, got {shown(indices)} alone; wrap it in a list")
        else:
            try:
                given = indices if isinstance(indices, np.ndarray) else list(indices)
                values = np.asarray(given)
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError("expected indices of shape (B,), got rows of different lengths or tensors") from error
        if values.ndim != 1 or not len(values):
            raise ValueError(f"expected indices of shape (B,), B at least 1, got {values.shape}")
        if values.dtype.kind in "UO" and any(isinstance(name, str) for name in given):
            return self._named(list(given))  # not as numpy has them: "a" for "a\0", "2" for 2
        if values.dtype.kind not in "iu":
            raise TypeError(f"expected integer indices or names, got {values.dtype}")
        rows = values.tolist()
        if min(rows) < 0 or max(rows) >= self.num_images:
            wrong = next(row for row in rows if not 0 <= row < self.num_images)
            raise IndexError(f"expected indices in 0..{self.num_images - 1}, got {wrong}")
        return values.astype(np.int64)

    def _named(self, names: list[Any]) -> IntArray:
        if self._position_of is None:
            raise ValueError("expected integer indices, got names; pass keys=[...] when building to use names")
        for name in names:
            if not isinstance(name, str) or name not in self._position_of:
                raise KeyError(f"unknown image name: expected indices among {self.num_images} keys, got {shown(name)}")
        return np.array([self._position_of[name] for name in names])

    def select(self, images: IntArray) -> PairSelection:
        """All pairs of these images, in order."""
        starts = self.offsets[images]
        counts = self.offsets[images + 1] - starts
        before = counts.cumsum() - counts
        positions = np.arange(len(images)).repeat(counts)
        rows = np.arange(len(positions)) + (starts - before)[positions]
        return PairSelection(rows, positions, self.classes[rows])

    def difference(self, other: "PairTable") -> str | None:
        """What tells the other table from this one, in words; None if nothing does."""
        for name in ("num_images", "num_classes", "num_pairs"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"expected {name} = {ours}, got {theirs}"
        if not np.array_equal(self.offsets, other.offsets) or not np.array_equal(self.classes, other.classes):
            same = self.offsets[1:] == other.offsets[1:]
            first = int(np.argmin(same)) if not same.all() else int(self.images()[self.classes != other.classes][0])
            return f"expected the same labels, got others, first at image {first}"
        if self.keys != other.keys:
            return "expected the same keys in the same order, got others"
        return None


def to_numpy(values: Any) -> npt.NDArray[Any]:
    """Numbers as an array on the host; those of a tensor wherever it lives."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    if values.is_meta:
        raise TypeError("there are no numbers on the meta device")
    if is_in_torch_dispatch_mode():
        listed = np.asarray(values.tolist())  # as a mode such as FakeTensorMode gives the numbers of a real tensor
        return listed.reshape(values.shape)
    values = values.detach().cpu()
    return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)


def plain_text(text: str) -> str:
    """The same as Python's own ``str``: of a ``np.str_``, say, which ``torch.load`` refuses in a state."""
    return str.__str__(text)


def _checked_keys(keys: Sequence[str], num_images: int) -> list[str]:
    try:
        names = [] if isinstance(keys, (str, bytes, set, frozenset)) else list(keys)
    except TypeError:
        names = []
    if not names and not isinstance(keys, (list, tuple)):
        raise TypeError(f"expected keys as a list of names, got {shown(keys)}")
    if len(names) != num_images:
        raise ValueError(f"expected one key for each of the {num_images} images of labels, got {len(names)}")
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"expected keys of type str, got {type(name).__name__}; convert with str()")
        if name in seen:
            raise ValueError(f"expected every key once, got {name!r} for two images")
        seen.add(name)
    return [plain_text(name) for name in names]
