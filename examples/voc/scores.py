"""What is scored, and over which classes; when there is no score; and the scores of label images."""

import argparse
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data import VOCFolder, read_label
from images import png
from texts import read_lines, same_form, shown
from torch import Tensor
from tqdm import tqdm

from oaa_lib import ConfusionMatrix, ThresholdSweep


def add_score_classes(parser: argparse.ArgumentParser) -> None:
    """``--score-classes``, for `chosen_classes`."""
    parser.add_argument(
        "--score-classes",
        metavar="NAME,NAME,...",
        help="classes that the mean is over, background among them if it counts (default: all that occur)",
    )


def chosen_classes(text: str | None, classes: Sequence[str]) -> list[int]:
    """The rows of a confusion matrix that the mean is over: 0 is background, class c is c + 1. Without a choice, all.

    Args:
        text: class names, separated by commas, or None.
        classes: of the data set, without background.
    """
    names = ["background", *classes]
    if text is None:
        return list(range(len(names)))
    chosen = [same_form(name) for name in text.split(",")]
    for name in chosen:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            known = f"did you mean {shown(near[0])}?" if near else f"there are {', '.join(names)}"
            raise SystemExit(f"--score-classes: the data set has no class {shown(name)}; {known}")
        if chosen.count(name) > 1:
            raise SystemExit(f"--score-classes: {shown(name)} is there twice; give each class once")
    if chosen == ["background"]:
        raise SystemExit("--score-classes: expected a class beside background, got background alone")
    return sorted(names.index(name) for name in chosen)


def names_of(scored: Sequence[int], classes: Sequence[str]) -> list[str]:
    """The names of chosen rows."""
    return [["background", *classes][c] for c in scored]


def classes_of(scored: Sequence[int]) -> list[int]:
    """The chosen classes without background."""
    return [c for c in scored if c > 0]


def over(scored: Sequence[int], classes: Sequence[str]) -> str:
    """The chosen classes as they are printed with a mean; empty where the mean is over all."""
    return "" if len(scored) == len(classes) + 1 else f" over {','.join(names_of(scored, classes))}"


def mean_of(iou: Tensor, scored: Sequence[int]) -> Tensor:
    """The mean of IoUs (..., C + 1) over the chosen classes that occur."""
    return iou[..., scored].nanmean(-1)


def best_threshold(sweep: ThresholdSweep, scored: Sequence[int], least: float = 0) -> float:
    """The lowest threshold, from `least` on, of the greatest mean over the chosen classes."""
    means = mean_of(sweep.iou(), scored).nan_to_num(-1)
    return float(sweep.thresholds[int(means.where(sweep.thresholds >= least, -2).argmax())])


def foreground(matrix: ConfusionMatrix, scored: Sequence[int] | None = None) -> dict[str, float | None]:
    """Of the chosen classes together: precision, the share of what is shown that is right; recall, of the truth."""
    counts = matrix.counts.double()
    classes = classes_of(range(len(counts)) if scored is None else scored)
    right = counts.diagonal()[classes].sum()
    shares = torch.stack([right / counts[:, classes].sum(), right / counts[classes].sum()])
    return dict(zip(("precision", "recall"), plain(shares), strict=True))


def by_class(data: VOCFolder, matrix: ConfusionMatrix) -> dict[str, dict[str, float | None]]:
    """IoU, precision and recall of each class; None where there is none."""
    names = ["background", *data.classes]
    values = {"class_iou": matrix.iou(), "class_precision": matrix.precision(), "class_recall": matrix.recall()}
    return {key: dict(zip(names, plain(value), strict=True)) for key, value in values.items()}


def plain(values: Tensor) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def no_score(truth: Tensor, shown_by: str, scored: Sequence[int] | None = None) -> str | None:
    """Why masks give no score, or None: one of an empty comparison would be perfect or zero by chance.

    Args:
        truth: (C + 1,) how many pixels of each value they have, ignored ones left out.
        shown_by: whose masks, as printed.
        scored: of `chosen_classes`, or None for all.
    """
    if not truth.sum():
        return f"no score: every pixel of the masks of {shown_by} is 255 (ignored)"
    if not truth[1:].sum():
        return (
            f"no score: the masks of {shown_by} show none of the {len(truth) - 1} classes, only 0 (background) and 255 "
            "(ignored); expected class c as the value c + 1: a mask of 0 and 255 needs 1 in place of 255"
        )
    if scored is not None and not truth[classes_of(scored)].sum():
        return f"no score: the masks of {shown_by} show none of the classes of --score-classes"
    return None


