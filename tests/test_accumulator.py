import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import FUSIONS, Batch, NaiveAccumulator, Stream, noisy_or, same, snapshot, streams

from oaa_lib import AttentionAccumulator, MaxFusion, MeanFusion, normalize_attention

GATES = ("score", "topk", None)
STORAGE = (torch.uint8, torch.float16, torch.float32)
# Half of the last step that storage can tell apart, and a little for arithmetic in float32.
ROUNDING = {torch.uint8: 0.5 / 255 + 1e-5, torch.float16: 2**-12 + 1e-5, torch.float32: 1e-5}
NAN, INF = float("nan"), float("inf")


def built_in(fusion: str):
    return noisy_or if fusion == "noisy_or" else fusion


def everything(accumulator: AttentionAccumulator) -> torch.Tensor:
    return accumulator[range(len(accumulator))]


def assert_agrees(accumulator: AttentionAccumulator, naive: NaiveAccumulator) -> None:
    counts = naive.dense_counts()
    # Maximum commutes with rounding; any other fusion adds one rounding for each map it takes.
    roundings = 1 if naive.fusion == "max" else max(1, int(counts.max()))
    torch.testing.assert_close(
        everything(accumulator).double(), naive.dense(), rtol=0, atol=ROUNDING[accumulator.dtype] * roundings
    )
    assert torch.equal(accumulator.counts.long(), counts)
    assert torch.equal(accumulator.accumulated, counts > 0)
    assert (accumulator.offered, accumulator.skipped) == (naive.offered, naive.skipped)
    assert accumulator.accepted == counts.sum()


# Against the loops of tests/reference.py


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("fusion", FUSIONS)
@given(
    streams(dtypes=(torch.float32, torch.float16, torch.bfloat16, torch.float64), fill_empty=True),
    st.sampled_from(STORAGE),
)
def test_accumulation_follows_the_equations(fusion, gate, stream, dtype):
    naive = NaiveAccumulator(stream.labels, stream.size, fusion, gate)
    accumulator = stream.accumulator(fusion=built_in(fusion), gate=gate, dtype=dtype)
    for batch in stream.batches:
        naive.update(batch)
        batch.give_to(accumulator)
        assert_agrees(accumulator, naive)


@pytest.mark.parametrize("gate", GATES)
@given(streams(faults=True, fill_empty=True), st.sampled_from(["max", "mean"]))
def test_faulty_maps_and_scores_are_skipped_and_counted_one_pair_at_a_time(gate, stream, fusion):
    naive = NaiveAccumulator(stream.labels, stream.size, fusion, gate)
    accumulator = stream.accumulator(fusion=fusion, gate=gate)
    for batch in stream.batches:
        naive.update(batch)
        batch.give_to(accumulator)
    assert_agrees(accumulator, naive)


@given(streams(fill_empty=True), st.tuples(st.integers(1, 7), st.integers(1, 7)), st.sampled_from(["max", "mean"]))
def test_score_maps_of_another_size_are_resized_bilinearly_after_normalization(stream, map_size, fusion):
    naive = NaiveAccumulator(stream.labels, map_size, fusion, "score")
    accumulator = stream.accumulator(map_size=map_size, fusion=fusion, dtype=torch.float32)
    for batch in stream.batches:
        naive.update(batch)
        batch.give_to(accumulator)
    assert_agrees(accumulator, naive)


@given(streams(), st.randoms())
def test_images_can_be_given_by_name(stream, rng):
    names = [f"2007_{i:06}" for i in range(len(stream.labels))]
    rng.shuffle(names)
    by_row, by_name = stream.accumulator(), stream.accumulator(keys=names)
    for batch in stream.batches:
        chosen = [names[i] for i in batch.indices]
        by_row.update(batch.indices, batch.score_maps, batch.logits)
        by_name.update(chosen, batch.score_maps, batch.logits)
        assert torch.equal(by_row[batch.indices], by_name[chosen])
        assert torch.equal(by_row.attention(batch.indices[0]), by_name.attention(chosen[0]))
        assert torch.equal(by_row.classes(batch.indices[0]), by_name.classes(chosen[0]))


# The laws of fusion


@given(streams())
def test_max_never_falls(stream):
    accumulator = stream.accumulator(gate=None)
    for batch in stream.batches:
        before = everything(accumulator)
        batch.give_to(accumulator)
        assert (everything(accumulator) >= before).all()


@pytest.mark.parametrize("dtype", STORAGE)
@given(stream=streams())
def test_max_is_idempotent(dtype, stream):
    accumulator = stream.give_to(stream.accumulator(dtype=dtype, gate=None))
    before = everything(accumulator)
    assert torch.equal(everything(stream.give_to(accumulator)), before)


