"""Random data of VOC's shape: 20 classes, one to three of them in an image."""

import torch
from torch import Tensor

CLASSES, SIDE = 20, 28


def labels(images: int) -> Tensor:
    """(N, 20) bool."""
    generator = torch.Generator().manual_seed(0)
    shown = torch.zeros(images, CLASSES, dtype=torch.bool)
    rows = torch.arange(images)
    for other in range(3):  # the second and third class in 40 and 16 of 100 images
        present = torch.rand(images, generator=generator) < 0.4**other
        shown[rows[present], torch.randint(CLASSES, (images,), generator=generator)[present]] = True
    return shown


def batches(images: int, size: int, count: int = 64) -> list[list[int]]:
    """Indices of ``count`` batches of different images."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(images, (4 * size,), generator=generator).unique()[:size].tolist() for _ in range(count)]


def scores(size: int) -> tuple[Tensor, Tensor]:
    """Score maps (B, 20, 28, 28) and logits (B, 20)."""
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(size, CLASSES, SIDE, SIDE, generator=generator)
    return maps, maps.mean((-2, -1))
