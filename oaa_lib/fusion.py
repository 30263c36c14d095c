"""Which fusion an accumulator uses: a built-in one by its name, or one of the user's, guarded."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from oaa_lib.arguments import floats, kind, shown
from oaa_lib.maps.coding import outside
from oaa_lib.strategies import ExponentialMovingAverage, Fusion, LatestFusion, MaxFusion, MeanFusion, NoisyOr

Fuse: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


class OwnFusion(Fusion):
    """A fusion of the user's, as the accumulator calls it: on copies, and what it returns is checked.

    Args:
        own: any callable of the form of `Fusion`, with or without its attributes.
    """

    guarded = True

    def __init__(self, own: Fuse) -> None:
        self.own = own
        for name in ("storage_dtype", "order_free", "zero_is_neutral", "reduction", "not_mergeable"):
            setattr(self, name, getattr(own, name, getattr(Fusion, name)))
        if self.reduction == "mean":
            self.zero_is_neutral = False  # a mean needs to know what each pixel has missed
        self.merge = None if getattr(own, "merge", None) is None else self._merge
        if self.merge is not None and not callable(own_merge := getattr(own, "merge", None)):
            raise TypeError(f"expected the fusion's merge to be a function, got {kind(own_merge)}")
        if self.reduction not in (None, "max", "mean", "latest"):
            raise ValueError(
                f"expected the fusion's reduction to be 'max', 'mean', 'latest' or None, got {shown(self.reduction)}"
            )

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        """What the user's fusion returns, in the dtype that it was given. It may write on that."""
        return _checked("the fusion", self.own(cumulative.clone(), attention.clone(), count), cumulative)

    def _merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        own: Any = self.own
        merged = _checked(
            "the fusion's merge", own.merge(first.clone(), second.clone(), first_count, second_count), first
        )
        what, advice = "the result of the fusion's merge", "fix the merge method"
        if outside(merged, what, advice).any():  # on an accelerator, which a merge may wait for
            outside(merged.cpu(), what, advice)
        return merged.clamp(0, 1)

    @property
    def name(self) -> str:
        """The name under which a file records the fusion: "own:" and that of your function or class."""
        return f"own:{getattr(self.own, '__qualname__', type(self.own).__qualname__)}"


FUSIONS: dict[str, Fusion] = {
    fusion.label: fusion
    for fusion in (MaxFusion(), MeanFusion(), LatestFusion(), ExponentialMovingAverage(), NoisyOr())
}
"""The fusions that have a name."""


def resolve_fusion(value: str | Fuse) -> Fuse:
    """The fusion that a user, or a saved file, asks for.

    Args:
        value: ``"max"``, ``"mean"``, ``"latest"``, ``"ema"``, ``"noisy-or"``, what `fusion_name` returned for one of
            these, such as ``"ema(momentum=0.5)"``, or a `Fusion`.

    Raises:
        TypeError: no callable, or the class of a fusion instead of an instance.
        ValueError: an unknown name.

    Example:
        >>> resolve_fusion("ema(momentum=0.5)")
        ExponentialMovingAverage(momentum=0.5)
    """
    known = f"one of {sorted(FUSIONS)} or a callable"
    if isinstance(value, str):
        name, settings = _parsed(value)
        if name not in FUSIONS or not set(settings) <= set(FUSIONS[name].settings):
            advice = "; mix a mean and a maximum with oaa_lib.harmonic_mix" if name == "harmonic" else ""
            raise ValueError(f"expected fusion to be {known}, got {value!r}{advice}")
        return type(FUSIONS[name])(**settings)  # of its own: settings of one may be changed
    if isinstance(value, type):
        raise TypeError(f"expected fusion to be {known}, got the class {value.__name__}; pass an instance of it")
    if not callable(value):
        raise TypeError(f"expected fusion to be {known}, got {type(value).__name__}")
    return value


def _parsed(text: str) -> tuple[str, dict[str, float]]:
    """A name and settings, as `fusion_name` writes them; an empty name if it did not write the text."""
    name, opened, settings = text.removesuffix(")").partition("(")
    if bool(opened) != text.endswith(")"):
        return "", {}
    try:
        parts = dict(part.split("=") for part in settings.split(", ")) if opened else {}
        return name, {setting: float(number) for setting, number in parts.items()}
    except ValueError:
        return "", {}


def fusion_name(fusion: Fuse) -> str:
    """The name under which a state records its fusion: a built-in one's, with its settings, or "own:" and yours.

    Example:
        >>> fusion_name(ExponentialMovingAverage(0.5)), fusion_name(NoisyOr())
        ('ema(momentum=0.5)', 'noisy-or')
    """
    return adapt(fusion).name


def adapt(fusion: Fuse) -> Fusion:
    """The fusion in the form that the accumulator calls: a built-in one as it is, any other guarded."""
    if isinstance(fusion, Fusion) and any(type(fusion) is type(each) for each in FUSIONS.values()):
        return fusion
    return OwnFusion(fusion)


def harmonic_mix(mean: Tensor, maximum: Tensor) -> Tensor:
    """The weighted harmonic mean of a running mean and a running maximum: 3 / (1 / mean + 2 / max).

    A pixel that was high once only is lower than with the maximum, and higher than with the average; 0 where either is
    0. Accumulate both, and mix what they hold.

    Args:
        mean: (..., H, W) floating point in [0, 1], of an accumulator with ``fusion="mean"``.
        maximum: the same of one with ``fusion="max"``.

    Returns:
        (..., H, W) in [0, 1], never outside of the two.

    Raises:
        TypeError: not floating point tensors.
        ValueError: different shapes or devices.

    Example:
        >>> harmonic_mix(torch.tensor([[0.5]]), torch.tensor([[1.0]]))
        tensor([[0.7500]])

    Source: the authors' first (caffe) release, not the paper. The release also rescales its maps at each update.
    """
    floats("mean", mean)
    floats("maximum", maximum)
    if mean.shape != maximum.shape:
        raise ValueError(f"expected mean and maximum of one shape, got {tuple(mean.shape)} and {tuple(maximum.shape)}")
    if mean.device != maximum.device:
        raise ValueError(f"expected mean and maximum on one device, got {mean.device} and {maximum.device}")
    # 3 / (1 / mean + 2 / max), in a form that keeps a constant what it is and never divides by 0
    weight = 2 * mean / (maximum + 2 * mean).clamp(min=torch.finfo(mean.dtype).tiny)
    return mean + (maximum - mean) * weight


def _checked(what: str, result: object, like: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or result.layout != torch.strided or result.is_complex():
        raise TypeError(f"expected {what} to return a tensor of real numbers, got {kind(result)}")
    if result.shape != like.shape:
        raise ValueError(f"expected {what} to return shape {tuple(like.shape)}, got {tuple(result.shape)}")
    if result.device != like.device:
        raise ValueError(f"expected {what} to return a tensor on {like.device}, got one on {result.device}")
    return result.to(like.dtype)
