"""Score attention maps as cues, and pseudo labels, against the masks (mIoU of global counts, as VOC scores).

Cues: a pixel belongs to the class of its strongest map, or to the background where that stays below a threshold; with
--saliency also where 1 - saliency, the paper's background cue, is not below it (each map min-maxed over its image).
Each folder gets its own threshold, since the best one differs by method. It is never chosen on the images it is
reported for: on the train split each half is scored with the threshold that is best on the other half; on another split
with --threshold-from, the best one on the train split's maps. --split may name a part of the maps' list.

The mean is over all classes that occur, or over those of --score-classes, which then choose the thresholds too: where
some classes have only a few masks, a mean over all of them is mostly noise.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import VOCFolder
from files import ends_with, write_text
from maps import FAINTEST, against_saliency, check_maps, check_saliency, map_files, read_map
from parallel import on_all_cores
from scores import (
    absent_classes,
    add_score_classes,
    best_threshold,
    by_class,
    check_cues,
    chosen_classes,
    classes_of,
    evaluate_labels,
    foreground,
    mean_of,
    names_of,
    over,
    plain,
    without_label,
)

from oaa_lib import ThresholdSweep

Result = dict[str, Any]


def main() -> None:
    """Run the stage."""
    arguments = parse_arguments()
    for option, path in (("--json", arguments.json), ("--curve", arguments.curve)):
        if path:
            with ends_with(f"{option} {path}", "choose a place that can be written to"):
                path.parent.mkdir(parents=True, exist_ok=True)
    data = VOCFolder(arguments.voc_root, arguments.split)
    scored = chosen_classes(arguments.score_classes, data.classes)
    results = print_scores(arguments, data, scored)
    if arguments.json:
        with ends_with(f"--json {arguments.json}", "the scores are above"):
            write_text(arguments.json, json.dumps(results, indent=1))
    if arguments.curve:
        import figures

        with ends_with(f"--curve {arguments.curve}", "the scores are above", ValueError):
            figures.curves({str(folder): results[str(folder)] for folder in arguments.maps}, arguments.curve)
    scores = {name: result["mean_iou"] for name, result in results.items() if result["mean_iou"] is not None}
    if not scores:
        raise SystemExit(f"no score on {data.split}: no pixel of a class is left to compare, all are ignored")
    best = max(scores, key=lambda name: scores[name])
    chosen = over(scored, data.classes)
    print(f"done: best is {best} with mIoU {100 * scores[best]:.2f}{chosen} on {data.split}")


def parse_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--split", default="train", help="list of the images, with masks (default: train)")
    parser.add_argument("--maps", type=Path, nargs="*", default=[], help="folders of NAME_CLASS.png")
    parser.add_argument("--threshold-from", type=Path, nargs="*", help="train-split maps, one for each of --maps")
    parser.add_argument("--labels", type=Path, nargs="*", default=[], help="folders of label images NAME.png")
    parser.add_argument("--saliency", type=Path, help="folder of 8-bit saliency maps NAME.png, for --maps")
    add_score_classes(parser)
    parser.add_argument("--json", type=Path, help="also write all numbers here, those of each class too")
    parser.add_argument("--curve", type=Path, help="also draw mIoU, precision and recall by threshold (.png)")
    arguments = parser.parse_args()
    if not arguments.maps and not arguments.labels:
        parser.error("give at least one folder with --maps or --labels")
    if arguments.threshold_from is not None and len(arguments.threshold_from) != len(arguments.maps):
        parser.error("give one --threshold-from folder for each --maps folder")
    if arguments.curve and not arguments.maps:
        parser.error("--curve draws the scores of --maps: give at least one folder")
    if arguments.saliency and not (arguments.maps and arguments.saliency.is_dir()):
        parser.error(
            f"--saliency {arguments.saliency}: expected a folder, and maps (--maps) that it is the background of"
        )
    return arguments


def print_scores(arguments: argparse.Namespace, data: VOCFolder, scored: Sequence[int]) -> dict[str, Result]:
    """Score every folder, and print a line for each; the results by folder."""
    sources = arguments.threshold_from or []
    train = VOCFolder(arguments.voc_root, "train") if sources else data
    for images in {data.split: data, train.split: train}.values():
        images.check_masks()
        if arguments.saliency:
            check_saliency(images, arguments.saliency)
    for folder in arguments.labels:
        without_label(data, folder)
    chosen, results, stated = over(scored, data.classes), {}, set()
    with_saliency = f", with {arguments.saliency}" if arguments.saliency else ""

    def state(folder: Path, result: Result) -> str:
        """Keep a result, say once what is to be known before it, and begin its line."""
        results[str(folder)] = result
        recall = list(result["class_recall"].values())
        found = [recall[c] is not None for c in classes_of(scored)]
        lines = absent_classes(found, names_of(classes_of(scored), data.classes), data.split)
        for line in lines if result["mean_iou"] is not None else []:
            if line not in stated:
                print(line)
            stated.add(line)
        score = "no score" if result["mean_iou"] is None else f"{100 * result['mean_iou']:7.2f}"
        return f"{folder!s:40.40} {data.split:>6} {len(data):6} {score}"

    print(f"{'maps':40} {'split':>6} {'images':>6} {'mIoU %':>7} {'threshold':>11} {'oracle':>7}")
    for position, folder in enumerate(arguments.maps):
        threshold_from = (train, sources[position]) if sources else None
        result = evaluate_maps(data, folder, threshold_from, scored, arguments.saliency)
        levels = "/".join(f"{level:.2f}" for level in result["thresholds"])
        print(f"{state(folder, result)} {levels:>11} {100 * result['oracle_mean_iou']:7.2f}{chosen}{with_saliency}")
    for folder in arguments.labels:
        result = evaluate_labels(data, folder, scored)
        without = f", {n} images without a label" if (n := result["without_label"]) else ""
        print(f"{state(folder, result)} ({result['ignored']:.1%} of the pixels ignored{without}){chosen}")
    return results


def evaluate_maps(
    data: VOCFolder,
    folder: Path,
    threshold_from: tuple[VOCFolder, Path] | None = None,
    scored: Sequence[int] | None = None,
    saliency: Path | None = None,
) -> dict[str, Any]:
    """Scores of one map folder.

    Args:
        data: the images, with masks and labels.
        folder: of their maps; it may hold those of further images.
        threshold_from: images and maps whose best threshold is taken, or None for that of the other half.
        scored: of `chosen_classes`, or None for all; the mean that thresholds are chosen by is over these too.
        saliency: folder of saliency maps, see `against_saliency`.
    """
    scored = chosen_classes(None, data.classes) if scored is None else scored
    even, odd = sweep_cues(data, folder, saliency)
    best = partial(best_threshold, scored=scored, least=FAINTEST if saliency else 0)
    check_cues(data, even, odd, scored, by_halves=threshold_from is None)
    if threshold_from is None:
        levels = best(odd), best(even)
    else:
        other = sweep_cues(*threshold_from, saliency)
        check_cues(threshold_from[0], *other, scored, by_halves=False)
        levels = (best(other[0].merge(other[1])),) * 2
    matrix = even.at(levels[0]).merge(odd.at(levels[1]))
    whole = even.merge(odd)
    curve = mean_of(whole.iou(), scored)
    classes = classes_of(scored)
    return {
        "split": data.split,
        "images": len(data),
        "score_classes": names_of(scored, data.classes),
        "saliency": str(saliency) if saliency else None,
        "mean_iou": mean_of(matrix.iou(), scored).item(),
        "foreground": foreground(matrix, scored),
        "thresholds": list(levels if threshold_from is None else levels[:1]),
        "threshold_from": "the other half" if threshold_from is None else threshold_from[0].split,
        "oracle_mean_iou": mean_of(whole.at(best(whole)).iou(), scored).item(),
        "oracle_threshold": best(whole),
        **by_class(data, matrix),
        "curve": plain(curve),
        "curve_precision": plain(whole.precision()[:, classes].nanmean(1)),
        "curve_recall": plain(whole.recall()[:, classes].nanmean(1)),
    }


def sweep_cues(folder: VOCFolder, maps: Path, saliency: Path | None = None) -> tuple[ThresholdSweep, ThresholdSweep]:
    """Two halves of the images, even rows and odd rows, at every threshold; counted on all cores."""
    check_maps(folder, maps, saliency)
    groups = [range(start, min(start + 16, len(folder))) for start in range(0, len(folder), 16)]
    parts = on_all_cores(partial(sweep_images, folder=folder, maps=maps, saliency=saliency), groups, str(maps))
    even, odd = ThresholdSweep(len(folder.classes)), ThresholdSweep(len(folder.classes))
    for part in parts:
        even.merge(part[0])
        odd.merge(part[1])
    return even, odd


def sweep_images(
    rows: Sequence[int], *, folder: VOCFolder, maps: Path, saliency: Path | None
) -> tuple[ThresholdSweep, ThresholdSweep]:
    """The same of some of the images."""
    halves = ThresholdSweep(len(folder.classes)), ThresholdSweep(len(folder.classes))
    for row in rows:
        sweep_image(folder.names[row], halves[row % 2], folder=folder, maps=maps, saliency=saliency)
    return halves


def sweep_image(name: str, sweep: ThresholdSweep, *, folder: VOCFolder, maps: Path, saliency: Path | None) -> None:
    """Count one image."""
    truth = folder.mask(name)
    size = (truth.shape[0], truth.shape[1])
    stack = [read_map(maps / file, size) for file in map_files(folder, name)]
    attention = torch.stack(stack) if stack else torch.empty(0, *size)
    if saliency is not None:
        attention = against_saliency(attention, read_map(saliency / f"{name}.png", size))
    sweep.update(attention, folder.class_ids(name), truth)


if __name__ == "__main__":
    main()
