"""Stage 5: segment images with a trained network, and score them (mean IoU of global counts, as VOC does).

Writes palette label images NAME.png to --out, in the form that VOC's server takes (put them in a folder
results/VOC2012/Segmentation/comp6_test_cls); images that are there already are passed over, so it can be stopped and
started again. Without masks (VOC's test split) it only writes. Class probabilities are averaged over --test-scales,
mirror images with --test-flip, and windows of --window pixels; then a dense CRF draws them to the edges of the
photograph (--crf-iterations; 0: none), on all cores beside the network. On several GPUs start one process each, with
--part 0/4, 1/4, ...; the same command without --part scores what they have written. The mean is over all classes that
occur, or over those of --score-classes.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bound import Bound
from crf import dense_crf, pydensecrf
from data import VOCFolder, read_label, write_label
from deeplab import SegmentationNetwork, build_segmentation_network
from files import write_text
from options import add_data_arguments, add_options, add_part_argument, resolve
from parallel import alongside, on_all_cores
from processes import check_device
from recipes import Evaluation
from scores import (
    absent_classes,
    add_score_classes,
    chosen_classes,
    classes_of,
    mean_of,
    names_of,
    no_score,
    over,
    plain,
)
from stopping import Stop, stop_signal
from tqdm import tqdm
from training import finished
from windows import probabilities

from oaa_lib import ConfusionMatrix


class Segmented(NamedTuple):
    """What the network says of an image.

    Attributes:
        name: of the image.
        photograph: (H, W, 3) uint8 RGB.
        probabilities: (C + 1, H, W) float32.
    """

    name: str
    photograph: np.ndarray
    probabilities: np.ndarray


def main() -> None:
    """Run the stage."""
    arguments = parse_arguments()
    check_device(arguments.device)
    run, state = finished(arguments.run)
    if "crop" not in run["recipe"]:
        raise SystemExit(f"{arguments.run} is no folder of train_segmentation.py (--run)")
    backbone, classes = run["arguments"]["backbone"], run["data"]["classes"]
    arguments.recipe = arguments.recipe or run["arguments"]["recipe"]
    settings: Evaluation = resolve(arguments, "evaluation", backbone)
    if settings.crf_iterations:
        pydensecrf()  # before the network is run in vain
    folder = VOCFolder(arguments.voc_root, arguments.split, labelled=False)
    if folder.classes != classes:
        raise SystemExit(f"{arguments.run} was trained on other classes than those of {arguments.voc_root}")
    scored = chosen_classes(arguments.score_classes, classes)
    network = build_segmentation_network(backbone, len(classes) + 1, weights="none")
    network.load_state_dict(state["network"])
    network.to(arguments.device, memory_format=torch.channels_last).eval()

    out = Bound(arguments.out, {"run": run, "settings": vars(settings), "split": folder.split})
    out.make()
    part, parts = arguments.part
    names = folder.names[part::parts]
    write_all(network, folder, names, out, settings)
    if parts > 1:
        print(
            f"done: {len(names)} label images of part {part}/{parts} -> {arguments.out}; when all parts are done, the "
            "same command without --part scores them"
        )
    else:
        score(folder, arguments.out, scored)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line, or these."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, help="folder of train_segmentation.py")
    parser.add_argument("--split", default="val", help="list of the images (default: val)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the label images and scores.json")
    add_part_argument(parser)
    add_score_classes(parser)
    add_options(parser, "evaluation", recipe="that of --run")
    return parser.parse_args(words)


def write_all(
    network: SegmentationNetwork, folder: VOCFolder, names: list[str], out: Bound, settings: Evaluation
) -> None:
    """The label images that are not there yet; with a CRF it runs beside the network."""
    todo = out.todo(names)
    write = partial(write_segmentation, out=out.path, settings=settings)
    bar = tqdm(desc=folder.split, initial=len(names) - len(todo), total=len(names))
    with stop_signal(True) as stop, bar:
        images = segment(network, folder, todo, settings, stop)
        for _ in alongside(write, images) if settings.crf_iterations else map(write, images):
            bar.update()
        if stop:
            raise SystemExit(f"stopped after {bar.n} of {len(names)} images; the same command goes on from there")


def segment(
    network: SegmentationNetwork, folder: VOCFolder, names: list[str], settings: Evaluation, stop: Stop
) -> Iterator[Segmented]:
    """One image after the other, until it is asked to stop."""
    for name in names:
        if stop:
            return
        photograph = folder.photograph(name)
        shown = probabilities(network, photograph, settings).cpu().numpy()
        yield Segmented(name, np.asarray(photograph), shown)


def write_segmentation(image: Segmented, *, out: Path, settings: Evaluation) -> None:
    """The label image of the most probable classes, after the CRF if there is one."""
    shown = image.probabilities
    check_finite(image.name, "the network's", shown)
    try:
        if settings.crf_iterations:
            shown = dense_crf(
                shown,
                image.photograph,
                iterations=settings.crf_iterations,
                gaussian=settings.crf_gaussian,
                bilateral=settings.crf_bilateral,
            )
            check_finite(image.name, "the CRF's", shown)
        write_label(out / f"{image.name}.png", shown.argmax(0).astype(np.uint8))
    except Exception as error:
        raise SystemExit(f"{image.name}: no label image could be made ({type(error).__name__}: {error})") from error


def check_finite(name: str, whose: str, probabilities: np.ndarray) -> None:
    """Refuse probabilities (C + 1, H, W) of which the greatest means nothing: NaN counts as the greatest."""
    wrong = ~np.isfinite(probabilities).all(0)
    if wrong.any():
        raise SystemExit(
            f"{name}: {whose} class probabilities are NaN or infinite in {wrong.sum()} of {wrong.size} pixels, so no "
            "label image is written; has the training diverged, or half precision overflowed?"
        )


def score(folder: VOCFolder, out: Path, scored: list[int]) -> None:
    """Write scores.json and print the IoU of each class, as far as there are masks."""
    masked = [name for name in folder.names if folder.has_mask(name)]
    done = f"done: {len(folder)} label images -> {out}"
    if len(masked) < len(folder):
        print(f"{len(folder) - len(masked)} of {len(folder)} images have no mask and are not scored")
    if not masked:
        print(done)
        return
    matrix = ConfusionMatrix(len(folder.classes) + 1)
    for counts in on_all_cores(partial(count, folder=folder, out=out), masked, "scores"):
        matrix.counts += torch.from_numpy(counts)
    truth = matrix.counts.sum(1)
    reason = no_score(truth, folder.split, scored)
    if reason:
        print(f"{done}; {reason}")
        return
    asked = classes_of(scored)
    for line in absent_classes(truth[asked].tolist(), names_of(asked, folder.classes), folder.split):
        print(line)
    ious = dict(zip(["background", *folder.classes], plain(matrix.iou()), strict=True))
    mean = mean_of(matrix.iou(), scored).item()
    result = {"split": folder.split, "images": len(masked), "score_classes": names_of(scored, folder.classes)}
    write_text(out / "scores.json", json.dumps(result | {"mean_iou": mean, "class_iou": ious}, indent=1))
    for name, iou in ious.items():
        print(f"{name:16} {'no score' if iou is None else f'{100 * iou:6.2f}'}")
    print(f"done: mean IoU {100 * mean:.2f}{over(scored, folder.classes)} on {len(masked)} images of {folder.split}")


def count(name: str, *, folder: VOCFolder, out: Path) -> np.ndarray:
    """(C + 1, C + 1) int64 pixels of one image by truth and label."""
    label, truth = read_label(out / f"{name}.png"), folder.mask(name)
    try:
        return ConfusionMatrix(len(folder.classes) + 1).update(label, truth).counts.numpy()
    except ValueError as error:
        raise SystemExit(f"{out / name}.png: {error}; remove it, and the same command makes it again") from None


if __name__ == "__main__":
    main()
