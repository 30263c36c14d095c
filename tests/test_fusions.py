"""Every built-in fusion follows its formula and its laws, and the laws catch whoever breaks them."""

import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from oaa_lib import AttentionAccumulator, View, testing
from oaa_lib.fusion import (
    FUSIONS,
    ExponentialMovingAverage,
    LatestFusion,
    MaxFusion,
    MeanFusion,
    NoisyOr,
    fusion_name,
    harmonic_mix,
    resolve_fusion,
)
from oaa_lib.testing import attention_streams, check_fusion, fold

every_built_in = pytest.mark.parametrize("fusion", [*FUSIONS.values(), ExponentialMovingAverage(0.3)], ids=repr)


# The formulas, over a whole stream of numbers at once


def moving_average(values, momentum):
    weights = [momentum ** (len(values) - 1)]
    weights += [(1 - momentum) * momentum ** (len(values) - 1 - t) for t in range(1, len(values))]
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def harmonic(values):
    mean, peak = np.mean(values), np.max(values)
    return 3 / (1 / mean + 2 / peak) if mean > 1e-30 else 0.0


FORMULAS = {
    "max": max,
    "mean": np.mean,
    "ema": lambda values: moving_average(values, 0.9),
    "ema(momentum=0.5)": lambda values: moving_average(values, 0.5),
    "ema(momentum=0.0)": lambda values: values[-1],
    "latest": lambda values: values[-1],
    "noisy-or": lambda values: 1 - np.prod([1 - value for value in values]),
}


@pytest.mark.parametrize("name", FORMULAS)
@given(maps=attention_streams())
def test_a_fusion_follows_its_formula(name, maps):
    stream = np.stack(maps).astype(np.float64)
    expected = np.array([FORMULAS[name](list(pixel)) for pixel in stream.reshape(len(maps), -1).T])
    np.testing.assert_allclose(fold(resolve_fusion(name), maps).flatten(), expected, atol=2e-6)


def test_the_formulas_by_hand():
    maps = [torch.tensor([[[value]]]) for value in (0.5, 0.0, 1.0)]
    assert fold(ExponentialMovingAverage(0.5), maps).item() == 0.625
    assert fold(LatestFusion(), maps).item() == 1
    assert fold(NoisyOr(), maps[:1] * 3).item() == 0.875


@given(maps=attention_streams())
def test_the_harmonic_mix_of_a_mean_and_a_maximum_follows_its_formula(maps):
    mixed = harmonic_mix(fold(MeanFusion(), maps), fold(MaxFusion(), maps))
    expected = np.array([harmonic(list(pixel)) for pixel in np.stack(maps).reshape(len(maps), -1).T.astype(np.float64)])
    np.testing.assert_allclose(mixed.flatten(), expected, atol=2e-6)
    assert (mixed >= fold(MeanFusion(), maps) - 1e-6).all()
    assert (mixed <= fold(MaxFusion(), maps) + 1e-6).all()


def test_the_harmonic_mix_is_0_where_nothing_was_ever_seen_and_never_nan():
    mean, maximum = torch.tensor([[0.0, 0.0, 1e-38, 1e-45, 1e-38], [0.0, 1.0, 1e-38, 1e-45, 1.0]])
    mixed = harmonic_mix(mean, maximum)
    assert mixed[:2].tolist() == [0, 0]
    torch.testing.assert_close(mixed, torch.tensor([0, 0, 1e-38, 0, 3e-38]), rtol=1e-4, atol=1e-44)


@pytest.mark.parametrize(
    ("mean", "maximum", "error", "message"),
    [
        (torch.ones(2).byte(), torch.ones(2), TypeError, "mean as a floating point tensor, got torch.uint8"),
        (torch.ones(2), 1.0, TypeError, "maximum as a floating point tensor, got float"),
        (torch.ones(2), torch.ones(3), ValueError, r"one shape, got \(2,\) and \(3,\)"),
    ],
)
def test_no_harmonic_mix(mean, maximum, error, message):
    with pytest.raises(error, match=message):
        harmonic_mix(mean, maximum)


