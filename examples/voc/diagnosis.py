"""What decides whether accumulation pays, measured while stage 1 trains: for its log, its pictures and its report."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oaa_lib import AttentionAccumulator, Snapshots, attention_similarity


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


class Diagnosis:
    """What has happened since it was last asked, as columns of the log.

    Args:
        accumulators: "max", which the columns are about, and "latest", which shows how attention wanders.
    """

    def __init__(self, accumulators: Mapping[str, AttentionAccumulator]) -> None:
        self.max, self.latest = accumulators["max"], accumulators["latest"]
        self.before = self.max.statistics()
        self.seconds, self.wandering = 0.0, Wandering()

    @contextmanager
    def of(self, accumulator: AttentionAccumulator, names: Sequence[str]) -> Iterator[None]:
        """Watch an update: how long that of the maximum takes, how those of some images wander."""
        before = self.latest[names] if accumulator is self.latest else None
        start = time.perf_counter()
        yield
        if accumulator is self.max:
            self.seconds += time.perf_counter() - start
        if before is not None:
            self.wandering.add(before, self.latest[names])

    def __call__(self) -> dict[str, float]:
        """One row of the log."""
        before, self.before = self.before, self.max.statistics()
        offered, accepted = (self.before.offered - before.offered).sum(), (self.before.accepted - before.accepted).sum()
        seconds, self.seconds = self.seconds, 0.0
        return {
            "gate_pass_rate": int(accepted) / max(int(offered), 1),
            "pairs_empty": int(self.before.never_accumulated.sum()),
            "maps_skipped": int(self.before.skipped.sum()),
            "similarity": self.wandering.take(),
            "accumulation_seconds": seconds,
        }


class Watched:
    """The maps of some images at the end of each pass: what has accumulated, and the latest; for figures.

    Args:
        accumulators: "max" and "latest".
        names: of the images.
        moments: the numbers of steps after which the maps are kept.
    """

    def __init__(
        self, accumulators: Mapping[str, AttentionAccumulator], names: Sequence[str], moments: Sequence[int]
    ) -> None:
        fusions = {"cumulative": "max", "latest": "latest"}
        self.kinds = {kind: Snapshots(accumulators[fusion], names, moments) for kind, fusion in fusions.items()}

    def take(self, done: int) -> None:
        """Keep the maps after so many steps, if this is one of the moments."""
        for snapshots in self.kinds.values():
            snapshots.take(done)

    def state_dict(self) -> dict[str, Any]:
        """The maps of each kind by image, and after how many steps they were taken."""
        maps = {kind: snapshots.state_dict()["maps"] for kind, snapshots in self.kinds.items()}
        return maps | {"taken": list(self.kinds["latest"].taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for kind, snapshots in self.kinds.items():
            snapshots.load_state_dict({"taken": state["taken"], "maps": state[kind]})
