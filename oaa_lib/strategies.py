"""The fusion strategies: AF(M, A) of Eq. 3 and 4, how a new attention map joins the cumulative one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from oaa_lib.arguments import number
from oaa_lib.maps.coding import decode, encode


class Fusion(ABC):
    """An attention fusion strategy. Yours may be a class derived from this one, or any function of the same form.

    The accumulator initialises M_1 = A_1 by itself; what the fusion returns counts from the second map on. The result
    must lie in [0, 1] and have the shape of ``cumulative``. A fusion of yours gets copies, so it may work in place. It
    is called with whole batches, images that see their first map included. `oaa_lib.testing.check_fusion` tests one.

    A fusion may say more about itself in these attributes; a function takes them too, and none of them is needed.

    Attributes:
        storage_dtype: what it needs to stay exact, instead of the accumulator's ``dtype``. With ``torch.float64`` it is
            called, and merged, in float64; what is read stays float32.
        order_free: whether the order of the maps makes no difference (up to rounding).
        zero_is_neutral: whether F(0, A, any count) = A. What was never seen may then be 0, uncounted.
        reduction: how the maps of several processes become one by an all-reduce: ``"max"``, ``"mean"`` (weighted by
            their counts) or ``"latest"`` (of whoever accepted most). Without it they are merged one by one.
        merge: ``merge(first, second, first_count, second_count)`` joins two cumulative maps that saw different streams.
            Without it, accumulators with this fusion refuse to be merged.
        not_mergeable: why there is no ``merge``, for the refusal's message.

    Example:
        >>> from oaa_lib import AttentionAccumulator
        >>> def common(cumulative, attention, count):
        ...     return torch.minimum(cumulative, attention)
        >>> common.order_free = True
        >>> accumulator = AttentionAccumulator([[1, 0]], (7, 7), fusion=common)

    Source: paper, section 3.2; its section 4.3 leaves designing further strategies to the reader.
    """

    storage_dtype: torch.dtype | None = None
    order_free: bool = False
    zero_is_neutral: bool = False
    label: ClassVar[str] = ""  # the name of a built-in one
    settings: ClassVar[tuple[str, ...]] = ()  # attributes that belong to its name
    commutes_with_rounding: ClassVar[bool] = False  # then it is called on maps as they are stored, without a count
    guarded: bool = False  # what it returns must be looked at
    reduction: Literal["max", "mean", "latest"] | None = None
    merge: Callable[..., Tensor] | None = None
    not_mergeable: str | None = None

    @abstractmethod
    def __call__(self, cumulative: Tensor, attention: Tensor, count: Any) -> Tensor:
        """M_t from M_{t-1} (K, H, W), A_t (K, H, W), both float32 in [0, 1], and t - 1, an integer tensor, >= 1.

        The count is (K, 1, 1), or (K, H, W) where not every pixel has seen as many maps (crops). A fusion with
        ``storage_dtype = torch.float64`` is given maps in float64.
        """

    @property
    def name(self) -> str:
        """The name under which a file records the fusion: a built-in one's, with its settings."""
        return f"{self.label}({settings})" if (settings := self._settings()) else self.label

    @property
    def refusal(self) -> str | None:
        """Why two streams of this fusion cannot become one, for an error message; None if they can."""
        if self.merge is not None:
            return None
        unknown = "what it keeps does not tell the result of having seen both; give it a merge method if it does"
        return f"fusion {self.name!r} cannot merge two streams: {self.not_mergeable or unknown}"

    def join(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """What is stored of pairs that have seen both streams, from stored maps and how often each pixel was seen."""
        assert self.merge is not None
        ours, theirs = decode(first), decode(second)
        maps = self.merge(ours, theirs, first_count.clamp(min=1), second_count.clamp(min=1))
        maps = torch.where(first_count == 0, theirs, torch.where(second_count == 0, ours, maps))
        return encode(maps, first.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings()})"

    def _settings(self) -> str:
        return ", ".join(f"{name}={float(getattr(self, name))!r}" for name in self.settings)  # not numpy's repr


