"""The quality of attention maps as cues, at every background threshold at once."""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from oaa_lib.arguments import FLOATS, number, on_device, whole_number, whole_numbers
from oaa_lib.metrics import ConfusionMatrix

LEVELS = 256  # thresholds are 0/255 .. 255/255: what 8-bit maps can tell apart
ROUNDING = 1e-4  # so far outside of [0, 1] attention is taken for 0 or 1


class ThresholdSweep:
    """Counts pixels so that a data set, seen once, can be scored at each of 256 background thresholds.

    A pixel shows the class of its strongest map, or background where that map stays below the threshold; the first of
    equal maps wins. Only counts are kept, so any number of images will do, and processes can count for themselves and
    `merge`. A score at the best threshold *of the same images* is an oracle's: choose it on others, see `two_fold`.

    Args:
        num_classes: C, without background.
        ignore_index: target pixels with this value are not counted.
        device: where the counts live; inputs may be on any device.

    Attributes:
        counts: (256, C + 1, C + 1) int64: strength of the winner in steps of 1/255, target, winner (class + 1).
        thresholds: (256,) float64, what the rows of every result belong to: 0, 1/255, .. 1.

    Raises:
        TypeError: a number that is no integer, or a device that is none.
        ValueError: no class, more than 2,048, or an ``ignore_index`` that is a label.

    Example:
        >>> import torch
        >>> sweep = ThresholdSweep(num_classes=2)
        >>> attention = torch.tensor([[[0.9, 0.6, 0.2]], [[0.1, 0.7, 0.0]]])
        >>> _ = sweep.update(attention, [0, 1], torch.tensor([[1, 2, 0]]))
        >>> sweep.at(0.3).mean_iou(), sweep.at(0.8).iou().tolist()
        (1.0, [0.5, 1.0, 0.0])

    Source: the field's measure of cues (PSA, IRN, SEAM); IoU as PASCAL VOC 2012.
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes = whole_number("num_classes", num_classes, 1, 2**11)
        self.ignore_index = whole_number("ignore_index", ignore_index, -(2**63), 2**63 - 1)
        if 0 <= ignore_index <= num_classes:
            raise ValueError(f"expected an ignore_index outside 0..{num_classes}, got {ignore_index}")
        width = self.num_classes + 1
        with torch.inference_mode(False):  # what is made in that mode could not be counted into outside of it
            self.counts = torch.zeros(LEVELS, width, width, dtype=torch.int64, device=on_device(device))
        self.thresholds = torch.arange(LEVELS, dtype=torch.float64, device="cpu") / (LEVELS - 1)

    def update(self, attention: Tensor, classes: Tensor | npt.ArrayLike, target: Tensor) -> Self:
        """Count one image.

        Args:
            attention: (K, H, W) in [0, 1] floating point (rounded to steps of 1/255; up to 1e-4 outside is clipped), or
                uint8; at the target's size.
            classes: (K,) integer, ids in 0 .. C - 1, whose maps these are, no id twice. K may be 0: all is background.
            target: (H, W) integer: 0 background, class c is c + 1, or ``ignore_index``.

        Returns:
            self.

        Raises:
            TypeError: attention that is neither floating point nor uint8, classes that are no integers (such as a 0/1
                row of bools), or a target that is not an integer tensor.
            ValueError: shapes, classes, attention or target out of range, or a class twice; nothing is counted then.
        """
        ids = self._class_ids(classes)
        levels = _levels(attention).to(self.counts.device)
        target = whole_numbers("target", target).to(self.counts.device, torch.int64)
        if levels.ndim != 3 or levels.shape[1:] != target.shape or ids.shape != levels.shape[:1]:
            raise ValueError(
                "expected attention (K, H, W), classes (K,) and target (H, W), got "
                f"{tuple(levels.shape)}, {tuple(ids.shape)} and {tuple(target.shape)}; resize the attention first"
            )
        width = self.num_classes + 1
        valid = target != self.ignore_index
        wrong = target[valid & ((target < 0) | (target >= width))]
        if len(wrong):
            found = wrong.min() if (wrong < 0).any() else f"up to {wrong.max()}"
            raise ValueError(f"expected target in 0..{width - 1} or {self.ignore_index}, got {found}")
        strength, winner = torch.zeros_like(target), torch.zeros_like(target)
        if len(ids):
            strength, which = levels.to(torch.int64).max(0)
            winner = ids[which] + 1
        cell = (strength[valid] * width + target[valid]) * width + winner[valid]
        self.counts.view(-1).index_add_(0, cell, torch.ones_like(cell))
        return self

    def _class_ids(self, classes: Any) -> Tensor:
        """(K,) int64 where the counts are."""
        try:
            ids = torch.as_tensor(classes, device=self.counts.device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"expected classes (K,) as integers, got {type(classes).__name__} ({error})") from None
        if ids.numel() and ids.dtype == torch.bool:
            raise TypeError("expected classes (K,) as integers, got torch.bool; pass ids, not a 0/1 row")
        ids = whole_numbers("classes (K,)", ids) if ids.numel() else ids
        known = ids.flatten().tolist()
        if any(not 0 <= c < self.num_classes for c in known):
            raise ValueError(f"expected classes in 0..{self.num_classes - 1}, without background, got {known}")
        if len(set(known)) < len(known):
            raise ValueError(f"expected classes without repetition, got {known}; pass ids, not a 0/1 row")
        return ids.to(torch.int64)

    def confusion(self) -> Tensor:
        """(256, C + 1, C + 1) int64: the confusion matrix (target, prediction) at each threshold."""
        kept = self.counts.flip(0).cumsum(0).flip(0)
        kept[:, :, 0] += (self.counts.sum(0) - kept).sum(-1)  # weaker winners are background
        return kept

    def at(self, threshold: float) -> ConfusionMatrix:
        """The confusion matrix at the first threshold of `thresholds` that is not below ``threshold``.

        Raises:
            TypeError: a threshold that is no number.
            ValueError: a threshold outside [0, 1].
        """
        level = int(torch.searchsorted(self.thresholds, number("threshold", threshold, 0, 1) - 1e-9))
        matrix = ConfusionMatrix(self.num_classes + 1, ignore_index=self.ignore_index, device=self.counts.device)
        matrix.counts += self.confusion()[level]
        return matrix

    def iou(self) -> Tensor:
        """(256, C + 1) float64 in [0, 1]; NaN for a class that neither target nor prediction contains."""
        confusion = self.confusion()
        hits = _hits(confusion)
        return hits / (confusion.sum(-1) + confusion.sum(-2) - hits)

    def precision(self) -> Tensor:
        """(256, C + 1) float64 in [0, 1]: of what is shown as a class, the share that is it; NaN if nothing is."""
        confusion = self.confusion()
        return _hits(confusion) / confusion.sum(-2)

    def recall(self) -> Tensor:
        """(256, C + 1) float64 in [0, 1]: of a class, the share that is shown as it; NaN if the targets have none."""
        confusion = self.confusion()
        return _hits(confusion) / confusion.sum(-1)

    def mean_iou(self) -> Tensor:
        """(256,) float64 in [0, 1], as `ConfusionMatrix.mean_iou` at each threshold."""
        return self.iou().nanmean(-1)

    def best_threshold(self) -> float:
        """The lowest threshold of the greatest mean IoU. For other images than these."""
        return float(self.thresholds[int(self.mean_iou().nan_to_num(-1).argmax())])

    def merge(self, other: "ThresholdSweep") -> Self:
        """Add the counts of another sweep.

        Raises:
            TypeError: ``other`` is no ThresholdSweep.
            ValueError: the other has another number of classes or another ignore_index.
        """
        if not isinstance(other, ThresholdSweep):
            raise TypeError(f"expected other as a ThresholdSweep, got {type(other).__name__}")
        ours, theirs = (self.num_classes, self.ignore_index), (other.num_classes, other.ignore_index)
        if ours != theirs:
            raise ValueError(f"expected a sweep with (num_classes, ignore_index) = {ours}, got {theirs}")
        self.counts += other.counts.to(self.counts.device)
        return self

    def reset(self) -> Self:
        """Forget all counts."""
        self.counts.zero_()
        return self


def two_fold(first: ThresholdSweep, second: ThresholdSweep) -> tuple[ConfusionMatrix, tuple[float, float]]:
    """Scores of two halves of a data set, each at the threshold that is best on the other: none sees its own answer.

    Args:
        first: of one half of the images.
        second: of the other.

    Returns:
        The confusion matrix of all images, and the thresholds that ``first`` and ``second`` were scored at.

    Raises:
        TypeError: a half that is no ThresholdSweep.
        ValueError: the halves have different classes.

    Example:
        >>> import torch
        >>> halves = ThresholdSweep(1), ThresholdSweep(1)
        >>> for half, strength in zip(halves, (0.4, 0.8)):
        ...     _ = half.update(torch.tensor([[[1.0, strength]]]), [0], torch.tensor([[1, 0]]))
        >>> matrix, thresholds = two_fold(*halves)
        >>> [round(threshold, 3) for threshold in thresholds], matrix.counts.tolist()
        ([0.804, 0.404], [[1, 1], [0, 2]])

    Source: the paper does not say how thresholds were chosen; choosing on the images that are scored flatters.
    """
    for name, half in (("first", first), ("second", second)):
        if not isinstance(half, ThresholdSweep):
            raise TypeError(f"expected {name} as a ThresholdSweep, got {type(half).__name__}")
    thresholds = second.best_threshold(), first.best_threshold()
    return first.at(thresholds[0]).merge(second.at(thresholds[1])), thresholds


def _levels(attention: Any) -> Tensor:
    """Attention in steps of 1/255."""
    readable = isinstance(attention, Tensor) and attention.layout == torch.strided and attention.device.type != "meta"
    if not readable or attention.dtype not in {*FLOATS, torch.uint8}:
        found = attention.dtype if readable else f"{type(attention).__name__}, sparse or on the meta device"
        found = found if isinstance(attention, Tensor) else type(attention).__name__
        raise TypeError(f"expected attention as a floating point or uint8 tensor, got {found}")
    values: Tensor = attention.detach()
    if values.dtype == torch.uint8:
        return values
    if not ((values >= -ROUNDING) & (values <= 1 + ROUNDING)).all():
        raise ValueError(
            f"expected attention in [0, 1], got [{values.min():.4g}, {values.max():.4g}]; "
            "call normalize_attention first"
        )
    if values.element_size() < 4:
        values = values.float()  # half precision would round twice
    return (values * (LEVELS - 1)).round().clamp(0, LEVELS - 1)


def _hits(confusion: Tensor) -> Tensor:
    return confusion.diagonal(dim1=-2, dim2=-1).double()
