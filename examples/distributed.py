"""OAA with many processes: each trains on its share of the images, and after an epoch all hold what all have seen.

    torchrun --nproc-per-node 2 examples/distributed.py                        # a minute on two cores, or CUDA
    torchrun --nproc-per-node 4 examples/distributed.py --resume --epochs 12   # goes on, with another number of them
    python examples/distributed.py                                             # one process

Stop it whenever you like: the last checkpoint is whole. Images and network are those of quickstart.py, without its
integral attention model. Processes on several machines need an --out that all of them see.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from quickstart import BATCH_SIZE, CLASSES, LEARNING_RATE, SIZE, Network, draw_image, score
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import v2
from tqdm import tqdm

import oaa_lib
from oaa_lib.augmentation import WithViews


def main() -> None:
    """Parse the arguments, join the other processes, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/distributed"), help="folder for checkpoint and maps")
    parser.add_argument("--images", type=int, default=400, help="how many to draw")
    parser.add_argument("--epochs", type=int, default=8, help="how many to train, in all")
    parser.add_argument("--seed", type=int, default=0, help="of the images, the weights and the order")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    args = parser.parse_args()
    if checkpoints(args.out) and not args.resume:
        parser.error(f"--out: there is a checkpoint in {args.out}; pass --resume to go on, or take another folder")
    device = join()
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


def join() -> torch.device:
    """Be one of the processes that torchrun started, or a group of one without it. Returns this process's device."""
    local, processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.device_count() >= processes:
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train a classifier and accumulate its attention."""
    rank, world = dist.get_rank(), dist.get_world_size()
    # All draw the same images; each will train on its share of them.
    rng = np.random.default_rng(args.seed)
    drawn = [draw_image(rng) for _ in tqdm(range(args.images), "drawing images", disable=rank > 0)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).float().permute(0, 3, 1, 2).contiguous()
    masks = torch.from_numpy(np.stack([mask for _, mask in drawn]))
    labels = torch.stack([(masks == c + 1).flatten(1).any(1) for c in range(len(CLASSES))], 1)

    crop_and_flip = v2.Compose([v2.RandomResizedCrop(SIZE, scale=(0.5, 1)), v2.RandomHorizontalFlip()])
    dataset = WithViews(list(zip(images, labels.float(), strict=True)), crop_and_flip)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, seed=args.seed)
    loader = DataLoader(dataset, max(1, BATCH_SIZE // world), sampler=sampler)

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(Network().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    accumulator = oaa_lib.AttentionAccumulator(labels, (SIZE // 4, SIZE // 4), device=device)

    def state(epoch: int) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "accumulator": accumulator, "epoch": epoch}

    first = 0
    if found := checkpoints(args.out):
        saved = state(0)
        dcp.load(saved, checkpoint_id=found[-1])  # the accumulator of every process: all had been synchronized
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        first = saved["epoch"]

    bar = tqdm(
        range(first, args.epochs), "classifier + OAA", args.epochs, initial=first, unit="epoch", disable=rank > 0
    )
    for epoch in bar:
        sampler.set_epoch(epoch)  # another order in each epoch, which all processes share
        torch.manual_seed((1000 * args.seed + epoch) * world + rank)  # other crops in each, shared by none
        losses = []
        for indices, views, batch, targets in loader:
            out = model(batch.to(device))
            loss = F.binary_cross_entropy_with_logits(out.logits, targets.to(device))  # Eq. 1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            accumulator.update(indices, out.score_maps, out.logits, views)  # what this process has seen; no waiting
        accumulator.synchronize()  # from here on what all have seen
        save(state(epoch + 1), args.out, epoch + 1)
        bar.set_postfix(loss=f"{torch.stack(losses).mean():.3f}", accepted=f"{accumulator.accepted}")

    if rank == 0:
        accumulator.save(args.out / "maps.safetensors")
        for name, rate in zip(CLASSES, accumulator.statistics().pass_rate.tolist(), strict=True):
            print(f"{name:8} maps that passed the gate: {rate:.1%}")
        row = score(accumulator[range(args.images)], labels, masks)
        print(f"cue mIoU of the accumulated maps: {row['reported']:.1f} (constant background {row['threshold']:.2f})")


def checkpoints(folder: Path) -> list[Path]:
    """Whole ones, the last one last."""
    return sorted(folder.glob("epoch-*"))


def save(state: dict[str, Any], folder: Path, epoch: int) -> None:
    """Write a checkpoint, all processes together; it gets its name once it is whole, and then replaces those before."""
    partial, before = folder / "partial", checkpoints(folder)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(folder / f"epoch-{epoch:05d}")
        for old in before:
            shutil.rmtree(old)
    dist.barrier()


if __name__ == "__main__":
    main()
