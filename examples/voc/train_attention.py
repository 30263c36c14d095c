"""Stage 1: train the classifier and accumulate its attention online (OAA; paper, sections 3.1 and 3.2).

Writes to --out: checkpoint.pt, {max,mean}.safetensors (the cumulative attention, `AttentionAccumulator.load`), log.csv,
settings.json. Run it again with the same --out to go on after the last checkpoint. With several GPUs:

    torchrun --nproc-per-node 4 examples/voc/train_attention.py --voc-root ... --out ...
"""

import argparse
import math
from typing import Any

import torch
from data import AttentionImages, Part, VOCFolder, ends_with
from networks import build_network
from optimization import make_optimizer, set_rate
from recipes import Attention, add_options, resolve
from torch import Tensor
from torch.nn import functional as F
from training import (
    OTHER_RUN,
    Process,
    Run,
    Stopwatch,
    add_arguments,
    autocast,
    gradients_of_last,
    join,
    state_of,
    training_split,
)
from when_it_pays import expectation, signs

from oaa_lib import AttentionAccumulator, Snapshots, attention_drop, attention_similarity

FUSIONS = (
    "max",
    "mean",
    "latest",
)  # the latest for the drop, the pictures of attention wandering, and how fast it does


def main() -> None:
    """Parse the arguments, join the other processes, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--negatives", help="list in ImageSets/Segmentation of images that show no class, mixed in")
    parser.add_argument("--snapshots", type=int, default=8, help="images whose attention of every epoch is kept")
    add_options(parser, "attention")
    arguments = parser.parse_args()
    with join(arguments.device) as process:
        train(arguments, process)


def train(arguments: argparse.Namespace, process: Process) -> None:
    """Run the stage."""
    settings = resolve(arguments, "attention", arguments.backbone)
    folder = VOCFolder(arguments.voc_root, training_split(arguments), negatives=arguments.negatives)
    if not folder.labels.any():
        raise SystemExit(f"no image of {folder.split} in {arguments.voc_root} shows a class: nothing to learn")
    run = Run(arguments, settings, folder, process)
    torch.manual_seed(arguments.seed)
    with ends_with("--weights", "expected 'default', 'none' or a file that fits --backbone", ValueError):
        network = build_network(arguments.backbone, len(folder.classes), arguments.weights)
    images = AttentionImages(
        folder, network, short_side=settings.short_side, flip=settings.flip, color_jitter=settings.color_jitter
    )
    optimizer = make_optimizer(network, settings)

    accumulators = {
        fusion: AttentionAccumulator(
            folder.labels,
            images.map_sizes,
            fusion=fusion,
            gate=None if settings.gate == "none" else settings.gate,
            keys=folder.names,
        )
        for fusion in FUSIONS
    }
    oaa = accumulators["max"]
    shown = [name for name in folder.names if folder.class_ids(name)]
    watched = shown[:: max(len(shown) // max(arguments.snapshots, 1), 1)][: arguments.snapshots]
    epochs = range(run.epoch_length, settings.iterations + 1, run.epoch_length)
    moments = [*epochs, settings.iterations]
    snapshots = {
        kind: Snapshots(accumulators[fusion], watched, moments)
        for kind, fusion in (("cumulative", "max"), ("latest", "latest"))
    }

    first, saved = 0, run.load()
    if saved is not None:
        first = saved["step"]
        with ends_with(f"{run.path}/checkpoint.pt", OTHER_RUN, KeyError, RuntimeError, ValueError):
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            for fusion, accumulator in accumulators.items():
                accumulator.load_state_dict(saved[fusion])
            for kind, shots in snapshots.items():
                shots.load_state_dict({"taken": saved["snapshots"]["taken"], "maps": saved["snapshots"][kind]})
    network = process.wrap(network).train()

    def state() -> dict[str, Any]:
        for accumulator in accumulators.values():
            if process.world > 1:
                accumulator.synchronize()
        kept = {"network": state_of(network), "optimizer": optimizer.state_dict()}
        kept["snapshots"] = {kind: shots.state_dict()["maps"] for kind, shots in snapshots.items()}
        kept["snapshots"]["taken"] = list(snapshots["latest"].taken)
        return kept | {fusion: accumulator.state_dict() for fusion, accumulator in accumulators.items()}

    last_pass = settings.iterations - math.ceil(len(folder) / settings.batch_size)
    accumulating = Stopwatch()
    wandering = Wandering()
    log = Log(oaa, accumulating, wandering)
    for step, batch in run.steps(first, images, state):
        fill = settings.fill_empty == "last-epoch" and step >= last_pass
        options = {"amp": arguments.amp, "fill": fill, "accumulating": accumulating, "wandering": wandering}
        loss = train_step(step, batch, network, optimizer, accumulators, settings, process, **options)
        for shots in snapshots.values():
            shots.take(step + 1)
        run.log(loss=loss, attention=log)

    if settings.fill_empty == "final-model":
        whole = AttentionImages(folder, images, short_side=settings.short_side)  # neither flipped nor jittered
        fill_empty(network, whole, accumulators, settings.normalization, process)
    if process.is_first:
        for fusion in ("max", "mean"):
            with ends_with(f"{run.path}/{fusion}.safetensors", "make room, then the same command writes it"):
                accumulators[fusion].save(run.path / f"{fusion}.safetensors")
        print(expectation(signs(run.path))[1])
        total = oaa.statistics()
        print(
            f"done: {settings.iterations} iterations, {oaa.pairs.num_pairs} pairs, "
            f"{int(total.never_accumulated.sum())} never accumulated, "
            f"{oaa.accepted / max(oaa.offered, 1):.0%} of the maps passed the gate -> {run.path}"
        )


def train_step(
    step: int,
    batch: list[Part],
    network: Any,
    optimizer: torch.optim.Optimizer,
    accumulators: dict[str, AttentionAccumulator],
    settings: Attention,
    process: Process,
    *,
    amp: bool,
    fill: bool,
    accumulating: Stopwatch,
    wandering: "Wandering",
) -> Tensor:
    """Learn from a batch and accumulate its attention on the way; returns the loss.

    Nothing waits for the device, but the accumulators' maps where they live on the host.

    Args:
        step: of the optimiser, from 0.
        batch: this process's share.
        network: in training mode.
        optimizer: of `make_optimizer`.
        accumulators: by the name of their fusion.
        settings: of the recipe.
        process: this one.
        amp: whether the forward pass is in bfloat16.
        fill: whether pairs that hold nothing accept what the gate refuses.
        accumulating: adds up the time of ``accumulators["max"]``.
        wandering: is shown the latest attention.
    """
    set_rate(optimizer, settings, step)
    share = process.world / settings.batch_size  # of one image in the loss; gradients are averaged over processes
    loss = torch.zeros((), device=process.device)
    for part in batch:  # the images of one shape
        images, labels = (t.to(process.device, non_blocking=True) for t in (part.images, part.targets))
        if settings.drop > 0:
            latest = accumulators["latest"].soft_labels(part.names, part.views)
            latest = latest.to(process.device, non_blocking=True)
            images = attention_drop(images, latest, labels, rate=settings.drop, threshold=settings.drop_above)
        with autocast(process, amp):
            out = network(images)  # Eq. 1
        part_loss = F.binary_cross_entropy_with_logits(out.logits.float(), labels) * (len(labels) * share)
        with gradients_of_last(network, part is batch[-1]):
            part_loss.backward()
        loss += part_loss.detach()
        if step >= settings.warm_up:
            before = accumulators["latest"][part.names]
            for fusion, accumulator in accumulators.items():
                with accumulating if fusion == "max" else Stopwatch():
                    accumulator.update(  # Eq. 2, and Eq. 4 with Eq. 5 or 10
                        part.names,
                        out.score_maps.detach(),
                        out.logits.detach(),
                        part.views,
                        normalization=settings.normalization,
                        fill_empty=fill,
                    )
            wandering.add(before, accumulators["latest"][part.names])
    optimizer.step()
    optimizer.zero_grad()
    return loss


class Wandering:
    """How similar the maps that pairs accept are to the ones before, on average; 1: attention stands still."""

    def __init__(self) -> None:
        self.total, self.number = torch.zeros(()), torch.zeros(())

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count the latest attention (B, C, h, w) before and after an update, where it is another."""
        similarity = attention_similarity(before, after)  # NaN where there was none before
        accepted = (before != after).flatten(2).any(2) & ~similarity.isnan()
        self.total = self.total.to(before.device) + similarity.where(accepted, 0).sum()
        self.number = self.number.to(before.device) + accepted.sum()

    def take(self) -> float:
        """The average since it was last taken; NaN if there was nothing."""
        average = (self.total / self.number).item()
        self.total, self.number = torch.zeros(()), torch.zeros(())
        return average


