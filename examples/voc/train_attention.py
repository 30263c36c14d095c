"""Stage 1: train the classifier and accumulate its attention online (OAA; paper, sections 3.1 and 3.2).

Writes to --out: checkpoint.pt, {max,mean}.safetensors (the cumulative attention, `AttentionAccumulator.load`), log.csv.
Run it again with the same --out to resume after the last complete epoch.
"""

import argparse
import time

import torch
from data import VOCFolder
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from training import (
    Run,
    Stopwatch,
    add_arguments,
    autocast,
    complete,
    learning_rate,
    make_loader,
    make_optimizer,
    mirror_back,
    prepare_network,
)

from oaa_lib import AttentionAccumulator


def latest(cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
    """A fusion that keeps the newest map: what the classifier attends to right now."""
    return attention


def cosine_similarity(before: AttentionAccumulator, now: AttentionAccumulator) -> float:
    """Mean cosine similarity of the pairs' maps in two epochs; 1 means that attention stands still."""
    both = (before.accumulated & now.accumulated).any(1).nonzero().flatten().tolist()
    similarities = [F.cosine_similarity(before.attention(i).flatten(1), now.attention(i).flatten(1)) for i in both]
    return torch.cat(similarities).mean().item() if similarities else float("nan")


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, epochs=15)
    parser.add_argument("--gate", choices=("score", "topk", "none"), default="score")
    parser.add_argument(
        "--warm-up", type=int, default=0, help="epochs that are not accumulated (release: 1; default: 0)"
    )
    parser.add_argument("--fill-empty", action="store_true", help="the last epoch is ungated for empty pairs (release)")
    parser.add_argument("--snapshots", type=int, default=8, help="images whose attention of every epoch is kept")
    arguments = complete(parser.parse_args())
    run = Run(arguments)

    data = VOCFolder(arguments.voc_root, "train", negatives=arguments.negatives)
    network = prepare_network(arguments, data)
    optimizer = make_optimizer(network, arguments)
    loader = make_loader(data, arguments)

    gate = None if arguments.gate == "none" else arguments.gate
    owners = {"labels": data.labels, "map_size": data.map_size, "keys": data.names}
    accumulators = {fusion: AttentionAccumulator(**owners, fusion=fusion, gate=gate) for fusion in ("max", "mean")}
    previous, current = (AttentionAccumulator(**owners, fusion=latest, gate=None) for _ in range(2))
    watched = data.names[:: max(len(data) // max(arguments.snapshots, 1), 1)][: arguments.snapshots]
    watched = [name for name in watched if data.class_ids(name)]
    snapshots: list[dict[str, Tensor]] = []

    state = run.load()
    first_epoch = 0
    if state is not None:
        first_epoch, snapshots = state["epoch"], state["snapshots"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        for name, accumulator in accumulators.items():
            accumulator.load_state_dict(state[name])
        previous.load_state_dict(state["previous"])
        print(f"resumed after epoch {first_epoch}")

    network.train()
    step = first_epoch * len(loader)
    for epoch in range(first_epoch, arguments.epochs):
        loader.batch_sampler.epoch = epoch
        current.reset()
        started, losses, accumulating = time.perf_counter(), [], Stopwatch()
        before = accumulators["max"].accepted, accumulators["max"].offered
        for names, images, labels, flipped in tqdm(loader, desc=f"epoch {epoch + 1}/{arguments.epochs}", leave=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(arguments, step, arguments.epochs * len(loader))
            with autocast(arguments):
                logits, score_maps = network(images.to(arguments.device))  # Eq. 1
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels.to(arguments.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            losses.append(loss.detach())

            score_maps = pad_to(mirror_back(score_maps.detach(), flipped), data.map_size)
            fill = arguments.fill_empty and epoch == arguments.epochs - 1
            with accumulating:
                if epoch >= arguments.warm_up:
                    accumulators["max"].update(names, score_maps, logits.detach(), fill_empty=fill)  # Eq. 4, 5
            if epoch >= arguments.warm_up:
                accumulators["mean"].update(names, score_maps, logits.detach(), fill_empty=fill)  # Eq. 10
            current.update(names, score_maps)

        seconds = time.perf_counter() - started
        offered = accumulators["max"].offered - before[1]
        row = {
            "epoch": epoch + 1,
            "loss": torch.stack(losses).mean().item(),
            "gate_pass_rate": (accumulators["max"].accepted - before[0]) / max(offered, 1),
            "pairs_empty": accumulators["max"].pairs.num_pairs - int(accumulators["max"].accumulated.sum()),
            "maps_skipped": accumulators["max"].skipped,
            "cosine_to_previous_epoch": cosine_similarity(previous, current) if epoch else float("nan"),
            "seconds": seconds,
            "accumulation_share": accumulating.seconds / seconds,
        }
        run.log(row, first=epoch == 0)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        snapshots.append({name: data.own_cells(name, current.attention(name)).clone() for name in watched})
        previous, current = current, previous
        run.save(
            epoch=epoch + 1,
            network=network.state_dict(),
            optimizer=optimizer.state_dict(),
            previous=previous.state_dict(),
            snapshots=snapshots,
            **{name: accumulator.state_dict() for name, accumulator in accumulators.items()},
        )

    for name, accumulator in accumulators.items():
        accumulator.save(run.folder / f"{name}.safetensors")
    best = accumulators["max"]
    empty = best.pairs.num_pairs - int(best.accumulated.sum())
    print(
        f"done: {arguments.epochs} epochs, {best.pairs.num_pairs} pairs, {empty} never accumulated, "
        f"{best.accepted / max(best.offered, 1):.0%} of the maps passed the gate -> {run.folder}"
    )


def pad_to(score_maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Score maps of any shape in the top left of one frame that holds every shape; `VOCFolder.own_cells` undoes it."""
    height, width = score_maps.shape[-2:]
    return F.pad(score_maps, (0, size[1] - width, 0, size[0] - height))


if __name__ == "__main__":
    main()