def absent_classes(found: Sequence[Any], classes: Sequence[str], shown_by: str) -> list[str]:
    """The line to print before a score, if some classes are in none of the masks.

    Args:
        found: of each class, whether it is there.
        classes: their names.
        shown_by: whose masks, as printed.
    """
    absent = [name for name, there in zip(classes, found, strict=True) if not there]
    if not absent:
        return []
    first = ", ".join(absent[:20]) + (", ..." if len(absent) > 20 else "")
    return [f"{len(absent)} of {len(classes)} classes are in none of the masks of {shown_by}: {first}"]


def check_cues(
    data: VOCFolder, even: ThresholdSweep, odd: ThresholdSweep, scored: Sequence[int], *, by_halves: bool
) -> None:
    """End where the maps cannot be scored, or no threshold be chosen."""
    halves = [half.counts.sum((0, 2)) for half in (even, odd)]
    truth, labelled = halves[0] + halves[1], data.labels.any(0)
    reason = no_score(truth, data.split, scored)
    if reason is None and not (truth[1:].bool() & labelled).any():
        seen = [name for name, pixels in zip(data.classes, truth[1:], strict=True) if pixels]
        named = [name for name, there in zip(data.classes, labelled, strict=True) if there]
        reason = f"no score: the masks of {data.split} show {seen[:5]}, the labels name {named[:5]}; they do not fit"
    if reason is None and by_halves and not all(half[classes_of(scored)].sum() for half in halves):
        chosen = " of --score-classes" if over(scored, data.classes) else ""
        reason = (
            f"no score: one half of the {len(data)} images of {data.split} shows no class{chosen}, so it cannot choose "
            "the threshold of the other; take more images, or --threshold-from"
        )
    if reason:
        raise SystemExit(reason)


def evaluate_labels(data: VOCFolder, folder: Path, scored: Sequence[int] | None = None) -> dict[str, Any]:
    """Scores of a folder of label images; ignored pixels are left out and their share is stated.

    The mean IoU is None where no pixel of a class is left to compare; it is over the classes `scored` (None: all).
    """
    scored = chosen_classes(None, data.classes) if scored is None else scored
    without = without_label(data, folder)
    matrix = ConfusionMatrix(len(data.classes) + 1)
    pixels, ignored = torch.zeros(len(data.classes) + 1, dtype=torch.int64), 0
    for name in tqdm(data.names, desc=f"{folder}", leave=False):
        truth, prediction = data.mask(name), read_prediction(name, data=data, labels=folder)
        unlabelled = (prediction == 255) & (truth != 255)
        ignored += int(unlabelled.sum())
        pixels += torch.bincount(truth[truth != 255], minlength=len(pixels))
        matrix.update(prediction.where(~unlabelled, 0), truth.masked_fill(unlabelled, 255))
    reason = no_score(pixels, data.split, scored)
    if reason:
        raise SystemExit(reason)
    return {
        "split": data.split,
        "images": len(data),
        "without_label": len(without),
        "score_classes": names_of(scored, data.classes),
        "mean_iou": mean_of(matrix.iou(), scored).item() if matrix.counts[classes_of(scored)].sum() else None,
        "foreground": foreground(matrix, scored),
        "ignored": ignored / int(pixels.sum()),
        **by_class(data, matrix),
    }


def without_label(data: VOCFolder, labels: Path) -> list[str]:
    """The images that got no label, for want of a saliency map; ends where other label images are missing."""
    told = labels / "without_saliency.txt"  # of make_pseudo_labels.py
    known = set(read_lines(told)) if told.exists() else set()
    without = [name for name in data.names if not png(labels, name).exists()]
    missing = [name for name in without if name not in known]
    if missing or len(without) == len(data):
        raise SystemExit(
            f"{labels} lacks the label images of {len(missing or without)} of the {len(data)} images of {data.split}, "
            f"first {(missing or without)[0]}.png"
        )
    return without


def read_prediction(name: str, *, data: VOCFolder, labels: Path) -> Tensor:
    """(H, W) int64 label image of one image, in the size of its mask; all 255 where there is none (`without_label`)."""
    path, size = png(labels, name), data.mask(name).shape
    if not path.exists():
        return torch.full(size, 255)
    prediction = read_label(path)
    if prediction.shape != size or ((prediction > len(data.classes)) & (prediction != 255)).any():
        raise SystemExit(
            f"{path}: expected a label image of the size {tuple(size)}, values 0..{len(data.classes)} "
            f"and 255, got {tuple(prediction.shape)} with values up to {int(prediction.max())}"
        )
    return prediction