class Log:
    """What decides whether accumulation pays, since it was last asked for."""

    def __init__(self, accumulator: AttentionAccumulator, accumulating: Stopwatch, wandering: Wandering) -> None:
        self.accumulator, self.accumulating, self.wandering = accumulator, accumulating, wandering
        self.offered, self.accepted = accumulator.offered, accumulator.accepted

    def __call__(self) -> dict[str, float]:
        """One row of the log."""
        statistics = self.accumulator.statistics()
        offered, accepted = int(statistics.offered.sum()), int(statistics.accepted.sum())
        rate = (accepted - self.accepted) / max(offered - self.offered, 1)
        self.offered, self.accepted = offered, accepted
        seconds, self.accumulating.seconds = self.accumulating.seconds, 0.0
        return {
            "gate_pass_rate": rate,
            "pairs_empty": int(statistics.never_accumulated.sum()),
            "maps_skipped": int(statistics.skipped.sum()),
            "similarity": self.wandering.take(),
            "accumulation_seconds": seconds,
        }


@torch.no_grad()
def fill_empty(
    network: Any,
    images: AttentionImages,
    accumulators: dict[str, AttentionAccumulator],
    normalization: str,
    process: Process,
) -> None:
    """Give pairs that no map was accepted for the final model's, in one view (the caffe program)."""
    network.eval()
    for accumulator in accumulators.values():
        gate, accumulator.gate = accumulator.gate, nothing
        empty = images.folder.labels.bool() & ~accumulator.accumulated.cpu()
        for index in empty.any(1).nonzero().flatten().tolist():
            out = network(images[index].image[None].to(process.device))
            accumulator.update([index], out.score_maps, out.logits, normalization=normalization, fill_empty=True)
        accumulator.gate = gate


def nothing(logits: Tensor, labels: Tensor) -> Tensor:
    """A gate that lets nothing pass."""
    return torch.zeros_like(labels, dtype=torch.bool)


if __name__ == "__main__":
    main()
