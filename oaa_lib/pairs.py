"""Who owns a map: the (image, target class) pairs of a data set, numbered in reading order."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

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
    """The target classes of every image, in compressed rows: 4 bytes a pair and 8 an image.

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
        self.classes = np.ascontiguousarray(classes, dtype=np.int32)
        self.num_classes = num_classes
        self.keys = None if keys is None else list(keys)
        self._position_of = None if keys is None else {key: i for i, key in enumerate(keys)}
        if self.keys is not None and len(self.keys) != self.num_images:
            raise ValueError(f"expected one key for each of the {self.num_images} images, got {len(self.keys)}")
        if self._position_of is not None and len(self._position_of) < self.num_images:
            raise ValueError("expected every key once; the same name stands for two images")

    @classmethod
    def from_labels(cls, labels: Any, keys: Sequence[str] | None = None) -> "PairTable":
        """From (N, C) labels, each 0 or 1."""
        array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
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
        if isinstance(indices, Tensor):
            if indices.device.type != "cpu":
                raise ValueError(
                    f"expected indices on the host, got a tensor on {indices.device}; reading it would wait for the "
                    "device, so keep the loader's own CPU tensor"
                )
            indices = indices.numpy()
        if isinstance(indices, (str, bytes, int, np.integer)):
            raise TypeError(f"expected a sequence of indices, got {indices!r} alone; wrap it in a list")
        values = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
        if values.ndim != 1 or not len(values):
            raise ValueError(f"expected indices of shape (B,), B at least 1, got {values.shape}")
        if values.dtype.kind == "U":
            if self._position_of is None:
                raise ValueError("expected integer indices, got names; pass keys=[...] when building to use names")
            unknown = [key for key in values.tolist() if key not in self._position_of]
            if unknown:
                raise KeyError(f"unknown image name {unknown[0]!r}; expected one of the {self.num_images} keys")
            return np.array([self._position_of[key] for key in values.tolist()])
        if values.dtype.kind not in "iu":
            raise TypeError(f"expected integer indices or names, got {values.dtype}")
        if values.min() < 0 or values.max() >= self.num_images:
            wrong = values[(values < 0) | (values >= self.num_images)][0]
            raise IndexError(f"expected indices in 0..{self.num_images - 1}, got {wrong}")
        return values.astype(np.int64)

    def select(self, images: IntArray) -> PairSelection:
        """All pairs of these images, in order."""
        starts = self.offsets[images]
        counts = self.offsets[images + 1] - starts
        positions = np.repeat(np.arange(len(images)), counts)
        within = np.arange(len(positions)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = starts[positions] + within
        return PairSelection(rows, positions, self.classes[rows].astype(np.int64))

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
