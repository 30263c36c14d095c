"""Attention that follows the edges of the photograph, in plain torch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from oaa_lib.arguments import floating, kind, listed, whole_number


@torch.no_grad()
def pixel_adaptive_refinement(
    images: Tensor,
    attention: Tensor,
    *,
    iterations: int = 10,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
) -> Tensor:
    """Replace each pixel's attention, some times over, by that of its neighbours of like colour.

    The neighbours j of a pixel i are the eight around it at each distance of ``dilations``; beyond the edge the
    outermost pixels repeat. Their weights are

        softmax over j of  - mean over channels of abs(I_j - I_i) / (0.1 s_i),

    s_i the standard deviation of the channel over i and its neighbours. Weights are not negative and add up to 1, so
    values stay between the least and the greatest of a map, and a constant map stays as it is. They do not depend on
    the brightness and contrast of the image: normalised images and those in [0, 1] or 0 .. 255 give the same.

    Args:
        images: (B, 3, H, W) floating point, photographs, however normalised.
        attention: (B, K, h, w) floating point, any maps, on the images' device; resized to the image (bilinear).
        iterations: how far attention spreads; 0 only resizes.
        dilations: distances of neighbours in pixels, at least 1. Those that are not below H and W are left out, since
            no pixel has such a neighbour; where none is left, maps are only resized.

    Returns:
        (B, K, H, W) float32, without gradient. NaN stays NaN, and spreads like attention. Each image takes 32 H W bytes
        for each dilation, and about 130 H W more.

    Raises:
        TypeError: an input that is no tensor, iterations or dilations that are no integers.
        ValueError: shapes, dtypes or devices that do not fit, no dilations or some below 1, a negative number of
            iterations.

    Example:
        >>> import torch
        >>> image = torch.tensor([0.0, 0, 1, 1]).expand(1, 3, 4, 4)      # dark left, bright right
        >>> attention = torch.tensor([0.0, 0.9, 0.3, 0]).expand(1, 1, 4, 4)
        >>> pixel_adaptive_refinement(image, attention, dilations=(1,)).round(decimals=1)[0, 0, 0]
        tensor([0.3000, 0.3000, 0.1000, 0.1000])

    Source: Araslanov and Roth, *Single-Stage Semantic Segmentation from Image Labels* (CVPR 2020), section 4.3 (PAMR);
    there the difference is divided by the variance, which depends on the scale of the image.
    """
    floating("images", images, "(B, 3, H, W)")
    floating("attention", attention, "(B, K, h, w)")
    if len(images) != len(attention) or not images.shape[1]:
        raise ValueError(
            "expected images (B, 3, H, W) floating point and attention (B, K, h, w), got "
            f"{kind(images)} and {kind(attention)}"
        )
    if images.device != attention.device:
        raise ValueError(f"expected images and attention on one device, got {images.device} and {attention.device}")
    size = (images.shape[-2], images.shape[-1])
    dilations = _checked_dilations(dilations, min(size))
    iterations = whole_number("iterations", iterations, 0)
    with torch.autocast(images.device.type, enabled=False):
        maps = attention.float()
        if maps.shape[1] and maps.shape[-2:] != size:
            maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        elif not maps.shape[1]:
            maps = maps.new_zeros(len(maps), 0, *size)
        if not iterations or not dilations or not maps.shape[1]:
            return maps.clone()
        weights = _weights(images.float(), dilations)
        for _ in range(iterations):
            refined = torch.zeros_like(maps)
            for place, neighbour in enumerate(_neighbours(maps, dilations)):
                refined.addcmul_(weights[:, place : place + 1], neighbour)
            maps = refined
        return maps


def _checked_dilations(dilations: Sequence[int], limit: int) -> list[int]:
    """Those below ``limit``."""
    items = listed("dilations", dilations, "integers")
    distances = [whole_number("dilations", distance, 1, 2**63 - 1) for distance in items]
    if not distances:
        raise ValueError(f"expected dilations of 1 to {limit - 1} pixels, at least one, got none")
    return [distance for distance in distances if distance < limit]


def _weights(images: Tensor, dilations: Sequence[int]) -> Tensor:
    """(B, 8 * len(dilations), H, W): what each neighbour counts; they add up to 1."""
    number = 8 * len(dilations) + 1
    mean = images / number
    for neighbour in _neighbours(images, dilations):
        mean += neighbour / number
    variance = (images - mean).square_() / number
    for neighbour in _neighbours(images, dilations):
        variance += (neighbour - mean).square_() / number
    scale = 0.1 * variance.sqrt_() + 1e-8
    weights = images.new_empty(len(images), number - 1, *images.shape[-2:])
    for place, neighbour in enumerate(_neighbours(images, dilations)):
        weights[:, place] = (neighbour - images).abs_().div_(scale).mean(1).neg_()
    for rows in torch.split(weights, 16, dim=-2):  # all at once would take three times the memory
        rows.copy_(rows.softmax(1))
    return weights


def _neighbours(maps: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The eight neighbours of all pixels at each distance, as views of (B, K, H, W)."""
    height, width = maps.shape[-2:]
    for distance in dilations:
        padded = F.pad(maps, [distance] * 4, mode="replicate")
        for down in (0, distance, 2 * distance):
            for right in (0, distance, 2 * distance):
                if (down, right) != (distance, distance):
                    yield padded[..., down : down + height, right : right + width]
