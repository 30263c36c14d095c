"""Damage of a file is noticed when it is opened, loaded or verified: it is refused, and stays as it is."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from reference import same, snapshot, streams

from oaa_lib import AttentionAccumulator, View
from oaa_lib.maps import mapped as mapping
from oaa_lib.maps.files import parse
from oaa_lib.maps.mapped import MappedStore

LABELS = [[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]]
KINDS = {
    "max": {"map_size": (3, 4)},
    "mean": {"map_size": (3, 4), "fusion": "mean"},
    "sizes": {"map_size": [[3, 4], [2, 2], [1, 1], [5, 1]], "fusion": "mean"},
    "noisy-or": {"map_size": (2, 2), "fusion": "noisy-or", "keys": ["a", "b", "c", "d"]},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True, scope="module")
def small_files():
    """Files are made with the smallest journal that serves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "JOURNAL_BYTES", 1)
        yield


def build(kind, path=None):
    return AttentionAccumulator(LABELS, **KINDS[kind], gate=None, path=path, resume=path is not None)


def show(accumulator, seed=0):
    score_maps = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    score_maps[3, 2, 0, 0] = torch.nan
    views = [View(0, 0.5, 1, 1), View(0, 0.2, 1, 1), View(), View(flip=True)]
    return accumulator.update(accumulator.pairs.keys or range(4), score_maps, views=views)


def places(path):
    """Where in a file each array lies, with the header."""
    with open(path, "rb") as file:
        entries, _ = parse(file)
    found = {name: range(entry.start, entry.stop) for name, entry in entries.items()}
    return {"header": range(min(each.start for each in found.values())), **found}


def refused(kind, path):
    """Whether a file is refused, the one way and the other, with its name, and stays as it is; else what is in it."""
    before, states = Path(path).read_bytes(), []
    for opening in (AttentionAccumulator.load, lambda path: build(kind, path)):
        try:
            states.append(snapshot(opening(path)))
        except ValueError as error:
            states.append(str(error))
    assert Path(path).read_bytes() == before
    if all(isinstance(each, str) and str(path) in each for each in states):
        return True
    assert same(*states)
    return states[0]


@every_kind
def test_a_flipped_bit_is_refused_or_lies_where_nothing_is(kind, tmp_path):
    path, rng = tmp_path / "maps", random.Random(0)
    right = snapshot(show(show(build(kind, path)), 1))
    whole = path.read_bytes()
    for name, place in places(path).items():
        for at in rng.sample(place, min(len(place), 60)):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            found = refused(kind, path)
            if found is not True:
                assert name in ("journal", "header"), (name, at)
                assert same(found, right), (name, at)


@every_kind
def test_a_flipped_bit_of_a_saved_file_is_refused(kind, tmp_path):
    show(build(kind)).save(tmp_path / "saved")
    whole, rng = (tmp_path / "saved").read_bytes(), random.Random(0)
    for at in rng.sample(range(len(whole)), 200):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        (tmp_path / "saved").write_bytes(damaged)
        with pytest.raises(ValueError, match="saved is no accumulator file, or it is damaged"):
            AttentionAccumulator.load(tmp_path / "saved")


@every_kind
def test_what_stands_in_another_ones_place_is_refused(kind, tmp_path):
    path = tmp_path / "maps"
    accumulator = show(show(build(kind, path)), 1)
    accumulator.update(["a"] if accumulator.pairs.keys else [0], torch.rand(1, 3, 2, 2))
    names = [name for name in ("maps", "missed", "counts", "seals") if name in places(path)]
    del accumulator
    whole = path.read_bytes()
    for name in names:
        place, damaged = places(path)[name], bytearray(whole)
        part = whole[place.start : place.stop]
        half = len(part) // 2 // 8 * 8
        damaged[place.start : place.stop] = part[half:] + part[:half]
        assert damaged != whole
        path.write_bytes(damaged)
        assert refused(kind, path) is True
        path.write_bytes(whole)


@every_kind
def test_what_was_never_written_is_refused(kind, tmp_path):
    """Blocks of zeros, as a file system may leave them after a power failure."""
    path = tmp_path / "maps"
    show(build(kind, path))
    whole, arrays = path.read_bytes(), places(path)
    for name in ("maps", "counts", "offered", "seals", "sealed", "classes"):
        damaged = bytearray(whole)
        damaged[arrays[name].start : arrays[name].stop] = bytes(len(arrays[name]))
        path.write_bytes(damaged)
        assert refused(kind, path) is True, name


def leave(monkeypatch, accumulator, path, update):
    """What an update would leave that is killed once all of it is noted: a copy of the file."""
    perform = MappedStore._perform

    def killed(store, changes, totals, seals, recorded):
        store._recorded[0] = recorded
        shutil.copy(accumulator._store._lock.path, path)
        perform(store, changes, totals, seals, recorded)

    monkeypatch.setattr(MappedStore, "_perform", killed)
    update()
    monkeypatch.undo()


