"""Stage 1: train the classifier and accumulate its attention online (OAA; paper, sections 3.1 and 3.2).

Writes to --out: checkpoint.pt, {max,mean}.safetensors (the cumulative attention, `AttentionAccumulator.load`), log.csv,
settings.json. Run it again with the same --out to go on after the last checkpoint. With several GPUs:

    torchrun --nproc-per-node 4 examples/voc/train_attention.py --voc-root ... --out ...
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from data import VOCFolder
from diagnosis import Diagnosis, Watched
from files import ends_with
from networks import BACKBONES, build_network
from optimization import set_rate
from options import add_options, add_training_arguments, resolve, training_split, whole_number
from processes import Process, join
from recipes import Attention
from samples import AttentionImages, Sample
from signs import expectation, signs
from stream import Part
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Optimizer
from torch.utils.data import Dataset
from training import Run

from oaa_lib import AttentionAccumulator, CAMOutput, attention_drop

FUSIONS = ("max", "mean", "latest")  # the latest for the drop, and to see how attention wanders
Accumulators = dict[str, AttentionAccumulator]


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
        "--snapshots", type=whole_number, default=8, help="images whose attention of every epoch is kept"
    )
    add_options(parser, "attention")
    return parser.parse_args(words)


def train(arguments: argparse.Namespace, process: Process) -> None:
    """Run the stage."""
    settings: Attention = resolve(arguments, "attention", arguments.backbone)
    if arguments.snapshots < 1:
        raise SystemExit(f"--snapshots: expected at least 1 image, got {arguments.snapshots}")
    if settings.warm_up >= settings.iterations:
        raise SystemExit(
            f"--warm-up {settings.warm_up}: nothing is accumulated in {settings.iterations} iterations; take fewer"
        )
    folder = VOCFolder(arguments.voc_root, training_split(arguments), negatives=arguments.negatives)
    if not folder.labels.any():
        raise SystemExit(f"no image of {folder.split} in {arguments.voc_root} shows a class: nothing to learn")
    run = Run(arguments, settings, folder, process)
    images = AttentionImages.augmented(folder, BACKBONES[arguments.backbone], settings)
    accumulators = make_accumulators(folder, images, settings)
    watched = watch(run, folder, accumulators)
    network, optimizer = run.start(build_network, len(folder.classes), snapshots=watched, **accumulators)

    learn(run, images, network, optimizer, accumulators, watched, Diagnosis(accumulators))

    if settings.fill_empty == "final-model":
        whole = AttentionImages(folder, images, short_side=settings.short_side)  # neither flipped nor jittered
        fill_empty(network, whole, accumulators, settings, process)
    if process.is_first:
        save(run, accumulators)


def learn(
    run: Run,
    images: Dataset[Sample],
    network: Any,
    optimizer: Optimizer,
    accumulators: Accumulators,
    watched: Watched,
    diagnosis: Diagnosis,
) -> None:
    """Train the network and accumulate its attention on the way.

    Nothing waits for the device, but the accumulators' maps where they live on the host.
    """
    settings = run.settings
    fills, first, last = settings.fill_empty == "last-epoch", run.last_pass[0], run.last_pass[-1]
    for step, batch in run.steps(images):
        set_rate(optimizer, settings, step)
        if fills and step in (first, first + 1, last):  # round batches that two passes share
            share(accumulators, run.process)  # what another process has filled is not empty
        how = {"normalization": settings.normalization, "fill_empty": fills and step in run.last_pass}
        for part in run.parts(batch):  # the images of one shape
            with run.autocast():
                out = network(shown(part, accumulators["latest"], settings))  # Eq. 1
            logits = pooled(out, settings.pooling)
            run.backward(binary_cross_entropy_with_logits(logits, part.targets), part)
            if step < settings.warm_up:
                continue
            for accumulator in accumulators.values():  # Eq. 2, the gate, and Eq. 4 with Eq. 5 or 10
                with diagnosis.of(accumulator, part.names):
                    accumulator.update(part.names, out.score_maps, logits, part.views, **how)
        if (step + 1) % run.epoch_length == 0 or step + 1 == settings.iterations:  # when maps are kept and logged
            share(accumulators, run.process)
        watched.take(step + 1)
        run.step(optimizer, attention=diagnosis)


def share(accumulators: Accumulators, process: Process) -> None:
    """Let every process know what all of them have seen."""
    if process.world > 1:
        for accumulator in accumulators.values():
            accumulator.synchronize()


def pooled(out: CAMOutput, pooling: str) -> Tensor:
    """Logits (B, C) float32 of score maps: their average (Eq. 1), or another pooling of the field.

    ``max``: Oquab et al., CVPR 2015. ``lse``: the log of the mean of exponentials, sharpness 5: Pinheiro and Collobert,
    CVPR 2015. ``topk``: the mean of the highest fifth of the cells.
    """
    scores = out.score_maps.float().flatten(2)  # (B, C, cells)
    if pooling == "max":
        return scores.amax(2)
    if pooling == "lse":
        return (torch.logsumexp(5 * scores, 2) - math.log(scores.shape[2])) / 5
    if pooling == "topk":
        return scores.topk(max(scores.shape[2] // 5, 1), 2).values.mean(2)
    return out.logits.float()


def shown(part: Part, latest: AttentionAccumulator, settings: Attention) -> Tensor:
    """The images (B, 3, H, W), with what the network looked at last hidden in some of them (attention drop)."""
    if settings.drop == 0:
        return part.images
    attention = latest.soft_labels(part.names, part.views).to(part.images.device, non_blocking=True)
    return attention_drop(part.images, attention, part.targets, rate=settings.drop, threshold=settings.drop_above)


def make_accumulators(folder: VOCFolder, images: AttentionImages, settings: Attention) -> Accumulators:
    """One for each fusion, with a map in the size of the network's cells for each pair."""
    gate = None if settings.gate == "none" else settings.gate
    options = {"gate": gate, "keys": folder.names}
    return {
        fusion: AttentionAccumulator(folder.labels, images.map_sizes, fusion=fusion, **options) for fusion in FUSIONS
    }


