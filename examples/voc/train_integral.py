"""Stage 2: train the integral attention model on the cumulative attention (OAA+; paper, section 3.3).

Writes to --out: checkpoint.pt, log.csv. Run it again with the same --out to resume after the last complete epoch.
"""

import argparse
import time
from pathlib import Path

import torch
from data import VOCFolder
from tqdm import tqdm
from training import (
    Run,
    add_arguments,
    autocast,
    complete,
    learning_rate,
    make_loader,
    make_optimizer,
    mirror_back,
    prepare_network,
)

from oaa_lib import AttentionAccumulator, hybrid_loss, multilabel_cross_entropy


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, epochs=15)
    parser.add_argument(
        "--maps", type=Path, required=True, help="cumulative attention of stage 1, e.g. .../max.safetensors"
    )
    parser.add_argument("--loss", choices=("hybrid", "mce"), default="hybrid", help="Eq. 9 or Eq. 6 (default: hybrid)")
    parser.add_argument("--normalization", choices=("class", "pooled"), default="class", help="of the hybrid loss")
    parser.add_argument("--threshold", type=float, default=0.0, help="soft labels up to this count as N- (default: 0)")
    arguments = complete(parser.parse_args())
    run = Run(arguments)

    data = VOCFolder(arguments.voc_root, "train", negatives=arguments.negatives)
    network = prepare_network(arguments, data)
    optimizer = make_optimizer(network, arguments)
    loader = make_loader(data, arguments)
    accumulator = AttentionAccumulator.load(arguments.maps)
    if accumulator.pairs.keys != data.names or accumulator.map_size != data.map_size:
        raise SystemExit(
            f"{arguments.maps} holds other images or map sizes than {arguments.voc_root}; use the same --negatives, "
            "--short-side and --backbone as in stage 1"
        )

    state = run.load()
    first_epoch = 0
    if state is not None:
        first_epoch = state["epoch"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"resumed after epoch {first_epoch}")

    network.train()
    step = first_epoch * len(loader)
    for epoch in range(first_epoch, arguments.epochs):
        loader.batch_sampler.epoch = epoch
        started, losses, constrained = time.perf_counter(), [], []
        for names, images, labels, flipped in tqdm(loader, desc=f"epoch {epoch + 1}/{arguments.epochs}", leave=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(arguments, step, arguments.epochs * len(loader))
            with autocast(arguments):
                score_maps = network(images.to(arguments.device)).score_maps
            height, width = score_maps.shape[-2:]
            soft_labels = mirror_back(accumulator[names][..., :height, :width], flipped).to(arguments.device)
            if arguments.loss == "hybrid":
                loss = hybrid_loss(
                    score_maps, soft_labels, normalization=arguments.normalization, threshold=arguments.threshold
                )
            else:
                loss = multilabel_cross_entropy(score_maps, soft_labels, threshold=arguments.threshold)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            losses.append(loss.detach())
            targets = soft_labels[labels.bool().to(arguments.device)]  # (K, h, w): maps of classes that are shown
            constrained.append((targets <= arguments.threshold).float().mean((1, 2)))

        row = {
            "epoch": epoch + 1,
            "loss": torch.stack(losses).mean().item(),
            "share_constrained": torch.cat(constrained).mean().item(),  # of the soft labels of shown classes, in N-
            "seconds": time.perf_counter() - started,
        }
        run.log(row, first=epoch == 0)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        run.save(epoch=epoch + 1, network=network.state_dict(), optimizer=optimizer.state_dict())
    print(f"done: {arguments.epochs} epochs of the {arguments.loss} loss -> {run.folder}")


if __name__ == "__main__":
    main()
