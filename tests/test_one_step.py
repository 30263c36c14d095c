"""Whatever changes maps is one step: an exception at any moment leaves what was before it or what comes after it."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from moments import interrupted
from reference import same, snapshot

from oaa_lib import AttentionAccumulator, View
from oaa_lib.maps import mapped as mapping
from oaa_lib.maps import merging

LABELS = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]])
KINDS = {
    "max": {"map_size": (3, 4)},
    "mean": {"map_size": (3, 4), "fusion": "mean"},
    "sizes of their own": {"map_size": [[3, 4], [2, 2], [1, 1], [3, 4]], "fusion": "mean"},
}
VIEWS = [View(), View(0.2, 0, 1, 0.6), View(flip=True), View(0, 0.3, 0.7, 1)]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Files are made with a journal that holds all of these maps, and little else."""
    monkeypatch.setattr(mapping, "JOURNAL_BYTES", 8192)


def build(kind, path=None):
    return AttentionAccumulator(LABELS, **KINDS[kind], gate=None, path=path, resume=path is not None)


def show(accumulator, number):
    """A batch with crops, a repeated image and a NaN."""
    score_maps = torch.from_numpy(np.random.default_rng(number).standard_normal((4, 3, 2, 3), dtype=np.float32))
    score_maps[0, 1, 0, 0] = torch.nan
    return accumulator.update([0, 3, 0, 1], score_maps, views=VIEWS)


def filled(kind, path=None, numbers=range(3)):
    accumulator = build(kind, path)
    for number in numbers:
        show(accumulator, number)
    return accumulator


OPERATIONS = {
    "update": lambda accumulator, other: show(accumulator, 3),
    "reset": lambda accumulator, other: accumulator.reset(),
    "load_state_dict": lambda accumulator, other: accumulator.load_state_dict(other.state_dict()),
    "merge": lambda accumulator, other: accumulator.merge(other),
}


class Case:
    """An operation, and what is there before and after it and after one more batch."""

    def __init__(self, kind, operation, folder=None):
        self.kind, self.folder = kind, folder
        self.other = filled(kind, numbers=range(5, 7))
        self.operate = OPERATIONS[operation]
        self.before, after = snapshot(filled(kind)), filled(kind)
        self.operate(after, self.other)
        self.after = snapshot(after)
        self.counts = {False: filled(kind).counts, True: after.counts}
        self.later = {True: snapshot(show(after, 9)), False: snapshot(filled(kind, numbers=[0, 1, 2, 9]))}
        if folder:
            filled(kind, folder / "base")

    def start(self):
        if self.folder is None:
            return filled(self.kind)
        return build(self.kind, shutil.copy(self.folder / "base", self.folder / "maps"))

    def check(self, accumulator):
        """Whether all of it has happened; and nothing of it otherwise."""
        state = snapshot(accumulator)
        assert same(state, self.before) or same(state, self.after)
        happened = same(state, self.after)
        if self.folder:
            shutil.copy(self.folder / "maps", self.folder / "killed")
            assert same(snapshot(AttentionAccumulator.load(self.folder / "killed")), state)
        assert same(snapshot(show(accumulator, 9)), self.later[happened])
        if self.folder:
            assert same(snapshot(AttentionAccumulator.load(self.folder / "maps")), self.later[happened])
        return happened


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_at_any_line_leaves_all_or_nothing(kind, operation, where, tmp_path):
    case, found = Case(kind, operation, tmp_path if where == "file" else None), []
    for step in itertools.count(1, 3 if where == "file" else 1):
        accumulator = case.start()
        if not interrupted({step}, case.operate, accumulator, case.other):
            break
        counts = accumulator.counts  # what is read at once, before anything else is asked of the accumulator
        found.append(case.check(accumulator))
        assert torch.equal(counts, case.counts[found[-1]])
        del accumulator  # which has the file
    assert found == sorted(found)  # there is one moment from which on it is sure to happen
    assert found.count(False) > 3
    assert found.count(True) > 3


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_exception_while_another_one_is_dealt_with_leaves_all_or_nothing_too(operation, where, tmp_path):
    case, found = Case("mean", operation, tmp_path if where == "file" else None), set()
    for step in itertools.count(1, 3):
        accumulator = case.start()
        if not interrupted(range(step, step + 30), case.operate, accumulator, case.other):
            break
        found.add(case.check(accumulator))
        del accumulator  # which has the file
    assert found == {False, True}


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_merge_that_the_users_fusion_refuses_late_changes_nothing(where, tmp_path, monkeypatch):
    class Picky:
        def __call__(self, cumulative, attention, count):
            return (cumulative + attention) / 2

        def merge(self, first, second, first_count, second_count):
            return torch.full_like(first, 2.0) if (first_count > 2).any() else first

    monkeypatch.setattr(merging, "BUCKET", 1)  # pair by pair
    ours, theirs = (
        AttentionAccumulator([[1], [1], [1]], (2, 2), fusion=Picky(), gate=None, path=path)
        for path in (tmp_path / "maps" if where == "file" else None, None)
    )
    for accumulator in (ours, theirs):
        accumulator.update([0, 1, 2], torch.rand(3, 1, 2, 2))
    for _ in range(2):
        ours.update([2], torch.rand(1, 1, 2, 2))
    before = snapshot(ours)
    with pytest.raises(ValueError, match=r"expected the result of the fusion's merge in \[0, 1\], got \[2, 2\]"):
        ours.merge(theirs)
    assert same(snapshot(ours), before)