def watch(run: Run, folder: VOCFolder, accumulators: Accumulators) -> Watched:
    """Images at even distances, after each pass and at the end."""
    number = run.arguments.snapshots
    labelled = [name for name in folder.names if folder.class_ids(name)]
    names = labelled[:: max(len(labelled) // number, 1)][:number]
    iterations = run.settings.iterations
    return Watched(accumulators, names, [*range(run.epoch_length, iterations + 1, run.epoch_length), iterations])


@torch.no_grad()
def fill_empty(
    network: Any, images: AttentionImages, accumulators: Accumulators, settings: Attention, process: Process
) -> None:
    """Give pairs that no map was accepted for the final model's, in one view (the caffe program)."""
    network.eval()
    for accumulator in accumulators.values():
        gate, accumulator.gate = accumulator.gate, nothing
        empty = images.folder.labels.bool() & ~accumulator.accumulated.cpu()
        for index in empty.any(1).nonzero().flatten().tolist():
            out = network(images[index].image[None].to(process.device))
            how = {"normalization": settings.normalization, "fill_empty": True}
            accumulator.update([index], out.score_maps, pooled(out, settings.pooling), **how)
        accumulator.gate = gate


def nothing(logits: Tensor, labels: Tensor) -> Tensor:
    """A gate that lets nothing pass."""
    return torch.zeros_like(labels, dtype=torch.bool)


def save(run: Run, accumulators: Accumulators) -> None:
    """Write the cumulative attention, and say what has come of it."""
    for fusion in ("max", "mean"):
        with ends_with(f"{run.path}/{fusion}.safetensors", "make room, then the same command writes it"):
            accumulators[fusion].save(run.path / f"{fusion}.safetensors")
    print(expectation(signs(run.path))[1])
    oaa = accumulators["max"]
    print(
        f"done: {run.settings.iterations} iterations, {oaa.pairs.num_pairs} pairs, "
        f"{int(oaa.statistics().never_accumulated.sum())} never accumulated, "
        f"{oaa.accepted / max(oaa.offered, 1):.0%} of the maps passed the gate -> {run.path}"
    )


if __name__ == "__main__":
    main()
