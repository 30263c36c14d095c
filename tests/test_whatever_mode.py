"""Right, or refused before anything changed: modes of torch and numpy, what a user's functions return, huge counts."""

import numpy as np
import pytest
import torch
from reference import same, snapshot
from torch import nn

from oaa_lib import (
    AttentionAccumulator,
    ConfusionMatrix,
    MeanFusion,
    ThresholdSweep,
    View,
    hybrid_loss,
    wrap_classifier,
)
from oaa_lib.interop import load_into, read_maps, write_maps
from oaa_lib.maps.kept import MOST
from oaa_lib.plotting import overlay
from oaa_lib.testing import assert_pixelwise, check_fusion

LABELS = [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
VIEWS = [View(0, 0, 0.5, 1), View(flip=True)]


def build(**options):
    return AttentionAccumulator(LABELS, **{"map_size": (4, 4), "gate": None, **options})


def show(accumulator, seed=0, dtype=torch.float32):
    """A batch in which one map is faulty."""
    score_maps = torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    score_maps[1, 2, 0, 0] = torch.nan
    accumulator.update([0, 1], score_maps.to(dtype), views=VIEWS)
    return accumulator.update([0, 1], score_maps.to(dtype))


# Modes


@pytest.mark.parametrize("fusion", ["max", "mean", "latest", "noisy-or"])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_what_is_built_in_inference_mode_is_changed_outside_and_the_other_way_round(where, fusion, tmp_path):
    def make(name):
        return build(fusion=fusion, path=tmp_path / name if where == "file" else None)

    expected = show(show(build(fusion=fusion)), 1)
    with torch.inference_mode():
        inside = make("inside")
        show(inside)
        other = show(build(fusion=fusion))
        state = inside.state_dict()
    show(inside, 1)
    assert same(snapshot(inside), snapshot(expected))
    outside = make("outside")
    show(outside)
    with torch.inference_mode():
        show(outside, 1)
    assert same(snapshot(outside), snapshot(expected))
    inside.reset()
    inside.load_state_dict(state)
    inside.merge(other)
    show(inside)
    with torch.inference_mode():
        inside.save(tmp_path / "saved")
        loaded = AttentionAccumulator.load(tmp_path / "saved")
    assert same(snapshot(show(loaded)), snapshot(show(inside)))


@pytest.mark.parametrize("inside", [True, False], ids=["counted inside first", "made inside"])
def test_a_metric_that_is_made_in_inference_mode_counts_outside(inside):
    truth, attention = torch.tensor([[0, 1, 2, 255]]), torch.tensor([[[0.1, 0.9, 0.3, 0.5]]])
    with torch.inference_mode():
        matrix, sweep = ConfusionMatrix(3), ThresholdSweep(2)
        if inside:
            matrix.update(truth % 3, truth)
            sweep.update(attention, torch.tensor([0]), truth)
    for _ in range(2 - inside):
        matrix.update(truth % 3, truth)
        sweep.update(attention, torch.tensor([0]), truth)
    twice = ConfusionMatrix(3).update(truth % 3, truth).update(truth % 3, truth)
    assert torch.equal(matrix.merge(ConfusionMatrix(3)).counts, twice.counts)
    once = ThresholdSweep(2).update(attention, torch.tensor([0]), truth)
    assert torch.equal(sweep.counts, 2 * once.counts)
    assert not matrix.reset().counts.any()
    assert not sweep.reset().counts.any()


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "fusion", ["max", "mean", "ema", lambda m, a, n: (m + a) / 2], ids=["max", "mean", "ema", "own"]
)
def test_the_default_dtype_makes_no_difference(fusion, dtype, default_dtype):
    accumulator = show(show(build(fusion=fusion, dtype=dtype)), 1)
    read = [accumulator.attention(0), accumulator[[0, 1]], accumulator.soft_labels([0, 1], VIEWS, size=(3, 3))]
    torch.set_default_dtype(torch.float32)
    expected = show(show(build(fusion=fusion, dtype=dtype)), 1)
    assert same(snapshot(accumulator), snapshot(expected))
    expected = [expected.attention(0), expected[[0, 1]], expected.soft_labels([0, 1], VIEWS, size=(3, 3))]
    for found, right in zip(read, expected, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, right)


# The default device: "meta" stands for a card, and no number can be read from it


