"""Whatever is done to an accumulator, in whatever order: it holds what slow loops in float64 say (hypothesis).

`pytest --hypothesis-profile=thorough` and `python -m tests.campaign` go further. Run as a program, this file is
a process without threads that forks others, see `forks.Forks`.
"""

import copy
import os
import pickle
import signal
import tempfile
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forks import serve
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from moments import LIBRARY, at_each, copied, count
from reference import FUSIONS, Batch, NaiveAccumulator, Pair, fold, same, snapshot, some_view, what_was_left

from oaa_lib import AttentionAccumulator
from oaa_lib.maps import mapped as mapping

ROUNDING = {torch.uint8: 0.5 / 255 + 1e-5, torch.float16: 2**-12 + 1e-5, torch.float32: 1e-5}
OF_ONE_PIXEL = {**FUSIONS, "noisy-or": FUSIONS["noisy_or"], "ema": lambda m, a, t: 0.9 * m + 0.1 * a}
MERGEABLE = ("max", "mean", "latest", "noisy-or")
MOST = 300  # maps that a pair may hold here, since the loops keep all of them
seeds = st.integers(0, 2**32 - 1)


@dataclass
class Model(NaiveAccumulator):
    """The loops, and what a `synchronize` of one process leaves.

    Attributes:
        known: how many maps each pair had accepted then.
        base: whether what a mean was then is known.
    """

    known: dict[Pair, int] = field(default_factory=dict)
    base: bool = False

    def attention(self, image):
        return self.summary(image, lambda history: fold(OF_ONE_PIXEL[self.fusion], history))

    def forget(self):
        for kept in (self.histories, self.counts, self.log, self.known):
            kept.clear()
        self.base = False

    def merge(self, other):
        for pair, pixels in other.histories.items():
            here = self.histories.setdefault(pair, [[[] for _ in row] for row in pixels])
            for row, other_row in zip(here, pixels, strict=True):
                for history, others in zip(row, other_row, strict=True):
                    history.extend(others)
            self.counts[pair] = self.counts.get(pair, 0) + other.counts[pair]
        self.log += other.log

    def synchronize(self):
        self.known, self.base = dict(self.counts), True

    def reopen(self, base=False):
        """As a file is: a mean in a file knows what it was at the last synchronize if it is the same still."""
        self.base = base or (self.known == self.counts and bool(self.known))

    @property
    def cannot_synchronize(self):
        if self.fusion == "mean":
            return bool(self.known) and not self.base and self.known != self.counts
        return self.fusion == "ema" or (self.fusion == "noisy-or" and bool(self.known))

    def pairs(self):
        return [(image, target) for image, row in enumerate(self.labels) for target, shown in enumerate(row) if shown]

    def torn(self, after, done, complete):
        """What is there where some pairs have changed; the totals, if all has."""
        found = copy.deepcopy(self)
        for pair, changed in zip(self.pairs(), done, strict=True):
            for name in ("histories", "counts", "known"):
                getattr(found, name).pop(pair, None)
                source = getattr(after if changed else self, name)
                if pair in source:
                    getattr(found, name)[pair] = copy.deepcopy(source[pair])
        found.log = list(after.log if complete else self.log)
        return found


def some_batch(model, seed):
    """Views, repeated images, faults, negatives, scores in steps of 1/8, for ties and for exact sums."""
    rng = np.random.default_rng(seed)
    images, classes = len(model.labels), len(model.labels[0])
    dtype = (torch.float32, torch.float64, torch.float16, torch.bfloat16)[rng.integers(4)]
    faulty, size = rng.random() < 0.3, rng.integers(1, 5, 2)

    def scores(*shape):
        values = rng.integers(-8, 9, shape) / 8
        if faulty:
            wrong = rng.random(shape) < 0.5 / np.prod(shape[1:])
            values = np.where(wrong, rng.choice([np.nan, np.inf, -np.inf], shape), values)
        return torch.tensor(values, dtype=dtype)

    batch = int(rng.integers(1, 6))
    return Batch(
        rng.integers(0, images, batch).tolist(),
        scores(batch, classes, *size.tolist()),
        scores(batch, classes) if rng.random() < 0.5 else None,
        bool(rng.random() < 0.2),
        [some_view(rng) for _ in range(batch)] if rng.random() < 0.6 else None,
    )


