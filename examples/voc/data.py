"""Any data set in VOC layout: photographs, image-level labels, masks."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from class_names import read_classes
from files import write_image
from images import DRAWN, load, look, photograph, png, turned, undecided
from lists import Images, read_labels, read_names
from PIL import Image
from torch import Tensor

from oaa_lib.plotting import voc_palette

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VOCFolder:
    """One split of a folder in VOC layout.

    ``JPEGImages/NAME.jpg`` (or .png, ...), ``ImageSets/Segmentation/SPLIT_cls.txt`` with lines ``NAME ID [ID ...]``
    (0-based classes), ``classes.txt`` with one class name a line (without it, VOC's 20 are meant),
    ``SegmentationClass/NAME.png``, or ``SegmentationClassAug/NAME.png`` where that exists, for scoring only. Without
    ``SPLIT_cls.txt`` the labels are read from the masks; ``prepare.py`` writes such lists. Photographs are upright, as
    their EXIF entry says, and so are all sizes, maps and masks.

    Args:
        root: the folder.
        split: a list in ``ImageSets/Segmentation``.
        negatives: a further list of images that show none of the classes, or None.
        labelled: whether image-level labels are needed; without, the list of names is enough.

    Attributes:
        names: of the images.
        labels: (N, C) float32 0/1.
        classes: their names.
    """

    def __init__(self, root: Path, split: str, *, negatives: str | None = None, labelled: bool = True) -> None:
        self.root = root
        self.split = split
        if not (root / "JPEGImages").is_dir():
            raise SystemExit(f"{root} is not in VOC layout: expected a folder JPEGImages in it (--voc-root)")
        classes_file = root / "classes.txt"
        self.classes = read_classes(classes_file) if classes_file.exists() else list(VOC_CLASSES)
        self._mask_folders = [f for f in ("SegmentationClass", "SegmentationClassAug") if (root / f).is_dir()]
        self._elsewhere: dict[str, Path] = {}  # photographs that are not JPEGImages/NAME.jpg
        images = Images(root / "JPEGImages")
        label_ids = self._read_labels(images) if labelled else {name: [] for name in self._read_list(split, images)}
        if negatives is not None:
            empty = self._read_list(negatives, images)
            shown = [name for name in empty if label_ids.get(name)]
            if shown:
                raise SystemExit(
                    f"--negatives {negatives}: expected images that show no class, but {len(shown)} have labels in "
                    f"{split}, first {shown[0]}"
                )
            label_ids.update((name, []) for name in empty)
        if not label_ids:
            raise SystemExit(f"{self._list_path(split)} names no image")
        self.names = list(label_ids)
        self.labels = torch.zeros(len(self.names), len(self.classes))
        for row, ids in enumerate(label_ids.values()):
            self.labels[row, ids] = 1
        self._ids = label_ids

    def __len__(self) -> int:
        return len(self.names)

    def image_path(self, name: str) -> Path:
        """Where the photograph is."""
        return self._elsewhere.get(name, self.root / "JPEGImages" / f"{name}.jpg")

    def photograph(self, name: str) -> Image.Image:
        """The decoded image, RGB, upright."""
        with self._readable(name):
            return photograph(self.image_path(name))

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"{self.image_path(name)} cannot be read ({error}); replace it, or take it off the list"
            ) from error

    def size(self, name: str) -> tuple[int, int]:
        """(H, W) of the photograph, upright."""
        with self._readable(name):
            return look(self.image_path(name)).size

    def drawn_size(self, name: str) -> tuple[int, int]:
        """(H, W) of what another program drew on the photograph, refused where its size would not show the way up."""
        with self._readable(name):
            seen = look(self.image_path(name))
        if not seen.shows_turn:
            raise SystemExit(f"{self.image_path(name)}: what belongs to it cannot be used: {undecided(seen)}")
        return seen.size

    def mask(self, name: str) -> Tensor:
        """(H, W) int64 truth: 0 background, class c is c + 1, 255 ignored."""
        path = self._mask_path(name)
        if path is None:
            raise SystemExit(
                f"there is no mask {name}.png in {self.root}/SegmentationClass; masks are needed for scoring, and for "
                "labels without *_cls.txt"
            )
        label = read_label(path)
        with self._readable(name):
            seen = look(self.image_path(name))
        if tuple(label.shape) not in (seen.size, seen.stored):
            raise SystemExit(f"{path}: expected the photograph's size {seen.size}, got {tuple(label.shape)}")
        if ((label > len(self.classes)) & (label != 255)).any():
            raise SystemExit(f"{path}: expected 0..{len(self.classes)} and 255 (ignored), got {int(label.max())}")
        if seen.orientation == 1:
            return label
        try:
            return torch.from_numpy(turned(label.numpy().astype(np.uint8), seen).astype(np.int64))
        except ValueError as error:
            raise SystemExit(f"{path}: {error}") from error

    def has_mask(self, name: str) -> bool:
        """Whether the truth is there."""
        return self._mask_path(name) is not None

    def check_masks(self) -> None:
        """End where an image has no mask."""
        if missing := [name for name in self.names if not self.has_mask(name)]:
            raise SystemExit(
                f"{len(missing)} of {len(self)} images of {self.split} have no mask, first {missing[0]}.png"
            )

    def _mask_path(self, name: str) -> Path | None:
        paths = [png(self.root / folder, name) for folder in self._mask_folders]
        return next((path for path in paths if path.exists()), None)

    def class_ids(self, name: str) -> list[int]:
        """0-based classes of an image."""
        return self._ids[name]

    def _list_path(self, split: str) -> Path:
        return self.root / "ImageSets" / "Segmentation" / f"{split}.txt"

    def _read_list(self, split: str, images: Images) -> list[str]:
        path = self._list_path(split)
        if not path.exists():
            raise SystemExit(f"{path} does not exist; expected one image name a line")
        lines = read_names(path, images)
        self._locate(lines, path, images)
        return list(lines)

    def _read_labels(self, images: Images) -> dict[str, list[int]]:
        path = self._list_path(f"{self.split}_cls")
        if not path.exists():
            values = {name: self.mask(name).unique() for name in self._read_list(self.split, images)}
            return {name: [int(v) - 1 for v in found if 0 < v < 255] for name, found in values.items()}
        labels = read_labels(path, images, len(self.classes))
        self._locate({name: line for name, (line, _) in labels.items()}, path, images)
        self._check_first_id(labels, path)
        return {name: ids for name, (_, ids) in labels.items()}

    def _check_first_id(self, labels: dict[str, tuple[int, list[int]]], path: Path) -> None:
        """End where no image has the class 0 and the first masks all show that the list counts from 1."""
        labelled = {name: ids for name, (_, ids) in labels.items() if ids}
        if not labelled or min(map(min, labelled.values())) == 0:
            return
        shown = {}
        for name in islice((name for name in labelled if self.has_mask(name)), 16):
            with suppress(SystemExit):  # a damaged mask is found where it is needed
                shown[name] = [int(v) - 1 for v in self.mask(name).unique() if 0 < v < 255]
        if shown and all(ids == [c - 1 for c in labelled[name]] for name, ids in shown.items()):
            name, ids = next(iter(shown.items()))
            raise SystemExit(
                f"{path}, line {labels[name][0]}: {name} has the class ids {labelled[name]}, its mask shows {ids}; "
                "expected ids that count from 0"
            )

    def _locate(self, lines: dict[str, int], path: Path, images: Images) -> None:
        """Find the photographs of a list that names each in a line; end if some are missing."""
        missing = []
        for name in lines:
            found = images.of(name)
            if len(found) > 1:
                several = ", ".join(file.name for file in found)
                raise SystemExit(f"{path}, line {lines[name]}: expected one image {name}, found {several}")
            if not found or not found[0].exists():
                missing.append(name)
            elif found[0].name != f"{name}.jpg":
                self._elsewhere[name] = found[0]
        if missing:
            first = missing[0]
            raise SystemExit(
                f"{len(missing)} of {len(lines)} images are missing, first {first}.jpg ({path}, line {lines[first]})"
            )


def read_label(path: Path) -> Tensor:
    """(H, W) int64 of an indexed or grey label image."""
    try:
        image = load(path, DRAWN)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read ({error}); make it again") from error
    if image.mode not in ("P", "L"):
        raise SystemExit(f"{path}: expected an indexed label image, got mode {image.mode}; see prepare.py")
    return torch.from_numpy(np.asarray(image).astype(np.int64))


def write_label(path: Path, label: np.ndarray) -> None:
    """One label image (H, W) with VOC's palette, as VOC's server takes it; it appears whole or not at all."""
    image = Image.fromarray(label.astype(np.uint8), mode="P")
    image.putpalette(voc_palette().tobytes())
    write_image(path, image)
