"""Score attention maps as cues, and pseudo labels, against the masks (mIoU of global counts, as VOC scores).

Cues: a pixel belongs to the class of its strongest map, or to the background where that stays below a threshold. Each
map folder gets its own threshold, since the best one differs by method. It is never chosen on the images it is reported
for: on the train split each half is scored with the threshold that is best on the other half; on another split with
--threshold-from, the best one on the train split's maps. --split may name a part of the list that the maps were made
for.

The mean is over all classes that occur, or over those of --score-classes, which then choose the thresholds too: where
some classes have only a few masks, a mean over all of them is mostly noise.
"""

import argparse
import difflib
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import VOCFolder, read_label
from files import ends_with, read_json, write_text
from images import DRAWN, load, png
from parallel import on_all_cores
from texts import same_form, shown
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


def over(scored: Sequence[int], classes: Sequence[str]) -> str:
    """The chosen classes as they are printed with a mean; empty where the mean is over all."""
    return "" if len(scored) == len(classes) + 1 else f" over {','.join(names_of(scored, classes))}"


def mean_of(iou: Tensor, scored: Sequence[int]) -> Tensor:
    """The mean of IoUs (..., C + 1) over the chosen classes that occur."""
    return iou[..., scored].nanmean(-1)


def best_threshold(sweep: ThresholdSweep, scored: Sequence[int]) -> float:
    """The lowest threshold of the greatest mean over the chosen classes."""
    return float(sweep.thresholds[int(mean_of(sweep.iou(), scored).nan_to_num(-1).argmax())])


def sweep_cues(folder: VOCFolder, maps: Path) -> tuple[ThresholdSweep, ThresholdSweep]:
    """Two halves of the images, even rows and odd rows, at every threshold; counted on all cores."""
    check_maps(folder, maps)
    groups = [range(start, min(start + 16, len(folder))) for start in range(0, len(folder), 16)]
    parts = on_all_cores(partial(sweep_images, folder=folder, maps=maps), groups, str(maps))
    even, odd = ThresholdSweep(len(folder.classes)), ThresholdSweep(len(folder.classes))
    for part in parts:
        even.merge(part[0])
        odd.merge(part[1])
    return even, odd


def sweep_images(rows: Sequence[int], *, folder: VOCFolder, maps: Path) -> tuple[ThresholdSweep, ThresholdSweep]:
    """The same of some of the images."""
    halves = ThresholdSweep(len(folder.classes)), ThresholdSweep(len(folder.classes))
    for row in rows:
        sweep_image(folder.names[row], halves[row % 2], folder=folder, maps=maps)
    return halves


def sweep_image(name: str, sweep: ThresholdSweep, *, folder: VOCFolder, maps: Path) -> None:
    """Count one image."""
    truth, class_ids = folder.mask(name), folder.class_ids(name)
    size = (truth.shape[0], truth.shape[1])
    stack = [read_map(maps / f"{name}_{c}.png", size) for c in class_ids]
    attention = torch.stack(stack) if stack else torch.empty(0, *size)
    sweep.update(attention, class_ids, truth)


def check_maps(folder: VOCFolder, maps: Path) -> None:
    """End where the maps were made for another list, which lacks some of the images or gives them other labels."""
    missing = {
        name: [c for c in folder.class_ids(name) if not png(maps, f"{name}_{c}").exists()] for name in folder.names
    }
    without = [name for name, ids in missing.items() if ids]
    if not without:
        return
    first, source = without[0], maps / "source.json"
    path, shows = maps / f"{first}_{missing[first][0]}.png", folder.classes[missing[first][0]]
    made_for = read_json(source).get("split") if source.exists() else None
    made = f"; the maps there were made for the list {made_for}" if made_for not in (None, folder.split) else ""
    raise SystemExit(
        f"{path} is missing; run export_attention.py for this split first (--split {folder.split}): {len(without)} of "
        f"its {len(folder)} images have no map of one of their classes, first {first} ({shows}){made}"
    )


def read_map(path: Path, size: tuple[int, int]) -> Tensor:
    """(H, W) uint8 of an 8-bit grey image in the photograph's size."""
    path = png(path.parent, path.name.removesuffix(".png"))
    if not path.exists():
        raise SystemExit(f"{path} is missing; run export_attention.py for this split first")
    try:
        image = load(path, DRAWN)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read ({error}); remove it and make it again") from error
    mode, pixels = image.mode, torch.from_numpy(np.asarray(image).copy())
    if mode != "L" or tuple(pixels.shape) != size:
        raise SystemExit(
            f"{path}: expected 8-bit grey (mode L) in the photograph's size {size}, got mode {mode} and "
            f"{tuple(pixels.shape[:2])}"
        )
    return pixels


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


