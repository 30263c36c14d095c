"""What `pseudo_label_from_cues` costs, against an arg-max over the channels of all classes in numpy."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.data import CLASSES
from benchmarks.timing import Row, take_turns
from oaa_lib import pseudo_label_from_cues

HEIGHT, WIDTH = 375, 500


def pseudo_labels(seconds: float) -> Iterator[Row]:
    """One image with one to three classes, and a batch of all three."""
    cues = []
    for count in (1, 2, 3):
        generator = torch.Generator().manual_seed(count)
        attention = torch.rand(count, HEIGHT, WIDTH, generator=generator)
        cues.append((attention, list(range(count)), torch.rand(HEIGHT, WIDTH, generator=generator)))
    for batch in ([cues[0]], [cues[1]], [cues[2]], cues):
        arrays = [(attention.numpy(), classes, saliency.numpy()) for attention, classes, saliency in batch]
        ours, dense = take_turns(
            lambda batch=batch: [pseudo_label_from_cues(*cue) for cue in batch],
            lambda arrays=arrays: [dense_label(*cue) for cue in arrays],
            seconds=seconds / 2,
        )
        name = "batch of 3 images" if len(batch) > 1 else f"{len(batch[0][1])} classes"
        ratio = dense.median / ours.median
        yield Row(f"pseudo label, {name}", ours, dense, ratio, "times faster", 5, False)
    assert all((pseudo_label_from_cues(*cue).numpy() == dense_label(*_numpy(cue))).all() for cue in cues)


def dense_label(attention: np.ndarray, classes: list[int], saliency: np.ndarray) -> np.ndarray:
    """The rule of `pseudo_label_from_cues`, word by word on (21, H, W)."""
    channels = np.zeros((CLASSES + 1, HEIGHT, WIDTH), dtype=np.float32)
    channels[0] = 1 - saliency
    for values, category in zip(attention, classes, strict=True):
        channels[category + 1] = (values - values.min()) / (values.max() - values.min())
    kept = np.where(channels < 0.3, 0, channels)
    label = kept.argmax(0)
    conflict = (channels > 0.9).sum(0) >= 2
    uncertain = (label == 0) & ((saliency >= 32 / 255) | (channels[1:] > 0.8).any(0))
    label[conflict | uncertain] = 255
    if ((label != 0) & (label != 255)).mean() < 0.01:
        label[:] = 255
    return label


def _numpy(cue):
    return cue[0].numpy(), cue[1], cue[2].numpy()