@pytest.mark.parametrize("dtype", STORAGE)
@given(stream=streams(), rng=st.randoms(use_true_random=False))
def test_max_does_not_depend_on_order_nor_on_how_batches_are_cut(dtype, stream, rng):
    shuffled = [single for batch in stream.batches for single in batch.single()]
    rng.shuffle(shuffled)
    first = stream.give_to(stream.accumulator(dtype=dtype, gate=None))
    second = Stream(stream.labels, stream.size, shuffled).give_to(stream.accumulator(dtype=dtype, gate=None))
    assert same(snapshot(first), snapshot(second))


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("fusion", ["mean", "noisy_or"])
@given(stream=streams(faults=True))
def test_a_batch_is_the_same_as_its_images_one_by_one(fusion, dtype, stream):
    options = {"fusion": built_in(fusion), "dtype": dtype, "gate": None}
    singles = [single for batch in stream.batches for single in batch.single()]
    first = stream.give_to(stream.accumulator(**options))
    second = Stream(stream.labels, stream.size, singles).give_to(stream.accumulator(**options))
    assert same(snapshot(first), snapshot(second))


def test_max_in_8_bits_is_the_maximum_of_the_rounded_maps():
    maps = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    accumulator = AttentionAccumulator([[1]], (4, 4), gate=None)
    for score_map in maps:
        accumulator.update([0], score_map[None])
    steps = (normalize_attention(maps) * 255).round().amax(0)
    assert torch.equal(accumulator[[0]][0] * 255, steps)


@pytest.mark.parametrize("given", [{}, {"gate": None}, {"dtype": torch.float32}], ids=str)
def test_every_update_asks_the_fusion(given, monkeypatch):
    """So that a breakpoint in `MaxFusion.__call__` fires, and Eq. 5 stands in one place."""
    calls = []

    def watched(self, cumulative, attention, count=None):
        calls.append((cumulative.dtype, attention.dtype))
        return torch.maximum(cumulative, attention)

    monkeypatch.setattr(MaxFusion, "__call__", watched)
    accumulator = AttentionAccumulator([[1, 0], [0, 1], [1, 1]], (3, 3), **given)
    for number in range(1, 4):
        accumulator.update([0, 2], torch.rand(2, 2, 3, 3), torch.rand(2, 2))
        assert calls == [(accumulator.dtype, accumulator.dtype)] * number
    assert accumulator.dtype == given.get("dtype", torch.uint8)


def test_8_bits_hold_every_step_through_any_number_of_updates():
    attention = (torch.arange(256.0) / 255).view(1, 1, 16, 16)
    accumulator = AttentionAccumulator([[1]], (16, 16), gate=None)
    for _ in range(3):
        accumulator.update([0], attention, normalization=None)
        assert torch.equal(accumulator[[0]], attention)


@given(streams(), st.randoms(use_true_random=False))
def test_mean_does_not_depend_on_order_nor_on_how_batches_are_cut(stream, rng):
    shuffled = [single for batch in stream.batches for single in batch.single()]
    rng.shuffle(shuffled)
    first = stream.give_to(stream.accumulator(fusion="mean", gate=None))
    second = Stream(stream.labels, stream.size, shuffled).give_to(stream.accumulator(fusion="mean", gate=None))
    assert torch.equal(first.counts, second.counts)
    torch.testing.assert_close(everything(first), everything(second), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", STORAGE)
def test_mean_stays_exact_over_many_maps_whatever_the_storage(dtype):
    maps = torch.rand(500, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    accumulator = AttentionAccumulator([[1]], (3, 3), fusion="mean", gate=None, dtype=dtype)
    for score_map in maps:
        accumulator.update([0], score_map[None], normalization=None)
    torch.testing.assert_close(accumulator[[0]][0].double(), maps.mean(0), rtol=0, atol=1e-6)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30))
def test_mean_stays_inside_the_hull_of_what_it_has_seen(values):
    accumulator = AttentionAccumulator([[1]], (1, 1), fusion="mean", gate=None)
    for value in values:
        accumulator.update([0], torch.full((1, 1, 1, 1), value), normalization=None)
    assert min(values) <= accumulator.attention(0).item() <= max(values)


@pytest.mark.parametrize("fusion", ["max", "mean"])
def test_every_map_stays_in_zero_to_one_through_resizing(fusion):
    rng = random.Random(0)
    for _ in range(50):
        map_size = (rng.randint(1, 70), rng.randint(1, 70))
        accumulator = AttentionAccumulator([[1]], map_size, fusion=fusion, gate=None, dtype=torch.float32)
        for _ in range(3):
            accumulator.update([0], torch.ones(1, 1, rng.randint(1, 30), rng.randint(1, 30)))
        assert accumulator.attention(0).min() > 0.99999
        assert accumulator.attention(0).max() <= 1


