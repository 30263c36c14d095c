"""What each process of a group does in the tests of `synchronize`: started by torchrun, one file of results a rank.

    python -m torch.distributed.run --standalone --nproc-per-node 4 tests/distributed_worker.py FOLDER

All scenarios go into one launch, since a process takes seconds to start. The cases and events are imported by
test_distributed.py, which lets one process see everything and compares.
"""

import contextlib
import gc
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler

from oaa_lib import AttentionAccumulator, View
from oaa_lib.maps import processes

LABELS = [[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]]  # no event shows image 4
SIZES = [[6, 5], [3, 8], [6, 5], [1, 1], [4, 4], [2, 2]]
ROUNDS = 3
EVENTS = 6  # batches of a round


class OwnMean:
    """A user's mean that asks for no more than what the maps are stored in."""

    reduction = "mean"

    def __call__(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        return cumulative + (attention - cumulative) / (count + 1)

    def merge(self, first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
        return (first * first_count + second * second_count) / (first_count + second_count)


class Case(NamedTuple):
    """How an accumulator is built, and whether it is shown crops and flips."""

    options: dict[str, Any]
    crops: bool

    def accumulator(self, **others: Any) -> AttentionAccumulator:
        options = {"labels": LABELS, "map_size": (6, 5), **self.options, **others}
        return AttentionAccumulator(options.pop("labels"), options.pop("map_size"), **options)

    def show(self, accumulator: AttentionAccumulator, turn: int, rank: int = 0, world: int = 1) -> None:
        """What a rank sees in a round; of one process: everything."""
        for number, (indices, score_maps, logits, views) in enumerate(events(turn)):
            if owner(turn, number, world) == rank:
                accumulator.update(indices, score_maps, logits, views if self.crops else None)


CASES = {
    "max, uint8": Case({}, False),
    "max, float16, crops": Case({"dtype": torch.float16}, True),
    "max, float32, crops, sizes": Case({"dtype": torch.float32, "map_size": SIZES}, True),
    "mean": Case({"fusion": "mean"}, False),
    "mean, crops": Case({"fusion": "mean"}, True),
    "mean, crops, sizes": Case({"fusion": "mean", "map_size": SIZES}, True),
    "mean, sizes": Case({"fusion": "mean", "map_size": SIZES}, False),
    "own mean, float16, crops": Case({"fusion": OwnMean(), "dtype": torch.float16}, True),
}
LATEST = {  # what one process would hold depends on the order
    "latest, crops": Case({"fusion": "latest"}, True),
    "latest, float16, sizes": Case({"fusion": "latest", "dtype": torch.float16, "map_size": SIZES}, False),
}
ONCE = {  # fusions that can be synchronised once only
    "noisy-or, crops": Case({"fusion": "noisy-or"}, True),
    "noisy-or, sizes": Case({"fusion": "noisy-or", "map_size": SIZES}, False),
    "noisy-or, crops, sizes": Case({"fusion": "noisy-or", "map_size": SIZES}, True),
}
SAVED = (
    "max, uint8",
    "mean, crops",
    "mean, sizes",
)  # go through a checkpoint, on to other numbers of processes


def events(turn: int) -> Iterator[tuple[list[int], Tensor, Tensor, list[View]]]:
    """The batches of one round, whoever sees them. Images meet again: in a batch, on other ranks, in other rounds."""
    for number in range(EVENTS):
        rng = np.random.default_rng([turn, number])
        indices = rng.choice([0, 1, 2, 3, 5], 4)
        scores = rng.normal(size=(4, 3, 4, 5))
        scores[rng.random((4, 3)) < 0.08] = np.nan
        logits = rng.normal(size=(4, 3)) + np.array(LABELS)[indices]  # some pass the gate
        low, high = rng.uniform(-0.1, 0.5, (4, 2)), rng.uniform(0.6, 1.2, (4, 2))
        boxes = [View(*low[i], *high[i], bool(rng.random() < 0.5)) for i in range(4)]
        yield indices.tolist(), torch.tensor(scores).float(), torch.tensor(logits).float(), boxes


def owner(turn: int, number: int, world: int) -> int:
    """Uneven shards: in the first round, and with more than two ranks in every one, there is one that sees nothing."""
    idle = (turn + 1) % world if world > 2 or (world == 2 and turn == 0) else None
    busy = [rank for rank in range(world) if rank != idle]
    return busy[(0, 0, 1, 0, 2, 0)[number] % len(busy)]


def snapshot(accumulator: AttentionAccumulator) -> dict[str, Any]:
    """A copy of all that is kept, and of what it says of itself."""
    state = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in accumulator.state_dict().items()
    }
    return {**state, "statistics": tuple(accumulator.statistics())}


def refusal(call: Callable[[], Any]) -> str | None:
    """The message of the ValueError."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


# Scenarios: each is called with the rank, the number of processes and a folder, and returns what the test looks at.


def every_round(rank: int, world: int, folder: Path) -> Any:
    """Update, synchronize, update, ...: the states before and after, and after a second synchronize."""
    found: dict[str, Any] = {}
    for name, case in {**CASES, **LATEST}.items():
        accumulator = case.accumulator()
        found[name] = []
        for turn in range(ROUNDS):
            case.show(accumulator, turn, rank, world)
            once = snapshot(accumulator.synchronize())
            found[name].append((once, snapshot(accumulator.synchronize())))
    return found


def once_only(rank: int, world: int, folder: Path) -> Any:
    """Fusions whose maps are gathered; the second time is refused."""
    found = {}
    for name, case in ONCE.items():
        accumulator = case.accumulator()
        for turn in range(ROUNDS):
            case.show(accumulator, turn, rank, world)
        state = snapshot(accumulator.synchronize())
        found[name] = (state, refusal(accumulator.synchronize), snapshot(accumulator))
    return found


def order_matters(rank: int, world: int, folder: Path) -> Any:
    accumulator = AttentionAccumulator(LABELS, (2, 2), fusion="ema")
    return refusal(accumulator.synchronize)


def small_buckets(rank: int, world: int, folder: Path) -> Any:
    """As in the other scenarios, but a few pixels at a time."""
    usual, processes.BUCKET = processes.BUCKET, 7
    try:
        found = {}
        for name, case in {**CASES, **ONCE}.items():
            accumulator = case.accumulator()
            for turn in range(ROUNDS):
                case.show(accumulator, turn, rank, world)
            found[name] = snapshot(accumulator.synchronize())
        return found
    finally:
        processes.BUCKET = usual


def one_is_different(rank: int, world: int, folder: Path) -> Any:
    """The last rank holds something else. Everybody must hear of it, and go on afterwards."""
    case, last, found = CASES["max, uint8"], rank == world - 1, {}
    others: dict[str, dict[str, Any]] = {
        "labels": {"labels": [row[::-1] for row in LABELS]},
        "keys": {"keys": list("abcdef")},
        "map size": {"map_size": (5, 6)},
        "map size of each image": {"map_size": [[6, 5]] * 6},
        "fusion": {"fusion": "noisy-or", "dtype": torch.float32},
        "dtype": {"dtype": torch.float16},
    }
    for what, options in others.items():
        accumulator = case.accumulator(**(options if last else {}))
        case.show(accumulator, 0)
        before = snapshot(accumulator)
        found[what] = (refusal(accumulator.synchronize), before, snapshot(accumulator))

    def refused(*, gate: Any) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
        accumulator = case.accumulator(gate=gate)
        case.show(accumulator, 0)
        accumulator.synchronize()
        if last:
            accumulator.reset()
        before = snapshot(accumulator)
        return refusal(accumulator.synchronize), before, snapshot(accumulator)

    found["last synchronize"] = refused(gate=None)
    found["last synchronize, nothing accepted"] = refused(gate=lambda logits, labels: labels & False)
    accumulator = case.accumulator()
    case.show(accumulator, 0, rank, world)
    found["alike"] = snapshot(accumulator.synchronize())
    return found


def one_cannot(rank: int, world: int, folder: Path) -> Any:
    """The last rank's process ended between two synchronizations of a mean; of its file it cannot say what is new."""
    case, path = CASES["mean, crops"], folder / f"mean-{world}-{rank}.oaa"
    accumulator = case.accumulator(path=path)
    case.show(accumulator, 0, rank, world)
    accumulator.synchronize()
    case.show(accumulator, 1)
    if rank == world - 1:
        del accumulator
        gc.collect()
        accumulator = case.accumulator(path=path, resume=True)
    return refusal(accumulator.synchronize)


def in_files(rank: int, world: int, folder: Path) -> Any:
    """A file for each rank; closed, opened and synchronised again."""
    found = {}
    for name in ("max, uint8", "max, float32, crops, sizes", "mean, crops"):
        case, path = CASES[name], folder / f"{name}-{world}-{rank}.oaa"
        found[name] = []
        for turn in range(ROUNDS):
            accumulator = case.accumulator(path=path, resume=True)
            case.show(accumulator, turn, rank, world)
            found[name].append(snapshot(accumulator.synchronize()))
            del accumulator
            gc.collect()
    return found


def loaded_by_one(rank: int, world: int, folder: Path) -> Any:
    """What a process without a group has seen is loaded by the last rank alone; then all see the second round."""
    found = {}
    for name in SAVED:
        case = CASES[name]
        accumulator, before = case.accumulator(), case.accumulator()
        case.show(before, 0)
        if rank == world - 1:
            accumulator.load_state_dict(before.state_dict())
        case.show(accumulator, 1, rank, world)
        found[name] = snapshot(accumulator.synchronize())
    return found


def loaded_by_all(rank: int, world: int, folder: Path) -> Any:
    """What one process has seen is loaded by all; they see the second round, one alone the third; all load that."""
    found = {}
    for name in SAVED:
        case = CASES[name]
        first, several, alone, again = (case.accumulator() for _ in range(4))
        case.show(first, 0)
        several.load_state_dict(first.state_dict(), known_to_all=True)
        case.show(several, 1, rank, world)
        alone.load_state_dict(several.synchronize().state_dict())
        case.show(alone, 2)
        again.load_state_dict(alone.state_dict(), known_to_all=True)
        found[name] = (snapshot(several), snapshot(again.synchronize()))
    return found


class EndedError(Exception):
    """Here the process was killed."""


class EndsAt(TorchDispatchMode):
    """Ends before the so-manieth time that a tensor is exchanged or changed; on all ranks at once."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" or func._schema.is_mutable:
            if not self.left:
                raise EndedError
            self.left -= 1
        return func(*args, **(kwargs or {}))


def killed(rank: int, world: int, folder: Path) -> Any:
    """The processes end here and there in a synchronize; each time the file is opened again."""
    found: dict[str, Any] = {}
    for name in ("max, uint8", "mean, crops"):
        case, found[name] = CASES[name], []
        for left in itertools.count():
            path, ended = folder / f"killed-{name}-{left}-{world}-{rank}.oaa", False
            accumulator = case.accumulator(path=path)
            case.show(accumulator, 0, rank, world)
            before = snapshot(accumulator)
            with contextlib.suppress(EndedError), EndsAt(left):
                ended = True
                accumulator.synchronize()
                ended = False
            del accumulator
            gc.collect()
            found[name].append((ended, before, snapshot(case.accumulator(path=path, resume=True))))
            if not ended:
                break
    return found


def a_group_of_some(rank: int, world: int, folder: Path) -> Any:
    """The first and the last rank."""
    case, members = CASES["mean, crops"], sorted({0, world - 1})
    group = dist.new_group(members)
    accumulator = case.accumulator()
    case.show(accumulator, 0, rank, world)
    before = snapshot(accumulator)
    said = refusal(lambda: accumulator.synchronize(group))
    return members, said, before, snapshot(accumulator)


class Memory(TorchDispatchMode):
    """The most bytes of new tensors that were alive at once."""

    def __init__(self, accumulator: AttentionAccumulator) -> None:
        super().__init__()
        self.kept = {value.untyped_storage().data_ptr() for value in tensors(accumulator)}
        self.made: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        alive = [tensor for reference in self.made if (tensor := reference()) is not None]
        self.made = [weakref.ref(tensor) for tensor in alive]
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
        self.peak = max(self.peak, sum(size for place, size in sizes.items() if place not in self.kept))
        return result


def tensors(accumulator: AttentionAccumulator) -> list[Tensor]:
    return [value for value in accumulator.state_dict().values() if isinstance(value, Tensor)]


def memory(rank: int, world: int, folder: Path) -> Any:
    """In buckets of 2048 pixels: peak bytes, and the bytes of the maps."""
    usual, processes.BUCKET = processes.BUCKET, 2048
    try:
        found = {}
        for fusion in ("max", "mean", "noisy-or"):
            accumulator = AttentionAccumulator([[1]] * 512, (8, 8), fusion=fusion, dtype=torch.float32)
            accumulator.update(range(512), torch.rand(512, 1, 8, 8), views=[View(0, 0, 0.5, 1)] * 512)
            with Memory(accumulator) as watch:
                accumulator.synchronize()
            found[fusion] = (watch.peak, accumulator.state_dict()["maps"].nbytes)
        return found
    finally:
        processes.BUCKET = usual


class Pictures:
    """A data set; the attention that a network has of a picture depends on the epoch."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index

    @staticmethod
    def attention(index: int, epoch: int) -> Tensor:
        return torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(100 * epoch + index))

    @staticmethod
    def accumulator(fusion: str) -> AttentionAccumulator:
        return AttentionAccumulator([[1, i % 2] for i in range(10)], (4, 4), fusion=fusion, gate=None)

    def sampler(self, rank: int, world: int, epoch: int) -> DistributedSampler[int]:
        """Shuffled; repeats some pictures where the number of processes does not divide theirs."""
        sampler: DistributedSampler[int] = DistributedSampler(self, world, rank, shuffle=True, seed=5)  # type: ignore[arg-type]
        sampler.set_epoch(epoch)
        return sampler


