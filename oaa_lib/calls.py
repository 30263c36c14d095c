"""What one call of a model shows: the inputs and outputs of its modules, and how its tokens are laid out."""

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Without gradient a recorded call keeps what would be freed; a pool and its map are never far from the logits.
KEPT_STEPS = 160


class Step(NamedTuple):
    """One module's call.

    Attributes:
        name: of the module, as `named_modules` has it.
        module: itself.
        given: its first tensor argument; a vector (B, D) as it was before the module ran.
        made: the first tensor that it returned.
        value: ``made``; a vector as it was when the module returned, before anything changed it in place.
    """

    name: str
    module: nn.Module
    given: Tensor
    made: Tensor
    value: Tensor


def is_vector(tensor: Tensor) -> bool:
    """Whether a tensor holds one vector for each image: (B, D), (B, D, 1, 1)."""
    return tensor.ndim >= 2 and sum(side > 1 for side in tensor.shape[1:]) <= 1


@contextmanager
def recorded(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[deque[Step]]:
    """Record the calls of these modules that this thread makes, in the order of their ends."""
    steps: deque[Step] = deque(maxlen=KEPT_STEPS)
    thread = threading.get_ident()
    running: list[tuple[nn.Module, Tensor | None]] = []  # modules that have been entered, and what they were given
    names: dict[nn.Module, str] = {}

    # Another thread may call the same module while these hooks are there, or just after they have been removed, when
    # it no longer knows that they take keyword arguments too.
    def enter(module: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        if threading.get_ident() == thread:
            given = _first_tensor((*args, *(kwargs or {}).values()))
            running.append((module, None if given is None else _kept(given)))

    def leave(module: nn.Module, args: Any, *rest: Any) -> None:
        if threading.get_ident() != thread:
            return
        while running:  # a module that ended in an exception, which the model caught, has not been left
            entered, given = running.pop()
            if entered is module:
                made = _first_tensor(rest[-1:])
                if given is not None and made is not None:
                    steps.append(Step(names[module], module, given, made, _kept(made)))
                return

    handles = []
    try:
        for name, module in modules:
            names[module] = name
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def visible_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that can be watched without a change of what they compute.

    `nn.TransformerEncoderLayer` takes another way, with another rounding, when it or a part of it has a hook.
    """
    hidden = {
        part for layer in model.modules() if isinstance(layer, nn.TransformerEncoderLayer) for part in layer.modules()
    }
    return ((name, module) for name, module in model.named_modules() if module not in hidden)


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor in what a module is given or returns: itself, in a list, or in a model output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for entry in value:
            if (found := _first_tensor(entry)) is not None:
                return found
    return None


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if is_vector(tensor) else tensor


class Layouts:
    """How a call makes tokens: which grids become one row, and which rows are put together.

    Attributes:
        grids: (rows, columns) that have become one dimension of a tensor (B, N, D) or (B, D, N), or were made from one.
        joins: for N, the (start, length) of each part of a row (B, N, D) that was put together of several.
        blocked: each N of a row (B, N, D) made of blocks, such as windows or units of 2 x 2: not row after row.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.blocked: set[int] = set()
        self.grids: set[tuple[int, int]] = set()
        self.joins: dict[int, set[tuple[int, int]]] = {}

    def note(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: Any) -> None:
        """Take in one operation on tensors; nothing but shapes is looked at."""
        if not isinstance(made, Tensor) or not args:
            return
        if operation is torch.ops.aten.cat.default:
            dimension = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if made.ndim == 3 and dimension in (1, -2):
                start = 0
                for part in args[0]:
                    self.joins.setdefault(made.shape[1], set()).add((start, part.shape[1]))
                    start += part.shape[1]
        elif operation is torch.ops.aten.im2col.default:
            self.grids.add(_unfolded(args[0].shape[-2:], *args[1:5]))
        elif isinstance(args[0], Tensor) and args[0].numel() == made.numel():
            row, grid = sorted((args[0].shape, made.shape), key=len)
            if len(row) == 3 and len(grid) > 3 and row[0] == grid[0] == self.batch:
                groups = _groups(row, grid)
                self.grids |= {(group[0], group[1]) for group in groups if len(group) == 2}
                if groups and sum(side > 1 for side in groups[0]) > 2:
                    self.blocked.add(row[1])
            elif made.ndim == 3 <= args[0].ndim and sorted(row) != sorted(grid):  # no transposition
                blocks, width = args[0].shape[0], args[0].shape[-1]
                if made.shape[0] == self.batch != blocks and made.shape[2] == width:  # the batch was one of blocks
                    self.blocked.add(made.shape[1])

    def patches(self, count: int) -> list[tuple[tuple[int, int], int]]:
        """Grids that may be in a row of tokens, and where each starts; the longest first."""
        found, parts = set(), [(0, count)]
        for start, length in parts:  # grows
            if length in self.blocked:
                return []
            found |= {(grid, start) for grid in self.grids if grid[0] * grid[1] == length}
            parts += [(start + more, part) for more, part in self.joins.get(length, ()) if 0 < part < length]
        return sorted(found, key=lambda patches: (-patches[0][0] * patches[0][1], patches))


@contextmanager
def layouts(batch: int) -> Iterator[Layouts]:
    """Record how this thread lays out tokens.

    Whether patches come from a convolution, from windows or from merging: to become tokens (B, N, D) a map changes its
    shape, and the change says how many rows and columns N has.
    """
    seen = Layouts(batch)

    def run(mode: Any, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        seen.note(operation, args, kwargs or {}, made)
        return made

    mode: Any = type("LayoutMode", (TorchDispatchMode,), {"__torch_dispatch__": run})
    with mode():
        yield seen


def _groups(row: Sequence[int], grid: Sequence[int]) -> list[list[int]]:
    """Which neighbouring sizes of ``grid``, after the batch, make each size of ``row``; none if they do not."""
    groups = []
    place = 1
    for size in row[1:]:
        group: list[int] = []
        while place < len(grid) and (math.prod(group) < size or not group):
            group.append(grid[place])
            place += 1
        if math.prod(group) != size:
            return []
        if len(group) == 1 and grid[place : place + 1] == (1,):  # a grid of one column
            group.append(grid[place])
            place += 1
        groups.append(group)
    return groups


def _unfolded(sides: Sequence[int], kernel: Any, dilation: Any, padding: Any, stride: Any) -> tuple[int, int]:
    """The grid of patches that `torch.nn.functional.unfold` cuts."""
    rows, columns = (
        (side + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis, side in enumerate(sides)
    )
    return rows, columns