@given(st.integers(0, 2**32 - 1))
def test_the_first_map_is_taken_as_it_is(seed):
    calls = []

    def fusion(cumulative, attention, count):
        calls.append(count.flatten().tolist())
        return cumulative * 0.5

    attention = torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    accumulator = AttentionAccumulator([[1]], (2, 2), fusion=fusion, gate=None, dtype=torch.float32)
    accumulator.update([0], attention, normalization=None)
    assert torch.equal(accumulator[[0]], attention)  # M_1 = A_1
    accumulator.update([0], attention, normalization=None)
    assert torch.equal(accumulator[[0]], attention * 0.5)  # M_2 = AF(M_1, A_2)
    assert all(count >= 1 for call in calls for count in call)


def test_a_fusion_is_told_how_many_maps_the_cumulative_one_holds():
    def latest_count(cumulative, attention, count):
        return (count / 10).expand_as(attention)

    accumulator = AttentionAccumulator([[1, 1]], (1, 1), fusion=latest_count, gate=None, dtype=torch.float32)
    accumulator.update([0, 0, 0], torch.ones(3, 2, 1, 1)).update([0], torch.ones(1, 2, 1, 1))
    torch.testing.assert_close(accumulator.attention(0).flatten(), torch.tensor([0.3, 0.3]))


@pytest.mark.parametrize(("fusion", "name"), [(MaxFusion(), "max"), (MeanFusion(), "mean")])
@given(stream=streams())
def test_a_built_in_fusion_is_the_same_by_name_and_as_an_object(fusion, name, stream):
    by_object, by_name = stream.accumulator(fusion=fusion), stream.accumulator(fusion=name)
    assert same(snapshot(stream.give_to(by_object)), snapshot(stream.give_to(by_name)))
    assert by_object.merge(by_name).accepted == 2 * by_name.accepted


@pytest.mark.parametrize("dtype", STORAGE)
def test_a_fusion_that_works_in_place_does_no_harm(dtype):
    def in_place(cumulative, attention, count):
        return cumulative.mul_(attention.mul_(0.5))

    def out_of_place(cumulative, attention, count):
        return cumulative * (attention * 0.5)

    first, second = (
        AttentionAccumulator([[1, 0]], (1, 1), fusion=fusion, dtype=dtype) for fusion in (in_place, out_of_place)
    )
    for logits in (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])):
        for accumulator in (first, second):
            accumulator.update([0], torch.ones(1, 2, 1, 1), logits)
        assert torch.equal(everything(first), everything(second))


def test_a_fusion_that_is_a_rounding_beyond_the_range_is_taken_as_its_end():
    def rounding(cumulative, attention, count):
        return torch.where(attention > 0.5, 1.00001, -0.00001)

    accumulator = AttentionAccumulator([[1]], (1, 2), fusion=rounding, dtype=torch.float32)
    for _ in range(2):
        accumulator.update([0], torch.tensor([[[[0.75, 0.25]]]]), normalization=None)
    assert accumulator.attention(0).flatten().tolist() == [1, 0]


def test_a_fusion_sees_finite_attention_only():
    seen = []

    def watching(cumulative, attention, count):
        seen.append(bool(cumulative.isfinite().all() and attention.isfinite().all()))
        return torch.maximum(cumulative, attention)

    score_maps = torch.ones(1, 2, 1, 1)
    accumulator = AttentionAccumulator([[1, 1]], (1, 1), fusion=watching, gate=None).update([0], score_maps)
    score_maps[0, 0] = NAN
    accumulator.update([0], score_maps)
    assert all(seen)


# Gates


@given(streams(logits=True))
def test_a_closed_gate_changes_nothing(stream):
    accumulator = stream.accumulator(gate=lambda logits, labels: torch.zeros_like(labels))
    stream.give_to(accumulator)
    assert not everything(accumulator).any()
    assert accumulator.accepted == 0
    assert accumulator.offered == sum(sum(stream.labels[i]) for batch in stream.batches for i in batch.indices)


def test_a_gate_that_closes_later_keeps_the_maps_bit_equal():
    is_open = True
    accumulator = AttentionAccumulator([[1, 0]], (3, 3), gate=lambda logits, labels: torch.full_like(labels, is_open))
    accumulator.update([0], torch.rand(1, 2, 3, 3))
    before, is_open = snapshot(accumulator), False
    accumulator.update([0, 0], torch.rand(2, 2, 3, 3))
    assert same({**snapshot(accumulator), "offered": before["offered"]}, before)


