"""Class probabilities of a photograph by a segmentation network, averaged over views and windows."""

import torch
from deeplab import SegmentationNetwork
from PIL import Image
from recipes import Evaluation
from samples import network_size, to_tensor
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def probabilities(network: SegmentationNetwork, photograph: Image.Image, settings: Evaluation) -> Tensor:
    """(C + 1, H, W) float32 class probabilities at the photograph's size: the average of all views."""
    size = (photograph.height, photograph.width)
    total = torch.zeros(())
    views = [
        (scale, flip) for scale in settings.test_scales for flip in ([False, True] if settings.test_flip else [False])
    ]
    for scale, flip in views:
        height, width = network_size(size, round(min(size) * scale), network.geometry)
        image = to_tensor(photograph.resize((width, height), Image.Resampling.BILINEAR), network.mean, network.std)
        image = image[None].to(next(network.parameters()).device)
        shown = windowed(network, image.flip(-1) if flip else image, settings)
        shown = shown.flip(-1) if flip else shown
        align = network.geometry.centred
        total = total.to(shown) + F.interpolate(shown, size, mode="bilinear", align_corners=align)[0]
    return total / len(views)


def windowed(network: SegmentationNetwork, image: Tensor, settings: Evaluation) -> Tensor:
    """(1, C + 1, H, W) probabilities of an image (1, 3, H, W), averaged where windows overlap."""
    height, width = image.shape[-2:]
    side = network.geometry.side(settings.window) if settings.window else max(height, width)
    total, count = torch.zeros((), device=image.device), torch.zeros(1, 1, height, width, device=image.device)
    for top in starts(height, side, settings.overlap):
        for left in starts(width, side, settings.overlap):
            part = image[..., top : top + side, left : left + side]
            scores = network(part).float()
            scores = F.interpolate(scores, part.shape[-2:], mode="bilinear", align_corners=network.geometry.centred)
            place = (left, width - left - part.shape[-1], top, height - top - part.shape[-2])
            total = total + F.pad(scores.softmax(1), place)
            count[..., top : top + side, left : left + side] += 1
    return total / count


def starts(length: int, side: int, overlap: float) -> list[int]:
    """Where windows begin: evenly spread, the last one ends at the border, and they overlap by the share or more."""
    if length <= side:
        return [0]
    steps = -(-(length - side) // max(round(side * (1 - overlap)), 1))
    return [round(step * (length - side) / steps) for step in range(steps + 1)]
