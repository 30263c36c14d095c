"""Nothing waits for the device, and nothing mixes devices: shown without a GPU.

Under `FakeTensorMode` a tensor has a device, a dtype and a shape but no values, so whatever needs a value (`.item()`,
`nonzero`, boolean indexing) or mixes devices raises. Backward passes need a real CUDA device and are left out.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from reference import noisy_or
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

from oaa_lib import (
    AttentionAccumulator,
    CAMHead,
    View,
    attention_similarity,
    hybrid_loss,
    multilabel_cross_entropy,
    normalize_attention,
    pseudo_label_from_cues,
)

LABELS = [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
GATES = {"score": "score", "topk": "topk", "none": None, "user's": lambda logits, labels: labels & (logits > 0)}
BUILT_IN = ["max", "mean", "latest", "ema", "noisy-or"]
FUSIONS = {**dict(zip(BUILT_IN, BUILT_IN, strict=True)), "user's": noisy_or}
MAP_SIZES = {"one size": (4, 4), "sizes": [(4, 4), (5, 6), (2, 2)]}
SEEN = [View(0.25, -0.5, 1.25, 0.5, True), View(), View(flip=True), View(0.45, 0.45, 0.55, 0.55)]
VIEWS = {"none": None, "flips": [View(flip=True), View(), View(), View(flip=True)], "crops": default_collate(SEEN)}
FORMS = {  # made outside of the mode, as by a data loader
    "list": SEEN,
    "tensor": torch.tensor(SEEN),
    "array": np.array(SEEN),
    "collated": default_collate(SEEN),
}


@contextlib.contextmanager
def cuda_bfloat16_autocast() -> Iterator[None]:
    """What `torch.autocast("cuda", torch.bfloat16)` switches; itself it stays off, with a warning, without a GPU."""
    was_enabled, was_dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", was_enabled)
        torch.set_autocast_dtype("cuda", was_dtype)


PRECISIONS = {"plain": contextlib.nullcontext, "autocast": cuda_bfloat16_autocast}
precisions = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=list(PRECISIONS))


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


def output(batch: int = 2, size: tuple[int, int] = (5, 6), dtype: torch.dtype = torch.float32):
    """What a model on the GPU returns for three classes: score maps and logits."""
    return (
        torch.empty(batch, 3, *size, device="cuda", dtype=dtype),
        torch.empty(batch, 3, device="cuda", dtype=dtype),
    )


class Transfers(TorchDispatchMode):
    """Counts the copies from the device to the host, each of which waits for the device; the mode allows them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            self.count += (source.device.type, result.device.type) == ("cuda", "cpu")
        return result


# The control: the mode does see what must not happen


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: x.isfinite().all().tolist(), DataDependentOutputException),
        (lambda x: "never" if x.sum() > 0 else "reached", DataDependentOutputException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x + torch.empty(2), RuntimeError),
        (lambda x: x.copy_(x) + torch.ones(2), RuntimeError),
    ],
    ids=["item", "tolist", "if", "nonzero", "boolean indexing", "two devices", "a constant on the host"],
)
def test_the_mode_refuses_to_wait_and_to_mix_devices(mode, wait, error):
    with pytest.raises(error):
        wait(torch.empty(2, device="cuda"))


def test_autocast_is_really_on(mode):
    with cuda_bfloat16_autocast():
        product = torch.empty(2, 2, device="cuda") @ torch.empty(2, 2, device="cuda")
    assert product.dtype == torch.bfloat16


def test_transfers_are_counted(mode):
    x = torch.empty(2, device="cuda")
    with Transfers() as transfers:
        torch.empty(2).copy_(x.cpu() + x.to("cpu", non_blocking=True))
        torch.empty(2).to("cuda").copy_(x * 2)
        torch.empty(2).copy_(x)
    assert transfers.count == 3


# The way of the data


@precisions
@pytest.mark.parametrize("num_convs", [0, 3])
def test_the_head(mode, precision, num_convs):
    with torch.device("cuda"):
        head, features = CAMHead(8, 3, hidden_channels=4, num_convs=num_convs), torch.empty(2, 8, 5, 6)
    with precision():
        out = head(features)
    assert (out.logits.device.type, out.score_maps.device.type) == ("cuda", "cuda")
    assert (out.logits.shape, out.score_maps.shape) == ((2, 3), (2, 3, 5, 6))


