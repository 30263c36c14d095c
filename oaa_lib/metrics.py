"""Mean intersection over union from global counts, as PASCAL VOC scores it."""

import torch
from torch import Tensor
from typing_extensions import Self

from oaa_lib.arguments import on_device, whole_number, whole_numbers


class ConfusionMatrix:
    """Pixel counts of (target, prediction) over a whole data set, and the IoU they give.

    Counts are global: IoU is taken once, of the sums over all images, never averaged over images.

    Args:
        num_classes: number of classes *including* background; labels are 0 .. num_classes - 1.
        ignore_index: target pixels with this value are not counted.
        device: where the counts live; inputs may be on any device.

    Attributes:
        counts: (num_classes, num_classes) int64, rows are targets, columns predictions.

    Raises:
        TypeError: a number that is no integer, or a device that is none.
        ValueError: no class, more than 32,768, or an ``ignore_index`` that is a label.

    Example:
        >>> import torch
        >>> matrix = ConfusionMatrix(2)
        >>> _ = matrix.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 255]]))
        >>> matrix.mean_iou()
        1.0

    Source: PASCAL VOC 2012 segmentation; paper, section 4.1.
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes = whole_number("num_classes", num_classes, 1, 2**15)
        self.ignore_index = whole_number("ignore_index", ignore_index, -(2**63), 2**63 - 1)
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"expected an ignore_index outside 0..{num_classes - 1}, got {ignore_index}")
        with torch.inference_mode(False):  # what is made in that mode could not be counted into outside of it
            self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=on_device(device))

    def update(self, prediction: Tensor, target: Tensor) -> Self:
        """Count one image or batch.

        Args:
            prediction: integer, any shape, values 0 .. num_classes - 1 wherever the target counts.
            target: integer, same shape, values 0 .. num_classes - 1 or ``ignore_index``.

        Returns:
            self.

        Raises:
            TypeError: an input is not an integer tensor.
            ValueError: shapes differ, or a value is no class; nothing is counted then.
        """
        for name, values in (("prediction", prediction), ("target", target)):
            whole_numbers(name, values, "; take the arg-max of scores first")
        if prediction.shape != target.shape:
            raise ValueError(
                f"expected prediction and target of one shape, got {tuple(prediction.shape)} and "
                f"{tuple(target.shape)}; resize the prediction (nearest) to the target"
            )
        target = target.to(self.counts.device, torch.int64).flatten()
        prediction = prediction.to(self.counts.device, torch.int64).flatten()
        valid = target != self.ignore_index
        target, prediction = target[valid], prediction[valid]
        for name, values in (("prediction", prediction), ("target", target)):
            wrong = values[(values < 0) | (values >= self.num_classes)]
            if len(wrong):
                advice = "background is 0 and class c is c + 1, so num_classes is C + 1"
                if wrong[0] == self.ignore_index:  # of a proxy label, which ignores pixels, too
                    advice = "score the pixels that are known, update(prediction[known], target[known])"
                raise ValueError(
                    f"expected {name} in 0..{self.num_classes - 1}"
                    + (f" or {self.ignore_index}" if name == "target" else "")
                    + f", got {wrong[0].item()}; {advice}"
                )
        cells = torch.bincount(target * self.num_classes + prediction, minlength=self.num_classes**2)
        self.counts += cells.view_as(self.counts)
        return self

    def iou(self) -> Tensor:
        """(num_classes,) float64 in [0, 1]; NaN for a class that neither target nor prediction contains."""
        hits = self.counts.diagonal().double()
        return hits / (self.counts.sum(0) + self.counts.sum(1) - hits)

    def precision(self) -> Tensor:
        """(num_classes,) float64 in [0, 1]: of what is predicted as a class, the share that is it; NaN if none is."""
        return self.counts.diagonal().double() / self.counts.sum(0)

    def recall(self) -> Tensor:
        """(num_classes,) float64 in [0, 1]: of a class, the share predicted as it; NaN if the targets have none."""
        return self.counts.diagonal().double() / self.counts.sum(1)

    def mean_iou(self) -> float:
        """Mean IoU in [0, 1] over the classes that occur in target or prediction; NaN before the first update."""
        return self.iou().nanmean().item()

    def merge(self, other: "ConfusionMatrix") -> Self:
        """Add the counts of another matrix.

        Raises:
            TypeError: ``other`` is no ConfusionMatrix.
            ValueError: the other has another number of classes or another ignore_index.
        """
        if not isinstance(other, ConfusionMatrix):
            raise TypeError(f"expected other as a ConfusionMatrix, got {type(other).__name__}")
        ours, theirs = (self.num_classes, self.ignore_index), (other.num_classes, other.ignore_index)
        if ours != theirs:
            raise ValueError(f"expected a matrix with (num_classes, ignore_index) = {ours}, got {theirs}")
        self.counts += other.counts.to(self.counts.device)
        return self

    def reset(self) -> Self:
        """Forget all counts."""
        self.counts.zero_()
        return self
