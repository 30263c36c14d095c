"""What `AttentionAccumulator.update` costs: against PNG files, copies, a training step, a data set's size, a file."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.data import CLASSES, SIDE, batches, labels, logits, score_maps
from benchmarks.timing import HOST, Device, Measured, Row, take_turns
from oaa_lib import AttentionAccumulator, CAMHead

IMAGES = 10_582  # VOC's training set


def png(seconds: float) -> Iterator[Row]:
    """One 8-bit PNG a pair is read, maxed and written, as the public programs do."""
    shown = labels(IMAGES)
    for size, target in ((16, 40), (1, 7)):
        accumulator = AttentionAccumulator(shown, (SIDE, SIDE))
        with tempfile.TemporaryDirectory() as folder:
            update, loop = _updates(accumulator, shown, size), _png_loop(shown.numpy(), size, Path(folder))
            ours, files = take_turns(update, loop, seconds=seconds, turn=0.05)
        pairs = float(np.mean([shown[batch].sum() for batch in batches(IMAGES, size)]))
        ratio = files.median / ours.median
        yield Row(
            f"update a pair, batch {size}, against PNG",
            ours.per(pairs),
            files.per(pairs),
            ratio,
            "times faster",
            target,
            False,
        )


def floor(seconds: float) -> Iterator[Row]:
    """The pairs' float maps are read once, their stored bytes read and written once."""
    shown = labels(IMAGES)
    for size in (16, 256):
        accumulator = AttentionAccumulator(shown, (SIDE, SIDE))
        pairs = int(shown[batches(IMAGES, size)[0]].sum())
        source, stored = torch.rand(pairs, SIDE, SIDE), torch.zeros(pairs, SIDE, SIDE, dtype=torch.uint8)
        copy, read = torch.empty_like(source), torch.empty_like(stored)

        def copies(source=source, stored=stored, copy=copy, read=read) -> None:
            copy.copy_(source)
            read.copy_(stored)
            stored.copy_(read)

        ours, least = take_turns(_updates(accumulator, shown, size), copies, seconds=seconds)
        ratio = ours.median / least.median
        yield Row(f"update, batch {size}, against copies", ours, least, ratio, "times", None, True)


def launch_and_work(seconds: float, device: Device = HOST) -> Iterator[Row]:
    """How long an update keeps the host of an accelerator, and how long the accelerator."""
    shown = labels(IMAGES)
    for size in (5, 16, 256):
        accumulator = AttentionAccumulator(shown, (SIDE, SIDE), device=device.name)
        launch, work = device.launch_and_work(_updates(accumulator, shown, size), seconds)
        ratio = launch.median / work.median
        yield Row(f"update, batch {size}, host against device", launch, work, ratio, "times", None, True)


def training_step(seconds: float, device: Device = HOST, side: int = 224) -> Iterator[Row]:
    """A step of a VGG-16 classifier, batch 5 at 224 x 224, stride 8."""
    network = nn.Sequential(_vgg16(), CAMHead(512, CLASSES)).to(device.name)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    images, shown = torch.randn(5, 3, side, side, device=device.name), labels(IMAGES)
    targets = shown[:5].float().to(device.name)

    def step() -> None:
        loss = binary_cross_entropy_with_logits(network(images).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    accumulator = AttentionAccumulator(shown, (SIDE, SIDE), device=device.name)
    calls = (_updates(accumulator, shown, 5), step)
    ours, whole = take_turns(*(device.finishing(call) for call in calls), seconds=seconds)
    share = 100 * ours.median / whole.median
    yield Row("update, share of a VGG-16 step", ours, whole, share, "percent", 0.5, True)


def scale(seconds: float, largest: int = 1_000_000) -> Iterator[Row]:
    """The same batches from small and large data sets; what it takes to build one, and to hold it."""
    few_shown, shown = labels(1000), labels(largest)
    few = AttentionAccumulator(few_shown, (SIDE, SIDE)).reset()
    start = time.perf_counter()
    many = AttentionAccumulator(shown, (SIDE, SIDE))
    built = time.perf_counter() - start
    many.reset()  # writes every page, as an epoch would
    small, large = take_turns(_updates(few, few_shown, 16), _updates(many, shown, 16), seconds=seconds)
    ratio = large.median / small.median
    name = f"update, {largest:,} images against 1,000"
    yield Row(name, large, small, ratio, "times", 1.2, True)
    yield Row(f"construction, {largest:,} images", Measured.once(built), Measured.once(0), built, "seconds", 5, True)
    pairs = many.pairs.num_pairs
    kept = [value for value in many.state_dict().values() if isinstance(value, torch.Tensor)]
    more = sum(value.numel() * value.element_size() for value in kept) / pairs - SIDE * SIDE
    yield Row(
        "memory beside the maps, a pair", Measured.once(more), Measured.once(SIDE * SIDE), more, "bytes", 64, True, "B"
    )


def mapped(seconds: float) -> Iterator[Row]:
    """The maps in a file, against in memory."""
    shown = labels(IMAGES)
    memory = AttentionAccumulator(shown, (SIDE, SIDE)).reset()
    with tempfile.TemporaryDirectory() as folder:
        file = AttentionAccumulator(shown, (SIDE, SIDE), path=Path(folder) / "maps").reset()
        on_disk, in_memory = take_turns(_updates(file, shown, 16), _updates(memory, shown, 16), seconds=seconds)
    ratio = on_disk.median / in_memory.median
    yield Row("update, mapped file against memory", on_disk, in_memory, ratio, "times", None, True)


def _updates(accumulator: AttentionAccumulator, shown: torch.Tensor, size: int) -> Callable[[], object]:
    """Of ``size`` images each, with score maps that lie where the accumulator's maps do."""
    device = accumulator.device
    maps = score_maps(size).to(device)
    given = itertools.cycle([(batch, maps, logits(shown[batch]).to(device)) for batch in batches(len(shown), size)])
    return lambda: accumulator.update(*next(given))


def _png_loop(shown: np.ndarray, size: int, folder: Path) -> Callable[[], None]:
    indices, attention = (
        itertools.cycle(batches(len(shown), size)),
        score_maps(size).clamp(0, 1).mul(255).byte().numpy(),
    )
    for index in range(len(shown)):
        for category in np.flatnonzero(shown[index]):
            Image.fromarray(attention[0, category]).save(folder / f"{index}_{category}.png")

    def loop() -> None:
        for position, index in enumerate(next(indices)):
            for category in np.flatnonzero(shown[index]):
                path = folder / f"{index}_{category}.png"
                with Image.open(path) as file:
                    kept = np.asarray(file)
                Image.fromarray(np.maximum(kept, attention[position, category])).save(path)

    return loop


def _vgg16() -> nn.Sequential:
    """The convolutions of VGG-16 without its last two poolings: 512 features at stride 8."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, 512, 512, 512):
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)
