"""Is one method better than another, or were the images lucky? Differences in mean IoU with 95 % intervals.

    python examples/voc/compare.py --voc-root VOC --against runs/voc/seed0/maps/cam --maps runs/voc/seed0/maps/max

A paired bootstrap: as many images as there are are drawn with replacement, the same ones for both methods, and both are
scored anew, by global counts; 10,000 times. Every folder is scored as evaluate_cues.py scores it: maps at the threshold
that is best on the other half of the images (or at --background-level), with a constant background or --saliency; label
images (--labels) as they are, without their ignored pixels. Thresholds are not chosen again for each draw, and the
intervals are those of the choice of images: how much another seed of the training would change is not in them.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import VOCFolder
from evaluate_cues import evaluate_maps, sweep_image
from files import ends_with, write_text
from maps import FAINTEST, check_maps
from parallel import on_all_cores
from scores import add_score_classes, chosen_classes, evaluate_labels, mean_of, names_of, over, read_prediction
from torch import Tensor

from oaa_lib import ConfusionMatrix, ThresholdSweep

CHUNK = 500  # resamples at a time, so that memory stays flat


def counts_of_maps(data: VOCFolder, maps: Path, levels: Sequence[float], saliency: Path | None = None) -> Tensor:
    """(N, 3, C + 1) int64 of each image: pixels that are right, of the truth, and shown.

    Args:
        data: the images.
        maps: their maps.
        levels: the thresholds of even and odd rows, or one for all.
        saliency: folder of saliency maps, see `against_saliency`.
    """
    check_maps(data, maps, saliency)
    count = partial(count_map, data=data, maps=maps, levels=levels, saliency=saliency)
    return torch.stack(on_all_cores(count, range(len(data)), str(maps)))


def count_map(row: int, *, data: VOCFolder, maps: Path, levels: Sequence[float], saliency: Path | None) -> Tensor:
    """The same of one image, (3, C + 1)."""
    sweep = ThresholdSweep(len(data.classes))
    sweep_image(data.names[row], sweep, folder=data, maps=maps, saliency=saliency)
    return marginals(sweep.at(levels[row % len(levels)]))


def counts_of_labels(data: VOCFolder, labels: Path) -> Tensor:
    """(N, 3, C + 1) int64 as `counts_of_maps`, of label images; pixels that these ignore are not counted."""
    count = partial(count_label, data=data, labels=labels)
    return torch.stack(on_all_cores(count, data.names, str(labels)))


def count_label(name: str, *, data: VOCFolder, labels: Path) -> Tensor:
    """The same of one image, (3, C + 1)."""
    truth, prediction = data.mask(name), read_prediction(name, data=data, labels=labels)
    unlabelled = prediction == 255
    matrix = ConfusionMatrix(len(data.classes) + 1)
    return marginals(matrix.update(prediction.where(~unlabelled, 0), truth.masked_fill(unlabelled, 255)))


def marginals(matrix: ConfusionMatrix) -> Tensor:
    """(3, C + 1) int64: all that IoU needs of a confusion matrix."""
    return torch.stack([matrix.counts.diagonal(), matrix.counts.sum(1), matrix.counts.sum(0)])


def mean_iou(counts: Tensor, scored: Sequence[int]) -> Tensor:
    """(...) float64: mean IoU of summed counts (..., 3, C + 1), over the chosen classes that occur."""
    right, truth, shown = counts.double().unbind(-2)
    return mean_of(right / (truth + shown - right), scored)


def resampled(counts: Tensor, scored: Sequence[int], *, resamples: int, seed: int) -> Tensor:
    """(resamples,) float64: mean IoU on N images that are drawn with replacement, the same ones for the same seed.

    The difference of two such series is a paired bootstrap.

    Args:
        counts: (N, 3, C + 1) of `counts_of_maps`.
        scored: the classes that the mean is over; 0 is the background.
        resamples: how often N images are drawn.
        seed: of the draws.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993).
    """
    generator, number = np.random.default_rng(seed), len(counts)
    means = []
    for first in range(0, resamples, CHUNK):
        draws = min(CHUNK, resamples - first)
        times = generator.multinomial(number, np.full(number, 1 / number), draws)  # each image is drawn
        weights = torch.from_numpy(times).double()  # counts stay below 2^53: sums are exact
        means.append(mean_iou(torch.einsum("bn,nkc->bkc", weights, counts.double()), scored))
    return torch.cat(means)


def paired_differences(
    counts: Mapping[str, Tensor],
    against: Sequence[str],
    scored: Sequence[int],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """What is reported of methods, by "METHOD - CONTROL": of each method and every control that comes before it.

    Args:
        counts: of each method, as for `resampled`, on the same images.
        against: the methods that are controls.
        scored: the classes that the means are over.
        resamples: see `resampled`.
        seed: likewise.
    """
    drawn = {name: resampled(each, scored, resamples=resamples, seed=seed) for name, each in counts.items()}
    means = {name: mean_iou(each.sum(0), scored).item() for name, each in counts.items()}
    found = {}
    for number, name in enumerate(counts):
        for control in [each for each in list(counts)[:number] if each in against]:
            gains = drawn[name] - drawn[control]
            found[f"{name} - {control}"] = {
                "mean_iou": means[name],
                "against_mean_iou": means[control],
                "difference": means[name] - means[control],
                "interval": torch.quantile(gains, torch.tensor([0.025, 0.975], dtype=gains.dtype)).tolist(),
                "share_above_0": (gains > 0).double().mean().item(),
                "resamples": resamples,
                "seed": seed,
            }
    return found


def read_counts(
    data: VOCFolder,
    folder: Path,
    scored: Sequence[int],
    *,
    are_labels: bool,
    level: float | None = None,
    saliency: Path | None = None,
) -> Tensor:
    """The counts of a folder, at its own thresholds if none is given."""
    if are_labels:
        if evaluate_labels(data, folder, scored)["mean_iou"] is None:
            raise SystemExit(f"{folder}: no pixel of a class is left to compare, all are ignored")
        return counts_of_labels(data, folder)
    if level is not None:
        return counts_of_maps(data, folder, [max(level, FAINTEST) if saliency else level], saliency)
    levels = evaluate_maps(data, folder, scored=scored, saliency=saliency)["thresholds"]
    return counts_of_maps(data, folder, levels, saliency)


def main() -> None:
    """Compare each folder with one."""
    arguments = parse_arguments()
    data = VOCFolder(arguments.voc_root, arguments.split)
    if len(data) < 2:
        raise SystemExit(f"{arguments.split} names one image; a bootstrap needs at least 2, and says little below 50")
    scored = chosen_classes(arguments.score_classes, data.classes)
    how = {"level": arguments.background_level, "saliency": arguments.saliency}
    told = {"background_level": arguments.background_level, "saliency": str(arguments.saliency or "") or None}
    with_saliency = f", with {arguments.saliency}" if arguments.saliency else ""
    read = partial(read_counts, data, scored=scored, are_labels=bool(arguments.labels), **how)

    folders, results = list(dict.fromkeys(arguments.maps or arguments.labels)), {}
    counts = {"": read(arguments.against)} | {str(folder): read(folder) for folder in folders}
    drawing = {"resamples": arguments.resamples, "seed": arguments.seed}
    for folder, found in zip(folders, paired_differences(counts, [""], scored, **drawing).values(), strict=True):
        results[str(folder)] = {"against": str(arguments.against), "split": data.split, "images": len(data)} | found
        results[str(folder)] |= {"score_classes": names_of(scored, data.classes), **told}
        low, high = found["interval"]
        print(
            f"{folder} - {arguments.against}: mIoU {100 * found['mean_iou']:.2f} - "
            f"{100 * found['against_mean_iou']:.2f} = {100 * found['difference']:+.2f}, 95 % interval "
            f"{100 * low:+.2f} to {100 * high:+.2f}, {found['share_above_0']:.1%} of {arguments.resamples} resamples "
            f"above 0;{over(scored, data.classes)} on {len(data)} images of {data.split}{with_saliency}"
        )
    if arguments.json:
        with ends_with(f"--json {arguments.json}", "the differences are above"):
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(arguments.json, json.dumps(results, indent=1, allow_nan=False))


def parse_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--split", default="train", help="list of the images, with masks (default: train)")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--maps", type=Path, nargs="+", help="folders of NAME_CLASS.png")
    kind.add_argument("--labels", type=Path, nargs="+", help="folders of label images NAME.png")
    parser.add_argument("--against", type=Path, required=True, help="the folder that each is compared with")
    parser.add_argument(
        "--background-level", type=float, help="one threshold for all maps (default: each folder's own, two-fold)"
    )
    parser.add_argument("--saliency", type=Path, help="folder of 8-bit saliency maps NAME.png, for maps")
    add_score_classes(parser)
    parser.add_argument("--resamples", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    arguments = parser.parse_args()
    if arguments.resamples < 1 or arguments.seed < 0:
        parser.error("expected --resamples of at least 1 and --seed of at least 0")
    level = arguments.background_level
    if level is not None and (arguments.labels or not 0 <= level <= 1):
        parser.error(f"--background-level: expected a threshold of maps in [0, 1], got {level}")
    if arguments.saliency and (arguments.labels or not arguments.saliency.is_dir()):
        parser.error(
            f"--saliency {arguments.saliency}: expected a folder, and maps (--maps) that it is the background of"
        )
    return arguments


if __name__ == "__main__":
    main()
