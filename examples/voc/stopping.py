"""Ctrl-C, or the kill of a scheduler: the step is brought to its end, and nothing is lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Whether the user or a scheduler has asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *_: object) -> None:
        """As a signal's handler."""
        if self.asked:
            raise KeyboardInterrupt  # asked twice: at once
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked


@contextmanager
def stop_signal(enabled: bool) -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a wish that is granted at the end of the step."""
    stop = Stop()
    if not enabled:
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_alone(_: int) -> None:
    """A loader's process outlives Ctrl-C, so that the main one can end its step and write a checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