def build(options, path=None):
    return AttentionAccumulator(**options, path=path, resume=path is not None)


def give(accumulator, batch):
    indices = batch.indices if accumulator.pairs.keys is None else [accumulator.pairs.keys[i] for i in batch.indices]
    accumulator.update(indices, batch.score_maps, batch.logits, batch.views, fill_empty=batch.fill_empty)


def change(kind, options, batches):
    """A function that changes an accumulator; what it needs beside that is there already."""
    other = filled(options, batches) if kind in ("merge", "load_state_dict") else None
    return {
        "update": lambda accumulator: give(accumulator, batches[0]),
        "merge": lambda accumulator: accumulator.merge(other),
        "load_state_dict": lambda accumulator: accumulator.load_state_dict(other.state_dict()),
        "reset": lambda accumulator: accumulator.reset(),
    }[kind]


def filled(options, batches, path=None):
    accumulator = build(options, path)
    for batch in batches:
        give(accumulator, batch)
    return accumulator


def filled_model(empty, batches):
    model = Model(empty.labels, empty.map_size, empty.fusion, empty.gate)
    for batch in batches:
        model.update(batch)
    return model


def change_model(model, kind, batches):
    if kind == "update":
        model.update(batches[0])
    elif kind == "merge":
        model.merge(filled_model(model, batches))
    elif kind == "load_state_dict":
        fresh = filled_model(model, batches)
        model.forget()
        model.merge(fresh)
    else:
        model.forget()


WAYS = {"opening": LIBRARY, "changing": LIBRARY, "writing": os.path.join(LIBRARY, "maps", "mapped")}


def die_in_the_middle(job):
    """Open a file, change it, and be killed at some line of that; or at one of the change alone, or of its writing."""
    with open(job, "rb") as file:
        options, path, kind, batches, way, fraction = pickle.load(file)
    operate = change(kind, options, batches)

    def work(path):
        accumulator = None if way == "opening" else build(options, path)
        return lambda: operate(accumulator or build(options, path))

    moment = 1 + int(fraction * count(work(copied(path, "trial")), of=WAYS[way]))
    at_each(lambda number: number == moment and os.kill(os.getpid(), signal.SIGKILL), work(path), of=WAYS[way])


def refusal(function, *args):
    """Whether a call is refused."""
    try:
        function(*args)
    except (ValueError, IndexError, KeyError, TypeError):
        return True
    return False