@every_built_in
@given(value=st.floats(0, 1, width=32), length=st.integers(1, 30))
def test_a_constant_stays_itself_to_the_bit(fusion, value, length):
    if isinstance(fusion, NoisyOr):
        return  # it grows
    maps = [torch.full((1, 1, 1), value)] * length
    assert torch.equal(fold(fusion, maps), maps[0])


@every_built_in
@given(maps=attention_streams(max_length=12))
def test_no_rounding_leads_out_of_zero_to_one(fusion, maps):
    cumulative = maps[0]
    for count, attention in enumerate(maps[1:], start=1):
        cumulative = fusion(cumulative, attention, torch.full((len(attention), 1, 1), count))
        assert cumulative.min() >= 0
        assert cumulative.max() <= 1


@every_built_in
def test_a_built_in_fusion_leaves_its_arguments_alone(fusion):  # the accumulator gives it no copies
    cumulative, attention = torch.rand(2, 3, 2, 2)
    count = torch.ones(3, 1, 1, dtype=torch.int32)
    given = [tensor.clone() for tensor in (cumulative, attention, count)]
    fusion(cumulative, attention, count)
    if fusion.merge is not None:
        fusion.merge(cumulative, cumulative, count, count)
    assert all(map(torch.equal, given, (cumulative, attention, count)))