@given(streams())
def test_a_gate_opens_target_classes_only(stream):
    wide_open = stream.accumulator(gate=lambda logits, labels: torch.ones_like(labels))
    assert same(snapshot(stream.give_to(wide_open)), snapshot(stream.give_to(stream.accumulator(gate=None))))


def test_a_users_gate_gets_the_logits_and_boolean_labels_of_the_batch():
    calls = []

    def gate(logits, labels):
        calls.append((logits.clone(), labels.clone()))
        return labels

    accumulator = AttentionAccumulator([[1, 0], [0, 0], [1, 1]], (1, 1), gate=gate)
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    accumulator.update([2, 1, 0], torch.ones(3, 2, 1, 1), logits)
    accumulator.update([0], torch.tensor([[[[1.0, 3.0]], [[5.0, 9.0]]]]))
    assert torch.equal(calls[0][0], logits)
    assert calls[0][1].tolist() == [[True, True], [False, False], [True, False]]
    assert calls[1][0].tolist() == [[2.0, 7.0]]  # the average of the score maps


def test_a_gate_may_write_on_its_arguments():
    def gate(logits, labels):
        logits.zero_()
        return labels.logical_not_()

    logits = torch.tensor([[1.0, 2.0]])
    AttentionAccumulator([[1, 0]], (1, 1), gate=gate).update([0], torch.ones(1, 2, 1, 1), logits)
    assert logits.tolist() == [[1.0, 2.0]]


def test_fill_empty_gives_a_pair_its_first_map_ungated_and_gates_the_next():
    accumulator = AttentionAccumulator([[1, 0]], (1, 2))
    closed = torch.tensor([[0.0, 1.0]])
    first, second = torch.tensor([[[[1.0, 0.0]]] * 2]), torch.tensor([[[[0.0, 1.0]]] * 2])
    accumulator.update([0], first, closed)
    assert accumulator.accepted == 0
    accumulator.update([0, 0], torch.cat([first, second]), torch.cat([closed, closed]), fill_empty=True)
    accumulator.update([0], second, closed, fill_empty=True)
    assert accumulator.attention(0).tolist() == [[[1.0, 0.0]]]
    assert accumulator.accepted == 1


def test_fill_empty_does_not_let_faulty_maps_in():
    accumulator = AttentionAccumulator([[1]], (1, 1)).update([0], torch.full((1, 1, 1, 1), NAN), fill_empty=True)
    assert (accumulator.accepted, accumulator.skipped) == (0, 1)


# Normalization


def test_normalization_is_eq_2_unless_told_otherwise():
    score_maps = torch.tensor([[[[-1.0, 0.5, 1.0]]]])
    expected = {"max": [0, 0.5, 1], "minmax": [0, 0.5, 1]}
    for normalization, values in expected.items():
        accumulator = AttentionAccumulator([[1]], (1, 3), dtype=torch.float32)
        accumulator.update([0], score_maps, normalization=normalization)
        assert accumulator.attention(0).flatten().tolist() == values
    by_default = AttentionAccumulator([[1]], (1, 2), dtype=torch.float32).update([0], torch.tensor([[[[1.0, 4.0]]]]))
    assert by_default.attention(0).flatten().tolist() == [0.25, 1]
    minmax = AttentionAccumulator([[1]], (1, 2)).update([0], torch.tensor([[[[1.0, 4.0]]]]), normalization="minmax")
    assert minmax.attention(0).flatten().tolist() == [0, 1]


@given(streams())
def test_normalizing_outside_with_none_is_the_same_as_inside(stream):
    inside, outside = stream.accumulator(), stream.accumulator()
    for batch in stream.batches:
        logits = batch.score_maps.mean((-2, -1)) if batch.logits is None else batch.logits
        inside.update(batch.indices, batch.score_maps, logits)
        outside.update(batch.indices, normalize_attention(batch.score_maps), logits, normalization=None)
    assert same(snapshot(inside), snapshot(outside))


def test_attention_that_a_resize_pushed_a_rounding_beyond_one_is_taken_as_one():
    accumulator = AttentionAccumulator([[1]], (1, 2), dtype=torch.float32)
    accumulator.update([0], torch.tensor([[[[1.00001, -0.00001]]]]), normalization=None)
    assert accumulator.attention(0).flatten().tolist() == [1, 0]


# NaN and infinity


