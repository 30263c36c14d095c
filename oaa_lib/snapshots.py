"""How the maps of chosen images have grown: their state at chosen steps (paper, Fig. 1)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from oaa_lib.cumulative import CumulativeAttention
from oaa_lib.maps.coding import decode, encode


class Snapshots:
    """Keeps the maps of chosen images at chosen steps, to look at later how attention has wandered.

    The price: 8 bits a pixel of host memory for each map and step, and a wait for the device at each chosen step.

    Args:
        accumulator: whose maps. One with ``fusion="latest"`` shows how attention wanders, any other how it grows.
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

    def __init__(self, accumulator: CumulativeAttention, indices: Iterable[int | str], steps: Iterable[int]) -> None:
        self.accumulator = accumulator
        self.taken: list[int] = []
        self._due = set(steps)
        self._maps: dict[int | str, list[Tensor]] = {index: [] for index in indices}
        accumulator.pairs.positions(list(self._maps))

    def take(self, step: int) -> None:
        """Keep the maps if this step is a chosen one, once."""
        if step not in self._due or step in self.taken:
            return
        self.taken.append(step)
        for index, kept in self._maps.items():
            kept.append(encode(self.accumulator.attention(index), torch.uint8).cpu())

    def cumulative(self, index: int | str) -> Tensor:
        """(T, K, H, W) float32 in [0, 1]: the accumulator's maps of one image's classes at the steps `taken`.

        Raises:
            KeyError: an image that was not chosen.
            RuntimeError: nothing has been kept so far.
        """
        if index not in self._maps:
            raise KeyError(f"no snapshots are taken of {index!r}; there are some of {list(self._maps)}")
        if not self._maps[index]:
            raise RuntimeError(f"nothing has been kept of {index!r} so far; call take(step) at a chosen step")
        return decode(torch.stack(self._maps[index]))

    def state_dict(self) -> dict[str, Any]:
        """All that has been kept, as tensors and plain values, for a checkpoint."""
        return {"taken": list(self.taken), "maps": self._maps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, of snapshots of the same images.

        Raises:
            ValueError: it is of other images.
        """
        missing = {"taken", "maps"} - set(state)
        if missing:
            raise ValueError(f"expected the state_dict of Snapshots, got one without {sorted(missing)}")
        if list(state["maps"]) != list(self._maps):
            raise ValueError(f"expected snapshots of {list(self._maps)}, got those of {list(state['maps'])}")
        self.taken = list(state["taken"])
        self._maps = {index: list(maps) for index, maps in state["maps"].items()}