def test_a_momentum_of_0_is_the_latest_map_to_the_bit():
    maps = list(torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(fold(ExponentialMovingAverage(0), maps), maps[-1])


# Their laws


@every_built_in
@given(maps=attention_streams())
def test_a_built_in_fusion_is_what_it_claims_to_be(fusion, maps):
    check_fusion(fusion, maps)
    testing.assert_pixelwise(fusion, maps)


LAWS = {
    "assert_order_free": ["max", "mean", "noisy-or"],
    "assert_mergeable": ["max", "mean", "latest", "noisy-or"],
    "assert_zero_is_neutral": ["max", "latest", "noisy-or"],
    "assert_reduction": ["max", "mean", "latest"],
    "assert_monotone": ["max", "noisy-or"],
    "assert_idempotent": ["max"],
    "assert_in_hull": ["max", "mean", "latest", "ema"],
}


@pytest.mark.parametrize(("law", "name"), [(law, name) for law, names in LAWS.items() for name in names])
@given(maps=attention_streams())
def test_a_fusion_obeys(law, name, maps):
    getattr(testing, law)(FUSIONS[name], maps)


@pytest.mark.parametrize(("law", "name"), [(law, name) for law in LAWS for name in FUSIONS if name not in LAWS[law]])
def test_a_fusion_is_not_thought_to_obey(law, name):
    maps = [torch.tensor([[[value]]]) for value in (0.5, 0.75, 0.25)]
    with pytest.raises((AssertionError, ValueError)):
        getattr(testing, law)(FUSIONS[name], maps)


def test_what_the_built_in_fusions_claim():
    claims = {
        "order_free": LAWS["assert_order_free"],
        "merge": LAWS["assert_mergeable"],
        "zero_is_neutral": ["max", "noisy-or"],  # the latest must know where it has seen nothing, to be merged
        "reduction": LAWS["assert_reduction"],
        "not_mergeable": ["ema"],
        "storage_dtype": ["mean", "ema", "noisy-or"],
    }
    for attribute, names in claims.items():
        assert [name for name in FUSIONS if getattr(FUSIONS[name], attribute, False)] == names, attribute


@given(attention_streams())
def test_my_fusion(maps):  # as the docstring of oaa_lib.testing has it
    check_fusion(lambda cumulative, attention, count: torch.maximum(0.9 * cumulative, attention), maps)


# Who breaks a law is caught


def claiming(fusion, **claims):
    """A fusion that says more of itself than `fusion` does."""

    class Claiming:
        def __call__(self, cumulative, attention, count):
            return fusion(cumulative, attention, count)

    claiming = Claiming()
    for name, claim in claims.items():
        setattr(claiming, name, claim)
    return claiming


def the_max(cumulative, attention, count):
    return torch.maximum(cumulative, attention)


def the_mean(cumulative, attention, count):
    return (cumulative * count + attention) / (count + 1)


def latest(cumulative, attention, count):
    return attention


class Moody:
    """Remembers how often it was called."""

    calls = 0

    def __call__(self, cumulative, attention, count):
        self.calls += 1
        return cumulative if self.calls % 3 else attention


def weighted(first, second, first_count, second_count):
    return (first * first_count + second * second_count) / (first_count + second_count)


def forgetting_at(first, second):
    """A maximum whose merge is wrong for these counts alone."""

    def merge(m, o, n, k):
        return torch.where((n == first) & (k == second), m, torch.maximum(m, o))

    return claiming(the_max, merge=merge)


FAULTS = {
    "more than 1": (lambda m, a, n: m + a, r"\[0, 1\], got \["),
    "less than 0": (lambda m, a, n: m - a, r"\[0, 1\], got \[-"),
    "NaN": (lambda m, a, n: a / a, r"\[0, 1\], got \[nan"),
    "another shape": (lambda m, a, n: m.amax(0, keepdim=True), r"return shape \(\d, \d, \d\), got \(1, \d, \d\)"),
    "no tensor": (lambda m, a, n: m.tolist(), "return a tensor, got list"),
    "moods": (Moody(), "same again|one by one"),
    "chance": (lambda m, a, n: torch.rand_like(m), "same again gives the same"),
    "pairs that mix": (lambda m, a, n: torch.maximum(m, a.amax(0, keepdim=True)), "a batch is its pairs"),
    "one count for all": (lambda m, a, n: the_mean(m, a, n[:1]), "batch of different counts"),
    "order": (claiming(latest, order_free=True), "order makes no difference"),
    "order among the first": (
        claiming(lambda m, a, n: torch.where(n > 1, torch.maximum(m, a), m), order_free=True),
        "order makes no difference",
    ),
    "order after the first two": (
        claiming(lambda m, a, n: torch.where(n < 2, torch.maximum(m, a), m), order_free=True),
        "order makes no difference",
    ),
    "zero": (claiming(the_mean, zero_is_neutral=True), r"F\(0, A, \d\) = A"),
    "zero after a while": (
        claiming(lambda m, a, n: torch.where(n > 2, the_mean(m, a, n), the_max(m, a, n)), zero_is_neutral=True),
        r"F\(0, A, 3\) = A",
    ),
    "a maximum that is none": (claiming(the_mean, reduction="max"), "reduction 'max', cut after 1"),
    "a mean that is none": (claiming(the_max, reduction="mean"), "reduction 'mean', cut after 1"),
    "a latest map that is not kept": (claiming(the_max, reduction="latest"), "reduction 'latest', cut after 1"),
    "a mean without weights": (
        claiming(lambda m, a, n: (m + a) / 2, reduction="mean"),
        "reduction 'mean'",
    ),
    "another merge": (claiming(the_max, merge=lambda m, o, n, k: m), "merging streams cut"),
    "a merge without weights": (claiming(the_mean, merge=lambda m, o, n, k: (m + o) / 2), "merging streams cut"),
    "a merge with one weight": (
        claiming(the_mean, merge=lambda m, o, n, k: weighted(m, o, n[:1], k[:1])),
        r"merging streams cut after \[\d, \d",
    ),
    "a merge that adds": (claiming(the_max, merge=lambda m, o, n, k: m + o), r"merge to return maps in \[0, 1\], got"),
    "a merge that forgets after two": (forgetting_at(2, 1), "merging one by one from the first"),
    "a merge that forgets after one": (forgetting_at(1, 2), "merging one by one from the last"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_streams_show_a_fault_and_the_message_tells_it(fault):
    fusion, message = FAULTS[fault]

    def told(maps):
        try:
            check_fusion(fusion, maps)
        except AssertionError as error:
            return re.search(message, str(error))
        return False

    find(attention_streams(), told, settings=settings(phases=[Phase.generate], max_examples=100))


PIXELS_THAT_MIX = {
    "blurring": (lambda m, a, n: torch.maximum(m, a.mean((1, 2), keepdim=True)), "a map is its pixels"),
    "one count for all": (lambda m, a, n: the_mean(m, a, n[:, :1, :1]), "a map of different counts"),
    "a merge with one weight": (
        claiming(the_mean, merge=lambda m, o, n, k: weighted(m, o, n[:, :1, :1], k[:, :1, :1])),
        "merging is merging the pixels",
    ),
}


@pytest.mark.parametrize("fault", PIXELS_THAT_MIX)
def test_pixels_that_mix_are_told_though_such_a_fusion_is_valid(fault):
    fusion, message = PIXELS_THAT_MIX[fault]
    maps = list(torch.rand(3, 2, 2, 3, generator=torch.Generator().manual_seed(0)))
    check_fusion(fusion, maps)
    with pytest.raises(AssertionError, match=message):
        testing.assert_pixelwise(fusion, maps)


def test_orders_are_tried_that_only_swap_two():
    maps = [torch.full((1, 1, 1), value) for value in (0.1, 0.2, 0.3)]
    with pytest.raises(AssertionError, match="order makes no difference: expected 0, got 1"):
        testing.assert_order_free(lambda m, a, n: torch.where(n == 1, m, (m + a > 0.45).float()), maps)


def test_a_message_tells_the_law_the_place_and_the_numbers():
    maps = [torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)]
    maps[0][1, 0, 1] = 0.25
    with pytest.raises(AssertionError) as caught:
        testing.assert_monotone(the_mean, maps)
    assert str(caught.value) == (
        "no pixel falls: expected 0.25, got 0.125 (tolerance 1e-05) at (pair, row, column) (1, 0, 1), "
        "where the maps are [0.25, 0.0]"
    )


def test_the_tolerance_is_the_callers():
    maps = [torch.tensor([[[0.5]]]), torch.tensor([[[0.501]]])]
    nearly = claiming(latest, order_free=True)
    check_fusion(nearly, maps, tolerance=0.01)
    with pytest.raises(AssertionError, match="order"):
        check_fusion(nearly, maps)


def test_a_fusion_that_works_in_place_is_tried_on_copies():
    def in_place(cumulative, attention, count):
        torch.minimum(cumulative, attention, out=cumulative)
        attention.zero_()
        return cumulative

    maps = [torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.25)]
    check_fusion(in_place, maps)
    fold(in_place, maps[:1]).zero_()
    assert [float(attention) for attention in maps] == [0.5, 0.25]
    with pytest.raises(AssertionError, match="no pixel falls"):
        testing.assert_monotone(in_place, maps)


def test_fold_takes_what_the_accumulator_takes():
    maps = [torch.ones(1, 1, 1)] * 2
    for fusion in (lambda m, a, n: a + 5e-5, lambda m, a, n: a.double(), lambda m, a, n: a > 0):
        folded = fold(fusion, maps)
        assert folded.dtype == torch.float32
        assert folded.item() == 1


@pytest.mark.parametrize(
    ("fusion", "maps", "error", "message"),
    [
        (MaxFusion(), [], ValueError, "at least one map, got none"),
        (MaxFusion, [torch.zeros(1, 1, 1)], TypeError, "the class MaxFusion; pass an instance"),
        (
            claiming(the_max, reduction="sum"),
            [torch.zeros(1, 1, 1)],
            ValueError,
            "'max', 'mean' or 'latest', got 'sum'",
        ),
    ],
)
def test_what_cannot_be_checked_is_told(fusion, maps, error, message):
    with pytest.raises(error, match=message):
        check_fusion(fusion, maps)


def test_without_hypothesis_the_import_says_what_to_install():
    program = "import sys; sys.modules['hypothesis'] = None; import oaa_lib; import oaa_lib.testing"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "oaa_lib.testing needs hypothesis; install it with" in result.stderr.splitlines()[-1]


# The streams


def test_the_streams_are_attention_and_have_edges():
    shown = []

    @settings(max_examples=400)
    @given(attention_streams(max_length=4, max_pairs=2, max_side=3))
    def look(maps):
        assert all(m.dtype == torch.float32 and m.shape == maps[0].shape and m.ndim == 3 for m in maps)
        assert all(m.min() >= 0 and m.max() <= 1 for m in maps)
        assert len({m.data_ptr() for m in maps}) == len(maps)  # changing one changes no other
        shown.append(maps)

    look()
    assert {len(maps) for maps in shown} == {1, 2, 3, 4}
    assert {maps[0].shape[0] for maps in shown} == {1, 2}
    assert {side for maps in shown for side in maps[0].shape[1:]} == {1, 2, 3}
    assert any((m == 0).all() for maps in shown for m in maps)
    assert any((m == 1).all() for maps in shown for m in maps)
    assert any(len(m.unique()) > 2 for maps in shown for m in maps)
    # Hypothesis alone repeats itself now and then: about 10 such maps.
    assert sum(torch.equal(a, b) and len(a.unique()) > 2 for maps in shown for a, b in pairwise(maps)) > 20


# Names and settings


@pytest.mark.parametrize(
    ("fusion", "name", "shown"),
    [
        (MaxFusion(), "max", "MaxFusion()"),
        (MeanFusion(), "mean", "MeanFusion()"),
        (LatestFusion(), "latest", "LatestFusion()"),
        (NoisyOr(), "noisy-or", "NoisyOr()"),
        (ExponentialMovingAverage(), "ema(momentum=0.9)", "ExponentialMovingAverage(momentum=0.9)"),
        (ExponentialMovingAverage(0), "ema(momentum=0.0)", "ExponentialMovingAverage(momentum=0.0)"),
    ],
)
def test_a_built_in_fusion_has_a_name_that_leads_back_to_it(fusion, name, shown):
    assert repr(fusion) == shown
    assert fusion_name(fusion) == name
    assert repr(resolve_fusion(name)) == shown


@given(st.floats(0, 1, exclude_max=True))
def test_a_moving_average_comes_back_from_its_name_with_its_momentum(momentum):
    back = resolve_fusion(fusion_name(ExponentialMovingAverage(momentum)))
    assert type(back) is ExponentialMovingAverage
    assert back.momentum == momentum


def test_an_attribute_of_the_users_is_no_part_of_a_name(tmp_path):
    fusion = MaxFusion()
    fusion.note = "mine"
    assert fusion_name(fusion) == "max"
    AttentionAccumulator([[1]], (1, 1), fusion=fusion).save(tmp_path / "maps")
    assert type(AttentionAccumulator.load(tmp_path / "maps").fusion) is MaxFusion


def test_a_fusion_derived_from_the_maximum_merges_as_the_maximum_does():
    class Fading(MaxFusion):
        def __call__(self, cumulative, attention, count):
            return torch.maximum(0.5 * cumulative, attention)

    first, second = (AttentionAccumulator([[1]], (1, 1), fusion=Fading(), gate=None) for _ in range(2))
    for accumulator, value in ((first, 1.0), (second, 0.2)):
        accumulator.update([0], torch.full((1, 1, 1, 1), value), normalization=None)
    assert first.merge(second).attention(0).item() == 1


def test_short_names_are_accepted():
    assert {name: type(resolve_fusion(name)) for name in FUSIONS} == {
        "max": MaxFusion,
        "mean": MeanFusion,
        "ema": ExponentialMovingAverage,
        "latest": LatestFusion,
        "noisy-or": NoisyOr,
    }
    assert resolve_fusion("ema").momentum == 0.9


@pytest.mark.parametrize("name", ["ema", "ema(momentum=0.9)"])
def test_settings_of_a_fusion_by_name_are_those_of_one_accumulator(name):
    first, second = (AttentionAccumulator([[1]], (2, 2), fusion=name) for _ in range(2))
    first.fusion.momentum = 0.5
    assert second.fusion.momentum == AttentionAccumulator([[1]], (2, 2), fusion=name).fusion.momentum == 0.9


def test_a_users_fusion_is_itself_and_never_has_a_built_in_name():
    class Mine(MaxFusion):
        pass

    own = Mine()
    assert resolve_fusion(own) is own
    assert resolve_fusion(the_mean) is the_mean
    assert fusion_name(own).startswith("own:")
    assert fusion_name(own).endswith("Mine")
    assert fusion_name(the_mean) == "own:the_mean"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("median", ValueError, "'ema', 'latest', 'max', 'mean', 'noisy-or'.*callable.*got 'median'"),
        ("harmonic", ValueError, "got 'harmonic'; mix a mean and a maximum with oaa_lib.harmonic_mix"),
        ("ema(0.5)", ValueError, "got 'ema"),
        ("ema(momentum=half)", ValueError, "got 'ema"),
        ("ema(momentum=0.5", ValueError, "got 'ema"),
        ("max(momentum=0.5)", ValueError, "got 'max"),
        ("ema(decay=0.5)", ValueError, "got 'ema"),
        ("ema(momentum=1.5)", ValueError, r"momentum in \[0, 1\), got 1.5"),
        (None, TypeError, "callable, got NoneType"),
        (NoisyOr, TypeError, "got the class NoisyOr; pass an instance"),
    ],
)
def test_no_fusion(value, error, message):
    with pytest.raises(error, match=message):
        resolve_fusion(value)


