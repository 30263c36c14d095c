"""How many kernels one `update` launches on an accelerator, counted without one; the number depends on no machine.

`FakeTensorMode` runs every operator on tensors that have a device but no values, and `Kernels` sees each of them. What
counts is an operator of PyTorch's core (aten) that leaves its result on the device and has work to do there. These do
not count:

- views, which move no data (`view`, `select`, `expand`, `detach`, ...),
- constants: an operator that makes a tensor from no values (`zeros`, `ones_like`, `empty`, `arange`),
- what happens on the host,
- copies: from the host to the device (`Kernels.transfers`), and from one dtype to another (`Kernels.casts`).

An operator counts once, also where PyTorch launches two kernels for it (`index_add` and `masked_fill` copy first).
`python tests/test_kernels.py` lists the operators and the lines that ask for them.
"""

import weakref
from collections.abc import Iterator
from pathlib import Path
from traceback import extract_stack

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oaa_lib
from oaa_lib import AttentionAccumulator

BATCH, CLASSES, SIDE = 16, 20, 28
LIMITS = {"max": 25, "mean": 30}
CONSTANTS = {"empty", "empty_strided", "zeros", "ones", "full", "arange", "scalar_tensor"}  # and zeros_like, new_zeros


class Kernels(TorchDispatchMode):
    """Keeps the operators that work on an accelerator, and the copies that go to it."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[str, str]] = []  # operator, and the line of the library that asked for it
        self.transfers: list[tuple[str, str]] = []
        self.casts: list[tuple[str, str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device.type != "cpu" for tensor in results)
        if on_device and not is_view(function) and not is_constant(function):
            sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if is_copy(function) and any(tensor.device.type == "cpu" for tensor in sources):
                self.transfers.append((str(function), line_of_the_library()))
            elif name_of(function) == "_to_copy":
                self.casts.append((str(function), line_of_the_library()))
            else:
                self.launched.append((str(function), line_of_the_library()))
        return result


def is_view(function: torch._ops.OpOverload) -> bool:
    """Whether all that is returned shares the memory of an argument, and nothing is written."""
    returned = [value.alias_info for value in function._schema.returns]
    return all(alias is not None and not alias.is_write for alias in returned)


def is_copy(function: torch._ops.OpOverload) -> bool:
    return name_of(function) in ("_to_copy", "copy_")


def is_constant(function: torch._ops.OpOverload) -> bool:
    return name_of(function).removesuffix("_like").removeprefix("new_") in CONSTANTS


def name_of(function: torch._ops.OpOverload) -> str:
    return function._schema.name.partition("::")[2]


def line_of_the_library() -> str:
    """The innermost line of `oaa_lib` that is being run."""
    folder = Path(oaa_lib.__file__).parent
    lines = [frame for frame in extract_stack() if folder in Path(frame.filename).parents]
    return f"{Path(lines[-1].filename).name}:{lines[-1].lineno} {lines[-1].line}" if lines else "outside"


def kernels_of_update(fusion: str) -> Kernels:
    """One update with the defaults: raw float32 score maps of map_size's own size, logits given, distinct images."""
    labels = torch.zeros(2 * BATCH, CLASSES, dtype=torch.bool)
    labels[torch.arange(2 * BATCH), torch.arange(2 * BATCH) % CLASSES] = True
    labels[::3, 7] = True  # some images show two classes
    indices = list(range(0, 2 * BATCH, 2))
    with FakeTensorMode():
        score_maps = torch.empty(BATCH, CLASSES, SIDE, SIDE, device="cuda")
        logits = torch.empty(BATCH, CLASSES, device="cuda")
        accumulator = AttentionAccumulator(labels, (SIDE, SIDE), fusion=fusion, device="cuda")
        accumulator.update(indices, score_maps, logits)  # not the first one: what is done once does not count
        with Kernels() as kernels:
            accumulator.update(indices, score_maps, logits)
    return kernels


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


# The control: the counter sees what it should see


@pytest.mark.parametrize(
    ("work", "launched", "transfers"),
    [
        (lambda x: x + 1, 1, 0),
        (lambda x: x.mul_(2).exp(), 2, 0),
        (lambda x: x.half(), 0, 0),
        (lambda x: x.clone(), 1, 0),
        (lambda x: torch.topk(x, 2), 1, 0),
        (lambda x: x.view(2, 8).t()[None, :3].expand(2, -1, -1).unbind(), 0, 0),
        (lambda x: [torch.zeros_like(x), x.new_ones(3), torch.arange(3, device="cuda"), x.new_full((1,), 3)], 0, 0),
        (lambda x: torch.ones(3).mul_(2).to("cuda"), 0, 1),
        (lambda x: x[0].copy_(torch.ones(4)), 0, 1),
        (lambda x: x[0].copy_(x[1]), 1, 0),
        (lambda x: torch.ones(4).exp().sum(), 0, 0),
    ],
    ids=[
        "add",
        "two",
        "cast",
        "clone",
        "two results",
        "views",
        "constants",
        "transfer",
        "copy_",
        "on the device",
        "host",
    ],
)
def test_the_counter_counts_operators_on_the_device(mode, work, launched, transfers):
    x = torch.empty(4, 4, device="cuda")
    with Kernels() as kernels:
        work(x)
    assert (len(kernels.launched), len(kernels.transfers)) == (launched, transfers)


@pytest.mark.parametrize(("fusion", "limit"), LIMITS.items(), ids=list(LIMITS))
def test_an_update_launches_few_kernels(fusion, limit):
    launched = kernels_of_update(fusion).launched
    listed = "\n".join(f"{name:40} {line}" for name, line in launched)
    assert 5 < len(launched) <= limit, f"expected at most {limit} kernels, got {len(launched)}:\n{listed}"


class Memory(TorchDispatchMode):
    """How many bytes of new tensors are alive at most after an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def test_an_update_needs_little_memory():
    """At most twice the float32 maps of the pairs that the batch shows."""
    labels = torch.ones(BATCH, CLASSES, dtype=torch.bool)
    accumulator = AttentionAccumulator(labels, (SIDE, SIDE))
    score_maps, logits = torch.randn(BATCH, CLASSES, SIDE, SIDE), torch.randn(BATCH, CLASSES)
    with Memory() as memory:
        accumulator.update(range(BATCH), score_maps, logits)
    assert score_maps.nbytes < memory.peak <= 2 * score_maps.nbytes  # here all classes are targets


def test_a_refinement_needs_the_memory_that_it_states():
    images, dilations = torch.rand(1, 3, 128, 160), (1, 2, 4, 8, 12, 24)
    with Memory() as memory:
        oaa_lib.pixel_adaptive_refinement(images, torch.rand(1, 1, 8, 8), dilations=dilations)
    assert 32 * len(dilations) < memory.peak / (128 * 160) <= 32 * len(dilations) + 130


def test_memory_is_seen():
    with Memory() as memory:
        first = torch.ones(1000)
        first = first + 1
        second = first.view(10, 100) * 2
        del first
        second.mul_(2)
    assert memory.peak == 8000


if __name__ == "__main__":
    for fusion, limit in LIMITS.items():
        kernels = kernels_of_update(fusion)
        print(f"{fusion}: {len(kernels.launched)} kernels, at most {limit}; {len(kernels.transfers)} transfers")
        for kind in (kernels.launched, kernels.transfers):
            print(*(f"  {name:40} {line}" for name, line in kind), sep="\n", end="\n\n")
