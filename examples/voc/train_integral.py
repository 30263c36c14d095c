"""Stage 2: train the integral attention model on the cumulative attention (OAA+; paper, section 3.3).

Writes to --out: checkpoint.pt, log.csv, settings.json. Run it again with the same --out to go on after the last
checkpoint. With several GPUs: torchrun --nproc-per-node 4 examples/voc/train_integral.py ...
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data import VOCFolder
from files import ends_with
from networks import BACKBONES, build_network
from optimization import set_rate
from options import add_options, add_training_arguments, resolve, training_split
from processes import Process, join
from recipes import Integral
from samples import AttentionImages, Sample
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset
from training import Run

from oaa_lib import AttentionAccumulator, hybrid_loss, multilabel_cross_entropy
from oaa_lib.maps.pairs import PairTable


def main() -> None:
    """Parse the arguments, join the other processes, train."""
    arguments = parse_arguments()
    with join(arguments.device) as process:
        train(arguments, process)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line, or these."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    parser.add_argument("--negatives", help="list in ImageSets/Segmentation of images that show no class, mixed in")
    parser.add_argument(
        "--maps", type=Path, required=True, help="cumulative attention of stage 1, e.g. .../max.safetensors"
    )
    add_options(parser, "integral")
    return parser.parse_args(words)


def train(arguments: argparse.Namespace, process: Process) -> None:
    """Run the stage."""
    settings: Integral = resolve(arguments, "integral", arguments.backbone)
    folder = VOCFolder(arguments.voc_root, training_split(arguments), negatives=arguments.negatives)
    accumulator = cumulative_attention(arguments.maps, folder)
    run = Run(arguments, settings, folder, process)
    images = AttentionImages.augmented(folder, BACKBONES[arguments.backbone], settings)
    network, optimizer = run.start(build_network, len(folder.classes))
    learn(run, images, network, optimizer, accumulator)
    if process.is_first:
        print(f"done: {settings.iterations} iterations of the {settings.loss} loss -> {run.path}")


def cumulative_attention(path: Path, folder: VOCFolder) -> AttentionAccumulator:
    """What stage 1 has accumulated for these images."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist; run train_attention.py to its end first (--maps)")
    with ends_with(f"--maps {path}", "expected a file that train_attention.py wrote", ValueError):
        accumulator = AttentionAccumulator.load(path)
        difference = PairTable.from_labels(folder.labels, folder.names).difference(accumulator.pairs)
    if difference is not None:
        raise SystemExit(
            f"{path} holds the maps of other images or labels than {folder.root}, {folder.split} ({difference}); use "
            "the same lists, --split and --negatives as in stage 1"
        )
    if accumulator.accepted == 0:
        raise SystemExit(f"--maps {path} holds no attention: no pair has accepted a map; train stage 1 longer")
    return accumulator


def learn(
    run: Run, images: Dataset[Sample], network: Any, optimizer: Optimizer, accumulator: AttentionAccumulator
) -> None:
    """Train the network on the cumulative attention, without waiting for the device."""
    settings = run.settings
    for step, batch in run.steps(images):
        set_rate(optimizer, settings, step)
        constrained = []
        for part in run.parts(batch):  # the images of one shape
            with run.autocast():
                score_maps = network(part.images).score_maps
            soft_labels = accumulator.soft_labels(part.names, part.views, size=tuple(score_maps.shape[-2:]))
            if settings.constrain_below == "mean":
                soft_labels = above_mean(soft_labels)
            loss = integral_loss(score_maps, soft_labels.to(score_maps.device, non_blocking=True), settings)
            run.backward(loss, part, mean=settings.gradient == "mean")
            held_down = (soft_labels <= settings.threshold).float().mean((2, 3))  # N- of Eq. 8, share of the pixels
            constrained += [held_down[row, accumulator.classes(name)] for row, name in enumerate(part.names)]
        run.step(optimizer, share_constrained=torch.cat(constrained))  # of the pairs; negatives have none


def above_mean(soft_labels: Tensor) -> Tensor:
    """Soft labels (B, C, h, w), 0 where they are not above the mean of their map.

    The paper has 0 as the level, since its maps are 0 in most places. Coarse maps hardly ever are, and a fixed level
    suits one classifier and not another: on VOC 2007 0.75 left maps so sharp that saliency could not use them.
    """
    return soft_labels.where(soft_labels > soft_labels.mean((2, 3), keepdim=True), 0)


def integral_loss(score_maps: Tensor, soft_labels: Tensor, settings: Integral) -> Tensor:
    """The mean over the images of Eq. 9, or of Eq. 6."""
    if settings.loss == "mce":
        return multilabel_cross_entropy(score_maps, soft_labels, threshold=settings.threshold)
    options = {"normalization": settings.loss_normalization, "threshold": settings.threshold}
    return hybrid_loss(score_maps, soft_labels, **options)


if __name__ == "__main__":
    main()
