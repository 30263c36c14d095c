"""Watching attention accumulate: what has happened so far, and how chosen maps have grown."""

from typing import NamedTuple

from torch import Tensor


class Statistics(NamedTuple):
    """What an accumulator has done so far, per class: (C,) int64 on the host.

    Attributes:
        offered: maps that `update` was given.
        passed: of these, the finite ones that the gate let pass.
        skipped: of these, the ones refused because they or their gating scores were not finite.
        pairs: pairs of the data set.
        never_accumulated: of these, the ones that hold nothing.
    """

    offered: Tensor
    passed: Tensor
    skipped: Tensor
    pairs: Tensor
    never_accumulated: Tensor

    @property
    def pass_rate(self) -> Tensor:
        """(C,) float32 in [0, 1], ``passed / offered``; NaN for a class that was never offered."""
        return self.passed / self.offered
