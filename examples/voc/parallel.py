"""Work that needs no network, on all cores."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from os import cpu_count
from typing import Any

import torch
from tqdm import tqdm


def on_all_cores(call: Callable[[Any], Any], items: Sequence[Any], description: str) -> list[Any]:
    """``[call(item) for item in items]`` on all cores, with a progress bar; ``call`` is a function of a module."""
    workers = min(cpu_count() or 1, max(len(items) // 8, 1))
    if workers == 1:
        return [call(item) for item in tqdm(items, desc=description, leave=False)]
    with ProcessPoolExecutor(workers, get_context("forkserver"), torch.set_num_threads, (1,)) as pool:  # one core each
        return list(tqdm(pool.map(call, items, chunksize=4), total=len(items), desc=description, leave=False))


def alongside(call: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """``call(item)`` of each, as they get done, on all cores while this process makes the next ones.

    An item is drawn when one of two places for each core is free, so that memory stays flat. Ctrl-C is left to this
    process; what is under way is brought to its end.
    """
    from multiprocessing import forkserver  # Windows has none

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()  # all workers are forked from there, and inherit that Ctrl-C is ignored
    signal.signal(signal.SIGINT, before)
    workers = cpu_count() or 1
    running: set[Any] = set()
    try:
        with ProcessPoolExecutor(workers, get_context("forkserver"), torch.set_num_threads, (1,)) as pool:
            for item in items:
                running.add(pool.submit(call, item))
                done, running = wait(running, 0 if len(running) < 2 * workers else None, FIRST_COMPLETED)
                yield from (future.result() for future in done)
            while running:
                done, running = wait(running, None, FIRST_COMPLETED)
                yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise SystemExit(
            "a process beside this one was ended, by a signal or for want of memory; the same command goes on from "
            "there"
        ) from error
