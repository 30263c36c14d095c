"""What the pairs of a data set keep: named tensors, read and written by rows."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oaa_lib.maps.kept import Joint, Kept
from oaa_lib.maps.layout import MapLayout
from oaa_lib.maps.locking import Turn
from oaa_lib.maps.pairs import IntArray

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]


class Rows(NamedTuple):
    """Rows of a `Store`: as int64 numpy on the host and as an int64 tensor on the device of the maps."""

    numbers: IntArray
    tensor: Tensor


class Change(NamedTuple):
    """What happens to the rows of some pairs, or of some classes.

    Attributes:
        rows: K of them, each once; where nothing has new ``values`` the same one may occur again.
        size: (H, W) of their maps, if ``values`` has any.
        values: new values by name, (K,) or (K, H, W).
        raised: by how much tallies rise, by name, (K,). What is raised is no other change's value in the same step.
    """

    rows: Rows
    size: tuple[int, int]
    values: Mapping[str, Tensor]
    raised: Mapping[str, Tensor] = {}


class Store:
    """What the pairs keep, in memory.

    Whatever changes it is one step: an exception (Ctrl-C, say) waits until what has begun is finished; should that be
    interrupted as well, the next use finishes it.

    Args:
        layout: who owns the maps, and how large each one is.
        kept: all that is kept, by name.
        device: where.

    Attributes:
        tensors: by name.
        numbers: by name, what the host keeps.
        base: what a mean was when all processes last held the same (see `processes`); empty if they never did.
        partial: whether some accepted map did not show all of its image.
        turn: held by the thread that reads or changes what belongs together.
    """

    def __init__(self, layout: MapLayout, kept: Mapping[str, Kept], device: torch.device | str = "cpu") -> None:
        with torch.inference_mode(False):  # whose tensors could not be changed outside of it
            zeros = {
                name: torch.zeros(each.shape(layout), dtype=each.dtype, device=device)
                for name, each in kept.items()
                if not each.on_host
            }
        self._use(layout, kept, zeros, {n: np.zeros(k.shape(layout), np.int64) for n, k in kept.items() if k.on_host})

    def _use(self, layout: MapLayout, kept: Mapping[str, Kept], tensors: dict[str, Tensor], numbers: Arrays) -> None:
        self.layout, self.kept, self.tensors, self.numbers = layout, kept, tensors, numbers
        self.base: dict[str, Tensor] = {}
        self.partial = False
        self.turn = Turn()
        self._begun: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: all tensors as arrays, since torch sends tensors to a new process as shared memory."""
        self.settle()
        arrays = {
            kept: {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            for kept, tensors in (("tensors", self.tensors), ("base", self.base))
        }
        return {**vars(self), **arrays, "device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device = state.pop("device")
        vars(self).update(state)
        with torch.inference_mode(False):
            for tensors in (self.tensors, self.base):
                for name, array in tensors.items():
                    tensors[name] = torch.from_numpy(np.require(array, requirements="W")).to(device)

    def _make(self, step: Callable[[], None]) -> None:
        """Take a step which, made twice, comes to the same as made once."""
        self.settle()
        try:
            self._begun = step
            step()
            self._begun = None
        except BaseException:
            self.settle()
            raise

    def settle(self) -> None:
        """Finish a step that an exception cut short."""
        if self._begun is not None:
            self._begun()
            self._begun = None

    @property
    def device(self) -> torch.device:
        """Where the maps live."""
        return self.tensors["maps"].device

    def look(self) -> None:
        """Take from new values what later steps must know without waiting for them. Waits for the device."""
        self.partial = "missed" in self.tensors and bool(self.tensors["missed"].any())
        all_known = torch.equal(self.tensors["counts"], self.tensors["synchronized"])
        if all_known and not self.base and self.tensors["synchronized"].any():
            self.keep_base()

    def keep_base(self) -> None:
        """Keep what a mean is now that all processes hold the same: what comes later could not be told from it."""
        joined = self.kept["maps"].joined
        if isinstance(joined, Joint) and joined.reduction == "mean":
            self._copy_base({name: self.tensors[name] for name in ("maps", "missed")})

    def rows(self, numbers: IntArray) -> Rows:
        """Rows by their numbers."""
        return Rows(numbers, to_device(self.device, numbers))

    def read(
        self, names: Sequence[str], rows: Rows, size: tuple[int, int], *, base: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Copies of (K,) values and (K, H, W) maps of one size; of a `base` if one is given."""
        self.settle()
        tensors = self.tensors if base is None else base
        return {name: self._read(tensors[name], self.kept[name].per, rows, size) for name in names}

    def _read(self, tensor: Tensor, per: str, rows: Rows, size: tuple[int, int]) -> Tensor:
        if per != "pixel" or self.layout.starts is None:
            return tensor.index_select(0, rows.tensor)
        maps = [self._map(tensor, row, size) for row in rows.numbers.tolist()]
        return torch.stack(maps) if maps else tensor.new_zeros((0, *size))

    def write(self, changes: Sequence[Change], numbers: Arrays | None = None) -> None:
        """Make changes, and replace numbers that the host keeps, as one step."""
        compiling = torch.compiler.is_compiling()  # then a version is no number, and nothing can be finished later
        versions = {} if compiling else {name: tensor._version for name, tensor in self.tensors.items()}
        self._make(partial(self._apply, changes, numbers or {}, versions))

    def _apply(self, changes: Sequence[Change], numbers: Arrays, versions: Mapping[str, int]) -> None:
        """Make changes; where tallies have risen already since they had these versions, they do not rise again."""
        raised = {name: self.tensors[name]._version - version for name, version in versions.items()}
        for change in changes:
            self._write(change)
            self.partial |= "missed" in change.values
            for name, amounts in change.raised.items():
                if raised.get(name):
                    raised[name] -= 1
                else:
                    self.tensors[name].index_add_(0, change.rows.tensor, amounts.to(self.tensors[name].dtype))
        for name, values in numbers.items():
            self.numbers[name][:] = values

    def _write(self, change: Change) -> None:
        for name, values in change.values.items():
            if self.kept[name].per == "pixel" and self.layout.starts is not None:
                for row, pixels in zip(change.rows.numbers.tolist(), values, strict=True):
                    self._map(self.tensors[name], row, change.size).copy_(pixels)
            else:
                self.tensors[name].index_copy_(0, change.rows.tensor, values)

    def _map(self, tensor: Tensor, row: int, size: tuple[int, int]) -> Tensor:
        """The map of one row where every image has a size of its own."""
        assert self.layout.starts is not None
        start = int(self.layout.starts[row])
        return tensor[start : start + math.prod(size)].view(size)

    def reset(self) -> None:
        """Forget everything, as one step."""
        self._make(self._clear)

    def _clear(self) -> None:
        for tensor in self.tensors.values():
            tensor.zero_()
        for numbers in self.numbers.values():
            numbers[:] = 0
        self.base, self.partial = {}, False

    def replace(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        """Take over copies of another store's values, which must fit, as one step."""
        self._make(partial(self._copy, values, base))

    def _copy(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(values[name])
        for name, numbers in self.numbers.items():
            numbers[:] = values[name].cpu().numpy()
        self._know(base)

    def _know(self, base: Mapping[str, Tensor]) -> None:
        """Take a copy of a base, and look at what is new."""
        self._copy_base(base)
        self.look()

    def _copy_base(self, base: Mapping[str, Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.base = {name: tensor.to(self.device, copy=True) for name, tensor in base.items()}

    def state(self) -> dict[str, Tensor]:
        """All that is kept, as tensors that share its memory."""
        self.settle()
        shared = {name: torch.from_numpy(values) for name, values in self.numbers.items()}
        return {**self.tensors, **shared, **{f"base_{name}": tensor for name, tensor in self.base.items()}}

    def blocks(self, pixels: int) -> Iterator[tuple[Rows, tuple[int, int]]]:
        """All rows in order, in blocks of one map size and about so many pixels."""
        for numbers, size in self.layout.blocks(pixels):
            yield self.rows(numbers), size


def times_seen(counts: Tensor, missed: Tensor | None = None) -> Tensor:
    """How many maps have shown each pixel, from counts (K,): (K, H, W) less missed (K, H, W), or (K, 1, 1)."""
    times = counts[:, None, None]
    return times if missed is None else times - missed


def to_device(device: torch.device, numbers: npt.NDArray[Any]) -> Tensor:
    """Numbers of the host on a device, which nobody waits for."""
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)
