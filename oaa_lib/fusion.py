"""How a new attention map joins the cumulative one: AF(M, A) of Eq. 3 and 4."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Fusion(Protocol):
    """An attention fusion strategy: any callable of this form, a plain function included.

    The accumulator initialises M_1 = A_1 by itself; what the fusion returns counts from the second map on. The result
    must lie in [0, 1] and have the shape of ``cumulative``. The arguments are copies, so it may work in place. It is
    called with whole batches, images that see their first map included. Two optional attributes refine it:

    - ``storage_dtype``: a ``torch.dtype`` that the fusion needs to stay exact, instead of the accumulator's ``dtype``.
    - ``merge(first, second, first_count, second_count)``: joins two cumulative maps that saw different streams.
      Without it, accumulators with this fusion refuse to be merged.

    Example:
        >>> from oaa_lib import AttentionAccumulator
        >>> def noisy_or(cumulative, attention, count):
        ...     return 1 - (1 - cumulative) * (1 - attention)
        >>> accumulator = AttentionAccumulator([[1, 0]], (7, 7), fusion=noisy_or)
    """

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """M_t from M_{t-1} (K, H, W), A_t (K, H, W), both float32 in [0, 1], and t - 1 (K, 1, 1) integer, >= 1."""


@runtime_checkable
class MergeableFusion(Protocol):
    """A fusion that can also join two cumulative maps; each count is (K, 1, 1) integer, >= 1."""

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """See `Fusion`."""

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The cumulative map (K, H, W) of both streams, from the maps (K, H, W) of each."""


class MaxFusion:
    """Element-wise maximum, the paper's default: M_t = max(M_{t-1}, A_t) (Eq. 5).

    Monotone, idempotent, independent of order, exact in 8 bits.
    """

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """max(M_{t-1}, A_t)."""
        return torch.maximum(cumulative, attention)

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The maximum of both."""
        return torch.maximum(first, second)


class MeanFusion:
    """Running average: M_t = ((t - 1) M_{t-1} + A_t) / t (Eq. 10), kept in float32 so that it stays exact.

    Independent of order and of merge order up to rounding; never leaves the hull of the maps it has seen.
    """

    storage_dtype = torch.float32

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """M_{t-1} + (A_t - M_{t-1}) / t."""
        return cumulative + (attention - cumulative) / (count + 1)  # Eq. 10, so written that a constant stays itself

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The average of both, weighted by how many maps each has seen."""
        return first + (second - first) * (second_count / (first_count + second_count))


FUSIONS: dict[str, Fusion] = {"max": MaxFusion(), "mean": MeanFusion()}
