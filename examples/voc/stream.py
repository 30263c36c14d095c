"""The endless stream of training batches, which goes on at any step as if it had never been stopped."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from samples import Sample
from stopping import leave_signals_alone
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from oaa_lib import View


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

    def to(self, device: torch.device) -> "Part":
        """With images and targets on a device, which need not be waited for."""
        images, targets = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.targets))
        return self._replace(images=images, targets=targets)


def last_pass(iterations: int, batch_size: int, images: int) -> range:
    """The steps of the last whole pass over the images, or of the only one."""
    passes = max(iterations * batch_size // images, 1)
    return range((passes - 1) * images // batch_size, -(-passes * images // batch_size))


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

    def __init__(self, batch_size: int, first: int, last: int, *, rank: int, world: int) -> None:
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
    rank: int,
    world: int,
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
