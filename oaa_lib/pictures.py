"""Photographs and attention, in whatever holds them, as the pictures that `oaa_lib.plotting` shows."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from oaa_lib.arguments import WHOLE, kind, number

Picture: TypeAlias = npt.NDArray[np.uint8]
COLOURS = "inferno"  # perceptually even: equal steps of attention look like equal steps


def as_array(image: Any) -> npt.NDArray[Any]:
    """Whatever holds an image."""
    values = image if not isinstance(image, Tensor) else numbers("image", image)
    values = values.float() if isinstance(values, Tensor) and values.is_floating_point() else values
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected image as a tensor, an array or an image of Pillow, got {kind(image)}") from error


def photograph(image: Any) -> Picture:
    """(H, W, 3) uint8 of a photograph, see `oaa_lib.plotting.overlay`."""
    values = as_array(image)
    if values.ndim == 3 and values.shape[0] == 3 and values.shape[2] != 3:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] != 3 or not values.size:
        raise ValueError(f"expected image as a photograph (3, H, W) or (H, W, 3), got {values.shape}")
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating) or not (values.min() >= 0 and values.max() <= 1):
        found = f" in [{values.min():.4g}, {values.max():.4g}]" if values.dtype.kind in "iuf" else ""
        raise ValueError(
            f"expected image as a photograph of uint8, or floating point in [0, 1], got {values.dtype}{found}; "
            "undo the normalisation first"
        )
    return np.asarray((values * 255).round(), dtype=np.uint8)


def blend(photograph: Picture, attention: Tensor, opacity: float) -> Picture:
    """(H, W, 3) uint8: the colours of attention (h, w) in [0, 1] on a photograph."""
    from matplotlib import colormaps

    if attention.ndim != 2 or not attention.numel():
        raise ValueError(f"expected attention (h, w), got {tuple(attention.shape)}")
    values, opacity = attention.float(), number("opacity", opacity, 0, 1)
    if not (values.min() >= -1e-4 and values.max() <= 1 + 1e-4):
        raise ValueError(
            f"expected attention in [0, 1], got [{values.min():.4g}, {values.max():.4g}]; "
            "call normalize_attention first"
        )
    size = photograph.shape[:2]
    if values.shape != size:
        values = F.interpolate(values[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    heat = colormaps[COLOURS](values.clamp(0, 1).numpy())[..., :3] * 255
    return np.asarray(((1 - opacity) * photograph + opacity * heat).round(), dtype=np.uint8)


def numbers(name: str, values: Any) -> Tensor:
    """A tensor on the host of what can be one."""
    try:
        numbers = torch.as_tensor(values, device="cpu").detach()
        if numbers.dtype not in WHOLE and not numbers.is_floating_point():
            raise TypeError(f"{numbers.dtype} is no number type of a picture")
        return numbers.to_dense()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).split("\n")[0][:100]
        raise TypeError(f"expected {name} as numbers, got {kind(values)} ({reason})") from None
