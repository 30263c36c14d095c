"""What `pseudo_label_from_cues` costs, against an arg-max over the channels of all classes in numpy."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import interpolate

from benchmarks.data import CLASSES
from benchmarks.timing import Row, take_turns
from oaa_lib import pseudo_label_from_cues

HEIGHT, WIDTH = 375, 500


def pseudo_labels(seconds: float) -> Iterator[Row]:
    """One image with one to three classes, and all three one after the other: it is given one image at a time."""
    cues = [_cue(count) for count in (1, 2, 3)]
    for batch in ([cues[0]], [cues[1]], [cues[2]], cues):
        arrays = [(attention.numpy(), classes, saliency.numpy()) for attention, classes, saliency in batch]
        ours, dense = take_turns(
            lambda batch=batch: [pseudo_label_from_cues(*cue) for cue in batch],
            lambda arrays=arrays: [dense_label(*cue) for cue in arrays],
            seconds=seconds,
            turn=0.05,
        )
        name = "3 images in turn" if len(batch) > 1 else f"{len(batch[0][1])} of 20 classes"
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


def _cue(count: int) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Attention of ``count`` classes and saliency, smooth as a network's maps are once they have been resized."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count + 1, 1, 12, 16, generator=generator) - 0.3
    maps = interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")[:, 0].clamp(min=0)
    maps /= maps.amax((1, 2), keepdim=True)
    return maps[1:], list(range(count)), maps[0]


def _numpy(cue):
    return cue[0].numpy(), cue[1], cue[2].numpy()