@pytest.mark.parametrize("fault", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("where", "skipped"),
    [
        (("map", 0), {0}),  # a target's own map, logits given: nobody else is concerned
        (("map", 2), set()),  # a non-target map is not read if logits are given
        (("logit", 0), {0}),
        (("logit", 2), {0, 1}),  # the gate compares every target of the image with it
    ],
)
def test_a_fault_skips_the_pairs_that_depend_on_it_and_no_other(fault, where, skipped):
    score_maps, logits = torch.ones(2, 3, 2, 2), torch.tensor([[2.0, 2.0, 1.0]] * 2)
    if where[0] == "map":
        score_maps[0, where[1], 0, 1] = fault
    else:
        logits[0, where[1]] = fault
    accumulator = AttentionAccumulator([[1, 1, 0], [1, 1, 0]], (2, 2)).update([0, 1], score_maps, logits)
    assert accumulator.skipped == len(skipped)
    assert accumulator.offered == 4
    assert accumulator.accumulated.tolist() == [[0 not in skipped, 1 not in skipped, False], [True, True, False]]
    assert everything(accumulator).isfinite().all()


def test_a_target_whose_logit_is_nan_takes_no_place_among_the_k_best():
    accumulator = AttentionAccumulator([[1, 1, 0, 0]], (1, 1), gate="topk")
    accumulator.update([0], torch.ones(1, 4, 1, 1), torch.tensor([[NAN, 1.0, 2.0, 0.0]]))
    assert accumulator.accumulated.tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("gate", ["score", "topk"])
@pytest.mark.parametrize("fault", [NAN, INF, -INF])
def test_without_logits_a_fault_in_a_non_target_map_reaches_the_gate_and_skips_the_image(fault, gate):
    score_maps = torch.ones(2, 3, 2, 2)
    score_maps[:, 2], score_maps[0, 2, 0, 1] = 0, fault
    accumulator = AttentionAccumulator([[1, 1, 0], [1, 1, 0]], (2, 2), gate=gate).update([0, 1], score_maps)
    assert accumulator.accumulated.tolist() == [[False] * 3, [True, True, False]]
    assert (accumulator.skipped, accumulator.accepted) == (2, 2)


def test_without_gate_and_logits_a_non_target_map_is_never_read():
    score_maps = torch.ones(1, 2, 2, 2)
    score_maps[0, 1] = NAN
    accumulator = AttentionAccumulator([[1, 0]], (2, 2), gate=None).update([0], score_maps)
    assert (accumulator.skipped, accumulator.accepted) == (0, 1)


@pytest.mark.parametrize("normalization", ["max", "minmax", None])
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("map_size", [(2, 2), (5, 3)])
def test_a_fault_leaves_the_map_that_is_already_there(map_size, dtype, normalization):
    accumulator = AttentionAccumulator([[1]], map_size, dtype=dtype, gate=None).update([0], torch.rand(1, 1, 2, 2))
    before = snapshot(accumulator)
    accumulator.update([0], torch.tensor([[[[NAN, 1.0], [0.5, INF]]]]), normalization=normalization)
    assert accumulator.skipped == 1
    assert same({**snapshot(accumulator), "skipped": before["skipped"], "offered": 1}, before)


# What update promises


def test_arguments_are_not_modified():
    score_maps, logits, indices = torch.randn(3, 2, 4, 4), torch.randn(3, 2), np.array([1, 0, 1])
    labels = torch.tensor([[1, 0], [1, 1]])
    before = [x.clone() for x in (score_maps, logits, labels)]
    AttentionAccumulator(labels, (3, 3)).update(indices, score_maps, logits, fill_empty=True)
    assert all(torch.equal(x, y) for x, y in zip((score_maps, logits, labels), before, strict=True))
    assert indices.tolist() == [1, 0, 1]


def test_the_accumulator_does_not_alias_what_it_is_given():
    labels, score_maps = torch.tensor([[1, 0]]), torch.rand(1, 2, 2, 2)
    accumulator = AttentionAccumulator(labels, (2, 2), gate=None, dtype=torch.float32)
    accumulator.update([0], score_maps, normalization=None)
    before = everything(accumulator)
    labels.zero_()
    score_maps.zero_()
    before_again = everything(accumulator)
    assert torch.equal(before, before_again)
    before_again.zero_()
    accumulator.attention(0).zero_()
    accumulator.counts.zero_()
    assert torch.equal(before, everything(accumulator))
    assert accumulator.accepted == 1


@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_graph_is_kept(fusion):
    score_maps, logits = torch.rand(1, 1, 2, 2, requires_grad=True), torch.rand(1, 1, requires_grad=True)
    accumulator = AttentionAccumulator([[1]], (3, 3), fusion=built_in(fusion), dtype=torch.float32)
    accumulator.update([0, 0], (score_maps * 2).expand(2, -1, -1, -1), (logits * 2).expand(2, -1))
    kept = [*accumulator.state_dict().values(), everything(accumulator), accumulator.attention(0)]
    assert not any(value.requires_grad for value in kept if isinstance(value, torch.Tensor))