def through_a_sampler(rank: int, world: int, folder: Path) -> Any:
    """Two epochs of a DataLoader with a DistributedSampler, synchronised after each."""
    pictures, found = Pictures(), {}
    for fusion in ("max", "mean"):
        accumulator = pictures.accumulator(fusion)
        for epoch in range(2):
            for indices in DataLoader(pictures, batch_size=2, sampler=pictures.sampler(rank, world, epoch)):  # type: ignore[arg-type]
                maps = torch.stack([pictures.attention(i, epoch) for i in indices.tolist()])
                accumulator.update(indices, maps)
            accumulator.synchronize()
        found[fusion] = snapshot(accumulator)
    return found


def through_a_checkpoint(rank: int, world: int, folder: Path) -> Any:
    """4 processes see two rounds and save; 4, 2 and 1 load that and see the third. Also with the library's own file."""
    found = {}
    for name in SAVED:
        case, saved, file = CASES[name], folder / f"{name}.dcp", folder / f"{name}.oaa"
        if world == 4:
            accumulator = case.accumulator(keys=list("abcdef"))
            for turn in range(ROUNDS - 1):
                case.show(accumulator, turn, rank, world)
                accumulator.synchronize()
            dcp.save({"accumulator": accumulator, "epoch": ROUNDS - 1}, checkpoint_id=saved)
            if rank == 0:
                accumulator.save(file)
            dist.barrier()
        accumulator = case.accumulator(keys=list("abcdef"))
        place = accumulator.state_dict()["maps"].data_ptr()
        state = {"accumulator": accumulator, "epoch": 0}
        dcp.load(state, checkpoint_id=saved)
        loaded = snapshot(accumulator)
        found[name] = [(state["epoch"], accumulator.state_dict()["maps"].data_ptr() == place, loaded)]
        for resumed in (accumulator, AttentionAccumulator.load(file)):
            case.show(resumed, ROUNDS - 1, rank, world)
            found[name].append(snapshot(resumed.synchronize()))
    return found


SCENARIOS = (
    every_round,
    once_only,
    order_matters,
    small_buckets,
    one_is_different,
    one_cannot,
    in_files,
    loaded_by_one,
    loaded_by_all,
    killed,
    a_group_of_some,
    memory,
    through_a_sampler,
    through_a_checkpoint,
)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # collecting what the scenarios leave need not go through all of torch
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))  # a hang becomes an error
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {scenario.__name__: scenario(rank, world, folder) for scenario in SCENARIOS}
    torch.save(found, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