@pytest.mark.parametrize("momentum", [1, 1.5, -0.1, float("nan"), float("inf")])
def test_a_momentum_is_in_0_to_1(momentum):
    with pytest.raises(ValueError, match=rf"momentum in \[0, 1\), got {momentum}"):
        ExponentialMovingAverage(momentum)


@pytest.mark.parametrize("momentum", ["0.9", None])
def test_a_momentum_is_a_number(momentum):
    with pytest.raises(TypeError, match=rf"momentum as a number in \[0, 1\), got {type(momentum).__name__}"):
        ExponentialMovingAverage(momentum)


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        (ExponentialMovingAverage(0.5), r"'ema\(momentum=0.5\)' cannot merge two streams: .*order of its maps"),
        (latest, "'own:latest' cannot merge two streams: .*give it a merge method"),
        (claiming(latest, not_mergeable="it forgets"), "Claiming' cannot merge two streams: it forgets$"),
    ],
)
def test_what_cannot_be_merged_says_why(fusion, message):
    first, second = (AttentionAccumulator([[1]], (1, 1), fusion=fusion) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        first.merge(second)
    with pytest.raises(AssertionError, match="merge method"):
        testing.assert_mergeable(fusion, [torch.zeros(1, 1, 1)])


@pytest.mark.parametrize("name", ["max", "mean", "latest", "noisy-or"])
def test_what_can_be_merged_is_not_refused(name):
    first, second = (AttentionAccumulator([[1]], (1, 1), fusion=name) for _ in range(2))
    assert first.merge(second) is first


# In the accumulator


@pytest.mark.parametrize("fusion", [*FUSIONS.values(), the_mean], ids=fusion_name)
@given(maps=attention_streams())
def test_fold_is_what_the_accumulator_does(fusion, maps):
    pairs, *size = maps[0].shape
    accumulator = AttentionAccumulator([[1] * pairs], tuple(size), fusion=fusion, gate=None, dtype=torch.float32)
    for attention in maps:
        accumulator.update([0], attention[None], normalization=None)
    torch.testing.assert_close(accumulator.attention(0), fold(fusion, maps), rtol=0, atol=1e-6)


def test_fold_gives_a_fusion_what_the_accumulator_gives_it():
    given_to_it = []

    def fuse(*arguments):
        given_to_it.append([(tuple(argument.shape), argument.dtype) for argument in arguments])
        return arguments[0]

    accumulator = AttentionAccumulator([[1, 1, 1]], (2, 4), fusion=fuse, gate=None)
    for _ in range(2):
        accumulator.update([0], torch.rand(1, 3, 2, 4))
    by_the_accumulator = given_to_it[-1]
    fold(fuse, [torch.rand(3, 2, 4)] * 2)
    assert given_to_it[-1] == by_the_accumulator


def test_a_mix_of_two_devices_is_refused():
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        harmonic_mix(torch.rand(2, 2), torch.rand(2, 2, device="meta"))


WRONG_RESULTS = {
    "nothing": (lambda maps: None, TypeError, "a tensor of real numbers, got"),
    "a number": (lambda maps: 0.5, TypeError, "a tensor of real numbers, got"),
    "an array": (lambda maps: maps.numpy(), TypeError, "a tensor of real numbers, got"),
    "sparse": (lambda maps: maps.to_sparse(), TypeError, "a tensor of real numbers, got"),
    "complex": (lambda maps: maps.to(torch.complex64), TypeError, "a tensor of real numbers, got"),
    "too little": (lambda maps: maps[..., :-1], ValueError, "shape"),
    "elsewhere": (lambda maps: maps.to("meta"), ValueError, "on cpu, got one on meta"),
}


class Spoilt(MaxFusion):
    """The maximum, but for what it returns."""

    def __init__(self, spoil, where):
        self.spoil, self.where = spoil, where

    def __call__(self, cumulative, attention, count):
        fused = super().__call__(cumulative, attention, count)
        return self.spoil(fused) if self.where == "the fusion" else fused

    def merge(self, first, second, first_count, second_count):
        merged = torch.maximum(first, second)
        return self.spoil(merged) if self.where == "the fusion's merge" else merged


@pytest.mark.parametrize("where", ["the fusion", "the fusion's merge"])
@pytest.mark.parametrize("fault", WRONG_RESULTS)
def test_what_a_users_fusion_returns_is_checked_before_anything_changes(where, fault):
    spoil, error, message = WRONG_RESULTS[fault]
    fusion = Spoilt(lambda maps: maps, where)  # at first all is well
    accumulators = [AttentionAccumulator([[1, 0]], (2, 3), fusion=fusion, gate=None) for _ in range(2)]
    for number, accumulator in enumerate(accumulators):
        accumulator.update([0], torch.rand(1, 2, 2, 3, generator=torch.Generator().manual_seed(number)))
    before = accumulators[0][[0]].clone()
    fusion.spoil = spoil
    first, second = accumulators
    with pytest.raises(error, match=f"expected {where} to return .*{message}"):
        first.update([0], torch.ones(1, 2, 2, 3)) if where == "the fusion" else first.merge(second)
    assert torch.equal(accumulators[0][[0]], before)
    assert accumulators[0].accepted == 1
    fusion.spoil = lambda maps: maps
    accumulators[0].merge(accumulators[1])  # and it can be used on
    assert accumulators[0].accepted == 2


def test_a_merge_may_leave_0_to_1_by_a_rounding_and_is_clamped():
    class Rounded(MaxFusion):
        storage_dtype = torch.float32

        def merge(self, first, second, first_count, second_count):
            return torch.tensor([[-1e-7, 1 + 1e-7]]).expand_as(first)

    both = [AttentionAccumulator([[1]], (1, 2), fusion=Rounded(), gate=None) for _ in range(2)]
    for accumulator in both:
        accumulator.update([0], torch.ones(1, 1, 1, 2))
    both[0].merge(both[1])
    assert both[0][[0]].tolist() == [[[[0, 1]]]]


def test_a_mean_of_ones_own_counts_each_pixel_whatever_it_claims():
    class Mine(MeanFusion):
        zero_is_neutral = True  # wrong: a pixel that was not seen would pull the average down

    both = [AttentionAccumulator([[1]], (2, 4), fusion=fusion, gate=None) for fusion in ("mean", Mine())]
    left = View(right=0.5)
    for accumulator in both:
        for _ in range(2):
            accumulator.update([0], torch.ones(1, 1, 2, 2), views=[left], normalization=None)
        accumulator.update([0], torch.full((1, 1, 2, 4), 0.5), normalization=None)
    assert torch.equal(both[0][[0]], both[1][[0]])
    assert both[1][[0]][0, 0, 0].tolist() == pytest.approx([2.5 / 3, 2.5 / 3, 0.5, 0.5])
