"""Maps in a file: as in memory, and whatever becomes of the process or of the file, nothing is torn and nothing lost.

Run as a program, this file is a process without threads that forks others, which the tests kill (see `forks.Forks`).
"""

import copy
import errno
import functools
import inspect
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import time
import zlib

import moments
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from forks import say, serve
from hypothesis import given
from hypothesis import strategies as st
from reference import noisy_or, rows_of, same, snapshot, streams

from oaa_lib import AttentionAccumulator, View
from oaa_lib.fusion import ExponentialMovingAverage
from oaa_lib.maps import locking, replacing
from oaa_lib.maps import mapped as mapping
from oaa_lib.maps.files import Entry
from oaa_lib.maps.journal import Span, seal
from oaa_lib.maps.mapped import MappedStore
from oaa_lib.maps.store import Store

KEYS = ["a", "b"]
LABELS = [[1, 1, 0], [0, 0, 1]]


@pytest.fixture(autouse=True, scope="module")
def small_files():
    """Files are made with the smallest journal that serves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "JOURNAL_BYTES", 1)
        yield


def build(path=None, **options) -> AttentionAccumulator:
    return AttentionAccumulator(**{"labels": LABELS, "map_size": (2, 3), "keys": KEYS, "path": path, **options})


def fill(accumulator: AttentionAccumulator, seed: int = 0) -> AttentionAccumulator:
    generator = torch.Generator().manual_seed(seed)
    score_maps = torch.randn(2, len(accumulator.counts[0]), 4, 4, generator=generator)
    score_maps[1, 2, 0, 0] = float("nan")
    return accumulator.update(range(2), score_maps, views=[View(0.2, 0, 1, 1), View()], fill_empty=True)


def content(path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# The same as in memory

FUSIONS = ["max", "mean", "latest", "noisy-or", "ema"]


@st.composite
def cases(draw):
    """A stream, and how the accumulator is built."""
    sizes = draw(st.sampled_from(["the score maps'", "another", "each"]))
    stream = draw(streams(faults=True, fill_empty=True, views=True, sizes=sizes))
    options = {
        "gate": draw(st.sampled_from(["score", None])),
        "dtype": draw(st.sampled_from([torch.uint8, torch.float16, torch.float32])),
        "keys": draw(st.sampled_from([None, [f"image {i}" for i in range(len(stream.labels))]])),
    }
    return stream, options


@pytest.mark.parametrize("fusion", FUSIONS)
@given(case=cases())
def test_a_file_holds_what_memory_holds_whether_it_is_reopened_or_not(fusion, case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    stream, options = case
    make = functools.partial(stream.accumulator, fusion=fusion, **options)
    memory, mapped, reopened = make(), make(path=folder / "mapped"), make(path=folder / "reopened")
    for batch in stream.batches:
        batch.give_to(memory)
        batch.give_to(mapped)
        batch.give_to(reopened)
        del reopened
        reopened = make(path=folder / "reopened", resume=True)
    expected = snapshot(memory)
    assert same(snapshot(mapped), expected)
    assert same(snapshot(reopened), expected)
    assert repr(mapped) == repr(memory)

    copied = AttentionAccumulator.load(folder / "mapped")
    assert same(snapshot(copied), expected)
    mapped.save(folder / "saved")
    assert same(snapshot(AttentionAccumulator.load(folder / "saved")), expected)
    stream.batches[0].give_to(copied)  # it is a copy
    assert same(snapshot(mapped), expected)

    restored = make(path=folder / "restored")
    restored.load_state_dict(memory.state_dict())
    del restored
    assert same(snapshot(make(path=folder / "restored", resume=True)), expected)


@pytest.mark.parametrize("fusion", ["max", "mean", "latest", "noisy-or"])
@given(case=cases())
def test_merging_into_a_file_is_merging_in_memory(fusion, case, tmp_path_factory):
    path = tmp_path_factory.mktemp("disk") / "maps"
    stream, options = case
    make = functools.partial(stream.accumulator, fusion=fusion, **options)
    memory, mapped, other = stream.give_to(make()), stream.give_to(make(path=path)), make()
    stream.batches[-1].give_to(other)
    memory.merge(other)
    mapped.merge(other)
    del mapped
    assert same(snapshot(make(path=path, resume=True)), snapshot(memory))
    assert same(snapshot(make().merge(make(path=path, resume=True))), snapshot(make().merge(memory)))


@pytest.mark.parametrize("map_size", [(2, 3), [[2, 3], [4, 1]]], ids=["one size", "sizes of their own"])
def test_a_batch_of_which_nothing_is_accepted_is_counted(map_size, tmp_path):
    mapped = build(tmp_path / "maps", map_size=map_size)
    for shape in ((1, 3, 2, 3), (2, 3, 2, 3)):
        mapped.update(range(shape[0]), torch.full(shape, float("nan")))
    del mapped
    again = build(tmp_path / "maps", map_size=map_size, resume=True)
    assert (again.offered, again.accepted, again.skipped) == (5, 0, 5)


def test_reset_and_what_comes_after_it_are_in_the_file(tmp_path):
    mapped = fill(build(tmp_path / "maps"))
    mapped.reset()
    fill(mapped, seed=1)
    del mapped
    assert same(snapshot(build(tmp_path / "maps", resume=True)), snapshot(fill(build(), seed=1)))


def test_a_users_fusion_and_gate_can_live_in_a_file(tmp_path):
    def gate(logits, labels):
        return labels

    mapped = fill(build(tmp_path / "maps", fusion=noisy_or, gate=gate, dtype=torch.float32))
    del mapped
    again = build(tmp_path / "maps", fusion=noisy_or, gate=gate, dtype=torch.float32, resume=True)
    assert same(snapshot(again), snapshot(fill(build(fusion=noisy_or, gate=gate, dtype=torch.float32))))


def test_resume_makes_the_file_if_there_is_none(tmp_path):
    fill(build(tmp_path / "maps", resume=True))
    assert os.listdir(tmp_path) == ["maps"]
    assert same(snapshot(build(str(tmp_path / "maps"), resume=True)), snapshot(fill(build())))


def test_the_file_is_all_there_is_and_nothing_is_left_open(tmp_path):
    def mentions():
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.realpath(link) == os.path.realpath(tmp_path / "maps")]

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("tells open files by /proc")
    accumulator = fill(build(tmp_path / "maps"))
    assert mentions()
    del accumulator
    assert not mentions()
    with pytest.raises(ValueError, match="another data set"):
        build(tmp_path / "maps", map_size=(9, 9), resume=True)
    assert not mentions()
    assert os.listdir(tmp_path) == ["maps"]


# The layout of safetensors

SAFETENSORS = {"I64": np.int64, "I32": np.int32, "F32": np.float32, "F16": np.float16, "U8": np.uint8}


def read_by_the_rules(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A safetensors file by its published format, and nothing of ours."""
    whole = content(path)
    length = int.from_bytes(whole[:8], "little")
    text, buffer = whole[8 : 8 + length], whole[8 + length :]
    assert length <= 100_000_000
    assert text[:1] == b"{"  # the header must begin so; trailing spaces are allowed
    names = []
    header = json.loads(
        text.decode("utf-8"), object_pairs_hook=lambda items: names.extend(k for k, _ in items) or dict(items)
    )
    assert len([name for name in names if name in header]) == len(set(names) & header.keys())  # no name twice
    metadata = header.pop("__metadata__", {})
    assert all(isinstance(text, str) for item in metadata.items() for text in item)
    arrays, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        assert entry.keys() == {"dtype", "shape", "data_offsets"}
        begin, stop = entry["data_offsets"]
        assert begin == end  # no holes, nothing twice
        values = np.frombuffer(buffer[begin:stop], dtype=np.dtype(SAFETENSORS[entry["dtype"]]).newbyteorder("<"))
        assert (8 + length + begin) % values.itemsize == 0  # aligned
        arrays[name], end = values.reshape(entry["shape"]), stop
    assert end == len(buffer)
    return arrays, metadata