@precisions
@pytest.mark.parametrize("method", ["max", "minmax"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_normalization(mode, precision, method, dtype):
    with precision():
        attention = normalize_attention(output(dtype=dtype)[0], method=method)
    assert (attention.device.type, attention.dtype) == ("cuda", dtype)


@precisions
@pytest.mark.parametrize(
    ("fusion", "gate"),
    [(fusion, gate) for fusion in FUSIONS for gate in GATES if gate == "score" or fusion in ("max", "user's")],
)
def test_update_and_soft_labels(mode, precision, fusion, gate):
    fusion, gate = FUSIONS[fusion], GATES[gate]
    for storage, map_size, dtype, normalization, fill_empty in (
        (torch.uint8, (5, 6), torch.bfloat16, "max", False),
        (torch.uint8, (4, 4), torch.float32, None, True),
        (torch.float16, (4, 4), torch.float16, "minmax", True),
    ):
        accumulator = AttentionAccumulator(LABELS, map_size, fusion=fusion, gate=gate, dtype=storage, device="cuda")
        options = {"normalization": normalization, "fill_empty": fill_empty}
        for indices in ([0, 1], [0, 2, 0, 1, 0]):
            score_maps, logits = output(len(indices), dtype=dtype)
            with precision():
                accumulator.update(indices, score_maps, logits, **options)
                accumulator.update(indices, score_maps, **options)
                soft_labels = accumulator[indices]
            assert (soft_labels.device.type, soft_labels.dtype) == ("cuda", torch.float32)
            assert soft_labels.shape == (len(indices), 3, *map_size)


@pytest.mark.parametrize("map_size", [(5, 6), (4, 4)])
def test_update_with_images_without_label_only(mode, map_size):
    accumulator = AttentionAccumulator(LABELS, map_size, device="cuda")
    assert accumulator.update([2, 2], *output()).offered == 0


@precisions
@pytest.mark.parametrize("views", VIEWS.values(), ids=list(VIEWS))
@pytest.mark.parametrize("map_size", MAP_SIZES.values(), ids=list(MAP_SIZES))
@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=list(FUSIONS))
def test_nothing_waits_with_views_and_sizes(mode, precision, fusion, map_size, views):
    options = {"fusion": fusion, "dtype": torch.float16, "device": "cuda"}
    accumulator, other = (AttentionAccumulator(LABELS, map_size, **options) for _ in range(2))
    score_maps, logits = output(4, dtype=torch.bfloat16)
    with Transfers() as transfers, precision():
        for indices in ([0, 1, 2, 1], [1, 0, 2, 1]):
            accumulator.update(indices, score_maps, logits, views, fill_empty=True)
        read = accumulator.soft_labels([0, 1, 2, 1], views, size=(3, 7))
        similarity, attention = attention_similarity(read, read), accumulator.attention(1)
        if callable(getattr(accumulator.fusion, "merge", None)):
            other.merge(accumulator)
    assert transfers.count == 0
    for values, shape in ((read, (4, 3, 3, 7)), (similarity, (4, 3))):
        assert (values.device.type, values.dtype, values.shape) == ("cuda", torch.float32, shape)
    assert attention.shape == (1, *(map_size if isinstance(map_size, tuple) else map_size[1]))


@precisions
@pytest.mark.parametrize("normalization", ["max", "minmax", None])
@pytest.mark.parametrize("views", FORMS.values(), ids=list(FORMS))
def test_nothing_waits_whatever_form_the_views_come_in(mode, precision, views, normalization):
    accumulator = AttentionAccumulator(LABELS, (4, 4), device="cuda")
    with Transfers() as transfers, precision():
        accumulator.update([0, 1, 2, 1], output(4)[0], views=views, normalization=normalization)
        assert accumulator.soft_labels([1, 0, 2, 1], views).shape == (4, 3, 4, 4)
    assert transfers.count == 0


def test_images_of_several_sizes_need_a_size_to_be_read_at(mode):
    accumulator = AttentionAccumulator(LABELS, MAP_SIZES["sizes"], device="cuda")
    assert accumulator[[1, 1]].shape == (2, 3, 5, 6)
    with pytest.raises(ValueError, match="different sizes"):
        accumulator[[0, 1]]


def test_views_on_the_device_are_refused(mode):
    accumulator = AttentionAccumulator(LABELS, (4, 4), device="cuda")
    for views in (torch.empty(2, 5, device="cuda"), View(*torch.empty(5, 2, device="cuda"))):
        with pytest.raises(ValueError, match="reading it would wait"):
            accumulator.update([0, 1], *output(), views)
        with pytest.raises(ValueError, match="reading it would wait"):
            accumulator.soft_labels([0, 1], views)


@precisions
@pytest.mark.parametrize("views", VIEWS.values(), ids=list(VIEWS))
@pytest.mark.parametrize("map_size", MAP_SIZES.values(), ids=list(MAP_SIZES))
@pytest.mark.parametrize(("model", "maps"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("fusion", ["max", "mean", "latest"])
def test_the_maps_may_live_elsewhere_than_the_model(mode, precision, fusion, model, maps, map_size, views):
    accumulator = AttentionAccumulator(LABELS, map_size, fusion=fusion, device=maps)
    score_maps, logits = torch.empty(4, 3, 5, 6, device=model), torch.empty(4, 3, device=model)
    with precision():
        for indices in ([0, 1, 2, 1], [1, 0, 2, 1]):
            accumulator.update(indices, score_maps, logits, views)
        assert accumulator.soft_labels([1, 0, 2, 1], views, size=(3, 7)).device.type == maps
    assert accumulator.counts.device.type == maps


def test_what_tells_numbers_waits_and_statistics_once(mode):
    accumulator = AttentionAccumulator(LABELS, (4, 4), device="cuda").update([0, 1], *output())
    for name in ("accepted", "skipped"):
        with pytest.raises(DataDependentOutputException):
            getattr(accumulator, name)
    with Transfers() as transfers:
        statistics = accumulator.statistics()
    assert transfers.count == 1
    assert {values.device.type for values in statistics} == {"cpu"}
    assert [values.shape for values in statistics] == [(3,)] * 5


def test_update_by_name(mode):
    accumulator = AttentionAccumulator(LABELS, (5, 6), device="cuda", keys=["a", "b", "c"])
    assert accumulator.update(["c", "a"], *output()).offered == 2
    assert accumulator[["b"]].device.type == "cuda"


def test_what_else_an_accumulator_tells_and_does_on_the_device(mode):
    accumulator, other = (AttentionAccumulator(LABELS, (5, 6), device="cuda") for _ in range(2))
    assert accumulator.accumulated.device.type == "cuda"
    assert accumulator.counts.device.type == "cuda"
    assert accumulator.attention(0).device.type == "cuda"
    assert accumulator.classes(0).device.type == "cpu"
    assert accumulator.merge(other).reset().offered == 0
    assert "cuda" in repr(accumulator)


@precisions
@pytest.mark.parametrize("threshold", [0.0, 0.001])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_on_soft_labels_of_an_accumulator(mode, precision, dtype, threshold):
    soft_labels = AttentionAccumulator(LABELS, (5, 6), device="cuda")[[0, 1]]
    score_maps = output(dtype=dtype)[0]
    with precision():
        losses = [
            hybrid_loss(score_maps, soft_labels, normalization="class", threshold=threshold),
            hybrid_loss(score_maps, soft_labels, normalization="pooled", threshold=threshold),
            multilabel_cross_entropy(score_maps, soft_labels, threshold=threshold),
        ]
    assert [(loss.device.type, loss.dtype, loss.shape) for loss in losses] == [("cuda", torch.float32, ())] * 3


@precisions
@pytest.mark.parametrize("num_classes", [0, 1, 3])
@pytest.mark.parametrize("background", ["saliency", "constant", "map", "saliency and constant"])
def test_pseudo_labels(mode, precision, background, num_classes):
    with torch.device("cuda"):
        attention, saliency, back = torch.empty(num_classes, 5, 6), torch.empty(5, 6), torch.empty(5, 6)
    options = {"map": back, "saliency": None}.get(background, 0.5)
    for classes in (list(range(num_classes)), torch.arange(num_classes), torch.arange(num_classes, device="cuda")):
        with precision():
            label = pseudo_label_from_cues(
                attention, classes, saliency if background.startswith("saliency") else None, background=options
            )
        assert (label.device.type, label.dtype, label.shape) == ("cuda", torch.int64, (5, 6))


# Inside and outside of the mode: labels and indices are on the host, and real

REAL = {
    "list": lambda values: values,
    "array": np.array,
    "tensor": torch.tensor,
}


@pytest.mark.parametrize("allow_non_fake_inputs", [False, True])
@pytest.mark.parametrize("kind", REAL.values(), ids=list(REAL))
def test_an_accumulator_is_built_in_the_mode_from_real_labels(kind, allow_non_fake_inputs):
    labels = kind(LABELS)
    with FakeTensorMode(allow_non_fake_inputs=allow_non_fake_inputs):
        accumulator = AttentionAccumulator(labels, (5, 6), device="cuda")
        assert accumulator.update([1, 0], *output()).offered == 3


def test_labels_without_images_are_refused_in_the_mode_as_outside_of_it():
    labels = torch.zeros(0, 3)
    with FakeTensorMode(), pytest.raises(ValueError, match=r"got \(0, 3\)"):
        AttentionAccumulator(labels, (5, 6))


@pytest.mark.parametrize("allow_non_fake_inputs", [False, True])
@pytest.mark.parametrize("kind", REAL.values(), ids=list(REAL))
def test_real_indices_are_read_in_the_mode(kind, allow_non_fake_inputs):
    indices = kind([0, 1])
    with FakeTensorMode(allow_non_fake_inputs=allow_non_fake_inputs):
        accumulator = AttentionAccumulator(LABELS, (5, 6), device="cuda")
        assert accumulator.update(indices, *output()).offered == 3
        assert accumulator[indices].shape == (2, 3, 5, 6)


def test_an_accumulator_built_outside_takes_fake_score_maps_if_the_mode_allows_its_real_maps():
    accumulator = AttentionAccumulator(LABELS, (5, 6))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert accumulator.update([0, 1], *output()).offered == 3
        assert accumulator[[0, 1]].device.type == "cpu"


def test_maps_on_the_host_take_score_maps_of_the_device(mode):
    accumulator = AttentionAccumulator(LABELS, (4, 4), device="cpu")
    assert accumulator.update([0, 1, 0], *output(3)).offered == 5
    assert accumulator[[0, 1]].device.type == "cpu"


def test_maps_on_the_device_take_score_maps_of_the_host(mode):
    accumulator = AttentionAccumulator(LABELS, (4, 4), device="cuda", gate=None)
    accumulator.update([0, 1, 0], torch.empty(3, 3, 5, 6), torch.empty(3, 3))
    assert accumulator[[0, 1]].device.type == "cuda"
