"""How a new attention map joins the cumulative one: AF(M, A) of Eq. 3 and 4."""

import re
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Fusion(Protocol):
    """An attention fusion strategy: any callable of this form, a plain function included.

    The accumulator initialises M_1 = A_1 by itself; what the fusion returns counts from the second map on. The result
    must lie in [0, 1] and have the shape of ``cumulative``. The arguments are copies, so it may work in place. It is
    called with whole batches, images that see their first map included. `oaa_lib.testing.check_fusion` tests one.

    A fusion may say more about itself in these attributes; none of them is needed:

    - ``storage_dtype``: a ``torch.dtype`` that the fusion needs to stay exact, instead of the accumulator's ``dtype``.
    - ``order_free``: True if the order of the maps makes no difference (up to rounding).
    - ``zero_is_neutral``: True if F(0, A, any count) = A. What was never seen may then be 0, uncounted.
    - ``num_states`` = S and ``read(cumulative) -> (K, H, W)``: for a fusion that keeps S > 1 maps a pair. All S start
      as A_1; ``cumulative`` and the result are (K, S, H, W), ``attention`` is (K, 1, H, W), ``count`` (K, 1, 1, 1);
      users see what ``read`` returns.
    - ``merge(first, second, first_count, second_count)``: joins two cumulative maps that saw different streams.
      Without it, accumulators with this fusion refuse to be merged.
    - ``not_mergeable``: why there is no ``merge``, for the refusal's message.
    - ``reduction``: how the maps of several processes become one by an all-reduce: ``"max"``, or ``"mean"`` (weighted
      by their counts). Without it they are gathered and merged one by one.

    Example:
        >>> from oaa_lib import AttentionAccumulator
        >>> def common(cumulative, attention, count):
        ...     return torch.minimum(cumulative, attention)
        >>> common.order_free = True
        >>> accumulator = AttentionAccumulator([[1, 0]], (7, 7), fusion=common)

    Source: paper, section 3.2; its section 4.3 leaves designing further strategies to the reader.
    """

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """M_t from M_{t-1} (K, H, W), A_t (K, H, W), both float32 in [0, 1], and t - 1, integer, >= 1.

        The count is (K, 1, 1), or (K, H, W) where not every pixel has seen as many maps (crops).
        """


@runtime_checkable
class MergeableFusion(Protocol):
    """A fusion that can also join two cumulative maps; counts and maps are shaped as in `Fusion`."""

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """See `Fusion`."""

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The cumulative map (K, H, W) of both streams, from the maps (K, H, W) of each."""


class _Shown:
    """Shows its settings."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class MaxFusion(_Shown):
    """Element-wise maximum, the paper's default: M_t = max(M_{t-1}, A_t) (Eq. 5).

    Monotone, idempotent, independent of order, exact in 8 bits.
    """

    order_free = True
    zero_is_neutral = True
    reduction = "max"

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """max(M_{t-1}, A_t)."""
        return torch.maximum(cumulative, attention)

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The maximum of both."""
        return torch.maximum(first, second)


class MeanFusion(_Shown):
    """Running average: M_t = ((t - 1) M_{t-1} + A_t) / t (Eq. 10), kept in float32 so that it stays exact.

    Independent of order and of merge order up to rounding; never leaves the hull of the maps it has seen.
    """

    storage_dtype = torch.float32
    order_free = True
    reduction = "mean"

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """M_{t-1} + (A_t - M_{t-1}) / t."""
        return cumulative + (attention - cumulative) / (count + 1)  # Eq. 10, so written that a constant stays itself

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The average of both, weighted by how many maps each has seen."""
        return first + (second - first) * (second_count / (first_count + second_count))


class ExponentialMovingAverage(_Shown):
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

    storage_dtype = torch.float32
    not_mergeable = (
        "an exponential moving average depends on the order of its maps, and two streams have no common order"
    )

    def __init__(self, momentum: float = 0.9) -> None:
        if not isinstance(momentum, (int, float)):
            raise TypeError(f"expected momentum as a number in [0, 1), got {type(momentum).__name__}")
        if not 0 <= momentum < 1:
            raise ValueError(f"expected momentum in [0, 1), got {momentum}; at 1 nothing would ever be learnt")
        self.momentum = float(momentum)

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """M_{t-1} + (1 - momentum) (A_t - M_{t-1})."""
        return torch.lerp(cumulative, attention, 1 - self.momentum)


