"""How the maps of chosen images have grown: their state at chosen steps (paper, Fig. 1)."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oaa_lib.arguments import kind, shown, whole_number
from oaa_lib.cumulative import CumulativeAttention
from oaa_lib.maps.coding import decode, encode
from oaa_lib.maps.pairs import plain_text


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
        TypeError: no accumulator, or no sequences.
        ValueError: indices that are none, or a step below 0.
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
        if not isinstance(accumulator, CumulativeAttention):
            raise TypeError(f"expected accumulator as an AttentionAccumulator, got {kind(accumulator)}")
        self.accumulator = accumulator
        self.taken: list[int] = []
        self._due = {whole_number("steps", step, 0, 2**63 - 1) for step in _items("steps", steps)}
        chosen = _items("indices", indices)
        accumulator.pairs.positions(chosen)
        self._maps: dict[int | str, list[Tensor]] = {
            plain_text(index) if isinstance(index, str) else int(index): [] for index in chosen
        }

    def take(self, step: int) -> None:
        """Keep the maps if this step is a chosen one, once.

        Raises:
            TypeError: a step that is no integer.
            ValueError: one below 0.
        """
        step = whole_number("step", step, 0, 2**63 - 1)
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
        if not isinstance(index, (int, str, np.integer)) or index not in self._maps:
            raise KeyError(f"no snapshots are taken of {shown(index)}; expected index as one of {list(self._maps)}")
        if not self._maps[index]:
            raise RuntimeError(f"nothing has been kept of {index!r} so far; call take(step) at a chosen step")
        return decode(torch.stack(self._maps[index]))

    def state_dict(self) -> dict[str, Any]:
        """All that has been kept, as tensors and plain values, for a checkpoint."""
        return {"taken": list(self.taken), "maps": {index: list(maps) for index, maps in self._maps.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, of snapshots of the same images.

        Raises:
            TypeError: no dictionary.
            ValueError: entries are missing or malformed, or of other images; nothing is changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"expected state as the state_dict of Snapshots, got {kind(state)}")
        missing = {"taken", "maps"} - set(state)
        if missing:
            raise ValueError(f"expected the state_dict of Snapshots, got one without {sorted(missing)}")
        taken, found = state["taken"], state["maps"]
        if not isinstance(taken, list) or not isinstance(found, Mapping):
            raise ValueError(
                f"expected a state with taken as a list and maps by index, got {kind(taken)}, {kind(found)}"
            )
        if set(found) != set(self._maps):
            raise ValueError(
                f"expected snapshots of {list(self._maps)}, got those of {shown(list(found))}; is the state another's?"
            )
        taken = [whole_number("taken of the state", step, 0, 2**63 - 1) for step in taken]
        for index, maps in found.items():
            wanted = [(torch.uint8, self.accumulator.attention(index).shape)] * len(taken)
            if (
                not isinstance(maps, list)
                or [(getattr(m, "dtype", None), getattr(m, "shape", None)) for m in maps] != wanted
            ):
                raise ValueError(
                    f"expected a state with {len(taken)} uint8 maps of {index!r} like its attention, got others"
                )
        self.taken, self._maps = taken, {index: list(found[index]) for index in self._maps}


def _items(name: str, values: Any) -> list[Any]:
    """What may also be a generator or a tensor, as a list of Python's own values."""
    if isinstance(values, (Tensor, np.ndarray)) and values.ndim == 1 and not getattr(values, "is_meta", False):
        return list(values.tolist())
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Tensor, np.ndarray)):
        return list(values)
    raise TypeError(f"expected {name} as a sequence, got {kind(values)}")
