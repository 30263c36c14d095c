"""What a batch brings to the maps of its pairs: score maps become attention in the frames of their images."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from oaa_lib.cam import normalize_with_peak
from oaa_lib.pairs import IntArray
from oaa_lib.views import Floats, flips_only, into_image, mirror, sample


class Offer(NamedTuple):
    """What a batch brings to K maps of one size.

    Attributes:
        attention: (K, H, W) float32 in [0, 1] where it is fine; 0 where it is not seen.
        fine: (K,) bool, finite and in range.
        passed: (K,) bool, the gate's word.
        seen: (K, H, W) bool, the pixels that the views show; None: all.
    """

    attention: Tensor
    fine: Tensor
    passed: Tensor
    seen: Tensor | None

    def to(self, device: torch.device) -> "Offer":
        """The same on another device."""
        if device == self.attention.device:
            return self
        seen = None if self.seen is None else self.seen.to(device)
        return Offer(self.attention.to(device), self.fine.to(device), self.passed.to(device), seen)

    def at(self, places: Tensor | IntArray | slice) -> "Offer":
        """The offer to some of the maps."""
        if isinstance(places, slice):  # all of them
            return self
        seen = None if self.seen is None else self.seen[places]
        return Offer(self.attention[places], self.fine[places], self.passed[places], seen)


def normalize(maps: Tensor, normalization: Literal["max", "minmax"] | None) -> tuple[Tensor, Tensor]:
    """Raw maps (K, h, w) float32 to attention of the same shape, and which (K,) of it is usable."""
    lowest = maps.amin((-2, -1))
    if normalization is not None:
        attention, peak = normalize_with_peak(maps, normalization)  # Eq. 2
        return attention, (lowest > -math.inf) & (peak.view(-1) < math.inf)  # False for NaN
    usable = (lowest > -math.inf) & (maps.amax((-2, -1)) < math.inf)
    finite = maps.where(usable[:, None, None], 0)
    within = in_range(finite, "attention", "call normalize_attention first or leave normalization='max'")
    return maps.clamp(0, 1), usable & within


def place(offer: Offer, boxes: Floats | None, size: tuple[int, int]) -> Offer:
    """The offer of score maps that show ``boxes``, put into the frames of their images."""
    if boxes is None or flips_only(boxes):
        attention = offer.attention if boxes is None else mirror(offer.attention, boxes)
        return offer._replace(attention=resize(attention, size))
    sampling = into_image(boxes, size)
    attention, seen = sample(offer.attention, sampling)
    attention = attention.clamp(max=1)  # as in a resize
    return offer._replace(attention=attention, seen=None if sampling.covers() else seen)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (K, h, w) at another size, bilinear."""
    if maps.shape[1:] == size:
        return maps
    maps = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    return maps.clamp(max=1)  # the weights of a resize may add up to a rounding more than 1


def in_range(maps: Tensor, what: str, advice: str) -> Tensor:
    """(K,) bool: maps (K, ..., H, W) within [0, 1], give or take a rounding. On the host one outside is an error."""
    within = ((maps >= -1e-4) & (maps <= 1 + 1e-4)).flatten(1).all(1)
    if maps.device.type == "cpu" and not within.all():
        wrong = maps[~within]
        raise ValueError(f"expected {what} in [0, 1], got [{wrong.min():.4g}, {wrong.max():.4g}]; {advice}")
    return within