class HarmonicMix(_Shown):
    """The weighted harmonic mean of the running mean and the running maximum: 3 / (1 / mean + 2 / max).

    A pixel that was high once only is lower than with the maximum, and higher than with the average; 0 where either is
    0. It keeps two float32 maps a pair, (mean, max). Independent of order and of merge order up to rounding; never
    leaves the hull of the maps it has seen.

    Example:
        >>> from oaa_lib import AttentionAccumulator
        >>> accumulator = AttentionAccumulator([[1]], (1, 1), fusion=HarmonicMix())
        >>> for value in (1.0, 0.0):
        ...     _ = accumulator.update([0], torch.full((1, 1, 1, 1), value), normalization=None)
        >>> accumulator.attention(0)  # mean 0.5, max 1
        tensor([[[0.7500]]])

    Source: the authors' first (caffe) release, not the paper. The release also rescales its maps at each update.
    """

    storage_dtype = torch.float32
    order_free = True
    num_states = 2

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """Both maps after A_t: (K, 2, H, W)."""
        mean, peak = cumulative[:, :1], cumulative[:, 1:]
        return torch.cat((MeanFusion()(mean, attention, count), torch.maximum(peak, attention)), dim=1)

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The average of the means, weighted by how many maps each has seen, and the maximum of the maxima."""
        mean = MeanFusion().merge(first[:, :1], second[:, :1], first_count, second_count)
        return torch.cat((mean, torch.maximum(first[:, 1:], second[:, 1:])), dim=1)

    def read(self, cumulative: Tensor) -> Tensor:
        """The mix (K, H, W) of the two maps (K, 2, H, W)."""
        mean, peak = cumulative.unbind(1)
        # 3 / (1 / mean + 2 / max), so written that a constant stays itself and that 0 divides nothing
        weight = 2 * mean / (peak + 2 * mean).clamp(min=torch.finfo(mean.dtype).tiny)
        return mean + (peak - mean) * weight


class NoisyOr(_Shown):
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

    storage_dtype = torch.float32
    order_free = True
    zero_is_neutral = True

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """M_{t-1} + (1 - M_{t-1}) A_t."""
        return cumulative + (1 - cumulative) * attention  # so written that it never falls and that 0 changes nothing

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        """The same of both."""
        return first + (1 - first) * second


FUSIONS: dict[str, Fusion] = {
    "max": MaxFusion(),
    "mean": MeanFusion(),
    "ema": ExponentialMovingAverage(),
    "harmonic": HarmonicMix(),
    "noisy-or": NoisyOr(),
}
"""The fusions that have a name."""
EMA_NAME = re.compile(r"ema\(momentum=(\d+(?:\.\d+)?(?:e-\d+)?)\)")  # as `fusion_name` writes it


def resolve_fusion(value: str | Fusion) -> Fusion:
    """The fusion that a user, or a saved file, asks for.

    Args:
        value: ``"max"``, ``"mean"``, ``"ema"``, ``"harmonic"``, ``"noisy-or"``, what `fusion_name` returned for one of
            these, such as ``"ema(momentum=0.5)"``, or a `Fusion`.

    Raises:
        TypeError: no callable, the class of a fusion instead of an instance, or several states without ``read``.
        ValueError: an unknown name.

    Example:
        >>> resolve_fusion("ema(momentum=0.5)")
        ExponentialMovingAverage(momentum=0.5)
    """
    known = f"one of {sorted(FUSIONS)} or a callable"
    if isinstance(value, str):
        if settings := EMA_NAME.fullmatch(value):
            return ExponentialMovingAverage(float(settings[1]))
        if value not in FUSIONS:
            raise ValueError(f"expected fusion to be {known}, got {value!r}")
        return FUSIONS[value]
    if isinstance(value, type):
        raise TypeError(f"expected fusion to be {known}, got the class {value.__name__}; pass an instance of it")
    if not callable(value):
        raise TypeError(f"expected fusion to be {known}, got {type(value).__name__}")
    if (states := getattr(value, "num_states", 1)) > 1 and not callable(getattr(value, "read", None)):
        raise TypeError(
            f"expected fusion {fusion_name(value)!r}, which keeps {states} maps a pair, to have a method "
            "read(cumulative) that makes one map of them, got none; add it"
        )
    return value


def fusion_name(fusion: Fusion) -> str:
    """The name that tells what a state was made with: a built-in one's with settings, or "own:" and yours.

    Example:
        >>> fusion_name(ExponentialMovingAverage(0.5)), fusion_name(NoisyOr())
        ('ema(momentum=0.5)', 'noisy-or')
    """
    if type(fusion) is ExponentialMovingAverage:
        return f"ema(momentum={fusion.momentum})"
    for name, built_in in FUSIONS.items():
        if type(fusion) is type(built_in):
            return name
    return f"own:{getattr(fusion, '__qualname__', type(fusion).__qualname__)}"


def merge_refusal(fusion: Fusion) -> str | None:
    """Why two streams of this fusion cannot become one, for an error message; None if they can.

    Example:
        >>> merge_refusal(MaxFusion()) is None
        True
    """
    if isinstance(fusion, MergeableFusion):
        return None
    unknown = "what it keeps does not tell the result of having seen both; give it a merge method if it does"
    return f"fusion {fusion_name(fusion)!r} cannot merge two streams: {getattr(fusion, 'not_mergeable', unknown)}"
