"""Attention that gives way to the edges of the photograph, in plain torch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


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
        dilations: distances of neighbours in pixels, each below H and W.

    Returns:
        (B, K, H, W) float32, without gradient. Each image takes 32 H W bytes for each dilation.

    Raises:
        ValueError: shapes that do not fit, no or too large dilations, a negative number of iterations.

    Example:
        >>> import torch
        >>> image = torch.tensor([0.0, 0, 1, 1]).expand(1, 3, 4, 4)      # dark left, bright right
        >>> attention = torch.tensor([0.0, 0.9, 0.3, 0]).expand(1, 1, 4, 4)
        >>> pixel_adaptive_refinement(image, attention, dilations=(1,)).round(decimals=1)[0, 0, 0]
        tensor([0.3000, 0.3000, 0.1000, 0.1000])

    Source: Araslanov and Roth, *Single-Stage Semantic Segmentation from Image Labels* (CVPR 2020), section 4.3 (PAMR);
    there the difference is divided by the variance, which depends on the scale of the image.
    """
    if images.ndim != 4 or attention.ndim != 4 or len(images) != len(attention) or not images.is_floating_point():
        raise ValueError(
            "expected images (B, 3, H, W) floating point and attention (B, K, h, w), got "
            f"{tuple(images.shape)} {images.dtype} and {tuple(attention.shape)}"
        )
    size = (images.shape[-2], images.shape[-1])
    if not dilations or min(dilations) < 1 or max(dilations) >= min(size):
        raise ValueError(f"expected dilations of 1 to {min(size) - 1} pixels, got {tuple(dilations)}")
    if iterations < 0:
        raise ValueError(f"expected iterations >= 0, got {iterations}")
    with torch.autocast(images.device.type, enabled=False):
        maps = attention.float()
        if maps.shape[1] and maps.shape[-2:] != size:
            maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        elif not maps.shape[1]:
            maps = maps.new_zeros(len(maps), 0, *size)
        if not iterations or not maps.shape[1]:
            return maps.clone()
        weights = _weights(images.float(), dilations)
        for _ in range(iterations):
            refined = torch.zeros_like(maps)
            for place, neighbour in enumerate(_neighbours(maps, dilations)):
                refined.addcmul_(weights[:, place : place + 1], neighbour)
            maps = refined
        return maps


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
    differences = [((neighbour - images).abs_() / scale).mean(1) for neighbour in _neighbours(images, dilations)]
    return torch.stack(differences, dim=1).neg_().softmax(1)


def _neighbours(maps: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The eight neighbours of all pixels at each distance, as views of (B, K, H, W)."""
    height, width = maps.shape[-2:]
    for distance in dilations:
        padded = F.pad(maps, [distance] * 4, mode="replicate")
        for down in (0, distance, 2 * distance):
            for right in (0, distance, 2 * distance):
                if (down, right) != (distance, distance):
                    yield padded[..., down : down + height, right : right + width]
