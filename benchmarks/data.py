"""Random data of VOC's shape: 20 classes, one to three of them in an image."""

import random

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
    generator = random.Random(1)
    return [generator.sample(range(images), size) for _ in range(count)]


def score_maps(size: int) -> Tensor:
    """(B, 20, 28, 28)."""
    return torch.randn(size, CLASSES, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def logits(shown: Tensor) -> Tensor:
    """(B, 20) of a classifier that has learnt its images: the gate lets every pair pass, which is the most work."""
    return 8 * shown - 4 + torch.rand(shown.shape, generator=torch.Generator().manual_seed(3))