@pytest.mark.parametrize("map_size", [(4, 4), [[4, 4], [2, 3], [1, 1]]], ids=["one size", "sizes"])
@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("fusion", ["max", "mean"])
def test_the_default_device_makes_no_difference_to_an_accumulator(fusion, where, map_size, tmp_path):
    def make(name):
        return build(fusion=fusion, map_size=map_size, path=tmp_path / name if where == "file" else None)

    accumulator = show(make("first"))
    expected = snapshot(accumulator)
    with torch.device("meta"):
        fresh = make("second")
        fresh.load_state_dict(accumulator.state_dict())
        accumulator.save(tmp_path / "saved")
        loaded = AttentionAccumulator.load(tmp_path / "saved")
        emptied = make("third").merge(loaded).reset()
    assert same(snapshot(fresh), expected)
    assert same(snapshot(loaded), expected)
    assert same(snapshot(emptied), snapshot(make("fourth")))


def sweep():
    target = torch.ones(3, 3, dtype=torch.int64, device="cpu")
    swept = ThresholdSweep(2).update(torch.full((1, 3, 3), 0.5, device="cpu"), [0], target)
    return swept.best_threshold(), swept.at(0.4).mean_iou()


def wrap():
    with torch.device("cpu"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
        images = torch.rand(1, 3, 8, 8)
    return wrap_classifier(model)(images).score_maps.shape


def check():
    check_fusion("mean", [torch.full((2, 2, 2), value, device="cpu") for value in (0.5, 0.25, 1)])
    assert_pixelwise(MeanFusion(), [torch.full((2, 2, 2), value, device="cpu") for value in (0.5, 0.25, 1)])


def draw():
    return len(overlay(np.zeros((4, 4, 3), np.uint8), np.ones((2, 2))).axes)


@pytest.mark.parametrize("work", [sweep, wrap, check, draw])
def test_the_default_device_makes_no_difference_to(work):
    expected = work()
    with torch.device("meta"):
        assert work() == expected


@pytest.mark.parametrize("layout", ["oaa", "safetensors"])
def test_the_default_device_makes_no_difference_to_maps_that_are_read(layout, tmp_path):
    accumulator, fresh = show(build()), build()
    with torch.device("meta"):
        write_maps(accumulator, tmp_path, layout=layout)
        assert load_into(fresh, read_maps(tmp_path, layout=layout)).maps == 3
    assert torch.equal(fresh[range(3)], accumulator[range(3)])


@pytest.mark.parametrize("where", ["memory", "file"])
def test_numpy_may_raise_at_every_rounding(where, tmp_path):
    path = tmp_path / "maps" if where == "file" else None
    with np.errstate(all="raise"):
        accumulator = show(build(fusion="mean", path=path))
        tiny = torch.full((1, 3, 4, 4), 1e-38)
        tiny[..., 0, 0] = 1e30
        accumulator.update([0], tiny, views=[View(-1e8, -1e-9, 1, 1e8)])
        accumulator.soft_labels([0], [View(-1e8, -1e-9, 1, 1e8)], size=(2, 2))
        accumulator.merge(show(build(fusion="mean")))
        accumulator.statistics()
    assert accumulator.offered == 14


@pytest.mark.parametrize("map_size", [(4, 4), [[4, 4], [2, 3], [1, 1]]], ids=["one size", "sizes"])
def test_a_batch_of_negatives_only_is_read_at_any_size_and_passed_over(map_size):
    accumulator = build(map_size=map_size)
    for views in (None, [View(flip=True)] * 2, [View(0, 0, 0.5, 0.5)] * 2):
        soft_labels = accumulator.soft_labels([2, 2], views, size=(3, 2))
        assert soft_labels.shape == (2, 3, 3, 2)
        assert not soft_labels.any()
        accumulator.update([2, 2], torch.rand(2, 3, 4, 4), views=views)
    assert accumulator.offered == 0
    assert hybrid_loss(torch.rand(2, 3, 3, 2), soft_labels) > 0


# What functions of the user return


RESULTS = {
    "a list": (lambda x: x.tolist(), TypeError),
    "nothing": (lambda x: None, TypeError),
    "complex": (lambda x: x + 0j, TypeError),
    "sparse": (lambda x: x.to_sparse(), TypeError),
    "meta": (lambda x: x.to("meta"), ValueError),
    "one more": (lambda x: torch.cat([x, x]), ValueError),
    "one too few": (lambda x: x[1:], ValueError),
    "flat": (lambda x: x.flatten(), ValueError),
    "NaN": (lambda x: x.where(x == x.amax(), torch.nan), ValueError),
    "negative": (lambda x: x - 1, ValueError),
    "too large": (lambda x: x + 1, ValueError),
    "infinite": (lambda x: x / 0, ValueError),
}


class Own:
    """A fusion, both parts of which return what they are told to."""

    def __init__(self, fused=lambda x: x, merged=lambda x: x):
        self.fused, self.merged = fused, merged

    def __call__(self, cumulative, attention, count):
        return self.fused(torch.maximum(cumulative, attention))

    def merge(self, first, second, first_count, second_count):
        return self.merged(torch.maximum(first, second))


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("result", RESULTS)
def test_what_a_fusion_may_not_return(result, where, tmp_path):
    path = tmp_path / "maps" if where == "file" else None
    change, error = RESULTS[result]
    accumulator, other = (
        show(build(fusion=Own(), dtype=torch.float32, path=path)),
        show(build(fusion=Own(), dtype=torch.float32)),
    )
    before = snapshot(accumulator)
    accumulator.fusion.fused = change
    with pytest.raises(error, match="the fusion"):
        show(accumulator)
    assert same(snapshot(accumulator), before)
    accumulator.fusion.fused, accumulator.fusion.merged = (lambda x: x), change
    with pytest.raises(error, match="the fusion's merge"):
        accumulator.merge(other)
    assert same(snapshot(accumulator), before)


GATES = {
    "a list": (lambda x: x.tolist(), TypeError),
    "nothing": (lambda x: None, TypeError),
    "floats": (lambda x: x.float(), TypeError),
    "sparse": (lambda x: x.to_sparse(), TypeError),
    "meta": (lambda x: x.to("meta"), ValueError),
    "a row": (lambda x: x[0], TypeError),
    "one class": (lambda x: x[:, :1], TypeError),
}


@pytest.mark.parametrize("result", GATES)
def test_what_a_gate_may_not_return(result):
    change, error = GATES[result]
    accumulator = build(gate=lambda logits, labels: change(labels))
    before = snapshot(accumulator)
    with pytest.raises(error, match="expected the gate to return"):
        show(accumulator)
    assert same(snapshot(accumulator), before)


def test_a_fusion_is_refused_for_what_it_says_of_itself_when_the_accumulator_is_built():
    def own(cumulative, attention, count):
        return torch.maximum(cumulative, attention)

    for dtype in (torch.bfloat16, torch.int32, torch.bool, torch.complex64, "float32", 3):
        own.storage_dtype = dtype
        with pytest.raises((TypeError, ValueError), match="storage_dtype"):
            build(fusion=own)
    own.storage_dtype = None
    for reduction in ("sum", "MAX", 3, torch.zeros(2), True):
        own.reduction = reduction
        with pytest.raises((TypeError, ValueError), match="reduction"):
            build(fusion=own)
    own.reduction = None
    own.merge = "max"
    with pytest.raises(TypeError, match="merge"):
        build(fusion=own)


# Counts and maps that cannot be


def counted(number, fusion="mean"):
    accumulator = show(build(fusion=fusion))
    accumulator.state_dict()["counts"][:] = number
    return accumulator


@pytest.mark.parametrize("fusion", ["max", "mean"])
def test_counts_beyond_32_bits_are_not_joined(fusion):
    ours, theirs = counted(MOST // 2 + 5, fusion), counted(MOST // 2 + 5, fusion)
    before = snapshot(ours)
    with pytest.raises(ValueError, match=f"accepted at most {MOST} maps together"):
        ours.merge(theirs)
    assert same(snapshot(ours), before)
    ours.merge(counted(MOST // 2 - 5, fusion))
    assert ours.accumulated.any()
    assert (show(ours).counts >= 0).all()


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("counts", -1),
        ("counts", MOST + 1),
        ("synchronized", -3),
        ("maps", torch.nan),
        ("maps", 1.5),
        ("maps", -1.0),
        ("maps", torch.inf),
        ("base_maps", torch.nan),
    ],
)
def test_a_state_of_what_cannot_be_is_refused(name, value, where, tmp_path):
    accumulator = show(build(fusion="mean", path=tmp_path / "maps" if where == "file" else None))
    state, before = snapshot(accumulator), snapshot(accumulator)
    state |= {"base_maps": state["maps"].clone(), "base_missed": state["missed"].clone()}
    state[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"the state is damaged: expected {name} in"):
        accumulator.load_state_dict(state)
    assert same(snapshot(accumulator), before)
