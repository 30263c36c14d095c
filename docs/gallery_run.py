"""The training behind the gallery: classifier with accumulation, integral model, segmentation networks; seeded.

Everything is trained on drawn images with the network and the helpers of examples/quickstart.py.
"""

from typing import NamedTuple

import quickstart
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oaa_lib

CPU = torch.device("cpu")
EPOCHS, INTEGRAL_EPOCHS, SEGMENTATION_EPOCHS = 18, 8, 6
STRONG = 0.5  # attention above it counts as looking there


class Diary(NamedTuple):
    """What one epoch was like: shares in [0, 1]."""

    pass_rate: Tensor  # (C,) of the maps of each class, those that the gate let pass
    similarity: float  # of a pair's map with its latest one before, mean over the maps that passed
    object: dict[str, float]  # share of the objects' cells where attention is strong
    background: dict[str, float]  # share of the other cells where it is


class Run(NamedTuple):
    """All that the plots need."""

    images: Tensor
    labels: Tensor
    masks: Tensor
    cues: dict[str, Tensor]  # attention (N, C, h, w) by name
    watched: list[int]  # images whose maps were kept after each epoch, in these two:
    latest: oaa_lib.Snapshots
    largest: oaa_lib.Snapshots
    diary: list[Diary]


def train(num_images: int = 200, watched: int = 12, seed: int = 0) -> Run:
    """Classifier, accumulation and integral model; keeps the maps of the first images that show something."""
    images, labels, masks = quickstart.draw_data(num_images, seed)
    images = images.contiguous(memory_format=torch.channels_last)  # faster on a CPU
    network, optimizer, schedule, order = quickstart.start_training(EPOCHS, seed, CPU)
    size = (quickstart.SIZE // 4, quickstart.SIZE // 4)
    latest, average, largest = accumulators = [
        oaa_lib.AttentionAccumulator(labels, size, fusion=fusion)
        for fusion in ("latest", "mean", "max")
    ]
    chosen = labels.any(1).nonzero()[:watched, 0].tolist()
    moving, growing = (
        oaa_lib.Snapshots(accumulator, chosen, steps=range(1, EPOCHS + 1))
        for accumulator in (latest, largest)
    )
    # A pair's own cells: where most of the cell is the object.
    truth = torch.stack(
        [(masks == c + 1).float() for c in range(labels.shape[1])], dim=1
    )
    truth = F.adaptive_avg_pool2d(truth, size)[labels] > 0.5

    everything = range(num_images)
    diary: list[Diary] = []
    offered = accepted = torch.zeros(labels.shape[1])
    for epoch in range(1, EPOCHS + 1):
        before, counts = latest[everything][labels], latest.counts[labels]
        for indices, views, batch in quickstart.shuffled_batches(images, order):
            out = network(batch)
            loss = F.binary_cross_entropy_with_logits(
                out.logits, labels[indices].float()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for accumulator in accumulators:
                accumulator.update(indices, out.score_maps, out.logits, views)
        schedule.step()
        moving.take(epoch)
        growing.take(epoch)
        now = largest.statistics()
        maps = {
            "latest": latest[everything][labels],
            "mean": average[everything][labels],
            "max": largest[everything][labels],
        }
        similarity = oaa_lib.attention_similarity(before, maps["latest"])
        passed = latest.counts[labels] > counts
        diary.append(
            Diary(
                (now.accepted - accepted) / (now.offered - offered),
                similarity[passed].nanmean().item(),
                {
                    name: (values[truth] > STRONG).float().mean().item()
                    for name, values in maps.items()
                },
                {
                    name: (values[~truth] > STRONG).float().mean().item()
                    for name, values in maps.items()
                },
            )
        )
        offered, accepted = now.offered, now.accepted

    soft_labels = largest[everything]
    integral, optimizer, schedule, order = quickstart.start_training(
        INTEGRAL_EPOCHS, seed, CPU
    )
    for _ in range(INTEGRAL_EPOCHS):
        for indices, views, batch in quickstart.shuffled_batches(images, order):
            target = largest.soft_labels(indices, views)
            loss = oaa_lib.hybrid_loss(
                integral(batch).score_maps, target, threshold=quickstart.CONSTRAINT
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    cues = {
        "CAM": quickstart.attention_of(network, images, CPU),
        "OAA, mean": average[everything],
        "OAA, max": soft_labels,
        "OAA+": quickstart.attention_of(integral, images, CPU),
    }
    return Run(images, labels, masks, cues, chosen, moving, growing, diary)


def sweeps(
    run: Run, name: str
) -> tuple[oaa_lib.ThresholdSweep, oaa_lib.ThresholdSweep]:
    """Pixel counts of the even and of the odd images at every threshold."""
    halves = (
        oaa_lib.ThresholdSweep(run.labels.shape[1]),
        oaa_lib.ThresholdSweep(run.labels.shape[1]),
    )
    full = F.interpolate(run.cues[name], run.masks.shape[1:], mode="bilinear")
    for i, shown in enumerate(run.labels):
        halves[i % 2].update(full[i, shown], shown.nonzero()[:, 0], run.masks[i])
    return halves


def segment(
    run: Run, name: str, background: float, test_images: Tensor, seed: int = 0
) -> Tensor:
    """Train a small segmentation network on the pseudo labels of a cue; its label images (M, H, W) of other images."""
    pseudo_labels = quickstart.make_pseudo_labels(
        run.cues[name], run.labels, background
    )
    torch.manual_seed(seed)
    classes = run.labels.shape[1] + 1
    network = nn.Sequential(
        quickstart.Network().backbone,
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.ReLU(),
    )
    network.extend(
        [nn.Conv2d(64, classes, 1), nn.Upsample(scale_factor=4, mode="bilinear")]
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=quickstart.LEARNING_RATE)
    order = torch.Generator().manual_seed(seed)
    for _ in range(SEGMENTATION_EPOCHS):
        for indices in torch.randperm(len(run.images), generator=order).split(
            quickstart.BATCH_SIZE
        ):
            loss = F.cross_entropy(
                network(run.images[indices]), pseudo_labels[indices], ignore_index=255
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        return torch.cat([network(batch).argmax(1) for batch in test_images.split(50)])
