"""Score attention maps as cues, and pseudo labels, against the masks (mIoU of global counts, as VOC scores).

Cues: a pixel belongs to the class of its strongest map, or to the background where that stays below a threshold. Each
map folder gets its own threshold, since the best one differs by method. It is never chosen on the images it is reported
for: on the train split each half is scored with the threshold that is best on the other half; on another split with
--threshold-from, the best one on the train split's maps.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from data import VOCFolder, explained, read_label, spread, write_text
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from oaa_lib import ConfusionMatrix

LEVELS = 256  # the maps are 8-bit, so these thresholds are all there are


def count_cues(folder: VOCFolder, maps: Path) -> Tensor:
    """(2, LEVELS, C + 1, C + 1) int64: pixels by half of the images, strength of the winner, truth, winning class."""
    groups = [range(start, min(start + 16, len(folder))) for start in range(0, len(folder), 16)]
    counts = spread(partial(count_images, folder=folder, maps=maps), groups, str(maps))
    return torch.stack(counts).sum(0)


def count_images(rows: Sequence[int], *, folder: VOCFolder, maps: Path) -> Tensor:
    """The same of some of the images; even rows are one half, odd rows the other."""
    width = len(folder.classes) + 1
    counts = torch.zeros(2, LEVELS, width, width, dtype=torch.int64)
    for row in rows:
        counts[row % 2] += count_image(folder.names[row], folder=folder, maps=maps)
    return counts


def count_image(name: str, *, folder: VOCFolder, maps: Path) -> Tensor:
    """(LEVELS, C + 1, C + 1) int64: the same of one image."""
    width = len(folder.classes) + 1
    truth = folder.mask(name)
    strength, winner = torch.zeros_like(truth), torch.zeros_like(truth)
    class_ids = folder.class_ids(name)
    if class_ids:
        size = (truth.shape[0], truth.shape[1])
        stack = torch.stack([read_map(maps / f"{name}_{c}.png", size) for c in class_ids]).long()
        strength, which = stack.max(0)
        winner = torch.tensor(class_ids)[which] + 1
    valid = truth != 255
    cell = (strength[valid] * width + truth[valid]) * width + winner[valid]
    return torch.bincount(cell, minlength=LEVELS * width * width).view(LEVELS, width, width)


def read_map(path: Path, size: tuple[int, int]) -> Tensor:
    """(H, W) uint8 of an 8-bit grey image in the photograph's size."""
    if not path.exists():
        raise SystemExit(f"{path} is missing; run export_attention.py for this split first")
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, torch.from_numpy(np.asarray(image).copy())
    except (OSError, SyntaxError, ValueError) as error:  # Pillow has all of these for damaged files
        raise SystemExit(f"{path} cannot be read ({error}); remove it and make it again") from error
    if mode != "L" or tuple(pixels.shape) != size:
        raise SystemExit(
            f"{path}: expected 8-bit grey (mode L) in the photograph's size {size}, got mode {mode} and "
            f"{tuple(pixels.shape[:2])}"
        )
    return pixels


def confusion_at_thresholds(counts: Tensor) -> Tensor:
    """(LEVELS, C + 1, C + 1) confusion matrices from counts of the same shape: level t keeps strengths >= t."""
    kept = counts.flip(0).cumsum(0).flip(0)
    lost = (counts.sum(0) - kept).sum(-1)  # below the threshold: predicted as background, whatever the winner
    kept[:, :, 0] += lost
    return kept


def mean_ious(confusion: Tensor) -> Tensor:
    """(LEVELS,) mean IoU of each matrix; `ConfusionMatrix.mean_iou` of all of them at once."""
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    return (hits / (confusion.sum(-1) + confusion.sum(-2) - hits)).nanmean(-1)


def score(confusion: Tensor) -> ConfusionMatrix:
    """The metric object of a confusion matrix."""
    matrix = ConfusionMatrix(len(confusion))
    matrix.counts += confusion
    return matrix


def foreground(matrix: ConfusionMatrix) -> dict[str, float]:
    """Of all classes together: precision, the share of what is shown that is right; recall, that of the truth shown."""
    counts = matrix.counts.double()
    right = counts.diagonal()[1:].sum()
    return {"precision": (right / counts[:, 1:].sum()).item(), "recall": (right / counts[1:].sum()).item()}