@pytest.mark.parametrize("way", ["save", "path"])
@pytest.mark.parametrize("map_size", [(2, 3), [[2, 3], [4, 1]]], ids=["one size", "sizes of their own"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_file_is_a_safetensors_file(fusion, map_size, way, tmp_path):
    options = {"fusion": fusion, "map_size": map_size}
    accumulator = fill(build(tmp_path / "maps" if way == "path" else None, **options))
    if way == "save":
        accumulator.save(tmp_path / "maps")
    state = snapshot(accumulator)
    arrays, metadata = read_by_the_rules(tmp_path / "maps")
    theirs = safetensors.numpy.load_file(tmp_path / "maps")
    assert theirs.keys() == arrays.keys()
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() <= arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, theirs[name])
        if name in tensors:
            np.testing.assert_array_equal(array, tensors[name].numpy())
            assert array.dtype == tensors[name].numpy().dtype
    with safetensors.safe_open(tmp_path / "maps", framework="numpy") as file:
        assert file.metadata() == metadata
    assert json.loads(metadata["oaa_lib"])["fusion"] in (fusion, f"{fusion}(momentum=0.9)")
    assert json.loads(arrays["keys"].tobytes()) == KEYS


def test_the_maps_can_be_read_by_hand(tmp_path):
    accumulator = build(tmp_path / "maps", gate=None)
    accumulator.update(
        [0], torch.tensor([[[[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 3.0]], [[9.0] * 3] * 2]])
    )
    maps = read_by_the_rules(tmp_path / "maps")[0]["maps"]
    assert maps.tolist() == [[[64, 128, 0], [255, 0, 0]], [[0, 0, 0], [0, 0, 255]], [[0, 0, 0], [0, 0, 0]]]


# Processes that are killed

IMAGES = 12
TWO_OF_FOUR = np.zeros((IMAGES, 4), dtype=int)
for _image in range(IMAGES):
    TWO_OF_FOUR[_image, [_image % 4, (_image + 1 + _image // 4) % 4]] = 1
OFFERED = 8  # by each batch
KINDS = {
    "max": {"map_size": np.array([6, 7])},
    "mean": {"map_size": np.array([6, 7]), "fusion": "mean"},
    "sizes of their own": {
        "map_size": np.array([[3 + i % 3, 4 + i % 4] for i in range(IMAGES)]),
        "fusion": "mean",
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def endless(kind: str, path=None, *, scale: int = 1, journal: int = 1 << 20) -> AttentionAccumulator:
    """What the endless stream of `show` is given to."""
    options = {**KINDS[kind], "map_size": KINDS[kind]["map_size"] * scale, "path": path, "resume": path is not None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "JOURNAL_BYTES", journal)
        return AttentionAccumulator(TWO_OF_FOUR, **options, gate=None)


def show(accumulator: AttentionAccumulator, number: int, batch: int = 4) -> None:
    """Batch ``number`` of a stream that is the same in every process: crops, flips, repeated images, NaN."""
    rng = np.random.default_rng(number)
    score_maps = rng.standard_normal((batch, 4, 5, 6), dtype=np.float32)
    score_maps[rng.random((batch, 4)) < 0.05, 0, 0] = np.nan
    corners, sides = rng.uniform(-0.2, 0.6, (batch, 2)), rng.uniform(0.2, 0.9, (batch, 2))
    views = np.concatenate([corners, corners + sides, rng.integers(0, 2, (batch, 1))], axis=1)
    views[rng.random(batch) < 0.3] = (0, 0, 1, 1, 0)
    indices = rng.integers(0, IMAGES, batch) if batch < IMAGES else rng.permutation(IMAGES)
    accumulator.update(indices, torch.from_numpy(score_maps), views=torch.from_numpy(views))


def advance(kind: str, numbers, batch: int = 4, path=None, **options) -> dict[str, object]:
    """The state after some batches of the stream."""
    accumulator = endless(kind, path, **options)
    for number in numbers:
        show(accumulator, number, batch)
    return snapshot(accumulator)


def reopened(kind: str, path, **options) -> dict[str, object]:
    return advance(kind, [], path=path, **options)


class Killed(BaseException):
    """Stands for a kill: nothing in the opening of a file catches it, so it is as sudden."""


def kill_softly() -> None:
    raise Killed


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


WRITERS = tuple(inspect.getfile(each) for each in (MappedStore, Store, Span, Entry, replacing))  # wherever these are
at_each_line = functools.partial(moments.at_each, of=WRITERS)


def stop_at_line(step, die, function, *args) -> bool:
    """Run a function and die before so many lines; whether it came to that."""
    try:
        at_each_line(lambda number: die() if number == step else None, function, *args)
    except Killed:
        return True
    return False


def contents_at_each_line(path, function, *args) -> list[bytes]:
    """What a kill before each line of the code that writes would leave of a file; and what it is in the end."""
    found = [b""]

    def look(_=None):
        now = content(path)
        found.append(found[-1] if found[-1] == now else now)

    at_each_line(look, function, *args)
    look()
    return found[1:]


def states_of(kind: str, path, contents: list[bytes], **options) -> list[dict[str, object]]:
    """What is found in a file with each of these contents, whether it is loaded or reopened."""
    states, by_content = [], {}
    for each in contents:
        if each not in by_content:
            path.write_bytes(each)
            copied = snapshot(AttentionAccumulator.load(path))
            by_content[each] = reopened(kind, path, **options)
            assert same(copied, by_content[each])
        states.append(by_content[each])
    return states


# What the killed processes do; they are started by name, see `forks.Forks`


def keep_updating(kind, path, scale, pause):
    apply = MappedStore._apply
    if pause:  # most of the time goes by between record and settle
        MappedStore._apply = lambda *args: at_each_line(lambda _: time.sleep(pause), apply, *args)
    accumulator = endless(kind, path, scale=scale)
    with open(f"{path}.log", "ab", buffering=0) as log:
        for number in itertools.count(accumulator.offered // OFFERED):
            show(accumulator, number)
            log.write(b".")


def die_while_writing(kind, path, number, step):
    stop_at_line(step, kill, show, endless(kind, path), number)


def die_with_garbage_in_place(kind, path, number):
    perform = MappedStore._perform

    def scribble(store, changes, totals, seals, recorded):
        garbage = [c._replace(values={name: torch.full_like(v, 77) for name, v in c.values.items()}) for c in changes]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "_recorded", store._recorded.copy())  # which stays at 0
            seals = [np.full_like(each, 77) for each in seals]
            perform(store, garbage, {name: np.full_like(numbers, 77) for name, numbers in totals.items()}, seals, 0)
        store._recorded[0] = recorded
        kill()

    MappedStore._perform = scribble
    show(endless(kind, path), number)


def die_while_opening(kind, path, step):
    stop_at_line(step, kill, functools.partial(endless, kind, path, journal=1))


def keep_saving(path):
    for seed in itertools.count():
        accumulator = build(map_size=(300, 300), keys=None)
        accumulator.update(range(2), torch.full((2, 3, 1, 1), seed + 1.0))
        accumulator._store.tensors["maps"].fill_(seed % 256)
        accumulator._store.tensors["counts"].fill_(seed % 256)
        accumulator.save(path)
        with open(f"{path}.log", "ab", buffering=0) as log:
            log.write(b".")


def make(path):
    fill(build(path))
    say([name for name in os.listdir(os.path.dirname(path)) if not name.endswith(".partial")])


def hold(path):
    accumulator = build(path, resume=True)
    say(sorted(accumulator.state_dict()))
    signal.pause()


def hold_after_load(path):
    accumulator = build(path, resume=True)
    AttentionAccumulator.load(path)
    fill(accumulator)
    say("filled")
    signal.pause()


def try_to_open(path, room):
    """Load the file, and resume from it: the error of each. Little memory may be asked for."""
    import resource

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    errors = []
    for way in (AttentionAccumulator.load, functools.partial(build, resume=True)):
        try:
            fill(way(path))
            errors.append([None, "", ""])
        except Exception as error:
            causes = [error]
            while causes[-1].__context__ is not None:
                causes.append(causes[-1].__context__)
            errors.append([type(error).__name__, str(error), " ".join(repr(cause) for cause in causes)])
    say(errors)


def run_out_of_disk(path, size, way):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        if way == "save":
            fill(build(), seed=1).save(path)
        else:
            build(path)
        say(None)
    except OSError as error:
        say(error.errno)


@pytest.mark.slow
@every_kind
def test_a_process_killed_at_any_moment_loses_at_most_the_batch_in_flight(kind, forks, tmp_path):
    path, log, scale = tmp_path / "maps", tmp_path / "maps.log", 12
    rng = random.Random(kind)
    expected, done = endless(kind, scale=scale), 0
    for attempt in range(30):
        log.write_bytes(b"")
        forks.start(keep_updating, kind, path, scale, 0.0005 if attempt % 3 == 2 else 0)
        reports = rng.randrange(1, 3) if attempt % 3 else 0
        forks.wait_until(lambda least=reports: log.stat().st_size >= least)
        time.sleep(rng.uniform(0, 0.04))
        forks.kill()
        reported = done + log.stat().st_size
        found = reopened(kind, path, scale=scale)
        complete = int(found["offered"].sum()) // OFFERED
        assert reported <= complete <= reported + 1
        for number in range(done, complete):
            show(expected, number)
        assert same(found, snapshot(expected))
        done = complete
    assert done >= 20  # in two attempts of three something was reported before the kill


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "really"), [*((kind, False) for kind in KINDS), ("mean", True)])
def test_a_process_killed_at_any_line_of_a_write_leaves_the_state_before_or_after_it(kind, really, forks, tmp_path):
    path, left = tmp_path / "maps", tmp_path / "left"
    before, after = advance(kind, range(6), path=path, journal=1 << 16), advance(kind, range(7))
    shutil.copyfile(path, left)
    if really:
        states = []
        for step in itertools.count(1):
            shutil.copyfile(left, path)
            killed = forks.run(die_while_writing, kind, path, 6, step) == -signal.SIGKILL
            states += states_of(kind, path, [content(path)])
            if not killed:
                break
    else:
        states = states_of(kind, left, contents_at_each_line(path, show, endless(kind, path), 6))
    assert all(same(state, before) or same(state, after) for state in states)
    found = [same(state, after) for state in states]
    assert found == sorted(found)  # there is one moment from which on the batch is sure
    assert found.count(False) > 15
    assert found.count(True) > 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*maps:pytest.PytestUnraisableExceptionWarning")  # stopped where it opens the file
@every_kind
def test_what_was_recorded_is_repeated_however_often_the_repetition_is_killed_too(kind, forks, tmp_path):
    path = tmp_path / "maps"
    advance(kind, range(6), path=path)
    assert forks.run(die_with_garbage_in_place, kind, path, 6) == -signal.SIGKILL
    after = advance(kind, range(7))
    assert same(snapshot(AttentionAccumulator.load(path)), after)
    shutil.copyfile(path, tmp_path / "base")
    for step in itertools.count(1):
        killed = stop_at_line(step, kill_softly, endless, kind, path)
        assert same(snapshot(AttentionAccumulator.load(path)), after)
        if not killed:
            break
        if step % 2:
            shutil.copyfile(tmp_path / "base", path)
    assert step > 100
    assert same(reopened(kind, path), after)


@pytest.mark.slow
@every_kind
def test_a_batch_too_large_for_the_journal_is_torn_between_pairs_only(kind, tmp_path):
    path, scale, batch = tmp_path / "maps", 3, IMAGES
    before = advance(kind, range(6), batch, path=path, scale=scale, journal=1)
    after = advance(kind, range(7), batch, scale=scale)
    seen = set()
    contents = contents_at_each_line(path, show, endless(kind, path, scale=scale), 6, batch)
    for state in states_of(kind, tmp_path / "left", contents, scale=scale):
        rows = list(zip(*(rows_of(values) for values in (state, before, after)), strict=True))
        assert all(row in (old, new) for row, old, new in rows)
        seen.add(sum(row != old for row, old, _ in rows))
        totals = [name for name in ("skipped", "offered") if not torch.equal(state[name], before[name])]
        assert not totals or same(state, after)  # the totals change with the last pairs
    assert same(state, after)
    assert len(seen) > 3  # the journal was used several times


def merge(accumulator, other):
    accumulator.merge(other)


def reset(accumulator, other):
    accumulator.reset()


def load(accumulator, other):
    accumulator.load_state_dict(other.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("fits", [True, False], ids=["in one step", "in many"])
@pytest.mark.parametrize("operate", [merge, reset, load])
@every_kind
def test_what_changes_all_maps_is_one_step_if_the_journal_holds_it_and_else_torn_between_pairs_only(
    kind, operate, fits, tmp_path
):
    path, other, scale = tmp_path / "maps", endless(kind, scale=3), 3
    before = advance(kind, range(3), path=path, journal=1 << 18 if fits else 1, scale=scale)
    for number in range(10, 13):
        show(other, number)
    changed = endless(kind, scale=scale)
    for number in range(3):
        show(changed, number)
    operate(changed, other)
    after = snapshot(changed)
    contents = contents_at_each_line(path, operate, endless(kind, path, scale=scale), other)
    states = states_of(kind, tmp_path / "left", contents, scale=scale)
    for state in states:
        rows = list(zip(*(rows_of(values) for values in (state, before, after)), strict=True))
        assert all(row in (old, new) for row, old, new in rows)
        totals = [name for name in ("skipped", "offered") if not torch.equal(state[name], before[name])]
        assert not totals or same(state, after)
    whole = [same(state, after) for state in states]
    assert whole == sorted(whole)
    assert {True, False} == set(whole)
    assert all(same(state, before) or same(state, after) for state in states) == fits


@pytest.mark.slow
def test_a_process_killed_while_it_makes_the_file_leaves_none_or_a_whole_one(forks, tmp_path):
    empty, made = snapshot(endless("max")), []
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        folder.mkdir()
        ended = forks.run(die_while_opening, "max", folder / "maps", step)
        assert all(name == "maps" or name.endswith(".partial") for name in os.listdir(folder))
        made.append((folder / "maps").exists())
        assert same(reopened("max", folder / "maps", journal=1), empty)
        if ended != -signal.SIGKILL:
            break
    assert ended == 0
    assert made == sorted(made)
    assert made.count(False) > 20
    assert made.count(True) > 20


@pytest.mark.slow
def test_a_save_killed_at_any_moment_leaves_the_old_file_or_the_new_one(forks, tmp_path):
    path, log = tmp_path / "saved", tmp_path / "saved.log"
    rng = random.Random(0)
    for _ in range(30):
        log.write_bytes(b"")
        forks.start(keep_saving, path)
        reports = 1 + rng.randrange(3)
        forks.wait_until(lambda least=reports: log.stat().st_size >= least)
        time.sleep(rng.uniform(0, 0.02))
        forks.kill()
        saved = AttentionAccumulator.load(path)
        number = log.stat().st_size - 1
        assert int(saved.counts.max()) in (number, number + 1)
        assert (saved.state_dict()["maps"] == saved.counts.max()).all()


# One process at a time


def test_a_second_process_is_refused_and_the_file_is_free_when_the_first_has_ended(forks, tmp_path):
    path = tmp_path / "maps"
    build(path)
    before = content(path)
    forks.start(hold, path)
    forks.hear()
    for _ in range(2):
        with pytest.raises(BlockingIOError, match=r"maps is in use by another .*; give each a path of its own"):
            build(path, resume=True)
    assert content(path) == before
    forks.kill()
    assert same(snapshot(fill(build(path, resume=True))), snapshot(fill(build())))


def test_reading_the_file_meanwhile_is_no_reason_to_let_another_process_in(forks, tmp_path):
    """Unlike a lock of POSIX, which is gone once its process closes the file, though it was opened a second time."""
    path = tmp_path / "maps"
    build(path)
    forks.start(hold_after_load, path)
    forks.hear()
    before = content(path)
    with pytest.raises(BlockingIOError, match="in use"):
        build(path, resume=True)
    assert content(path) == before
    forks.kill()


def test_a_process_that_makes_the_file_at_the_same_time_is_noticed(forks, tmp_path, monkeypatch):
    path = tmp_path / "maps"
    allocate = os.posix_fallocate

    def meanwhile(*args):
        assert forks.ask(make, path) == ["maps"]
        allocate(*args)

    monkeypatch.setattr(os, "posix_fallocate", meanwhile)
    with pytest.raises(FileExistsError, match=r"maps exists; pass resume=True"):
        build(path)
    assert os.listdir(tmp_path) == ["maps"]
    assert same(snapshot(build(path, resume=True)), snapshot(fill(build())))


def test_a_system_without_reservation_or_locks_will_do(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    for module in (locking, replacing):
        monkeypatch.setattr(module, "fcntl", None)
    fill(build(tmp_path / "maps"))
    assert os.listdir(tmp_path) == ["maps"]
    assert same(snapshot(build(tmp_path / "maps", resume=True)), snapshot(fill(build())))


# What is refused; each time the file stays as it is


def test_an_existing_file_asks_for_resume(tmp_path):
    fill(build(tmp_path / "maps"))
    before = content(tmp_path / "maps")
    with pytest.raises(FileExistsError, match=r"maps exists; pass resume=True to go on with it, or take another path"):
        build(tmp_path / "maps")
    assert content(tmp_path / "maps") == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match="resume=True"):
        build(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "maps"]


OTHERS = {
    "more images": ({"labels": [*LABELS, [0, 1, 0]], "keys": ["a", "b", "c"]}, "num_images"),
    "more classes": ({"labels": [[1, 1, 0, 0], [0, 0, 1, 0]]}, "num_classes"),
    "more labels": ({"labels": [[1, 1, 1], [0, 0, 1]]}, "num_pairs"),
    "other labels": ({"labels": [[1, 0, 1], [0, 0, 1]]}, "labels"),
    "other keys": ({"keys": ["a", "c"]}, "keys"),
    "keys in another order": ({"keys": ["b", "a"]}, "keys"),
    "no keys": ({"keys": None}, "keys"),
    "another map size": ({"map_size": (3, 3)}, "map_size"),
    "the map size turned": ({"map_size": (3, 2)}, "map_size"),
    "a map size for each image": ({"map_size": [[2, 3], [2, 3]]}, "map_size"),
    "another fusion": ({"fusion": "mean"}, "fusion"),
    "a user's fusion": ({"fusion": noisy_or}, "fusion"),
    "another dtype": ({"dtype": torch.float16}, "dtype"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_file_of_something_else_is_refused(other, tmp_path):
    fill(build(tmp_path / "maps"))
    before = content(tmp_path / "maps")
    options, named = OTHERS[other]
    with pytest.raises(ValueError, match=rf"maps (belongs to|has) another (?=.*expected ).*{named}"):
        build(tmp_path / "maps", **options, resume=True)
    assert content(tmp_path / "maps") == before
    assert os.listdir(tmp_path) == ["maps"]


@pytest.mark.parametrize(
    ("options", "others", "named"),
    [
        ({"map_size": [[2, 3], [4, 5]]}, {"map_size": [[2, 3], [5, 4]]}, "map_size"),
        ({"map_size": [[2, 3], [4, 5]]}, {"map_size": (2, 3)}, "map_size"),
        ({"fusion": "ema"}, {"fusion": ExponentialMovingAverage(0.5)}, r"momentum=0.5.*momentum=0.9"),
        ({"fusion": "ema"}, {"fusion": "ema(momentum=0.91)"}, "momentum"),
        ({"fusion": "mean"}, {"fusion": "latest"}, "fusion"),
        ({"fusion": "max"}, {"fusion": "noisy-or"}, "fusion"),
        ({"fusion": "latest"}, {"fusion": "latest", "dtype": torch.float32}, "dtype"),
    ],
)
def test_the_file_of_another_setting_is_refused(options, others, named, tmp_path):
    fill(build(tmp_path / "maps", **options))
    before = content(tmp_path / "maps")
    with pytest.raises(ValueError, match=rf"maps (belongs to|has) another .*{named}"):
        build(tmp_path / "maps", **others, resume=True)
    assert content(tmp_path / "maps") == before
    assert same(snapshot(build(tmp_path / "maps", **options, resume=True)), snapshot(fill(build(**options))))


def test_another_gate_may_go_on_with_the_file(tmp_path):
    fill(build(tmp_path / "maps"))
    assert same(snapshot(build(tmp_path / "maps", gate="topk", resume=True)), snapshot(fill(build())))


@pytest.mark.parametrize("way", ["save", "path"])
def test_a_file_that_is_too_short_or_too_long_is_refused(way, tmp_path):
    path = tmp_path / "maps"
    accumulator = fill(build(path if way == "path" else None))
    if way == "save":
        accumulator.save(path)
    del accumulator
    whole = content(path)
    for length in [*range(0, len(whole), 13), len(whole) - 1, len(whole) + 1, len(whole) + 4096]:
        path.write_bytes((whole + bytes(4096))[:length])
        for open_it in (AttentionAccumulator.load, functools.partial(build, resume=True)):
            with pytest.raises(ValueError, match="maps is no accumulator file, or it is damaged"):
                open_it(path)
        assert path.read_bytes() == (whole + bytes(4096))[:length]


def test_a_saved_file_is_told_from_one_to_go_on_with(tmp_path):
    fill(build()).save(tmp_path / "maps")
    before = content(tmp_path / "maps")
    with pytest.raises(ValueError, match=r"maps .*written by save\(\); read it with AttentionAccumulator.load"):
        build(tmp_path / "maps", resume=True)
    assert content(tmp_path / "maps") == before


def test_a_save_does_not_replace_the_file_that_the_maps_live_in(tmp_path):
    mapped = fill(build(tmp_path / "maps"))
    os.symlink(tmp_path / "maps", tmp_path / "link")
    for path in (tmp_path / "maps", os.path.relpath(tmp_path / "maps"), tmp_path / "link"):
        with pytest.raises(ValueError, match=r"another path.*maps|maps.*another path"):
            mapped.save(path)
    fill(mapped, seed=1)
    del mapped
    assert same(snapshot(build(tmp_path / "maps", resume=True)), snapshot(fill(fill(build()), seed=1)))


class Bomb:
    """Whoever unpickles it creates the file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def as_pickle(path, bomb):
    path.write_bytes(pickle.dumps(bomb))


def as_torch_zip(path, bomb):
    torch.save({"maps": bomb}, path)


def as_torch_legacy(path, bomb):
    torch.save({"maps": bomb}, path, _use_new_zipfile_serialization=False)


def as_npz(path, bomb):
    with open(path, "wb") as file:
        np.savez(file, maps=np.array([bomb], dtype=object))


def as_npy(path, bomb):
    with open(path, "wb") as file:
        np.save(file, np.array([bomb], dtype=object))


def as_garbage(path, bomb):
    path.write_bytes(bytes(range(256)) * 3)


def as_text(path, bomb):
    path.write_text("2007_000032 0 14\n")


def as_nothing(path, bomb):
    path.write_bytes(b"")


def as_other_safetensors(path, bomb):
    safetensors.numpy.save_file({"maps": np.zeros(3, dtype=np.float32)}, path, {"format": "pt"})


@pytest.mark.parametrize(
    "write",
    [as_pickle, as_torch_zip, as_torch_legacy, as_npz, as_npy, as_garbage, as_text, as_nothing, as_other_safetensors],
)
def test_any_other_file_is_refused_and_runs_nothing(write, tmp_path):
    write(tmp_path / "maps", Bomb(tmp_path / "exploded"))
    before = content(tmp_path / "maps")
    for open_it in (AttentionAccumulator.load, functools.partial(build, resume=True)):
        with pytest.raises(ValueError, match=r"maps is no accumulator file"):
            open_it(tmp_path / "maps")
    assert content(tmp_path / "maps") == before
    assert os.listdir(tmp_path) == ["maps"]


def test_what_cannot_be_given_with_a_path(tmp_path):
    with pytest.raises(ValueError, match="expected a path together with resume=True"):
        build(resume=True)
    for device in ("cuda", "meta"):
        with pytest.raises(ValueError, match=f"expected device='cpu' together with a path, got {device}"):
            build(tmp_path / "maps", device=device)
    with pytest.raises(FileNotFoundError):
        build(tmp_path / "no" / "maps")
    with pytest.raises(FileNotFoundError):
        build(tmp_path / "no" / "maps", resume=True)
    with pytest.raises(TypeError, match="dtype"):
        build(tmp_path / "maps", dtype=torch.float64)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        build(tmp_path / "folder", resume=True)
    assert os.listdir(tmp_path) == ["folder"]


# Files that lie. They are opened in a process that may not take much memory nor time.


def whole_header(path) -> tuple[dict, bytes]:
    whole = content(path)
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def write_whole(path, text: bytes, buffer: bytes, length: int | None = None) -> None:
    text += b" " * (-len(text) % 8)
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + buffer)


def forge(path, change) -> None:
    """Rewrite a file with other arrays and plain values; its offsets and its checksum fit."""
    arrays, metadata = read_by_the_rules(path)
    arrays, plain = {name: array.copy() for name, array in arrays.items()}, json.loads(metadata["oaa_lib"])
    plain = change(arrays, plain) or plain
    names = {np.dtype(dtype): name for name, dtype in SAFETENSORS.items()}
    header, buffer = {"__metadata__": {"oaa_lib": json.dumps(plain)}}, b""
    for name, array in arrays.items():
        stop = len(buffer) + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [len(buffer), stop]}
        buffer += array.tobytes()
    write_whole(path, json.dumps(header).encode(), buffer)
    if "checksum" in arrays:
        whole = content(path)
        path.write_bytes(whole[:-4] + zlib.crc32(whole[:-4]).to_bytes(4, "little"))


HUGE, DEEP = 10**30, 200_000
LENGTHS = {
    "beyond the file": 1 << 20,
    "of 8 EiB": 1 << 63,
    "of all bits": (1 << 64) - 1,
    "of nothing": 0,
    "of a byte": 1,
}
TEXTS = {
    "deep lists": b"[" * DEEP,
    "deep dicts": b'{"a":' * DEEP,
    "deep and closed": b"[" * DEEP + b"]" * DEEP,
    "deep metadata": b'{"__metadata__":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep plain values": json.dumps({"__metadata__": {"oaa_lib": "[" * DEEP + "]" * DEEP}}).encode(),
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "no JSON": b"{maps}",
    "no UTF-8": b"\xff\xfe\xfd",
    "a long number": b"9" * 10_000,
    "nothing but metadata": b'{"__metadata__": {"oaa_lib": "{}"}}',
    "no metadata": b"{}",
    "metadata of another kind": b'{"__metadata__": 3}',
    "metadata of others": b'{"__metadata__": {"format": "pt"}}',
    "plain values that are none": b'{"__metadata__": {"oaa_lib": 3}}',
}
ENTRIES = {
    "a negative side": {"shape": [-3, -2, 3]},
    "one negative side": {"shape": [-18]},
    "a huge side": {"shape": [HUGE]},
    "huge sides": {"shape": [1 << 62, 1 << 62, 4]},
    "huge sides of nothing": {"shape": [0, HUGE], "data_offsets": [0, 0]},
    "many sides": {"shape": [1] * 5000},
    "sides of a huge product": {"shape": [10**3000] * 60},
    "sides that are text": {"shape": "ab"},
    "sides that are none": {"shape": None},
    "a side of infinity": {"shape": [float("inf")]},
    "a side that is no number": {"shape": [[2], 3]},
    "another shape": {"shape": [2, 3, 3]},
    "a wider dtype": {"dtype": "F32"},
    "an unknown dtype": {"dtype": "F64"},
    "a dtype that is none": {"dtype": ["U8"]},
    "offsets beyond the file": {"data_offsets": [1 << 40, (1 << 40) + 18]},
    "offsets that overlap": {"data_offsets": [0, 18]},
    "negative offsets": {"data_offsets": [-18, 0]},
    "offsets the wrong way round": {"data_offsets": [18, 0]},
    "three offsets": {"data_offsets": [0, 9, 18]},
    "no offsets": {"data_offsets": None},
}


def changed(name, value):
    return lambda arrays, plain: arrays.__setitem__(name, np.asarray(value))


def without(name):
    return lambda arrays, plain: arrays.__delitem__(name)


def plainly(**values):
    return lambda arrays, plain: plain.update(values)


def bytes_of(text: str):
    return np.frombuffer(text.encode(), dtype=np.uint8)


def with_sizes(sizes):
    def change(arrays, plain):
        arrays["map_size"] = np.asarray(sizes)
        plain["map_size"] = None

    return change


FORGERIES = {
    "no plain dict": lambda arrays, plain: [1],
    "no classes": plainly(num_classes=None),
    "huge classes": plainly(num_classes=10**12),
    "very huge classes": plainly(num_classes=HUGE),
    "negative classes": plainly(num_classes=-1),
    "too few classes": plainly(num_classes=1),
    "classes as text": plainly(num_classes="3"),
    "half a class": plainly(num_classes=2.5),
    "a huge map size": plainly(map_size=[1 << 20, 1 << 20]),
    "a map size that overflows": plainly(map_size=[1 << 33, 1 << 33]),
    "a map size beyond integers": plainly(map_size=[HUGE, 1]),
    "a map size of 0": plainly(map_size=[0, 3]),
    "a negative map size": plainly(map_size=[-2, -3]),
    "a map size of fractions": plainly(map_size=[2.0, 3.0]),
    "a map size of text": plainly(map_size="ab"),
    "a map size of a dict": plainly(map_size={}),
    "a map size that is missing": plainly(map_size=None),
    "another map size": plainly(map_size=[3, 2]),
    "huge sizes": with_sizes([[1 << 20, 1 << 20], [1, 1]]),
    "sizes that overflow": with_sizes([[1 << 32, 1 << 32], [1 << 31, 1 << 32]]),
    "negative sizes": with_sizes([[-2, 3], [2, 3]]),
    "fractional sizes": with_sizes(np.float32([[2, 3], [2, 3]])),
    "sizes of too many images": with_sizes([[2, 3]] * 3),
    "an unknown fusion": plainly(fusion="median"),
    "a fusion with a bad setting": plainly(fusion="ema(momentum=7)"),
    "a fusion of another kind": plainly(fusion=[1]),
    "a fusion that needs more": plainly(fusion="mean"),
    "huge offsets": changed("offsets", [0, 1 << 40, (1 << 40) + 1]),
    "offsets beyond the pairs": changed("offsets", [0, 2, 300]),
    "huge negative offsets": changed("offsets", [0, -(1 << 62), 3]),
    "falling offsets": changed("offsets", [0, 5, 3]),
    "offsets that begin late": changed("offsets", [1, 2, 3]),
    "no offsets at all": changed("offsets", np.zeros(0, dtype=np.int64)),
    "offsets in two dimensions": changed("offsets", [[0, 2, 3]]),
    "offsets of floats": changed("offsets", np.float32([0, np.nan, 3])),
    "one more class": changed("classes", [0, 1, 2, 0]),
    "no classes at all": changed("classes", np.zeros(0, dtype=np.int64)),
    "a class beyond": changed("classes", [0, 1, 3]),
    "a class below": changed("classes", [0, -1, 2]),
    "a class twice": changed("classes", [1, 1, 2]),
    "classes of a row": changed("classes", [[0, 1, 2]]),
    "deep keys": changed("keys", bytes_of("[" * DEEP + "]" * DEEP)),
    "keys that are no JSON": changed("keys", bytes_of("a b")),
    "keys that are no text": changed("keys", bytes_of("[1, 2]")),
    "keys that are one text": changed("keys", bytes_of('"ab"')),
    "too many keys": changed("keys", bytes_of('["a", "b", "c"]')),
    "a key twice": changed("keys", bytes_of('["a", "a"]')),
    "a number of keys": changed("keys", bytes_of("2")),
    "no maps": without("maps"),
    "no counts": without("counts"),
    "no keys": without("keys"),
    "no offered": without("offered"),
    "maps of integers": changed("maps", np.zeros((3, 2, 3), dtype=np.int64)),
    "maps of another shape": changed("maps", np.zeros((3, 3, 2), dtype=np.uint8)),
    "maps of another dtype": changed("counts", np.zeros(3)[:, None].astype(np.float32)),
}
SAVED_ONLY = {
    "an unknown gate": plainly(gate="best"),
    "a gate of another kind": plainly(gate=[1]),
    "a base of another shape": changed("base_maps", np.zeros((2, 2, 3), dtype=np.uint8)),
    "a base of what is not kept": changed("base_missed", np.zeros((3, 2, 3), dtype=np.int32)),
}
MAPPED_ONLY = {
    "no journal": without("journal"),
    "nothing recorded": without("recorded"),
    "an empty journal": changed("journal", np.zeros(0, dtype=np.uint8)),
    "a short journal": changed("journal", np.zeros(64, dtype=np.uint8)),
    "a journal of numbers": changed("journal", np.zeros(4096, dtype=np.int64)),
    "a journal in two dimensions": changed("journal", np.zeros((4096, 2), dtype=np.uint8)),
    "two records": changed("recorded", [0, 0]),
    "a record of a byte": changed("recorded", np.uint8([0])),
    "a journal recorded beyond its end": changed("recorded", [1 << 40]),
    "a journal recorded by one too much": lambda arrays, plain: arrays["recorded"].fill(len(arrays["journal"]) + 1),
    "less than nothing recorded": changed("recorded", [-1]),
    "zeros recorded": changed("recorded", [160]),
    "a few bytes recorded": changed("recorded", [7]),
}


def journal(*spans, recorded=None):
    """Spans (count, length, places, bytes) recorded. The first one is fine."""

    def change(arrays, plain):
        data = b""
        for count, length, places, values in [(1, 1, [2048], b"\x07"), *spans]:
            data += np.int64([count, length, *places]).tobytes() + values
        arrays["journal"][: len(data)] = np.frombuffer(data, dtype=np.uint8)
        end = len(data) if recorded is None else recorded(len(data))
        arrays["recorded"][0] = seal(arrays["journal"], end) if 0 <= end <= len(arrays["journal"]) else end

    return change


MAPPED_ONLY |= {
    "a place beyond the file": journal((1, 1, [1 << 30], b"\1")),
    "a place beyond all": journal((1, 1, [(1 << 63) - 1], b"\1")),
    "a place before the file": journal((1, 1, [-1], b"\1")),
    "a place in the header": journal((1, 1, [8], b"\1")),
    "a place of the far past": journal((1, 1, [-(1 << 63)], b"\1")),
    "a row that reaches out": journal((1, 2100, [2048], b"\1" * 2100)),
    "a count of 0": journal((0, 8, [], b"")),
    "a length of 0": journal((1, 0, [2048], b"")),
    "a negative count": journal((-1, 8, [2048], b"\1" * 8)),
    "a negative length": journal((1, -24, [2048], b"")),
    "two negatives": journal((-2, -3, [2048, 2048], b"\1" * 6)),
    "a huge count": journal((1 << 60, 1, [2048], b"\1")),
    "a huge length": journal((1, 1 << 60, [2048], b"\1")),
    "a count that overflows": journal((1 << 62, 1 << 62, [2048], b"\1")),
    "a row cut off": journal((1, 64, [2048], b"\1" * 64), recorded=lambda size: size - 1),
    "a head cut off": journal((1, 64, [2048], b"\1" * 64), recorded=lambda size: size - 80),
    "more recorded than written": journal(recorded=lambda size: size + 8),
}


def refuses_both_ways(forks, path) -> None:
    before = content(path)
    for error, message, causes in forks.ask(try_to_open, path, 256 << 20):
        assert error == "ValueError", (error, message)
        assert os.fspath(path) in message
        assert "emory" not in causes  # what it claims was not even tried
    assert content(path) == before


@pytest.fixture(params=["save", "path"])
def either(request, tmp_path):
    """A file of each kind."""
    accumulator = fill(build(tmp_path / "maps" if request.param == "path" else None))
    if request.param == "save":
        accumulator.save(tmp_path / "maps")
    return tmp_path / "maps"


@pytest.fixture
def mapped(tmp_path):
    fill(build(tmp_path / "maps"))
    return tmp_path / "maps"


@pytest.mark.parametrize("length", LENGTHS)
def test_a_header_with_a_length(length, either, forks):
    header, buffer = whole_header(either)
    write_whole(either, json.dumps(header).encode(), buffer, LENGTHS[length])
    refuses_both_ways(forks, either)


@pytest.mark.parametrize("text", TEXTS)
def test_a_header_that_is(text, either, forks):
    write_whole(either, TEXTS[text], whole_header(either)[1])
    refuses_both_ways(forks, either)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_with(entry, either, forks):
    header, buffer = whole_header(either)
    header["maps"] |= ENTRIES[entry]
    write_whole(either, json.dumps(header).encode(), buffer)
    refuses_both_ways(forks, either)


@pytest.mark.parametrize("entry", [None, 3, [], {}, "maps"], ids=repr)
def test_an_entry_that_is(entry, either, forks):
    header, buffer = whole_header(either)
    header["maps"] = entry
    write_whole(either, json.dumps(header).encode(), buffer)
    refuses_both_ways(forks, either)


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_file_that_fits_but_has(forgery, either, forks):
    forge(either, FORGERIES[forgery])
    refuses_both_ways(forks, either)


@pytest.mark.parametrize("forgery", SAVED_ONLY)
def test_a_saved_file_that_fits_but_has(forgery, tmp_path, forks):
    fill(build()).save(tmp_path / "maps")
    forge(tmp_path / "maps", SAVED_ONLY[forgery])
    refuses_both_ways(forks, tmp_path / "maps")


@pytest.mark.parametrize("forgery", MAPPED_ONLY)
def test_a_mapped_file_that_fits_but_has(forgery, mapped, forks):
    forge(mapped, MAPPED_ONLY[forgery])
    before = content(mapped)
    _, (error, message, causes) = forks.ask(try_to_open, mapped, 256 << 20)
    assert error == "ValueError", (error, message)
    assert os.fspath(mapped) in message
    assert "emory" not in causes
    assert content(mapped) == before


def test_forging_nothing_changes_nothing(either, forks):
    """So that the tests above fail for what they forge."""
    forge(either, lambda arrays, plain: None)
    loaded, resumed = forks.ask(try_to_open, either, 256 << 20)
    assert loaded[0] is None
    assert resumed[0] is None or "written by save()" in resumed[1]
    if resumed[0] is None:
        assert 2048 + 64 < os.stat(either).st_size < 2048 + 2100  # as `journal` assumes
        forge(either, journal())
        assert forks.ask(try_to_open, either, 256 << 20)[1][0] is None


@given(position=st.integers(0), mask=st.integers(1, 255))
def test_a_flipped_byte_of_the_header_is_refused_or_makes_no_difference(position, mask, tmp_path_factory):
    path = tmp_path_factory.mktemp("disk") / "maps"
    fill(build(path))
    whole = bytearray(content(path))
    position %= 8 + int.from_bytes(whole[:8], "little")
    whole[position] ^= mask
    path.write_bytes(whole)
    refusal = None
    try:
        found = snapshot(build(path, resume=True))
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert same(found, snapshot(fill(build())))
    else:
        assert str(path) in refusal
        assert content(path) == whole


# Full disks


def test_a_full_disk_is_told_when_the_file_is_made_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path / "maps")
    assert os.listdir(tmp_path) == []


def test_the_room_of_the_file_is_taken_at_once(tmp_path):
    accumulator = build(tmp_path / "maps", map_size=(500, 500), keys=None)
    taken = os.stat(tmp_path / "maps")
    assert taken.st_blocks * 512 >= taken.st_size > 3 * 500 * 500
    accumulator.update([0, 1], torch.rand(2, 3, 500, 500))
    assert os.stat(tmp_path / "maps").st_size == taken.st_size


@pytest.mark.parametrize("room", [0, 100, 1000, 2000])
def test_no_room_to_make_a_file_leaves_nothing(room, forks, tmp_path):
    assert forks.ask(run_out_of_disk, tmp_path / "maps", room, "path") == errno.EFBIG
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_no_room_to_save_leaves_the_old_file(room, forks, tmp_path):
    fill(build()).save(tmp_path / "maps")
    before = content(tmp_path / "maps")
    assert room < len(before)
    assert forks.ask(run_out_of_disk, tmp_path / "maps", room, "save") == errno.EFBIG
    assert content(tmp_path / "maps") == before
    assert os.listdir(tmp_path) == ["maps"]


# Objects


def test_a_file_is_not_sent_to_other_processes(tmp_path):
    mapped = fill(build(tmp_path / "maps"))
    for send in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"maps live in .*maps, which has one writer; save\(\) it and send"):
            send(mapped)
    assert mapped.accepted


if __name__ == "__main__":
    serve(globals())
