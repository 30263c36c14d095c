"""Stage 2: train the integral attention model on the cumulative attention (OAA+; paper, section 3.3).

Writes to --out: checkpoint.pt, log.csv, settings.json. Run it again with the same --out to go on after the last
checkpoint. With several GPUs: torchrun --nproc-per-node 4 examples/voc/train_integral.py ...
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from data import VOCFolder
from files import ends_with
from networks import build_network
from optimization import make_optimizer, set_rate
from processes import Process, autocast, gradients_of_last, join, state_of
from recipes import Integral, add_options, resolve
from samples import AttentionImages
from stream import Part
from torch import Tensor
from training import OTHER_RUN, Run, add_arguments, training_split

from oaa_lib import AttentionAccumulator, hybrid_loss, multilabel_cross_entropy
from oaa_lib.maps.pairs import PairTable


def main() -> None:
    """Parse the arguments, join the other processes, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--negatives", help="list in ImageSets/Segmentation of images that show no class, mixed in")
    parser.add_argument(
        "--maps", type=Path, required=True, help="cumulative attention of stage 1, e.g. .../max.safetensors"
    )
    add_options(parser, "integral")
    arguments = parser.parse_args()
    with join(arguments.device) as process:
        train(arguments, process)


def train(arguments: argparse.Namespace, process: Process) -> None:
    """Run the stage."""
    settings = resolve(arguments, "integral", arguments.backbone)
    folder = VOCFolder(arguments.voc_root, training_split(arguments), negatives=arguments.negatives)
    if not arguments.maps.exists():
        raise SystemExit(f"{arguments.maps} does not exist; run train_attention.py to its end first (--maps)")
    with ends_with(f"--maps {arguments.maps}", "expected a file that train_attention.py wrote", ValueError):
        accumulator = AttentionAccumulator.load(arguments.maps)
        difference = PairTable.from_labels(folder.labels, folder.names).difference(accumulator.pairs)
    if difference is not None:
        raise SystemExit(
            f"{arguments.maps} holds the maps of other images or labels than {arguments.voc_root}, {folder.split} "
            f"({difference}); use the same lists, --split and --negatives as in stage 1"
        )
    run = Run(arguments, settings, folder, process)
    torch.manual_seed(arguments.seed)
    with ends_with("--weights", "expected 'default', 'none' or a file that fits --backbone", ValueError):
        network = build_network(arguments.backbone, len(folder.classes), arguments.weights)
    images = AttentionImages(
        folder, network, short_side=settings.short_side, flip=settings.flip, color_jitter=settings.color_jitter
    )
    optimizer = make_optimizer(network, settings)

    first, saved = 0, run.load()
    if saved is not None:
        first = saved["step"]
        with ends_with(f"{run.path}/checkpoint.pt", OTHER_RUN, KeyError, RuntimeError, ValueError):
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
    network = process.wrap(network).train()

    def state() -> dict[str, Any]:
        return {"network": state_of(network), "optimizer": optimizer.state_dict()}

    for step, batch in run.steps(first, images, state):
        loss, constrained = train_step(
            step, batch, network, optimizer, accumulator, settings, process, amp=arguments.amp
        )
        shown = torch.cat([share[part.targets.bool()] for part, share in zip(batch, constrained, strict=True)])
        run.log(loss=loss, **({"share_constrained": shown.mean()} if len(shown) else {}))  # negatives show no class
    if process.is_first:
        print(f"done: {settings.iterations} iterations of the {settings.loss} loss -> {run.path}")


def train_step(
    step: int,
    batch: list[Part],
    network: Any,
    optimizer: torch.optim.Optimizer,
    accumulator: AttentionAccumulator,
    settings: Integral,
    process: Process,
    *,
    amp: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Learn from the cumulative attention of a batch, without waiting for the device.

    Args:
        step: of the optimiser, from 0.
        batch: this process's share.
        network: in training mode.
        optimizer: of `make_optimizer`.
        accumulator: of stage 1.
        settings: of the recipe.
        process: this one.
        amp: whether the forward pass is in bfloat16.

    Returns:
        The loss, and for each part (B, C) which share of the pixels the constraint loss holds down (N- of Eq. 8).
    """
    set_rate(optimizer, settings, step)
    images = settings.batch_size if settings.gradient == "mean" else 1
    share = process.world / images  # of one image in the loss; gradients are averaged over processes
    loss = torch.zeros((), device=process.device)
    constrained = []
    for part in batch:  # the images of one shape
        with autocast(process, amp):
            score_maps = network(part.images.to(process.device, non_blocking=True)).score_maps
        soft_labels = accumulator.soft_labels(part.names, part.views, size=tuple(score_maps.shape[-2:]))
        targets = soft_labels.to(process.device, non_blocking=True)
        if settings.loss == "hybrid":  # Eq. 9
            part_loss = hybrid_loss(
                score_maps, targets, normalization=settings.loss_normalization, threshold=settings.threshold
            )
        else:  # Eq. 6
            part_loss = multilabel_cross_entropy(score_maps, targets, threshold=settings.threshold)
        part_loss = part_loss * (len(targets) * share)
        with gradients_of_last(network, part is batch[-1]):
            part_loss.backward()
        loss += part_loss.detach()
        constrained.append((soft_labels <= settings.threshold).float().mean((2, 3)))
    optimizer.step()
    optimizer.zero_grad()
    return loss, constrained


if __name__ == "__main__":
    main()
