"""What has happened so far, in numbers."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from oaa_lib.arguments import floats


class Statistics(NamedTuple):
    """What an accumulator has done so far, per class: (C,) int64 on the host.

    Attributes:
        offered: maps that `AttentionAccumulator.update` was given.
        accepted: of these, the ones that were fused.
        skipped: of these, the ones refused because they or their gating scores were not finite (on an accelerator also
            those outside of [0, 1], which are an error on the CPU).
        pairs: pairs of the data set.
        never_accumulated: of these, the ones that hold nothing.
    """

    offered: Tensor
    accepted: Tensor
    skipped: Tensor
    pairs: Tensor
    never_accumulated: Tensor

    @property
    def pass_rate(self) -> Tensor:
        """(C,) float32 in [0, 1]: share of the finite maps that the gate let pass; NaN for a class without any."""
        return self.accepted.float() / (self.offered - self.skipped)


def attention_similarity(before: Tensor, after: Tensor) -> Tensor:
    """How alike two attention maps of a pair are: near 1, attention has hardly changed from the one to the other.

    Take the latest map before and after an `AttentionAccumulator.update` from an accumulator with ``fusion="latest"``.
    Consecutive maps may be alike while attention drifts far over a whole training: compare with early maps too.

    Args:
        before: (..., H, W) floating point in [0, 1].
        after: the same of a later map.

    Returns:
        (...) float32 in [0, 1]: the cosine of the two maps; NaN where one of them is 0 everywhere.

    Raises:
        TypeError: not floating point tensors.
        ValueError: different shapes or devices, or maps without pixels.

    Example:
        >>> import torch
        >>> attention_similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]))
        tensor(0.6000)

    Source: not in the paper; it puts a number on how far attention wanders (section 1, Fig. 1).
    """
    floats("before", before)
    floats("after", after)
    if before.shape != after.shape or before.ndim < 2 or 0 in before.shape[-2:]:
        raise ValueError(
            "expected before and after of one shape (..., H, W), H and W at least 1, got "
            f"{tuple(before.shape)} and {tuple(after.shape)}"
        )
    if before.device != after.device:
        raise ValueError(f"expected before and after on one device, got {before.device} and {after.device}")
    first, second = (maps if maps.dtype == torch.float64 else maps.float() for maps in (before, after))
    first, second = ((maps / maps.amax((-2, -1), keepdim=True)).float() for maps in (first, second))  # 0 / 0 is NaN
    return F.cosine_similarity(first.flatten(-2), second.flatten(-2), dim=-1).clamp(max=1)  # a rounding may lead beyond
