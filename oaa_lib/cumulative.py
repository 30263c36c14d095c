"""Reading cumulative attention: soft labels, attention, counts."""

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oaa_lib.fusion import Fuse, OwnFusion
from oaa_lib.gating import Gate, gate_name, resolve_gate
from oaa_lib.growing import resize
from oaa_lib.maps.coding import decode
from oaa_lib.maps.layout import checked_size
from oaa_lib.maps.locking import in_turn
from oaa_lib.maps.pairs import IntArray, PairTable
from oaa_lib.maps.store import Store, to_device
from oaa_lib.statistics import Statistics
from oaa_lib.strategies import Fusion
from oaa_lib.views import Views, check_views, flips_only, into_view, mirror, sample

Indices: TypeAlias = Iterable[int | str] | Tensor | npt.NDArray[Any]


class CumulativeAttention:
    """The cumulative attention maps of a data set, to be read. See `AttentionAccumulator`."""

    _gate: Gate | None
    _fusion: Fusion
    _store: Store

    @property
    def fusion(self) -> Fuse:
        """The fusion: a built-in one, or yours."""
        return self._fusion.own if isinstance(self._fusion, OwnFusion) else self._fusion

    @property
    def gate(self) -> Gate | None:
        """The gate, or None. Another one, or its name, may take its place at any time.

        Raises:
            TypeError, ValueError: as when the accumulator is built; the gate stays as it is.
        """
        return self._gate

    @gate.setter
    def gate(self, gate: str | Gate | None) -> None:
        self._gate = resolve_gate(gate)

    @property
    def pairs(self) -> PairTable:
        """Who owns the maps."""
        return self._store.layout.pairs

    @property
    def map_size(self) -> tuple[int, int] | IntArray:
        """(H, W) of every map, or (N, 2) int64 if every image has a size of its own."""
        return self._store.layout.map_size

    @property
    def device(self) -> torch.device:
        """Where the maps live."""
        return self._store.device

    @property
    def dtype(self) -> torch.dtype:
        """How the maps are stored."""
        return self._store.tensors["maps"].dtype

    # How much there is

    @property
    def accumulated(self) -> Tensor:
        """(N, C) bool on `device`: pairs that hold something."""
        return self.counts > 0

    @property
    def counts(self) -> Tensor:
        """(N, C) int32 on `device`: how many maps each pair has accepted; 0 for classes the image does not show."""
        counts = self._store.tensors["counts"]
        dense = counts.new_zeros(self.pairs.num_images, self.pairs.num_classes)
        images, classes = (to_device(self.device, each) for each in (self.pairs.images(), self.pairs.classes))
        return dense.index_put_((images, classes), counts)

    @property
    def skipped(self) -> int:
        """How many maps were refused because they or their gating scores were not finite. Waits for the device.

        On an accelerator also those outside of [0, 1] (attention with ``normalization=None``, or the result of a fusion
        of yours), which are an error on the CPU.
        """
        return int(self._store.tensors["skipped"].sum())

    @property
    def offered(self) -> int:
        """How many maps `update` has been offered."""
        return int(self._store.numbers["offered"].sum())

    @property
    def accepted(self) -> int:
        """How many maps were fused. Waits for the device."""
        return int(self._store.tensors["counts"].sum())

    @in_turn
    def statistics(self) -> Statistics:
        """What has happened so far, per class, on the host. Waits for the device, once.

        Example:
            >>> import torch
            >>> from oaa_lib import AttentionAccumulator
            >>> accumulator = AttentionAccumulator([[1, 0], [1, 1]], (7, 7), gate=None)
            >>> accumulator.update([1], torch.rand(1, 2, 7, 7)).statistics().never_accumulated
            tensor([1, 0])
        """
        counts, skipped = self._store.tensors["counts"], self._store.tensors["skipped"]
        classes = to_device(self.device, self.pairs.classes)
        accepted, empty = (
            torch.zeros_like(skipped).index_add_(0, classes, values.long()) for values in (counts, counts == 0)
        )
        accepted, skipped, empty = torch.stack([accepted, skipped, empty]).cpu()
        pairs = torch.from_numpy(np.bincount(self.pairs.classes, minlength=self.pairs.num_classes))
        return Statistics(torch.from_numpy(self._store.numbers["offered"].copy()), accepted, skipped, pairs, empty)

    def __len__(self) -> int:
        return self.pairs.num_images

    def __repr__(self) -> str:
        size = self.map_size if isinstance(self.map_size, tuple) else "one of every image"
        return (
            f"{type(self).__name__}({self.pairs.num_images} images, {self.pairs.num_classes} classes, "
            f"{self.pairs.num_pairs} pairs, map_size={size}, fusion={self._fusion.name!r}, "
            f"gate={gate_name(self.gate)!r}, dtype={self.dtype}, device={self.device})"
        )

    def __getitem__(self, indices: Indices) -> Tensor:
        """Soft labels of a batch of whole images, see `soft_labels`: (B, C, H, W) float32 in [0, 1] on `device`.

        Example:
            >>> from oaa_lib import AttentionAccumulator
            >>> AttentionAccumulator([[1, 0], [1, 1]], (7, 7))[[1, 0, 1]].shape
            torch.Size([3, 2, 7, 7])
        """
        return self.soft_labels(indices)

    def classes(self, index: int | str) -> Tensor:
        """(K,) int64 on the host: the classes of one image, in the order of `attention`."""
        return torch.from_numpy(self.pairs.select(self.pairs.positions([index])).classes)

    def attention(self, index: int | str) -> Tensor:
        """(K, H, W) float32 in [0, 1] on `device`: the cumulative attention of one image's classes."""
        images = self.pairs.positions([index])
        return self._maps(self.pairs.select(images).rows, self._store.layout.size_of(images))

    @torch.no_grad()
    def soft_labels(
        self, indices: Indices, views: Views | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Cumulative attention of a batch as its views show it, to train the integral model with augmentation.

        Args:
            indices: (B,) rows of ``labels``, or names if ``keys`` were given; on the host.
            views: one `View` for each image, see `AttentionAccumulator.update`. None: the whole images.
            size: (h, w) of the result, read bilinearly (``align_corners=False``). None: ``map_size``.

        Returns:
            (B, C, h, w) float32 in [0, 1] on `device`; 0 for classes an image does not show, and outside the image.

        Raises:
            ValueError: images with sizes of their own and no ``size``, views that do not fit the batch.
            IndexError, KeyError: an index or name the data set does not have.

        Example:
            >>> from oaa_lib import AttentionAccumulator, View
            >>> accumulator = AttentionAccumulator([[1, 0], [1, 1]], (7, 7))
            >>> accumulator.soft_labels([1], [View(0, 0, 0.5, 0.5)], size=(14, 14)).shape
            torch.Size([1, 2, 14, 14])

        Source: paper, section 3.3.
        """
        images = self.pairs.positions(indices)
        boxes = None if views is None else check_views(views, len(images))
        size = self._store.layout.size_of(images) if size is None else checked_size(size)
        pairs = self.pairs.select(images)
        dense = torch.zeros(len(images), self.pairs.num_classes, *size, dtype=torch.float32, device=self.device)
        if not len(pairs.rows):
            return dense  # nothing but negatives
        for stored_size, members in self._store.layout.group(images[pairs.positions]):
            positions, classes = pairs.positions[members], pairs.classes[members]
            maps = self._maps(pairs.rows[members], stored_size)
            if boxes is None or flips_only(boxes):
                maps = resize(maps if boxes is None else mirror(maps, boxes[positions]), size)
            else:
                maps = sample(maps, into_view(boxes[positions], size))[0].clamp(max=1)
            dense.index_put_((to_device(self.device, positions), to_device(self.device, classes)), maps)
        return dense

    @in_turn
    def _maps(self, rows: IntArray, size: tuple[int, int]) -> Tensor:
        """(K, H, W) float32 maps of one size."""
        return decode(self._store.read(["maps"], self._store.rows(rows), size)["maps"]).float()
