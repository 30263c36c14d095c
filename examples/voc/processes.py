"""The processes that share a training: where each computes, and how gradients are exchanged."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from files import ends_with
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclasses.dataclass(frozen=True)
class Process:
    """One of the processes of a training.

    Attributes:
        device: where it computes.
        rank: its number.
        world: how many there are.
    """

    device: torch.device
    rank: int
    world: int

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes files and prints."""
        return self.rank == 0

    def place(self, network: nn.Module) -> nn.Module:
        """The network on this process's device."""
        return network.to(self.device, memory_format=torch.channels_last)  # the faster layout on CPUs and GPUs alike

    def share(self, network: nn.Module) -> nn.Module:
        """The network as it is trained: with several processes gradients are averaged over them."""
        return DistributedDataParallel(network) if self.world > 1 else network


def check_device(device: str) -> None:
    """End if --device names what is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: no CUDA device is available here; use --device cpu")
    with ends_with(f"--device {device}", "use cuda or cpu", RuntimeError, NotImplementedError):
        if torch.device(device).type != "cuda":  # the processes of torchrun have not chosen their cards yet
            torch.zeros(1, device=device).cpu()


@contextmanager
def join(device: str) -> Iterator[Process]:
    """Be one of the processes that torchrun started, or the only one."""
    check_device(device)
    torch.backends.cudnn.deterministic = True  # a resumed training repeats an uninterrupted one
    if "RANK" not in os.environ:
        yield Process(torch.device(device), 0, 1)
        return
    mine = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    dist.init_process_group("cpu:gloo,cuda:nccl" if mine.type == "cuda" else "gloo")
    try:
        yield Process(mine, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def gradients_of_last(network: nn.Module, is_last: bool) -> Iterator[None]:
    """Exchange gradients with the other processes once a step: round the forward and backward pass of a part."""
    if is_last or not isinstance(network, DistributedDataParallel):
        yield
    else:
        with network.no_sync():
            yield