class Machine(RuleBasedStateMachine):
    """One accumulator, in memory or in a file, and the loops beside it."""

    fusion, mapped, forks = "max", False, None
    steps = kills = torn = 0

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="oaa")
        self.saved, self.number, self.accumulator = [], 0, None

    def teardown(self):
        del self.accumulator
        self.folder.cleanup()

    def place(self, name):
        self.number += 1
        return os.path.join(self.folder.name, f"{name}{self.number}")

    @initialize(
        seed=seeds,
        gate=st.sampled_from(["score", "topk", None]),
        dtype=st.sampled_from(list(ROUNDING)),
        own_sizes=st.booleans(),
        named=st.booleans(),
        large=st.booleans(),
        journal=st.sampled_from([1, 1 << 15]),
    )
    def begin(self, seed, gate, dtype, own_sizes, named, large, journal):
        rng = np.random.default_rng(seed)
        images, classes = rng.integers(1, (7, 5)).tolist()
        labels = (rng.random((images, classes)) < rng.choice([0.5, 0.9])).astype(int)
        labels[rng.integers(images), rng.integers(classes)] = 1
        sides = (9, 15) if large else (1, 5)
        size = [tuple(each) for each in rng.integers(*sides, (images, 2)).tolist()]
        size = size if own_sizes else size[0]
        self.model = Model(labels.tolist(), size, self.fusion, gate)
        self.options = {
            "labels": labels.tolist(),
            "map_size": size,
            "fusion": self.fusion,
            "gate": gate,
            "dtype": dtype,
        }
        self.options["keys"] = [f"image {i}" for i in range(images)] if named else None
        self.one_step = journal > 1
        self.path = self.place("maps") if self.mapped else None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mapping, "JOURNAL_BYTES", journal)
            self.accumulator = build(self.options, self.path)

    @property
    def room(self):
        return max(self.model.counts.values(), default=0) < MOST / 2

    # What changes maps

    @precondition(lambda self: self.room)
    @rule(seed=seeds)
    def update(self, seed):
        batch = some_batch(self.model, seed)
        give(self.accumulator, batch)
        self.model.update(batch)

    @rule(seed=seeds, fault=st.sampled_from(["image", "shape", "dtype", "views"]))
    def refused_update(self, seed, fault):
        batch = some_batch(self.model, seed)
        if fault == "image":
            indices = [*batch.indices[1:], "nobody" if self.options["keys"] else len(self.model.labels)]
            assert refusal(self.accumulator.update, indices, batch.score_maps)
        else:
            broken = {"shape": batch.score_maps[0], "dtype": batch.score_maps.nan_to_num(0, 0, 0).int()}
            batch.score_maps = broken.get(fault, batch.score_maps)
            batch.views = [] if fault == "views" else batch.views
            assert refusal(give, self.accumulator, batch)

    @precondition(lambda self: self.room)
    @rule(batches=st.lists(seeds, max_size=3))
    def merge(self, batches):
        batches = [some_batch(self.model, seed) for seed in batches]
        other = filled(self.options, batches)
        if self.fusion in MERGEABLE:
            assert self.accumulator.merge(other) is self.accumulator
            self.model.merge(filled_model(self.model, batches))
        else:
            assert refusal(self.accumulator.merge, other)

    @precondition(lambda self: self.room and self.fusion in MERGEABLE)
    @rule()
    def merge_itself(self):
        self.accumulator.merge(self.accumulator)
        self.model.merge(copy.deepcopy(self.model))

    @rule()
    def reset(self):
        self.accumulator.reset()
        self.model.forget()

    @rule()
    def synchronize(self):
        if self.model.cannot_synchronize:
            assert refusal(self.accumulator.synchronize)
        else:
            self.accumulator.synchronize()
            self.model.synchronize()

    # What keeps and restores them

    @rule()
    def save(self):
        path = self.place("saved")
        self.accumulator.save(path)
        self.saved.append((path, None, copy.deepcopy(self.model)))

    @rule()
    def state_dict(self):
        self.saved.append((None, copy.deepcopy(self.accumulator.state_dict()), copy.deepcopy(self.model)))

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 20), into_it=st.booleans())
    def load(self, which, into_it):
        path, state, model = self.saved[which % len(self.saved)]
        loaded = AttentionAccumulator.load(path) if path else build(self.options)
        if state is not None:
            loaded.load_state_dict(state)
        model = copy.deepcopy(model)
        model.reopen(model.base)
        agree(loaded, model)
        if into_it or self.path:
            self.accumulator.load_state_dict(loaded.state_dict())
        else:
            self.accumulator = loaded
        self.model = model

    @rule()
    def copy(self):
        if self.path:
            agree(AttentionAccumulator.load(self.path), self.model)
        else:
            self.accumulator = copy.deepcopy(self.accumulator)

    # Its file

    @precondition(lambda self: self.path)
    @rule()
    def reopen(self):
        self.accumulator = None
        self.accumulator = build(self.options, self.path)
        self.model.reopen()

    @precondition(lambda self: self.path and self.room)
    @rule(batch=seeds, way=st.sampled_from(list(WAYS)))
    def kill_an_update(self, batch, way):
        self.kill("update", [batch], way)

    @precondition(lambda self: self.path and self.room)
    @rule(
        kind=st.sampled_from(["merge", "load_state_dict", "reset"]),
        batches=st.lists(seeds, min_size=1, max_size=2),
        way=st.sampled_from(list(WAYS)),
    )
    def kill_another_change(self, kind, batches, way):
        if kind != "merge" or self.fusion in MERGEABLE:
            self.kill(kind, batches, way)

    def kill(self, kind, batches, way):
        self.number += 1
        fraction = np.random.default_rng((self.number, *batches)).random()
        batches = [some_batch(self.model, seed) for seed in batches]
        self.accumulator, job = None, os.path.join(self.folder.name, "job")
        with open(job, "wb") as file:
            pickle.dump((self.options, self.path, kind, batches, way, fraction), file)
        before = AttentionAccumulator.load(self.path)
        after = AttentionAccumulator.load(self.path)
        change(kind, self.options, batches)(after)
        type(self).kills += self.forks.run(die_in_the_middle, job) == -signal.SIGKILL
        left = AttentionAccumulator.load(self.path)
        self.accumulator = build(self.options, self.path)
        states = [snapshot(each) for each in (self.accumulator, left, before, after)]
        assert same(states[0], states[1])
        self.take_up(*states[1:], kind, batches)

    def take_up(self, found, before, after, kind, batches):
        """Go on with what is found after a kill: what was before it or what comes after it, whole pairs."""
        done, complete = what_was_left(found, before, after, one_step=self.one_step)
        type(self).torn += any(done) and not all(done) and not same(found, before)
        model = copy.deepcopy(self.model)
        change_model(model, kind, batches)
        self.model = self.model.torn(model, done, complete)
        self.model.reopen()

    @invariant()
    def agrees(self):
        if self.accumulator is not None:
            agree(self.accumulator, self.model)
            self.accumulator.verify()
            type(self).steps += 1


