"""Images as a network sees them: their size, their pixels, and the training images of stages 1 and 2."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from data import VOCFolder
from PIL import Image
from recipes import Training
from torch import Tensor
from torch.utils.data import Dataset

from oaa_lib import View
from oaa_lib.augmentation import transform_with_view

MAX_ASPECT = 3.0  # longer images are squeezed to this, so that one panorama does not decide the memory of a batch


def network_size(size: tuple[int, int], short_side: int, geometry: Any) -> tuple[int, int]:
    """(H, W) that an image is brought to: short side as given, aspect kept up to one cell, whole cells."""
    scale, limit = short_side / min(size), short_side * MAX_ASPECT
    height, width = (geometry.side(min(side * scale, limit)) for side in size)
    return height, width


def to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, H, W) float32, normalised per channel."""
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


class Sample(NamedTuple):
    """A training image as the network sees it.

    Attributes:
        name: of the image.
        view: which part of it is shown, and whether mirrored.
        image: (3, H, W) float32, normalised.
        target: what it is trained on: (C,) float32 image-level labels, or (H, W) int64 a label image.
    """

    name: str
    view: View
    image: Tensor
    target: Tensor


class AttentionImages(Dataset[Sample]):
    """Whole images for stages 1 and 2, resized with their aspect kept, flipped and jittered as the recipe says.

    Args:
        folder: the images and their labels.
        network: for whose geometry and normalisation.
        short_side: pixels.
        flip: probability.
        color_jitter: brightness, contrast, saturation, hue.
    """

    def __init__(
        self, folder: VOCFolder, network: Any, *, short_side: int, flip: float = 0, color_jitter: Sequence[float] = ()
    ) -> None:
        from torchvision.transforms import v2

        self.folder, self.geometry, self.mean, self.std = folder, network.geometry, network.mean, network.std
        self.sizes = {name: network_size(folder.size(name), short_side, network.geometry) for name in folder.names}
        jitter = [v2.ColorJitter(*color_jitter)] if any(color_jitter) else []
        self.augment = v2.Compose([v2.RandomHorizontalFlip(flip), *jitter])

    @classmethod
    def augmented(cls, folder: VOCFolder, network: Any, settings: Training) -> "AttentionImages":
        """As a stage trains on them."""
        return cls(
            folder, network, short_side=settings.short_side, flip=settings.flip, color_jitter=settings.color_jitter
        )

    def __len__(self) -> int:
        return len(self.folder)

    @property
    def map_sizes(self) -> Tensor:
        """(N, 2) int64: the (h, w) of each image's score map."""
        return torch.tensor([[self.geometry.cells(side) for side in self.sizes[name]] for name in self.folder.names])

    def __getitem__(self, index: int) -> Sample:
        name = self.folder.names[index]
        view, image = transform_with_view(self.augment, self.resized(name))
        return Sample(name, view, to_tensor(image, self.mean, self.std), self.folder.labels[index])

    def resized(self, name: str) -> Image.Image:
        """At the network's size (bicubic, as the paper's releases do)."""
        height, width = self.sizes[name]
        return self.folder.photograph(name).resize((width, height), Image.Resampling.BICUBIC)