def test_gradients_of_the_classifier_survive_an_update_between_forward_and_backward():
    score_maps = torch.rand(1, 1, 2, 2, requires_grad=True)
    doubled = score_maps * score_maps
    AttentionAccumulator([[1]], (2, 2)).update([0], doubled)
    doubled.sum().backward()
    torch.testing.assert_close(score_maps.grad, 2 * score_maps.detach())


def test_update_works_on_inference_tensors():
    with torch.inference_mode():
        score_maps = torch.rand(1, 1, 2, 2)
    accumulator = AttentionAccumulator([[1]], (2, 2)).update([0], score_maps).update([0], score_maps)
    assert accumulator.accepted == 2


def test_update_and_reset_and_merge_return_the_accumulator():
    accumulator = AttentionAccumulator([[1]], (2, 2))
    assert accumulator.update([0], torch.rand(1, 1, 2, 2)) is accumulator
    assert accumulator.merge(AttentionAccumulator([[1]], (2, 2))) is accumulator
    assert accumulator.reset() is accumulator


@pytest.mark.parametrize("map_size", [(2, 2), (5, 7)])
@pytest.mark.parametrize("gate", GATES)
def test_images_without_label_are_passed_over(gate, map_size):
    accumulator = AttentionAccumulator([[0, 0], [1, 0]], map_size, gate=gate)
    accumulator.update([0], torch.rand(1, 2, 2, 2)).update([0, 0], torch.full((2, 2, 2, 2), NAN), fill_empty=True)
    assert (accumulator.offered, accumulator.accepted, accumulator.skipped) == (0, 0, 0)
    accumulator.update([0, 1, 0], torch.rand(3, 2, 2, 2), torch.tensor([[0.0, 1.0], [1.0, 0.0], [NAN, NAN]]))
    assert (accumulator.offered, accumulator.accepted, accumulator.skipped) == (1, 1, 0)


@pytest.mark.parametrize(
    "labels",
    [
        [[1, 0], [1, 1]],
        np.array([[1, 0], [1, 1]], dtype=np.uint8),
        np.array([[True, False], [True, True]]),
        np.array([[1.0, 0.0], [1.0, 1.0]]),
        torch.tensor([[True, False], [True, True]]),
        torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8),
        torch.tensor([[1.0, 0.0], [1.0, 1.0]], requires_grad=True),
        torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float16),
        torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16),
        torch.tensor([[1, 1], [0, 1]]).T,
    ],
    ids=lambda labels: f"{type(labels).__name__}-{getattr(labels, 'dtype', '')}",
)
def test_labels_may_be_any_array_of_zeros_and_ones(labels):
    accumulator = AttentionAccumulator(labels, (2, 2))
    assert [accumulator.classes(i).tolist() for i in range(2)] == [[0], [0, 1]]


@pytest.mark.parametrize("map_size", [(2, 3), [2, 3], torch.Size([2, 3]), (np.int64(2), np.int32(3))], ids=repr)
def test_a_map_size_may_be_any_two_integers(map_size):
    accumulator = AttentionAccumulator([[1]], map_size)
    assert accumulator.map_size == (2, 3)
    assert accumulator.attention(0).shape == (1, 2, 3)


@pytest.mark.parametrize(
    "indices",
    [
        [1, 0],
        (1, 0),
        np.array([1, 0]),
        np.array([1, 0], dtype=np.uint8),
        torch.tensor([1, 0]),
        torch.tensor([1, 0], dtype=torch.int32),
        [torch.tensor(1), torch.tensor(0)],
        range(1, -1, -1),
        {1: "a", 0: "b"}.keys(),
    ],
    ids=lambda indices: type(indices).__name__,
)
def test_indices_may_be_any_sequence_of_rows(indices):
    score_maps = torch.rand(2, 1, 2, 2)
    accumulator = AttentionAccumulator([[1], [1]], (2, 2), gate=None, dtype=torch.float32)
    accumulator.update(indices, score_maps, normalization=None)
    assert torch.equal(accumulator[indices], score_maps)


@pytest.mark.parametrize("names", [["b", "a"], ("b", "a"), np.array(["b", "a"]), np.array(["b", "a"], dtype=object)])
def test_names_may_come_as_any_sequence_of_strings(names):
    accumulator = AttentionAccumulator([[1], [1]], (1, 1), keys=["a", "b"], gate=None, dtype=torch.float32)
    accumulator.update(names, torch.tensor([0.25, 0.75]).view(2, 1, 1, 1), normalization=None)
    assert accumulator[["a", "b"]].flatten().tolist() == [0.75, 0.25]


# What can be asked


