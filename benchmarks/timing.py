"""Fair timing: the candidates take turns within one process, and the medians are compared."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


class Measured(NamedTuple):
    """Seconds a call, median and quartiles over all turns; or a number of bytes."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Measured":
        """Of single calls."""
        return cls(*(float(np.percentile(samples, q)) for q in (50, 25, 75)))

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
    return [Measured.of(kept) for kept in samples]


class Device:
    """Where rows are measured: the host, or an accelerator with a clock and a memory of its own.

    Args:
        name: as torch takes it, "cpu" or "cuda".
        module: the clock and the memory, as `torch.cuda` has them; None: those of torch.
    """

    def __init__(self, name: str = "cpu", module: Any = None) -> None:
        self.name = name
        self.is_host = torch.device(name).type == "cpu"
        self.module = module if module is not None or self.is_host else torch.get_device_module(name)

    def __str__(self) -> str:
        naming = getattr(self.module, "get_device_name", None)
        return self.name if naming is None else naming()

    def finishing(self, call: Callable[[], object]) -> Callable[[], None]:
        """The call, and a wait until the device has done what it was asked to."""

        def finished() -> None:
            call()
            if not self.is_host:
                self.module.synchronize()

        return finished

    def launch_and_work(self, call: Callable[[], object], seconds: float) -> tuple[Measured, Measured]:
        """How long a call keeps the host, and how long the device then works for it; on the host both are one.

        The device is busy with something else while the host asks. So the host never waits for it, unless the call
        makes it wait, and the device finds all its work at once and never waits for the host.
        """
        self.finishing(call)()
        samples = []
        end = time.perf_counter() + seconds
        while len(samples) < 3 or time.perf_counter() < end:
            samples.append(self._once(call))
        launches, works = zip(*samples, strict=True)
        return Measured.of(launches), Measured.of(works)

    def _once(self, call: Callable[[], object]) -> tuple[float, float]:
        if self.is_host:
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            return took, took
        began, ended = (self.module.Event(enable_timing=True) for _ in range(2))
        busy = torch.ones(4096, 4096, device=self.name)
        for _ in range(2):
            torch.mm(busy, busy)
        began.record()
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        ended.record()
        self.module.synchronize()
        return took, began.elapsed_time(ended) / 1000

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """The most that a call allocates at once beside what was there before."""
        call()
        if self.is_host:
            return _peak_on_the_host(call)
        self.module.synchronize()
        self.module.reset_peak_memory_stats()
        before = self.module.memory_allocated()
        call()
        return self.module.max_memory_allocated() - before


def _peak_on_the_host(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


HOST = Device()
