"""What an accumulator tells about itself: counters, the latest attention, how similar it is to the one before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import NaiveAccumulator, noisy_or, same, snapshot, streams
from torch import Tensor

from oaa_lib import AttentionAccumulator, Snapshots, View

STORAGE = (torch.uint8, torch.float16, torch.float32)
ROUNDING = {torch.uint8: 0.5 / 255 + 1e-5, torch.float16: 2**-12 + 1e-5, torch.float32: 1e-5}
FUSIONS = ["max", "mean", "ema", "harmonic", "noisy-or", pytest.param(noisy_or, id="user's")]
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


# The latest attention


def everything(accumulator: AttentionAccumulator, name: str) -> list[Tensor]:
    """(C, H, W) of each image."""
    read = getattr(accumulator, name)
    return [read([image])[0] for image in range(len(accumulator))]


@pytest.mark.parametrize("fusion", ["max", "mean"])
@given(stream=any_stream, gate=gates, dtype=st.sampled_from(STORAGE))
def test_latest_is_what_each_pixel_was_shown_last(fusion, stream, gate, dtype):
    naive = NaiveAccumulator(stream.labels, stream.size, fusion, gate)
    accumulator = stream.accumulator(fusion=fusion, gate=gate, dtype=dtype, keep_latest=True)
    for batch in stream.batches:
        naive.update(batch)
        batch.give_to(accumulator)
        for image, latest in enumerate(everything(accumulator, "latest")):
            torch.testing.assert_close(latest.double(), naive.latest(image), rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize("fusion", FUSIONS)
@given(stream=any_stream, gate=gates)
def test_similarity_is_the_cosine_of_the_two_latest_over_what_the_later_view_shows(fusion, stream, gate):
    naive = NaiveAccumulator(stream.labels, stream.size, "max", gate)
    accumulator = stream.accumulator(fusion=fusion, gate=gate, dtype=torch.float32, keep_latest=True)
    for batch in stream.batches:
        naive.update(batch)
        batch.give_to(accumulator)
        expected = torch.full(accumulator.counts.shape, NAN)
        for pair, similarity in naive.similarities.items():
            expected[pair] = similarity
        torch.testing.assert_close(accumulator.similarity, expected, rtol=0, atol=1e-5, equal_nan=True)
        assert accumulator.similarity.dtype == torch.float32
        assert not ((accumulator.similarity < 0) | (accumulator.similarity > 1)).any()


def shown(accumulator: AttentionAccumulator, *maps: list[float], view: View | None = None) -> AttentionAccumulator:
    """Images of one pixel row, one map after the other."""
    for values in maps:
        attention = torch.tensor(values).view(1, 1, 1, -1)
        accumulator.update([0], attention, views=None if view is None else [view], normalization=None)
    return accumulator


def one_row(**options) -> AttentionAccumulator:
    return AttentionAccumulator([[1]], (1, 2), **{"gate": None, "keep_latest": True, **options})


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        ([[1.0, 0.0]], NAN),
        ([[1.0, 0.0], [1.0, 0.0]], 1),
        ([[1.0, 0.0], [0.2, 0.0]], 1),
        ([[1.0, 0.0], [0.0, 1.0]], 0),
        ([[1.0, 0.0], [1.0, 1.0]], 0.5**0.5),
        ([[0.0, 0.0], [1.0, 1.0]], 0),
        ([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], 0.5**0.5),
    ],
)
def test_similarity_of_known_maps(maps, expected, dtype):
    similarity = shown(one_row(dtype=dtype), *maps).similarity
    assert similarity.item() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_similarity_with_views_of_known_maps():
    left = View(right=0.5)
    accumulator = shown(one_row(), [0.6, 0.8])
    assert shown(accumulator, [0.3], view=left).similarity.item() == pytest.approx(1)  # all that the later view shows
    assert accumulator.latest([0]).flatten().tolist() == pytest.approx([0.3, 0.8], abs=0.5 / 255)
    assert shown(accumulator, [0.4, 0.3]).similarity.item() == pytest.approx(0.84, abs=0.01)
    assert shown(accumulator, [0.9, 0.9], view=View(1.5, 0, 2, 1)).similarity.item() == pytest.approx(0.84, abs=0.01)


def test_there_is_no_similarity_where_an_image_does_not_show_the_class():
    accumulator = AttentionAccumulator([[1, 0], [1, 1]], (1, 1), gate=None, keep_latest=True)
    accumulator.update([0, 1, 0], torch.ones(3, 2, 1, 1))
    torch.testing.assert_close(accumulator.similarity, torch.tensor([[1.0, NAN], [NAN, NAN]]), equal_nan=True)
    assert accumulator.similarity.shape == accumulator.counts.shape


def test_refused_and_faulty_maps_are_not_the_latest():
    accumulator = AttentionAccumulator([[1, 0]], (1, 2), keep_latest=True)
    opened, closed = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    accumulator.update([0, 0], torch.tensor([[[[1.0, 0.0]]] * 2, [[[1.0, 0.5]]] * 2]), opened.expand(2, 2))
    before = snapshot(accumulator)
    accumulator.update([0], torch.ones(1, 2, 1, 2), closed)
    accumulator.update([0], torch.full((1, 2, 1, 2), NAN), opened)
    assert same({**snapshot(accumulator), "offered": 0, "skipped": 0}, {**before, "offered": 0, "skipped": 0})


def test_latest_is_read_as_soft_labels_are():
    sizes = [(2, 3), (4, 4)]
    options = {"gate": None, "keep_latest": True, "keys": ["a", "b"]}
    accumulator = AttentionAccumulator([[1, 0], [1, 1]], sizes, **options)
    accumulator.update(["a", "b"], torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    views = [View(0.25, 0, 1.25, 1), View(flip=True)]  # each pair has seen one map: the latest is the cumulative one
    assert torch.equal(accumulator.latest(["b"]), accumulator[["b"]])
    read = accumulator.latest(["b", "a"], views, size=(3, 5))
    assert read.shape == (2, 2, 3, 5)
    assert torch.equal(read, accumulator.soft_labels(["b", "a"], views, size=(3, 5)))
    with pytest.raises(ValueError, match="different sizes"):
        accumulator.latest(["b", "a"])


def test_latest_and_similarity_have_to_be_asked_for():
    accumulator = AttentionAccumulator([[1]], (1, 1)).update([0], torch.ones(1, 1, 1, 1))
    assert not accumulator.keeps_latest
    with pytest.raises(ValueError, match="keep_latest=True"):
        accumulator.latest([0])
    with pytest.raises(ValueError, match="keep_latest=True"):
        _ = accumulator.similarity
    assert AttentionAccumulator([[1]], (1, 1), keep_latest=True).keeps_latest


@pytest.mark.parametrize("fusion", FUSIONS)
@given(stream=any_stream, dtype=st.sampled_from(STORAGE))
def test_keeping_the_latest_changes_no_maps(fusion, stream, dtype):
    kept, plain = (
        snapshot(stream.give_to(stream.accumulator(fusion=fusion, dtype=dtype, keep_latest=keep_latest)))
        for keep_latest in (True, False)
    )
    assert kept.keys() - plain.keys() == {"latest", "similarity"}
    assert same({name: kept[name] for name in plain}, plain)
    assert kept["latest"].dtype == dtype  # whatever the fusion needs


@given(any_stream)
def test_merged_latest_is_the_others_where_it_has_one(stream):
    first, second = (stream.accumulator(keep_latest=True, fusion="mean") for _ in range(2))
    for i, batch in enumerate(stream.batches):
        batch.give_to((first, second)[i % 2])
    ours, theirs = (everything(accumulator, "latest") for accumulator in (first, second))
    similarities, has = (first.similarity, second.similarity), second.accumulated
    first.merge(second)
    for image, merged in enumerate(everything(first, "latest")):
        for target, values in enumerate(merged):
            assert torch.equal(values, (theirs if has[image, target] else ours)[image][target])
    expected = similarities[0].where(~has, similarities[1])
    torch.testing.assert_close(first.similarity, expected, rtol=0, atol=0, equal_nan=True)


def test_of_two_streams_of_one_map_each_there_is_no_similarity():
    first, second = (shown(one_row(), [1.0, value]) for value in (0.0, 1.0))
    assert first.merge(second).counts.item() == 2
    assert first.similarity.isnan().all()


def test_merging_one_that_keeps_its_latest_with_one_that_does_not():
    with_latest, without = shown(one_row(), [1.0, 0.0], [0.5, 0.0]), shown(one_row(keep_latest=False), [0.0, 1.0])
    latest, similarity = with_latest.latest([0]), with_latest.similarity
    assert not without.merge(with_latest).keeps_latest
    assert torch.equal(without[[0]].flatten(), torch.ones(2))
    with_latest.merge(shown(one_row(keep_latest=False), [0.0, 1.0]))
    assert torch.equal(with_latest.latest([0]), latest)
    assert torch.equal(with_latest.similarity, similarity)


@given(any_stream)
def test_reset_forgets_the_latest(stream):
    accumulator = stream.give_to(stream.accumulator(keep_latest=True)).reset()
    assert same(snapshot(accumulator), snapshot(stream.accumulator(keep_latest=True)))
    assert accumulator.similarity.isnan().all()


# Snapshots


def test_snapshots_keep_the_maps_of_their_images_at_their_steps():
    options = {"keys": ["a", "b", "c"], "gate": None, "keep_latest": True, "fusion": "mean"}
    accumulator = AttentionAccumulator([[1, 0, 1], [0, 1, 0], [0, 0, 0]], [(2, 3), (4, 4), (5, 5)], **options)
    snapshots = Snapshots(accumulator, indices=["b", "a"], steps=[0, 3, 5, 9])
    kept: dict[str, list[list[Tensor]]] = {"a": [[], []], "b": [[], []]}
    for step in range(6):
        accumulator.update(["a", "b"], torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(step)))
        for _ in range(2):  # once is enough
            snapshots.take(step)
        if step in (0, 3, 5):
            for key, (cumulative, latest) in kept.items():
                cumulative.append(accumulator.attention(key))
                latest.append(accumulator.latest([key])[0, accumulator.classes(key)])
    assert snapshots.taken == [0, 3, 5]
    for key, (cumulative, latest) in kept.items():
        for values, expected in ((snapshots.cumulative(key), cumulative), (snapshots.latest(key), latest)):
            torch.testing.assert_close(values, torch.stack(expected), rtol=0, atol=0.5 / 255 + 1e-6)
            assert values.device.type == "cpu"


def test_snapshots_change_nothing_and_do_not_follow_the_maps():
    accumulator = AttentionAccumulator([[1]], (1, 2), gate=None, keep_latest=True)
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
    accumulator = AttentionAccumulator([[1, 0], [1, 1]], (2, 2), gate=None, keep_latest=True)
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
    assert torch.equal(resumed.latest(1), whole.latest(1))
    with pytest.raises(ValueError, match=r"expected snapshots of \[0\], got those of \[1\]"):
        Snapshots(accumulator, [0], [0]).load_state_dict(whole.state_dict())


def test_snapshots_that_are_not_there_are_told():
    accumulator = AttentionAccumulator([[1, 0], [1, 1]], (2, 2), gate=None)
    snapshots = Snapshots(accumulator, [1], [0])
    with pytest.raises(RuntimeError, match="nothing has been kept"):
        snapshots.cumulative(1)
    with pytest.raises(KeyError, match="no snapshots are taken of 0"):
        snapshots.cumulative(0)
    with pytest.raises(RuntimeError, match="keep_latest=True"):
        snapshots.latest(1)
