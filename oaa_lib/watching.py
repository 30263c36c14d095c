"""Watching attention accumulate: what has happened so far, and how chosen maps have grown."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from oaa_lib.maps import decode, encode

if TYPE_CHECKING:
    from oaa_lib.accumulator import AttentionAccumulator


class Statistics(NamedTuple):
    """What an accumulator has done so far, per class: (C,) int64 on the host.

    Attributes:
        offered: maps that `AttentionAccumulator.update` was given.
        accepted: of these, the ones that were fused.
        skipped: of these, the ones refused because they or their gating scores were not finite.
        pairs: pairs of the data set.
        never_accumulated: of these, the ones that hold nothing.
    """

    offered: Tensor
    accepted: Tensor
    skipped: Tensor
    pairs: Tensor
    never_accumulated: Tensor

    @property
    def pass_rate(self) -> Tensor:
        """(C,) float32 in [0, 1]: share of the finite maps that the gate let pass; NaN for a class without any."""
        return self.accepted / (self.offered - self.skipped)


class Snapshots:
    """Keeps the maps of chosen images at chosen steps, to look at later how attention has wandered.

    The price: 8 bits a pixel of host memory for each map and step, and a wait for the device at each chosen step.

    Args:
        accumulator: whose maps.
        indices: which images, as `AttentionAccumulator.update` takes them.
        steps: at which steps to keep them.

    Attributes:
        taken: the steps kept so far.

    Raises:
        IndexError, KeyError: an index or name the data set does not have.

    Example:
        >>> import torch
        >>> from oaa_lib import AttentionAccumulator
        >>> accumulator = AttentionAccumulator([[1, 0], [1, 1]], (7, 7), gate=None)
        >>> snapshots = Snapshots(accumulator, indices=[1], steps=range(0, 100, 2))
        >>> for step in range(5):
        ...     _ = accumulator.update([0, 1], torch.rand(2, 2, 7, 7))
        ...     snapshots.take(step)
        >>> snapshots.taken, snapshots.cumulative(1).shape
        ([0, 2, 4], torch.Size([3, 2, 7, 7]))

    Source: paper, Fig. 1.
    """

    def __init__(self, accumulator: "AttentionAccumulator", indices: Iterable[int | str], steps: Iterable[int]) -> None:
        self.accumulator = accumulator
        self.taken: list[int] = []
        self._due = set(steps)
        self._cumulative: dict[int | str, list[Tensor]] = {index: [] for index in indices}
        self._latest: dict[int | str, list[Tensor]] = {index: [] for index in self._cumulative}
        accumulator.pairs.positions(list(self._cumulative))

    def take(self, step: int) -> None:
        """Keep the maps if this step is a chosen one, once."""
        if step not in self._due or step in self.taken:
            return
        self.taken.append(step)
        for index, kept in self._cumulative.items():
            kept.append(encode(self.accumulator.attention(index), torch.uint8).cpu())
            if self.accumulator.keeps_latest:
                latest = self.accumulator.latest([index])[0, self.accumulator.classes(index)]
                self._latest[index].append(encode(latest, torch.uint8).cpu())

    def cumulative(self, index: int | str) -> Tensor:
        """(T, K, H, W) float32 in [0, 1]: the cumulative attention of one image's classes at the steps `taken`.

        Raises:
            KeyError: an image that was not chosen.
            RuntimeError: nothing has been kept so far.
        """
        return self._stack(self._cumulative, index)

    def _stack(self, kept: dict[int | str, list[Tensor]], index: int | str) -> Tensor:
        if index not in kept:
            raise KeyError(f"no snapshots are taken of {index!r}; there are some of {list(kept)}")
        if not kept[index]:
            raise RuntimeError(f"nothing has been kept of {index!r} so far; call take(step) at a chosen step")
        return decode(torch.stack(kept[index]))

    def latest(self, index: int | str) -> Tensor:
        """(T, K, H, W) float32 in [0, 1]: the latest accepted attention at these steps; needs ``keep_latest=True``."""
        if not self.accumulator.keeps_latest:
            raise RuntimeError("the accumulator keeps no latest attention; build it with keep_latest=True")
        return self._stack(self._latest, index)

    def state_dict(self) -> dict[str, Any]:
        """All that has been kept, as tensors and plain values, for a checkpoint."""
        return {"taken": list(self.taken), "cumulative": self._cumulative, "latest": self._latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, of snapshots of the same images.

        Raises:
            ValueError: it is of other images.
        """
        if list(state["cumulative"]) != list(self._cumulative):
            raise ValueError(
                f"expected snapshots of {list(self._cumulative)}, got those of {list(state['cumulative'])}"
            )
        self.taken = list(state["taken"])
        self._cumulative = {index: list(maps) for index, maps in state["cumulative"].items()}
        self._latest = {index: list(maps) for index, maps in state["latest"].items()}