def evaluate_maps(data: VOCFolder, folder: Path, threshold_counts: Tensor | None = None) -> dict[str, object]:
    """Scores of one map folder; ``threshold_counts`` are those of the maps that choose the threshold, if others do."""
    counts = count_cues(data, folder)
    if threshold_counts is None:
        halves = [confusion_at_thresholds(half) for half in counts]
        levels = [int(mean_ious(halves[1 - half]).argmax()) for half in (0, 1)]
        matrix = score(halves[0][levels[0]] + halves[1][levels[1]])
    else:
        levels = [int(mean_ious(confusion_at_thresholds(threshold_counts.sum(0))).argmax())]
        matrix = score(confusion_at_thresholds(counts.sum(0))[levels[0]])
    curve = mean_ious(confusion_at_thresholds(counts.sum(0)))
    return {
        "split": data.split,
        "images": len(data),
        "mean_iou": matrix.mean_iou(),
        "foreground": foreground(matrix),
        "thresholds": [level / 255 for level in levels],
        "oracle_mean_iou": curve.max().item(),
        "oracle_threshold": curve.argmax().item() / 255,
        "class_iou": dict(zip(["background", *data.classes], matrix.iou().tolist(), strict=True)),
        "curve": curve.tolist(),
    }


def evaluate_labels(data: VOCFolder, folder: Path) -> dict[str, object]:
    """Scores of a folder of label images; ignored pixels are left out and their share is told."""
    matrix = ConfusionMatrix(len(data.classes) + 1)
    ignored = pixels = 0
    for name in tqdm(data.names, desc=f"{folder}", leave=False):
        path, truth = folder / f"{name}.png", data.mask(name)
        prediction = read_label(path)
        if prediction.shape != truth.shape or ((prediction > len(data.classes)) & (prediction != 255)).any():
            raise SystemExit(
                f"{path}: expected a label image of the size {tuple(truth.shape)}, values 0..{len(data.classes)} "
                f"and 255, got {tuple(prediction.shape)} with values up to {int(prediction.max())}"
            )
        unlabelled = (prediction == 255) & (truth != 255)
        ignored, pixels = ignored + int(unlabelled.sum()), pixels + int((truth != 255).sum())
        matrix.update(prediction.where(~unlabelled, 0), truth.masked_fill(unlabelled, 255))
    return {
        "split": data.split,
        "images": len(data),
        "mean_iou": matrix.mean_iou(),
        "foreground": foreground(matrix),
        "ignored": ignored / pixels,
        "class_iou": dict(zip(["background", *data.classes], matrix.iou().tolist(), strict=True)),
    }


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--split", default="train")
    parser.add_argument("--maps", type=Path, nargs="*", default=[], help="folders of NAME_CLASS.png")
    parser.add_argument(
        "--threshold-from", type=Path, nargs="*", help="train-split maps, one folder for each of --maps"
    )
    parser.add_argument("--labels", type=Path, nargs="*", default=[], help="folders of label images NAME.png")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    arguments = parser.parse_args()
    if not arguments.maps and not arguments.labels:
        parser.error("give at least one folder with --maps or --labels")
    if arguments.threshold_from is not None and len(arguments.threshold_from) != len(arguments.maps):
        parser.error("give one --threshold-from folder for each --maps folder")

    if arguments.json:
        with explained(f"--json {arguments.json}", "choose a place that can be written to"):
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
    data = VOCFolder(arguments.voc_root, arguments.split)
    train = VOCFolder(arguments.voc_root, "train") if arguments.threshold_from else data
    results: dict[str, dict[str, object]] = {}
    print(f"{'maps':40} {'split':>6} {'images':>6} {'mIoU %':>7} {'threshold':>11} {'oracle':>7}")
    for position, folder in enumerate(arguments.maps):
        source = arguments.threshold_from
        result = evaluate_maps(data, folder, count_cues(train, source[position]) if source else None)
        levels = "/".join(f"{level:.2f}" for level in result["thresholds"])
        print(
            f"{folder!s:40.40} {data.split:>6} {len(data):6} {100 * result['mean_iou']:7.2f} {levels:>11} "
            f"{100 * result['oracle_mean_iou']:7.2f}"
        )
        results[str(folder)] = result
    for folder in arguments.labels:
        result = evaluate_labels(data, folder)
        print(
            f"{folder!s:40.40} {data.split:>6} {len(data):6} {100 * result['mean_iou']:7.2f} "
            f"({result['ignored']:.1%} of the pixels ignored)"
        )
        results[str(folder)] = result
    if arguments.json:
        with explained(f"--json {arguments.json}", "the scores are above"):
            write_text(arguments.json, json.dumps(results, indent=1))
    best = max(results, key=lambda key: results[key]["mean_iou"])
    print(f"done: best is {best} with mIoU {100 * results[best]['mean_iou']:.2f} on {data.split}")


if __name__ == "__main__":
    main()
