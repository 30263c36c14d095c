"""Which pairs of a run are worth looking at: those that were watched, the largest gains, the worst failures."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from data import VOCFolder
from finished_run import SHOWN, FinishedRun, Method
from parallel import on_all_cores
from torch import Tensor

from oaa_lib import ConfusionMatrix


@dataclass
class Pair:
    """An image and one of its classes.

    Attributes:
        name: of the image.
        place: of the class among the image's classes.
        kinds: why it is shown: "watched", "gain", "failure".
        iou: of the class in this image, by method.
        gain: of accumulation over the CAM, in IoU; None where that is not known.
    """

    name: str
    place: int
    kinds: list[str]
    iou: dict[str, float | None]
    gain: float | None = None


def class_ious(
    attention: Tensor, class_ids: Sequence[int], truth: Tensor, threshold: float, num_classes: int
) -> list[float | None]:
    """IoU of each of an image's classes: a pixel takes the class of its strongest map, as in the scores of all images.

    Args:
        attention: (K, H, W) uint8.
        class_ids: K.
        truth: (H, W) integer.
        threshold: below which a pixel is background.
        num_classes: of the data set.
    """
    strength, which = attention.max(0)
    shown = torch.where(strength >= 255 * threshold - 1e-6, torch.tensor(class_ids)[which] + 1, 0)
    iou = ConfusionMatrix(num_classes + 1).update(shown, truth).iou().tolist()
    return [None if math.isnan(iou[c + 1]) else iou[c + 1] for c in class_ids]


def image_ious(
    name: str, *, data: VOCFolder, methods: dict[str, Method], rows: dict[str, int]
) -> dict[str, list[float | None]]:
    """Those of one image with each method that has a threshold and maps of it."""
    class_ids, truth, ious = data.class_ids(name), data.mask(name), {}
    for key, method in methods.items():
        level = method.threshold(rows.get(name, 0))
        if level is not None and method.has_maps(name, class_ids):
            maps = [method.read(name, c, (truth.shape[0], truth.shape[1])) for c in class_ids]
            ious[key] = class_ious(torch.stack(maps), class_ids, truth, level, len(data.classes))
    return ious


def choose(run: FinishedRun, *, most: int, failure: float) -> list[Pair]:
    """The pairs to show: all watched ones, the largest gains, the worst failures.

    Args:
        run: whose.
        most: of each of the latter two.
        failure: IoU below which a pair is one.
    """
    methods = {key: run.methods[key] for key in SHOWN if run.methods[key].scores}
    labelled = {name: run.data for name in run.watched.cumulative}
    if methods:
        labelled |= {name: run.scored for name in run.scored.names if run.scored.class_ids(name)}
    names = [name for name in labelled if run.data.has_mask(name)] if methods else []
    score = partial(image_ious, data=run.data, methods=methods, rows=run.rows)
    known = set(run.data.names)
    names = [name for name in names if name in known]
    ious = dict(zip(names, on_all_cores(score, names, "IoU of each image"), strict=True))
    pairs = [
        Pair(name, place, [], {method: values[place] for method, values in ious.get(name, {}).items()})
        for name in dict.fromkeys([*run.watched.cumulative, *names])
        for place in range(len(run.data.class_ids(name)))
    ]
    for pair in pairs:
        ours, cam = pair.iou.get(run.best), pair.iou.get("cam")
        pair.gain = None if ours is None or cam is None else ours - cam
        if pair.name in run.watched.cumulative:
            pair.kinds.append("watched")
    gains = sorted((p for p in pairs if p.gain is not None and p.gain > 0), key=lambda p: -p.gain)
    failures = sorted((p for p in pairs if is_failure(run, p, failure)), key=lambda p: p.iou[run.best])
    for kind, chosen in (("gain", gains[:most]), ("failure", failures[:most])):
        for pair in chosen:
            pair.kinds.append(kind)
    watched = [pair for pair in pairs if "watched" in pair.kinds]
    return unique([*watched, *gains[:most], *failures[:most]])


def is_failure(run: FinishedRun, pair: Pair, below: float) -> bool:
    """Whether attention has failed on a pair."""
    value = pair.iou.get(run.best)
    return value is not None and value < below


def unique(pairs: Iterable[Pair]) -> list[Pair]:
    """Each once."""
    return list({(pair.name, pair.place): pair for pair in pairs}.values())