def filled() -> AttentionAccumulator:
    """Three images of three classes; image 1 shows none."""
    accumulator = AttentionAccumulator([[1, 0, 1], [0, 0, 0], [0, 1, 0]], (2, 3), gate=None)
    return accumulator.update([0, 2], torch.rand(2, 3, 2, 3, generator=torch.Generator().manual_seed(0)))


def test_soft_labels_are_dense_and_zero_for_classes_the_image_does_not_show():
    accumulator = filled()
    soft_labels = accumulator[[2, 0, 1, 2]]
    assert (soft_labels.shape, soft_labels.dtype) == ((4, 3, 2, 3), torch.float32)
    assert soft_labels[:3].flatten(2).any(2).tolist() == [[False, True, False], [True, False, True], [False] * 3]
    assert torch.equal(soft_labels[1, [0, 2]], accumulator.attention(0))
    assert torch.equal(soft_labels[3], soft_labels[0])
    assert 0 <= soft_labels.min() <= soft_labels.max() <= 1


def test_classes_and_attention_of_an_image_belong_together():
    accumulator = filled()
    assert [accumulator.classes(i).tolist() for i in range(3)] == [[0, 2], [], [1]]
    assert [tuple(accumulator.attention(i).shape) for i in range(3)] == [(2, 2, 3), (0, 2, 3), (1, 2, 3)]
    assert accumulator.classes(0).dtype == torch.int64
    assert accumulator.attention(0).dtype == torch.float32


def test_counters_tell_offered_accepted_and_skipped():
    accumulator = AttentionAccumulator([[1, 1, 0], [1, 0, 0]], (1, 1))
    score_maps, logits = torch.ones(3, 3, 1, 1), torch.tensor([[2.0, 0.0, 1.0], [2.0, 2.0, 1.0], [2.0, 0.0, 1.0]])
    score_maps[2] = NAN
    accumulator.update([0, 0, 1], score_maps, logits)
    assert (accumulator.offered, accumulator.accepted, accumulator.skipped) == (5, 3, 1)
    assert accumulator.counts.tolist() == [[2, 1, 0], [0, 0, 0]]
    assert accumulator.accumulated.tolist() == [[True, True, False], [False, False, False]]
    assert accumulator.accumulated.dtype == torch.bool


def test_a_pair_that_accumulated_an_empty_map_holds_something():
    accumulator = AttentionAccumulator([[1]], (1, 1), gate=None).update([0], -torch.ones(1, 1, 1, 1))
    assert accumulator.accumulated.all()
    assert not everything(accumulator).any()


@given(streams(faults=True))
def test_reset_is_a_fresh_start(stream):
    accumulator = stream.give_to(stream.accumulator()).reset()
    assert same(snapshot(accumulator), snapshot(stream.accumulator()))
    stream.give_to(accumulator)
    assert same(snapshot(accumulator), snapshot(stream.give_to(stream.accumulator())))


def test_storage_is_8_bits_unless_told_otherwise():
    assert AttentionAccumulator([[1]], (1, 1)).dtype == torch.uint8
    assert AttentionAccumulator([[1]], (1, 1), dtype=torch.float16).dtype == torch.float16


def test_len_is_the_number_of_images_and_repr_tells_the_settings():
    accumulator = AttentionAccumulator([[1, 0, 1], [0, 0, 0]], (2, 3), fusion="mean", gate="topk")
    assert len(accumulator) == 2
    for part in ("2 images", "3 classes", "2 pairs", "(2, 3)", "mean", "topk", "float32", "cpu"):
        assert part in repr(accumulator)


# Merging


@pytest.mark.parametrize("dtype", STORAGE)
@given(stream=streams(faults=True), gate=st.sampled_from(GATES))
def test_merged_max_is_exactly_what_one_accumulator_would_have_seen(dtype, stream, gate):
    whole, first, second = (stream.accumulator(dtype=dtype, gate=gate) for _ in range(3))
    stream.give_to(whole)
    for i, batch in enumerate(stream.batches):
        batch.give_to((first, second)[i % 2])
    before = snapshot(second)
    assert same(snapshot(first.merge(second)), snapshot(whole))
    assert same(snapshot(second), before)


@given(streams(faults=True), st.randoms(use_true_random=False))
def test_merged_mean_equals_eq_10_in_any_merge_order(stream, rng):
    whole = stream.give_to(stream.accumulator(fusion="mean", gate=None))
    parts = [stream.accumulator(fusion="mean", gate=None) for _ in stream.batches]
    for part, batch in zip(parts, stream.batches, strict=True):
        batch.give_to(part)
    while len(parts) > 1:
        rng.shuffle(parts)
        parts.append(parts.pop().merge(parts.pop()))
    torch.testing.assert_close(everything(parts[0]), everything(whole), rtol=0, atol=1e-6)
    assert torch.equal(parts[0].counts, whole.counts)
    assert (parts[0].offered, parts[0].skipped) == (whole.offered, whole.skipped)