class MaxFusion(Fusion):
    """Element-wise maximum, the paper's default: M_t = max(M_{t-1}, A_t) (Eq. 5).

    Monotone, idempotent, independent of order, exact in 8 bits: it commutes with rounding.
    """

    label = "max"
    order_free = True
    zero_is_neutral = True
    commutes_with_rounding = True
    reduction = "max"

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor | None = None) -> Tensor:
        """max(M_{t-1}, A_t)."""
        return torch.maximum(cumulative, attention)  # Eq. 5

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The maximum of both."""
        return torch.maximum(first, second)  # not self(...): a class derived from this one may fuse otherwise


class MeanFusion(Fusion):
    """Running average: M_t = ((t - 1) M_{t-1} + A_t) / t (Eq. 10), kept in float32 so that it stays exact.

    Independent of order and of merge order up to rounding; never leaves the hull of the maps it has seen.
    """

    label = "mean"
    storage_dtype = torch.float32
    order_free = True
    reduction = "mean"

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """M_{t-1} + (A_t - M_{t-1}) / t."""
        return cumulative + (attention - cumulative) / (count + 1)  # Eq. 10 in a form that keeps a constant what it is

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The average of both, weighted by how many maps each has seen."""
        return first + (second - first) * (second_count.float() / (first_count + second_count))


class LatestFusion(Fusion):
    """Keeps the latest map that was accepted: M_t = A_t. For looking at it, or for the attention drop layer.

    Pixels that the latest view did not show keep what an earlier one showed there. Merged, the other stream counts as
    the later one.

    Source: the attention drop layer of the authors' extension (TPAMI 2021) hides what the latest attention shows.
    """

    label = "latest"
    commutes_with_rounding = True
    reduction = "latest"

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor | None = None) -> Tensor:
        """A_t."""
        return attention

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The second."""
        return second


class ExponentialMovingAverage(Fusion):
    """Forgets early maps: M_t = momentum * M_{t-1} + (1 - momentum) * A_t, kept in float32.

    The first map still weighs ``momentum ** (t - 1)``. Depends on the order of the maps, so it cannot be merged; never
    leaves the hull of the maps it has seen.

    Args:
        momentum: in [0, 1); 0 keeps the latest map only.

    Raises:
        TypeError: a momentum that is no number.
        ValueError: one outside [0, 1).

    Example:
        >>> from oaa_lib import AttentionAccumulator
        >>> accumulator = AttentionAccumulator([[1]], (1, 1), fusion=ExponentialMovingAverage(0.75))
        >>> for value in (1.0, 0.0):
        ...     _ = accumulator.update([0], torch.full((1, 1, 1, 1), value), normalization=None)
        >>> accumulator.attention(0)
        tensor([[[0.7500]]])

    Source: not in the paper, which encourages readers to explore further strategies (section 4.3).
    """

    label = "ema"
    settings = ("momentum",)
    storage_dtype = torch.float32
    not_mergeable = (
        "an exponential moving average depends on the order of its maps, and two streams have no common order"
    )

    def __init__(self, momentum: float = 0.9) -> None:
        advice = "; at 1 nothing would ever be learnt"
        self.momentum = number("momentum", momentum, 0, 1, below=True, advice=advice)

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """M_{t-1} + (1 - momentum) (A_t - M_{t-1})."""
        return torch.lerp(cumulative, attention, 1 - self.momentum)


class NoisyOr(Fusion):
    """The chance that any of the maps is right, were they independent: M_t = 1 - (1 - M_{t-1}) (1 - A_t).

    Monotone, independent of order and of merge order up to rounding; not idempotent: it grows with every map, and a
    long training drives it towards 1 wherever there is some attention. Kept in float32: in 8 bits a rounding would be
    added with each map.

    Example:
        >>> from oaa_lib import AttentionAccumulator
        >>> accumulator = AttentionAccumulator([[1]], (1, 1), fusion=NoisyOr())
        >>> for value in (0.5, 0.5):
        ...     _ = accumulator.update([0], torch.full((1, 1, 1, 1), value), normalization=None)
        >>> accumulator.attention(0)
        tensor([[[0.7500]]])

    Source: not in the paper, which encourages readers to explore further strategies (section 4.3).
    """

    label = "noisy-or"
    storage_dtype = torch.float32
    order_free = True
    zero_is_neutral = True

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """M_{t-1} + (1 - M_{t-1}) A_t."""
        return cumulative + (1 - cumulative) * attention  # in this form it never falls, and 0 changes nothing

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The same of both."""
        return first + (1 - first) * second
