"""Any data set in VOC layout: images, image-level labels, masks, and batches of one shape."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from networks import Geometry
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
MAX_ASPECT = 3.0  # longer images are squeezed to this, so that the maps of a data set have a bounded size


class Sample(NamedTuple):
    """One training sample.

    Attributes:
        name: of the image.
        image: (3, H, W) float32, normalised; mirrored if ``flipped``.
        labels: (C,) float32 0/1.
        flipped: whether the image is mirrored.
    """

    name: str
    image: Tensor
    labels: Tensor
    flipped: bool


class VOCFolder(Dataset[Sample]):
    """Images of one split of a folder in VOC layout, with image-level labels.

    ``JPEGImages/NAME.jpg``, ``ImageSets/Segmentation/SPLIT_cls.txt`` with lines ``NAME ID [ID ...]`` (0-based classes),
    ``classes.txt`` with one class name a line (without it, VOC's 20 are meant), ``SegmentationClass/NAME.png`` for
    scoring only. Without ``SPLIT_cls.txt`` the labels are read from the masks.

    Args:
        root: the folder.
        split: ``train``, ``val`` or another list in ``ImageSets/Segmentation``.
        negatives: a further list of images that show none of the classes, or None.
    """

    def __init__(self, root: Path, split: str, *, negatives: str | None = None) -> None:
        self.root = root
        self.split = split
        if not (root / "JPEGImages").is_dir():
            raise SystemExit(f"{root} is not in VOC layout: expected a folder JPEGImages in it (--voc-root)")
        classes_file = root / "classes.txt"
        self.classes = classes_file.read_text().split() if classes_file.exists() else list(VOC_CLASSES)
        label_ids = self._read_labels()
        if negatives is not None:
            label_ids.update((name, []) for name in self._read_list(f"{negatives}.txt"))
        self.names = list(label_ids)
        missing = [name for name in self.names if not self.image_path(name).exists()]
        if missing:
            raise SystemExit(f"{len(missing)} of {len(self.names)} images are missing, first {missing[0]}.jpg")
        self.labels = torch.zeros(len(self.names), len(self.classes))
        for row, ids in enumerate(label_ids.values()):
            self.labels[row, ids] = 1
        self.sizes: dict[str, tuple[int, int]] = {}  # of the network's input, (H, W); filled by prepare()

    def prepare(self, short_side: int, geometry: Geometry, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the size every image is brought to: short side as given, aspect kept up to one cell, whole cells."""
        self.geometry = geometry
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        for name in self.names:
            with Image.open(self.image_path(name)) as image:
                width, height = image.size
            scale = short_side / min(width, height)
            limit = short_side * MAX_ASPECT
            self.sizes[name] = (geometry.side(min(height * scale, limit)), geometry.side(min(width * scale, limit)))

    @property
    def map_size(self) -> tuple[int, int]:
        """(H, W) in cells that holds the score map of every image."""
        heights, widths = zip(*self.sizes.values(), strict=True)
        return self.geometry.cells(max(heights)), self.geometry.cells(max(widths))

    def own_cells(self, name: str, maps: Tensor) -> Tensor:
        """Maps (..., H, W) in the frame of `map_size` to the cells (..., h, w) that the image fills, its top left."""
        height, width = (self.geometry.cells(side) for side in self.sizes[name])
        return maps[..., :height, :width]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: tuple[int, bool]) -> Sample:
        """Sample ``item[0]``, mirrored if ``item[1]``: `ShapeBatches` decides both."""
        index, flipped = item
        image = self.load(self.names[index])
        return Sample(self.names[index], image.flip(-1) if flipped else image, self.labels[index], flipped)

    def load(self, name: str) -> Tensor:
        """(3, H, W) float32, resized (bicubic, as the paper's releases do) and normalised."""
        height, width = self.sizes[name]
        with Image.open(self.image_path(name)) as image:
            pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        return (tensor - self.mean) / self.std

    def image_path(self, name: str) -> Path:
        """Where the photograph is."""
        return self.root / "JPEGImages" / f"{name}.jpg"

    def mask(self, name: str) -> Tensor:
        """(H, W) int64 truth: 0 background, class c is c + 1, 255 ignored."""
        path = self.root / "SegmentationClass" / f"{name}.png"
        if not path.exists():
            raise SystemExit(f"{path} does not exist; masks are needed for scoring, and for labels without *_cls.txt")
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise SystemExit(f"{name}.png: expected an indexed label image, got mode {image.mode}")
            return torch.from_numpy(np.asarray(image).astype(np.int64))

    def class_ids(self, name: str) -> list[int]:
        """0-based classes of an image."""
        if not hasattr(self, "_row"):
            self._row = {key: row for row, key in enumerate(self.names)}
        return self.labels[self._row[name]].nonzero().flatten().tolist()

    def _read_list(self, filename: str) -> list[str]:
        path = self.root / "ImageSets" / "Segmentation" / filename
        if not path.exists():
            raise SystemExit(f"{path} does not exist; expected one image name a line")
        return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]

    def _read_labels(self) -> dict[str, list[int]]:
        path = self.root / "ImageSets" / "Segmentation" / f"{self.split}_cls.txt"
        if path.exists():
            rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
            labels = {row[0]: [int(c) for c in row[1:]] for row in rows}
        else:
            labels = {}
            for name in self._read_list(f"{self.split}.txt"):
                labels[name] = [int(v) - 1 for v in self.mask(name).unique() if 0 < v < 255]
        for name, ids in labels.items():
            if any(not 0 <= c < len(self.classes) for c in ids):
                raise SystemExit(f"{name} has the class ids {ids}; expected 0..{len(self.classes) - 1}")
        return labels


class ShapeBatches(Sampler[list[tuple[int, bool]]]):
    """Shuffled batches of images that share a shape, each mirrored with probability 1/2.

    Order and mirroring depend on ``seed`` and ``epoch`` alone, so a resumed run sees what an uninterrupted one sees.
    """

    def __init__(self, data: VOCFolder, batch_size: int, *, seed: int = 0, training: bool = True) -> None:
        self.data, self.batch_size, self.seed, self.training = data, batch_size, seed, training
        self.epoch = 0

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        draw = random.Random(f"{self.seed}/{self.epoch}")
        order = list(range(len(self.data)))
        if self.training:
            draw.shuffle(order)
        by_shape: dict[tuple[int, int], list[tuple[int, bool]]] = defaultdict(list)
        for index in order:
            by_shape[self.data.sizes[self.data.names[index]]].append((index, self.training and draw.random() < 0.5))
        batches = [
            group[start : start + self.batch_size]
            for group in by_shape.values()
            for start in range(0, len(group), self.batch_size)
        ]
        if self.training:
            draw.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        counts: dict[tuple[int, int], int] = defaultdict(int)
        for size in self.data.sizes.values():
            counts[size] += 1
        return sum(-(-count // self.batch_size) for count in counts.values())


def collate(samples: list[Sample]) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Names, images (B, 3, H, W), labels (B, C) float, flipped (B,) bool."""
    names, images, labels, flipped = zip(*samples, strict=True)
    return list(names), torch.stack(images), torch.stack(labels), torch.tensor(flipped)
