"""What `AttentionAccumulator.synchronize` moves between processes, against the least that joining maps must move."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.data import SIDE, labels, score_maps
from benchmarks.timing import Measured, Row
from oaa_lib import AttentionAccumulator

IMAGES = 2000


def synchronize(seconds: float) -> Iterator[Row]:
    """Two processes on this machine. An all-reduce moves the same share of whatever it is given: bytes given count."""
    for fusion in ("max", "mean"):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "bytes"
            mp.spawn(_process, (fusion, _free_port(), result), nprocs=2)
            given, least = (float(number) for number in result.read_text().split())
        yield Row(
            f"synchronize, {fusion}: bytes moved",
            Measured.once(given),
            Measured.once(least),
            given / least,
            "times",
            None,
            True,
            "B",
        )


def _process(rank: int, fusion: str, port: int, result: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    accumulator = AttentionAccumulator(labels(IMAGES), (SIDE, SIDE), fusion=fusion, gate=None)
    maps = score_maps(16)
    for start in range(16 * rank, IMAGES, 32):
        indices = list(range(start, min(start + 16, IMAGES)))
        accumulator.update(indices, maps[: len(indices)])
    given, all_reduce = [0], dist.all_reduce

    def counting(tensor: torch.Tensor, *arguments: object, **options: object) -> object:
        given[0] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = counting
    accumulator.synchronize()
    if rank == 0:
        state = accumulator.state_dict()
        least = sum(state[name].numel() * state[name].element_size() for name in ("maps", "counts"))
        result.write_text(f"{given[0]} {least}")
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        return int(candidate.getsockname()[1])
