"""Attention of a trained model from several views of each image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oaa_lib.arguments import flag, floating, kind, listed, number
from oaa_lib.cam import normalize_attention
from oaa_lib.maps.layout import LARGEST, checked_size


@torch.no_grad()
def multi_scale_attention(
    model: Callable[[Tensor], Any],
    images: Tensor,
    *,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Attention averaged over scales and mirror images, all classes and the whole batch at once.

    Each view's score maps are normalised (Eq. 2), mirrored back, brought to one size (bilinear,
    ``align_corners=False``) and averaged: every view has the same weight. The average is not normalised once more, so
    the maximum of a map is usually below 1; ``normalize_attention(result)`` does that. IRN sums raw score maps and
    normalises once: thresholds for its maps do not carry over. The model's mode is left alone; call ``model.eval()``
    before.

    Args:
        model: returns `CAMOutput`, or anything with ``.score_maps`` (B, C, h, w); see `wrap_classifier`.
        images: (B, 3, H, W) floating point.
        scales: factors of the images' sides, above 0; a side is rounded to whole pixels.
        flip: whether each scale is shown mirrored too.
        size: (h, w) of the result. None: that of the score maps at scale 1, or at the first scale without a 1.

    Returns:
        (B, C, h, w) in [0, 1], dtype and device of the score maps, without gradient. Take an image's own classes from
        it; the maps of classes that are not shown mean nothing. Score maps with NaN give attention with NaN.

    Raises:
        TypeError: a model that cannot be called or returns no score maps; images, scales or a size of another kind.
        ValueError: images that are not (B, 3, H, W), scales that are not above 0 or make a side longer than 32,768
            pixels, or a size that is none.

    Example:
        >>> import torch
        >>> from oaa_lib import CAMHead
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4, padding=1), CAMHead(8, 5))
        >>> multi_scale_attention(model, torch.rand(2, 3, 32, 48)).shape
        torch.Size([2, 5, 8, 12])

    Source: the common practice of the field; the paper has one view (section 3.1, Eq. 2).
    """
    floating("images", images, "(B, 3, H, W)")
    if not callable(model):
        raise TypeError(f"expected model to be callable, got {kind(model)}")
    flag("flip", flip)
    size = None if size is None else checked_size(size)
    scales = _checked_scales(scales, max(images.shape[-2:]))
    ordered = sorted(scales, key=lambda scale: scale != 1)  # scale 1 first: it determines the size
    total, dtype = None, images.dtype
    for scale in ordered:
        sides = [max(round(side * scale), 1) for side in images.shape[-2:]]
        resized = images if scale == 1 else F.interpolate(images, sides, mode="bilinear", align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            score_maps = _score_maps(model(resized.flip(-1) if mirrored else resized))
            dtype = score_maps.dtype
            half = dtype in (torch.float16, torch.bfloat16)  # in which nothing should be added up
            attention = normalize_attention(score_maps.float() if half else score_maps)
            attention = attention.flip(-1) if mirrored else attention
            size = size or (attention.shape[-2], attention.shape[-1])
            if attention.shape[-2:] != size:
                attention = F.interpolate(attention, size, mode="bilinear", align_corners=False)
            total = attention if total is None else total + attention
    assert total is not None
    return (total / (len(ordered) * (2 if flip else 1))).to(dtype)


def _checked_scales(scales: Any, side: int) -> list[float]:
    numbers = [number("scales", scale, 0, LARGEST / side) for scale in listed("scales", scales, "numbers")]
    if not numbers or min(numbers) == 0:
        raise ValueError(f"expected scales above 0, at least one, got {tuple(numbers)}")
    return numbers


def _score_maps(output: Any) -> Tensor:
    score_maps = getattr(output, "score_maps", None)
    if not isinstance(score_maps, Tensor) or score_maps.ndim != 4:
        raise TypeError(
            f"expected a model that returns score maps (B, C, h, w), got {type(output).__name__}; use "
            "wrap_classifier(model)"
        )
    return score_maps