@pytest.mark.parametrize(("fusion", "expected"), [("max", torch.maximum), ("mean", lambda a, b: (a + b) / 2)])
def test_merging_covers_data_sets_of_any_size(fusion, expected):
    maps = torch.rand(2, 9001, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    options = {"fusion": fusion, "gate": None, "dtype": torch.float32}
    first, second = (AttentionAccumulator(torch.ones(9001, 1), (1, 1), **options) for _ in range(2))
    first.update(range(9001), maps[0], normalization=None)
    second.update(range(9001), maps[1], normalization=None)
    torch.testing.assert_close(everything(first.merge(second)), expected(*maps))
    assert (first.counts == 2).all()


def test_a_users_fusion_merges_with_its_own_merge():
    class NoisyOr:
        def __call__(self, cumulative, attention, count):
            return noisy_or(cumulative, attention, count)

        def merge(self, first, second, first_count, second_count):
            return noisy_or(first, second, first_count)

    fusion = NoisyOr()
    first, second = (
        AttentionAccumulator([[1], [1], [1]], (1, 1), fusion=fusion, gate=None, dtype=torch.float32) for _ in range(2)
    )
    first.update([0, 1], torch.full((2, 1, 1, 1), 0.5), normalization=None)
    second.update([1, 2], torch.full((2, 1, 1, 1), 0.5), normalization=None)
    assert first.merge(second)[range(3)].flatten().tolist() == [0.5, 0.75, 0.5]


def test_a_users_fusion_chooses_its_storage():
    class Precise:
        storage_dtype = torch.float32

        def __call__(self, cumulative, attention, count):
            return cumulative * attention

    assert AttentionAccumulator([[1]], (1, 1), fusion=Precise(), dtype=torch.uint8).dtype == torch.float32


def test_a_batch_may_be_larger_than_the_data_set():
    score_maps = torch.rand(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    accumulator = AttentionAccumulator([[1], [1]], (2, 2), gate=None, dtype=torch.float32)
    accumulator.update([i % 2 for i in range(64)], score_maps, normalization=None)
    for image in range(2):
        assert torch.equal(accumulator[[image]][0], score_maps[image::2].amax(0))


def test_batches_of_a_training_run_touch_their_own_images_only():
    accumulator = AttentionAccumulator(torch.ones(6, 2), (2, 2), gate=None)
    accumulator.update([4, 1], torch.ones(2, 2, 2, 2))
    assert accumulator.accumulated.all(1).tolist() == [False, True, False, False, True, False]
    Batch([4], torch.ones(1, 2, 2, 2)).give_to(accumulator)
    assert accumulator.counts[:, 0].tolist() == [0, 1, 0, 0, 2, 0]


def test_the_owners_of_another_accumulator_own_the_maps_here_with_its_names():
    first = AttentionAccumulator([[1, 0], [1, 1]], (2, 2), keys=["a", "b"])
    second = AttentionAccumulator(first.pairs, (3, 3))
    assert second.classes("b").tolist() == [0, 1]
    with pytest.raises(ValueError, match="PairTable, which has its own, got some"):
        AttentionAccumulator(first.pairs, (3, 3), keys=["c", "d"])


@pytest.mark.parametrize("fails", [False, True])
def test_a_merge_of_the_users_goes_in_buckets_and_changes_nothing_if_a_late_one_fails(fails, monkeypatch):
    def greatest(cumulative, attention, count):
        return torch.maximum(cumulative, attention)

    def merge(first, second, first_count, second_count):
        calls.append(len(first))
        return torch.maximum(first, second) + (3 if fails and len(calls) == 3 else 0)

    calls, greatest.merge = [], merge
    maps = torch.rand(2, 8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    both = [AttentionAccumulator(torch.ones(8, 1), (2, 2), fusion=greatest, gate=None) for _ in range(2)]
    for accumulator, score_maps in zip(both, maps, strict=True):
        accumulator.update(range(8), score_maps)
    before = both[0][range(8)].clone()
    monkeypatch.setattr("oaa_lib.maps.merging.BUCKET", 8)  # two maps at a time
    if fails:
        with pytest.raises(ValueError, match=r"result of the fusion's merge in \[0, 1\]"):
            both[0].merge(both[1])
        assert torch.equal(both[0][range(8)], before)
        assert both[0].offered == 8
    else:
        assert torch.equal(both[0].merge(both[1])[range(8)], torch.maximum(before, both[1][range(8)]))
        assert both[0].offered == 16
    assert max(calls) <= 2