def agree(accumulator, model):
    """The maps, the counts, and what is said of them."""
    classes = len(model.labels[0])
    counts = model.dense_counts()
    assert torch.equal(accumulator.counts.long(), counts)
    assert torch.equal(accumulator.accumulated, counts > 0)
    statistics, labels = accumulator.statistics(), torch.tensor(model.labels)
    offered = np.bincount([target for (_, target), _ in model.log], minlength=classes)
    skipped = np.bincount([pair[1] for pair, what in model.log if what == "skipped"], minlength=classes)
    assert statistics.offered.tolist() == offered.tolist()
    assert statistics.skipped.tolist() == skipped.tolist()
    assert statistics.accepted.tolist() == counts.sum(0).tolist()
    assert statistics.never_accumulated.tolist() == ((counts == 0) & (labels > 0)).sum(0).tolist()
    assert (accumulator.offered, accumulator.skipped) == (model.offered, model.skipped)
    # A maximum commutes with rounding, the latest is rounded once; any other adds one rounding for each map it takes.
    roundings = 1 if model.fusion in ("max", "latest") else max(1, int(counts.max()))
    for image in np.flatnonzero(labels.any(1)).tolist():
        index = image if accumulator.pairs.keys is None else accumulator.pairs.keys[image]
        targets = accumulator.classes(index)
        assert targets.tolist() == labels[image].nonzero().flatten().tolist()
        found, expected = accumulator.attention(index).double(), model.attention(image)[targets]
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING[accumulator.dtype] * roundings)


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mapped", [False, True], ids=["in memory", "in a file"])
@pytest.mark.parametrize("fusion", ["max", "mean", "latest", "noisy-or", "ema"])
def test_it_holds_what_the_loops_say_whatever_is_done(fusion, mapped, one_process, forks):
    machine = type("Machine", (Machine,), {"fusion": fusion, "mapped": mapped, "forks": forks})
    examples = max(1, settings().max_examples // (5 if mapped else 10))
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=20))
    print(machine.steps, "steps,", machine.kills, "kills,", machine.torn, "of them in the middle of a batch")


if __name__ == "__main__":
    serve(globals())