@every_kind
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_journal_of_a_killed_process_changes_nothing(kind, tmp_path, monkeypatch):
    path, left = tmp_path / "maps", tmp_path / "left"
    accumulator = show(build(kind, path))
    after = show(show(build(kind)), 1)
    leave(monkeypatch, accumulator, left, lambda: show(accumulator, 1))
    whole, rng = left.read_bytes(), random.Random(0)
    assert same(snapshot(AttentionAccumulator.load(left)), snapshot(after))
    noted = int.from_bytes(whole[places(left)["recorded"].start :][:4], "little")
    assert noted > 100
    for at in rng.sample(places(left)["journal"][:noted], 60) + list(places(left)["recorded"]):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        left.write_bytes(damaged)
        assert refused(kind, left) is True


@every_kind
def test_a_file_of_a_killed_process_that_is_damaged_elsewhere_stays_as_it_is(kind, tmp_path, monkeypatch):
    left = tmp_path / "left"
    accumulator = show(build(kind, tmp_path / "maps"))
    image = ["a"] if accumulator.pairs.keys else [0]
    leave(monkeypatch, accumulator, left, lambda: accumulator.update(image, torch.rand(1, 3, 2, 2)))
    damaged = bytearray(left.read_bytes())
    damaged[places(left)["maps"].stop - 1] ^= 1
    left.write_bytes(damaged)
    assert refused(kind, left) is True


# On demand


@every_kind
def test_verify_sees_what_happens_to_the_file_while_it_is_in_use(kind, tmp_path):
    path = tmp_path / "maps"
    accumulator = show(build(kind, path))
    assert accumulator.verify() is None
    place = places(path)["maps"]
    number = os.open(path, os.O_RDWR)
    byte = os.pread(number, 1, place.stop - 1)
    os.pwrite(number, bytes([byte[0] ^ 4]), place.stop - 1)
    with pytest.raises(
        ValueError,
        match=r"maps is .*damaged: 1 of its 5 maps do not fit their checksums, first the one of image 3, class 2",
    ):
        accumulator.verify()
    os.pwrite(number, byte, place.stop - 1)
    accumulator.verify()
    for name in set(places(path)) & {"classes", "offsets", "keys", "map_size", "offered", "skipped", "sealed"}:
        at = places(path)[name].start
        byte = os.pread(number, 1, at)
        os.pwrite(number, bytes([byte[0] ^ 7]), at)
        with pytest.raises(ValueError, match=r"maps is .*damaged: its labels or totals do not fit their checksums"):
            accumulator.verify()
        os.pwrite(number, byte, at)
        accumulator.verify()
    os.close(number)


def test_there_is_nothing_to_verify_in_memory_or_in_files_of_earlier_versions(tmp_path):
    assert show(build("max")).verify() is None
    old = Path(__file__).parent / "files" / "max.mapped"
    shutil.copy(old, tmp_path / "maps")
    labels = [[1, 1, 0], [0, 0, 1], [1, 0, 1]]
    mapped = AttentionAccumulator(labels, (3, 4), keys=["a", "b", "c"], path=tmp_path / "maps", resume=True)
    mapped.verify()
    mapped.update(["a"], torch.rand(1, 3, 3, 4)).verify()


@pytest.mark.parametrize("fusion", ["max", "mean", "latest", "noisy-or"])
@given(stream=streams(faults=True, fill_empty=True, views=True, sizes="each"), journal=st.sampled_from([1, 1 << 14]))
def test_the_checksums_fit_whatever_was_done(fusion, stream, journal, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "maps"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "JOURNAL_BYTES", journal)
        mapped = stream.accumulator(fusion=fusion, path=path)
    memory = stream.accumulator(fusion=fusion)
    for batch in stream.batches:
        batch.give_to(mapped)
        batch.give_to(memory)
        mapped.verify()
    for change in (
        lambda each: each.merge(memory),
        lambda each: each.load_state_dict(memory.state_dict()),
        lambda each: each.load_state_dict(each.state_dict()),
        lambda each: each.reset(),
    ):
        change(mapped)
        mapped.verify()


def test_the_checksums_fit_after_a_synchronize(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for kind in ("max", "mean", "sizes"):
            mapped = show(build(kind, tmp_path / kind))
            for _ in range(2):
                mapped.synchronize().verify()
                show(mapped).verify()
            del mapped
            build(kind, tmp_path / kind).verify()
    finally:
        dist.destroy_process_group()


def test_a_state_that_was_changed_in_place_is_taken_over_by_load_state_dict(tmp_path):
    """As torch.distributed.checkpoint does it."""
    mapped = show(build("mean", tmp_path / "maps"))
    state = mapped.state_dict()
    state["maps"].mul_(0.5)
    with pytest.raises(ValueError, match="do not fit their checksums"):
        mapped.verify()
    mapped.load_state_dict(state)
    mapped.verify()
    assert np.isclose(mapped.attention(0).mean(), show(build("mean")).attention(0).mean() / 2)
