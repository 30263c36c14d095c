"""What `AttentionAccumulator.synchronize` moves between processes, against the least that joining maps must move."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.data import SIDE, labels, score_maps
from benchmarks.timing import Measured, Row
from oaa_lib import AttentionAccumulator

PROCESSES = 2


def synchronize(seconds: float, images: int = 2000) -> Iterator[Row]:
    """Two processes on this machine. What each sends is 2 (R - 1) / R times what it gives to all-reduce, R being 2."""
    for fusion in ("max", "mean"):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_process, (fusion, images, Path(folder)), nprocs=PROCESSES)
            given, least = (
                Measured.once(2 * (PROCESSES - 1) / PROCESSES * float(number))
                for number in (Path(folder) / "bytes").read_text().split()
            )
        ratio = given.median / least.median
        yield Row(f"synchronize, {fusion}: bytes moved", given, least, ratio, "times", None, True, "B")


def _process(rank: int, fusion: str, images: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    accumulator = AttentionAccumulator(labels(images), (SIDE, SIDE), fusion=fusion, gate=None)
    maps = score_maps(16)
    for start in range(16 * rank, images, 16 * PROCESSES):
        indices = list(range(start, min(start + 16, images)))
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
        (folder / "bytes").write_text(f"{given[0]} {least}")
    dist.destroy_process_group()