def classes_of(scored: Sequence[int]) -> list[int]:
    """The chosen classes without background."""
    return [c for c in scored if c > 0]


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


def foreground(matrix: ConfusionMatrix, scored: Sequence[int] | None = None) -> dict[str, float | None]:
    """Of the chosen classes together: precision, the share of what is shown that is right; recall, of the truth."""
    counts = matrix.counts.double()
    classes = classes_of(range(len(counts)) if scored is None else scored)
    right = counts.diagonal()[classes].sum()
    shares = torch.stack([right / counts[:, classes].sum(), right / counts[classes].sum()])
    return dict(zip(("precision", "recall"), plain(shares), strict=True))


def evaluate_maps(
    data: VOCFolder,
    folder: Path,
    threshold_from: tuple[VOCFolder, Path] | None = None,
    scored: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Scores of one map folder.

    Args:
        data: the images, with masks and labels.
        folder: of their maps; it may hold those of further images.
        threshold_from: images and maps whose best threshold is taken, or None for that of the other half.
        scored: of `chosen_classes`, or None for all; the mean that thresholds are chosen by is over these too.
    """
    scored = chosen_classes(None, data.classes) if scored is None else scored
    even, odd = sweep_cues(data, folder)
    check_cues(data, even, odd, scored, by_halves=threshold_from is None)
    if threshold_from is None:
        levels = best_threshold(odd, scored), best_threshold(even, scored)
    else:
        other = sweep_cues(*threshold_from)
        check_cues(threshold_from[0], *other, scored, by_halves=False)
        levels = (best_threshold(other[0].merge(other[1]), scored),) * 2
    matrix = even.at(levels[0]).merge(odd.at(levels[1]))
    whole = even.merge(odd)
    curve = mean_of(whole.iou(), scored)
    classes = classes_of(scored)
    return {
        "split": data.split,
        "images": len(data),
        "score_classes": names_of(scored, data.classes),
        "mean_iou": mean_of(matrix.iou(), scored).item(),
        "foreground": foreground(matrix, scored),
        "thresholds": list(levels if threshold_from is None else levels[:1]),
        "threshold_from": "the other half" if threshold_from is None else threshold_from[0].split,
        "oracle_mean_iou": curve.max().item(),
        "oracle_threshold": best_threshold(whole, scored),
        **by_class(data, matrix),
        "curve": plain(curve),
        "curve_precision": plain(whole.precision()[:, classes].nanmean(1)),
        "curve_recall": plain(whole.recall()[:, classes].nanmean(1)),
    }


def by_class(data: VOCFolder, matrix: ConfusionMatrix) -> dict[str, dict[str, float | None]]:
    """IoU, precision and recall of each class; None where there is none."""
    names = ["background", *data.classes]
    values = {"class_iou": matrix.iou(), "class_precision": matrix.precision(), "class_recall": matrix.recall()}
    return {key: dict(zip(names, plain(value), strict=True)) for key, value in values.items()}


def plain(values: Tensor) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def evaluate_labels(data: VOCFolder, folder: Path, scored: Sequence[int] | None = None) -> dict[str, Any]:
    """Scores of a folder of label images; ignored pixels are left out and their share is stated.

    The mean IoU is None where no pixel of a class is left to compare. The arguments are those of `evaluate_maps`.
    """
    scored = chosen_classes(None, data.classes) if scored is None else scored
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
        "score_classes": names_of(scored, data.classes),
        "mean_iou": mean_of(matrix.iou(), scored).item() if matrix.counts[classes_of(scored)].sum() else None,
        "foreground": foreground(matrix, scored),
        "ignored": ignored / int(pixels.sum()),
        **by_class(data, matrix),
    }


def read_prediction(name: str, *, data: VOCFolder, labels: Path) -> Tensor:
    """(H, W) int64 label image of one image, in the size of its mask."""
    path, size = png(labels, name), data.mask(name).shape
    prediction = read_label(path)
    if prediction.shape != size or ((prediction > len(data.classes)) & (prediction != 255)).any():
        raise SystemExit(
            f"{path}: expected a label image of the size {tuple(size)}, values 0..{len(data.classes)} "
            f"and 255, got {tuple(prediction.shape)} with values up to {int(prediction.max())}"
        )
    return prediction


def draw_curves(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Mean IoU over the threshold, and precision over recall of the classes, for each folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    over_threshold, over_recall = figure.subplots(1, 2)
    for folder, result in results.items():
        (line,) = over_threshold.plot(
            np.linspace(0, 1, len(result["curve"])), 100 * np.array(result["curve"], float), label=folder
        )
        for threshold in result["thresholds"]:
            over_threshold.axvline(threshold, color=line.get_color(), linestyle=":", linewidth=1)
        recall, precision = (100 * np.array(result[f"curve_{name}"], float) for name in ("recall", "precision"))
        over_recall.plot(recall, precision)
    told = next(iter(results.values()))
    over_threshold.set(xlabel="threshold (dotted: as chosen)", ylabel="mIoU in %")
    over_threshold.set_title(f"{told['split']}, {told['images']} images; thresholds from {told['threshold_from']}")
    if len(told["score_classes"]) < len(told["class_iou"]):
        over_threshold.set_xlabel(f"threshold (dotted: as chosen)\nmean over {','.join(told['score_classes'])}")
    over_threshold.legend()
    over_recall.set(xlabel="recall in %, mean of the classes", ylabel="precision in %", title="without background")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--split", default="train", help="list of the images, with masks (default: train)")
    parser.add_argument("--maps", type=Path, nargs="*", default=[], help="folders of NAME_CLASS.png")
    parser.add_argument(
        "--threshold-from", type=Path, nargs="*", help="train-split maps, one folder for each of --maps"
    )
    parser.add_argument("--labels", type=Path, nargs="*", default=[], help="folders of label images NAME.png")
    add_score_classes(parser)
    parser.add_argument("--json", type=Path, help="also write all numbers here, those of each class too")
    parser.add_argument(
        "--curve", type=Path, help="also draw mIoU, precision and recall over the threshold here (.png)"
    )
    arguments = parser.parse_args()
    if not arguments.maps and not arguments.labels:
        parser.error("give at least one folder with --maps or --labels")
    if arguments.threshold_from is not None and len(arguments.threshold_from) != len(arguments.maps):
        parser.error("give one --threshold-from folder for each --maps folder")

    for option, path in (("--json", arguments.json), ("--curve", arguments.curve)):
        if path:
            with ends_with(f"{option} {path}", "choose a place that can be written to"):
                path.parent.mkdir(parents=True, exist_ok=True)
    data = VOCFolder(arguments.voc_root, arguments.split)
    train = VOCFolder(arguments.voc_root, "train") if arguments.threshold_from else data
    scored = chosen_classes(arguments.score_classes, data.classes)
    chosen = over(scored, data.classes)
    results: dict[str, dict[str, Any]] = {}
    stated: set[str] = set()

    def state(result: dict[str, Any]) -> None:
        """What is to be known before the scores of a folder, once."""
        recall = list(result["class_recall"].values())
        found = [recall[c] is not None for c in classes_of(scored)]
        for line in absent_classes(found, names_of(classes_of(scored), data.classes), data.split):
            if line not in stated:
                print(line)
            stated.add(line)

    print(f"{'maps':40} {'split':>6} {'images':>6} {'mIoU %':>7} {'threshold':>11} {'oracle':>7}")
    for position, folder in enumerate(arguments.maps):
        source = arguments.threshold_from
        result = evaluate_maps(data, folder, (train, source[position]) if source else None, scored)
        state(result)
        levels = "/".join(f"{level:.2f}" for level in result["thresholds"])
        print(
            f"{folder!s:40.40} {data.split:>6} {len(data):6} {100 * result['mean_iou']:7.2f} {levels:>11} "
            f"{100 * result['oracle_mean_iou']:7.2f}{chosen}"
        )
        results[str(folder)] = result
    for folder in arguments.labels:
        result = evaluate_labels(data, folder, scored)
        if result["mean_iou"] is not None:
            state(result)
        score = "no score" if result["mean_iou"] is None else f"{100 * result['mean_iou']:7.2f}"
        print(
            f"{folder!s:40.40} {data.split:>6} {len(data):6} {score} ({result['ignored']:.1%} of the pixels ignored)"
            f"{chosen}"
        )
        results[str(folder)] = result
    if arguments.json:
        with ends_with(f"--json {arguments.json}", "the scores are above"):
            write_text(arguments.json, json.dumps(results, indent=1))
    if arguments.curve:
        if not arguments.maps:
            parser.error("--curve draws the scores of --maps: give at least one folder")
        with ends_with(f"--curve {arguments.curve}", "the scores are above"):
            draw_curves({str(folder): results[str(folder)] for folder in arguments.maps}, arguments.curve)
    scores = {name: result["mean_iou"] for name, result in results.items() if result["mean_iou"] is not None}
    if not scores:
        raise SystemExit(f"no score on {data.split}: no pixel of a class is left to compare, all are ignored")
    best = max(scores, key=lambda name: scores[name])
    print(f"done: best is {best} with mIoU {100 * scores[best]:.2f}{chosen} on {data.split}")


if __name__ == "__main__":
    main()
