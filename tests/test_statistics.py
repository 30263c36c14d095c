"""What an accumulator tells about itself: counters, the latest attention, how similar two maps are, snapshots."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import NaiveAccumulator, cosine, same, snapshot, streams
from torch import Tensor

from oaa_lib import AttentionAccumulator, Snapshots, attention_similarity

STORAGE = (torch.uint8, torch.float16, torch.float32)
ROUNDING = {torch.uint8: 0.5 / 255 + 1e-5, torch.float16: 2**-12 + 1e-5, torch.float32: 1e-5}
NAN = float("nan")

any_stream = st.sampled_from(["another", "each"]).flatmap(
    lambda sizes: streams(views=True, faults=True, fill_empty=True, sizes=sizes)
)
gates = st.sampled_from(["score", "topk", None])


# Counters


def assert_counted(accumulator: AttentionAccumulator, naive: NaiveAccumulator) -> None:
    statistics = accumulator.statistics()
    num_classes = len(naive.labels[0])

    def per_class(outcomes: set[str]) -> list[int]:
        chosen = [target for (_, target), outcome in naive.log if outcome in outcomes]
        return [chosen.count(target) for target in range(num_classes)]

    assert statistics.offered.tolist() == per_class({"accepted", "refused", "skipped", "unseen"})
    assert statistics.accepted.tolist() == per_class({"accepted"})
    assert statistics.skipped.tolist() == per_class({"skipped"})
    assert statistics.pairs.tolist() == [sum(column) for column in zip(*naive.labels, strict=True)]
    holding = [target for _, target in naive.histories]
    empty = [pairs - holding.count(target) for target, pairs in enumerate(statistics.pairs.tolist())]
    assert statistics.never_accumulated.tolist() == empty
    for target, rate in enumerate(statistics.pass_rate.tolist()):
        outcomes = [outcome for (_, of), outcome in naive.log if of == target and outcome != "skipped"]
        expected = outcomes.count("accepted") / len(outcomes) if outcomes else NAN
        assert rate == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("fusion", ["max", "mean"])
@given(stream=any_stream, gate=gates)
def test_statistics_count_what_has_happened_to_each_class(fusion, stream, gate):
    naive = NaiveAccumulator(stream.labels, stream.size, fusion, gate)
    accumulator = stream.accumulator(fusion=fusion, gate=gate)
    assert_counted(accumulator, naive)
    for batch in stream.batches:
        naive.update(batch)
        batch.give_to(accumulator)
        assert_counted(accumulator, naive)


def test_statistics_of_a_known_case():
    accumulator = AttentionAccumulator([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]], (1, 1))
    score_maps, logits = torch.ones(4, 4, 1, 1), torch.tensor([[2.0, 0.0, 1.0, 1.0]] * 4)
    score_maps[2, 0] = NAN
    statistics = accumulator.update([0, 0, 1, 0], score_maps, logits).statistics()
    assert statistics.offered.tolist() == [4, 3, 0, 0]
    assert statistics.accepted.tolist() == [3, 0, 0, 0]
    assert statistics.skipped.tolist() == [1, 0, 0, 0]
    assert statistics.pairs.tolist() == [3, 1, 0, 1]
    assert statistics.never_accumulated.tolist() == [2, 1, 0, 1]
    assert statistics.pass_rate.tolist() == pytest.approx([1, 0, NAN, NAN], nan_ok=True)
    assert {values.dtype for values in statistics} == {torch.int64}
    assert {values.device.type for values in statistics} == {"cpu"}
    assert statistics.pass_rate.dtype == torch.float32


def test_the_pass_rate_is_unknown_where_all_maps_were_faulty():
    accumulator = AttentionAccumulator([[1]], (1, 1)).update([0], torch.full((1, 1, 1, 1), NAN))
    assert accumulator.statistics().pass_rate.isnan().all()


@given(any_stream)
def test_statistics_add_up(stream):
    accumulator = stream.give_to(stream.accumulator())
    statistics = accumulator.statistics()
    assert statistics.offered.sum() == accumulator.offered
    assert statistics.accepted.sum() == accumulator.accepted
    assert statistics.skipped.sum() == accumulator.skipped
    assert statistics.pairs.sum() == accumulator.pairs.num_pairs
    assert statistics.never_accumulated.sum() == accumulator.pairs.num_pairs - accumulator.accumulated.sum()


@given(streams(views=True, faults=True))
def test_statistics_of_merged_reset_and_restored_accumulators(stream):
    whole, first, second, restored = (stream.accumulator() for _ in range(4))
    stream.give_to(whole)
    for i, batch in enumerate(stream.batches):
        batch.give_to((first, second)[i % 2])

    def told(accumulator: AttentionAccumulator) -> list[list[int]]:
        return [values.tolist() for values in accumulator.statistics()]

    assert told(first.merge(second)) == told(whole)
    restored.load_state_dict(whole.state_dict())
    assert told(restored) == told(whole)
    assert told(first.reset()) == told(stream.accumulator())


def test_statistics_stay_what_they_were_when_more_comes_and_are_not_shared():
    accumulator = AttentionAccumulator([[1]], (1, 1)).update([0], torch.ones(1, 1, 1, 1))
    statistics = accumulator.statistics()
    accumulator.update([0], torch.ones(1, 1, 1, 1))
    assert [values.item() for values in statistics] == [1, 1, 0, 1, 0]
    for values in statistics:
        values.fill_(7)
    assert [values.item() for values in accumulator.statistics()] == [2, 2, 0, 1, 0]


# The latest attention, and how similar two maps are


def everything(accumulator: AttentionAccumulator) -> list[Tensor]:
    """(C, H, W) of each image."""
    return [accumulator[[image]][0] for image in range(len(accumulator))]


@given(stream=any_stream, gate=gates, dtype=st.sampled_from(STORAGE))
def test_latest_is_what_each_pixel_was_shown_last(stream, gate, dtype):
    naive = NaiveAccumulator(stream.labels, stream.size, "max", gate)
    accumulator = stream.accumulator(fusion="latest", gate=gate, dtype=dtype)
    for batch in stream.batches:
        naive.update(batch)
        batch.give_to(accumulator)
        for image, latest in enumerate(everything(accumulator)):
            torch.testing.assert_close(latest.double(), naive.latest(image), rtol=0, atol=ROUNDING[dtype])


@given(any_stream)
def test_merged_latest_is_what_was_seen_in_both_streams_one_after_the_other(stream):
    first, second, whole = (stream.accumulator(fusion="latest", dtype=torch.float32) for _ in range(3))
    half = len(stream.batches) // 2
    for part, accumulator in ((stream.batches[:half], first), (stream.batches[half:], second)):
        for batch in part:
            batch.fill_empty = False  # which would look at what has been accumulated before
            batch.give_to(accumulator)
            batch.give_to(whole)
    for found, expected in zip(everything(first.merge(second)), everything(whole), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(first.counts, whole.counts)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0, 0.0], [1.0, 0.0], 1),
        ([1.0, 0.0], [0.2, 0.0], 1),
        ([1.0, 0.0], [0.0, 1.0], 0),
        ([1.0, 0.0], [1.0, 1.0], 0.5**0.5),
        ([0.0, 0.0], [1.0, 1.0], NAN),
        ([1.0, 1.0], [0.0, 0.0], NAN),
        ([1e-30, 0.0], [1e-30, 0.0], 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_similarity_of_known_maps(before, after, expected, dtype):
    found = attention_similarity(torch.tensor([before], dtype=dtype), torch.tensor([after], dtype=dtype))
    assert found.item() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert (found.shape, found.dtype) == ((), torch.float32)


@given(st.integers(0, 2**32 - 1))
def test_similarity_of_a_batch_is_the_cosine_of_its_maps_one_by_one(seed):
    first, second = torch.rand(2, 3, 4, 2, 5, generator=torch.Generator().manual_seed(seed))
    found = attention_similarity(first, second)
    assert found.shape == (3, 4)
    for i, j in itertools.product(range(3), range(4)):
        pixels = list(zip(first[i, j].flatten().tolist(), second[i, j].flatten().tolist(), strict=True))
        assert found[i, j].item() == pytest.approx(cosine(pixels), abs=1e-6)
    assert torch.equal(found, attention_similarity(second, first))


@pytest.mark.parametrize(
    ("before", "after", "error", "message"),
    [
        (torch.zeros(2, 2).int(), torch.zeros(2, 2), TypeError, "before.*floating point.*got torch.int32"),
        (torch.zeros(2, 2), [[0.0]], TypeError, "after.*floating point.*got list"),
        (torch.zeros(2, 2), torch.zeros(2, 3), ValueError, r"one shape.*got \(2, 2\) and \(2, 3\)"),
        (torch.zeros(2), torch.zeros(2), ValueError, r"\(\.\.\., H, W\)"),
    ],
)
def test_similarity_of_no_maps(before, after, error, message):
    with pytest.raises(error, match=message):
        attention_similarity(before, after)


# Snapshots


def shown(accumulator: AttentionAccumulator, *maps: list[float]) -> AttentionAccumulator:
    """Images of one pixel row, one map after the other."""
    for values in maps:
        accumulator.update([0], torch.tensor(values).view(1, 1, 1, -1), normalization=None)
    return accumulator


@pytest.mark.parametrize("fusion", ["mean", "latest"])
def test_snapshots_keep_the_maps_of_their_images_at_their_steps(fusion):
    options = {"keys": ["a", "b", "c"], "gate": None, "fusion": fusion}
    accumulator = AttentionAccumulator([[1, 0, 1], [0, 1, 0], [0, 0, 0]], [(2, 3), (4, 4), (5, 5)], **options)
    snapshots = Snapshots(accumulator, indices=["b", "a"], steps=[0, 3, 5, 9])
    kept: dict[str, list[Tensor]] = {"a": [], "b": []}
    for step in range(6):
        accumulator.update(["a", "b"], torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(step)))
        for _ in range(2):  # once is enough
            snapshots.take(step)
        if step in (0, 3, 5):
            for key, maps in kept.items():
                maps.append(accumulator.attention(key))
    assert snapshots.taken == [0, 3, 5]
    for key, expected in kept.items():
        found = snapshots.cumulative(key)
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=0.5 / 255 + 1e-6)
        assert found.device.type == "cpu"


def test_snapshots_change_nothing_and_do_not_follow_the_maps():
    accumulator = AttentionAccumulator([[1]], (1, 2), gate=None)
    snapshots = Snapshots(accumulator, [0], range(2))
    shown(accumulator, [0.2, 0.4])
    before = snapshot(accumulator)
    snapshots.take(0)
    assert same(snapshot(accumulator), before)
    shown(accumulator, [1.0, 1.0])
    snapshots.take(1)
    assert snapshots.cumulative(0).flatten().tolist() == pytest.approx([0.2, 0.4, 1, 1], abs=1e-6)


def test_snapshots_of_an_unknown_image_are_an_error():
    accumulator = AttentionAccumulator([[1]], (1, 1))
    with pytest.raises(IndexError):
        Snapshots(accumulator, [1], [0])
    with pytest.raises(KeyError):
        Snapshots(AttentionAccumulator([[1]], (1, 1), keys=["a"]), ["b"], [0])


def test_snapshots_go_on_from_a_checkpoint():
    accumulator = AttentionAccumulator([[1, 0], [1, 1]], (2, 2), gate=None)
    whole = Snapshots(accumulator, [1], range(4))
    resumed = Snapshots(accumulator, [1], range(4))
    for step in range(4):
        accumulator.update([0, 1], torch.rand(2, 2, 2, 2))
        whole.take(step)
        if step == 1:
            resumed.load_state_dict(whole.state_dict())
        if step > 1:
            resumed.take(step)
    assert resumed.taken == whole.taken == [0, 1, 2, 3]
    assert torch.equal(resumed.cumulative(1), whole.cumulative(1))
    with pytest.raises(ValueError, match=r"expected snapshots of \[0\], got those of \[1\]"):
        Snapshots(accumulator, [0], [0]).load_state_dict(whole.state_dict())


def test_the_order_of_images_makes_no_difference_to_a_checkpoint_of_snapshots():  # that of a set is arbitrary
    accumulator = AttentionAccumulator([[1, 0], [1, 1]], (2, 2), keys=["a", "b"])
    first, second = (Snapshots(accumulator, indices, [0]) for indices in (["a", "b"], ["b", "a"]))
    first.take(0)
    second.load_state_dict(first.state_dict())
    assert [len(second.cumulative(index)[0]) for index in ("a", "b")] == [1, 2]


def test_snapshots_that_are_not_there_are_told():
    accumulator = AttentionAccumulator([[1, 0], [1, 1]], (2, 2), gate=None)
    snapshots = Snapshots(accumulator, [1], [0])
    with pytest.raises(RuntimeError, match="nothing has been kept"):
        snapshots.cumulative(1)
    with pytest.raises(KeyError, match="no snapshots are taken of 0"):
        snapshots.cumulative(0)


def test_a_state_whose_maps_are_not_those_of_its_images_is_refused():
    accumulator = AttentionAccumulator([[1, 0], [1, 1]], (2, 2))
    snapshots = Snapshots(accumulator, [0, 1], [0])
    snapshots.take(0)
    state = snapshots.state_dict()
    for wrong in (state["maps"][0], [state["maps"][1][0].float()], "maps"):
        with pytest.raises(ValueError, match="1 uint8 maps of 1 like its attention"):
            Snapshots(accumulator, [0, 1], [0]).load_state_dict({**state, "maps": {**state["maps"], 1: wrong}})
