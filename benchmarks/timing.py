"""Fair timing: the candidates take turns within one process, and the medians are compared."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Measured(NamedTuple):
    """Seconds a call, median and quartiles over all turns; or a number of bytes."""

    median: float
    lower: float
    upper: float

    @classmethod
    def once(cls, value: float) -> "Measured":
        """What does not vary."""
        return cls(value, value, value)

    def per(self, parts: float) -> "Measured":
        """The share of one of so many parts."""
        return Measured(*(value / parts for value in self))


class Row(NamedTuple):
    """One line of the table. ``ratio`` is ``ours / baseline``, or whatever ``ratio_is`` says."""

    name: str
    ours: Measured
    baseline: Measured
    ratio: float
    ratio_is: str
    target: float | None
    at_most: bool
    unit: str = "s"

    @property
    def verdict(self) -> str:
        if self.target is None:
            return "-"
        ratio = round(self.ratio, 2)
        return "reached" if (ratio <= self.target if self.at_most else ratio >= self.target) else "missed"


def take_turns(*candidates: Callable[[], object], seconds: float, turn: float = 0) -> list[Measured]:
    """Time every call of each candidate, in turns, for about so many seconds altogether.

    A turn is one call: all find the caches as the others have left them, as in a training loop. Where only one of the
    candidates would ever run, ``turn`` seconds of calls without the others in between show it by itself.
    """
    for candidate in candidates:
        candidate()
    samples: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds
    while len(samples[0]) < 3 or time.perf_counter() < end:
        for candidate, kept in zip(candidates, samples, strict=True):
            now = time.perf_counter()
            turn_ends = now + turn
            while True:
                start = now
                candidate()
                now = time.perf_counter()
                kept.append(now - start)
                if now >= turn_ends:
                    break
    return [Measured(*(float(np.percentile(kept, q)) for q in (50, 25, 75))) for kept in samples]
