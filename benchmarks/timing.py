"""Fair timing: the candidates take turns within one process, and the medians are compared."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Time(NamedTuple):
    """Seconds a call: median and quartiles over all turns."""

    median: float
    lower: float
    upper: float


class Row(NamedTuple):
    """One line of the table. ``ratio`` is ``ours / baseline``, or whatever ``ratio_is`` says."""

    name: str
    ours: float
    baseline: float
    ratio: float
    ratio_is: str
    target: float | None
    at_most: bool
    unit: str = "s"

    @property
    def verdict(self) -> str:
        if self.target is None:
            return "-"
        reached = self.ratio <= self.target if self.at_most else self.ratio >= self.target
        return "reached" if reached else "missed"


def take_turns(*candidates: Callable[[], object], seconds: float, turns: int = 7) -> list[Time]:
    """Time each candidate in turn, at least ``turns`` times and for about so many seconds altogether."""
    loops = [_loops(candidate) for candidate in candidates]
    samples: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds
    while len(samples[0]) < turns or time.perf_counter() < end:
        for candidate, count, kept in zip(candidates, loops, samples, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                candidate()
            kept.append((time.perf_counter() - start) / count)
    return [Time(*(float(np.percentile(kept, q)) for q in (50, 25, 75))) for kept in samples]


def _loops(candidate: Callable[[], object]) -> int:
    """How many calls make a sample of about a millisecond; the calls also warm it up."""
    candidate()
    start = time.perf_counter()
    candidate()
    once = time.perf_counter() - start
    return max(1, int(1e-3 / max(once, 1e-9)))
