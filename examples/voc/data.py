"""Any data set in VOC layout: photographs, image-level labels, masks; and the endless stream of training batches."""

import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from images import DRAWN, load, look, photograph, png, turned, undecided
from lists import Images, read_classes, read_labels, read_names
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from oaa_lib import View
from oaa_lib.augmentation import transform_with_view
from oaa_lib.plotting import voc_palette

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
MAX_ASPECT = 3.0  # longer images are squeezed to this, so that one panorama does not decide the memory of a batch


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


def write_image(path: Path, image: Image.Image) -> None:
    """A PNG that appears whole or not at all."""
    with whole_file(path) as partial:
        image.save(partial, format="PNG")


def write_text(path: Path, text: str) -> None:
    """A small file that appears whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` once it is complete, and goes if it cannot be completed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several processes may write it
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def ends_with(what: str, advice: str, *others: type[Exception]) -> Iterator[None]:
    """End with a sentence where a file cannot be read or written, a full disk included, or at other errors."""
    try:
        yield
    except (OSError, *others) as error:
        reason = str(error).split("\n")[0]
        raise SystemExit(f"{what}: {reason}; {advice}") from error


def to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, H, W) float32, normalised per channel."""
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def network_size(size: tuple[int, int], short_side: int, geometry: Any) -> tuple[int, int]:
    """(H, W) that an image is brought to: short side as given, aspect kept up to one cell, whole cells."""
    scale, limit = short_side / min(size), short_side * MAX_ASPECT
    height, width = (geometry.side(min(side * scale, limit)) for side in size)
    return height, width


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


class Part(NamedTuple):
    """The images of a batch that have one shape.

    Attributes:
        names: of the B images.
        views: B of them.
        images: (B, 3, H, W) float32.
        targets: (B, C) float32 or (B, H, W) int64.
    """

    names: list[str]
    views: list[View]
    images: Tensor
    targets: Tensor


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


class Drawn(Dataset[Sample | SystemExit]):
    """The images of a stream by their position in it, with random numbers that depend on seed and position alone.

    So a training that is resumed at any step, with any number of workers or processes, sees what an uninterrupted one
    sees. The stream is one shuffled pass over the data set after the other.
    """

    def __init__(self, images: Dataset[Sample], *, seed: int) -> None:
        self.images, self.seed = images, seed
        self._epoch, self._order = -1, [0]

    def __getitem__(self, position: int) -> Sample | SystemExit:
        """The sample, or what is wrong with its files: a loader's process could not tell it by raising."""
        epoch, place = divmod(position, len(self.images))  # type: ignore[arg-type]
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.images)))  # type: ignore[arg-type]
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed << 40) + position)
            try:
                return self.images[self._order[place]]
            except SystemExit as bad_file:
                return bad_file


class Positions(Sampler[list[int]]):
    """Positions of each step's images, this process's share of them."""

    def __init__(self, batch_size: int, first: int, last: int, *, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.first, self.last, self.rank, self.world = batch_size, first, last, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            batch = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield list(batch[self.rank :: self.world])

    def __len__(self) -> int:
        return self.last - self.first


def parts_of_one_shape(samples: list[Sample | SystemExit]) -> list[Part] | SystemExit:
    """A batch as few stacks: images are neither cropped nor padded to one shape. Or what is wrong with a file."""
    by_shape: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        if isinstance(sample, SystemExit):
            return sample
        by_shape.setdefault(tuple(sample.image.shape), []).append(sample)
    return [
        Part(list(names), list(views), torch.stack(images), torch.stack(targets))
        for names, views, images, targets in (zip(*group, strict=True) for group in by_shape.values())
    ]


def make_loader(
    images: Dataset[Sample],
    batch_size: int,
    first: int,
    last: int,
    *,
    seed: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
) -> DataLoader[Any]:
    """The batches of steps ``first .. last - 1``, each a list of `Part`, or a `SystemExit` to raise."""
    if batch_size < world:
        raise SystemExit(f"--batch-size {batch_size}: expected at least one image for each of {world} processes")
    positions = Positions(batch_size, first, last, rank=rank, world=world)
    return DataLoader(
        Drawn(images, seed=seed),
        batch_sampler=positions,
        collate_fn=parts_of_one_shape,
        num_workers=workers,
        worker_init_fn=leave_signals_alone,
        pin_memory=torch.cuda.is_available(),
    )


def leave_signals_alone(_: int) -> None:
    """A loader's process outlives Ctrl-C, so that the main one can end its step and write a checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def on_all_cores(call: Callable[[Any], Any], items: Sequence[Any], description: str) -> list[Any]:
    """``[call(item) for item in items]`` on all cores, with a progress bar; ``call`` is a function of a module."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    from os import cpu_count

    from tqdm import tqdm

    workers = min(cpu_count() or 1, max(len(items) // 8, 1))
    if workers == 1:
        return [call(item) for item in tqdm(items, desc=description, leave=False)]
    with ProcessPoolExecutor(workers, get_context("forkserver"), torch.set_num_threads, (1,)) as pool:  # one core each
        return list(tqdm(pool.map(call, items, chunksize=4), total=len(items), desc=description, leave=False))


def alongside(call: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """``call(item)`` of each, as they get done, on all cores while this process makes the next ones.

    An item is drawn when one of two places for each core is free, so that memory stays flat. Ctrl-C is left to this
    process; what is under way is brought to its end.
    """
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import forkserver, get_context
    from os import cpu_count

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()  # all workers are forked from there, and inherit that Ctrl-C is ignored
    signal.signal(signal.SIGINT, before)
    workers = cpu_count() or 1
    running: set[Any] = set()
    try:
        with ProcessPoolExecutor(workers, get_context("forkserver"), torch.set_num_threads, (1,)) as pool:
            for item in items:
                running.add(pool.submit(call, item))
                done, running = wait(running, 0 if len(running) < 2 * workers else None, FIRST_COMPLETED)
                yield from (future.result() for future in done)
            while running:
                done, running = wait(running, None, FIRST_COMPLETED)
                yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise SystemExit(
            "a process beside this one was ended, by a signal or for want of memory; the same command goes on from "
            "there"
        ) from error
