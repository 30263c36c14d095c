import copy
import enum
import io
import itertools
import os
import pathlib
import pickle
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from reference import noisy_or, same, snapshot, streams

from oaa_lib import AttentionAccumulator, ExponentialMovingAverage, Snapshots
from oaa_lib.maps.pairs import PairTable

KEYS = ["a", "b"]
LABELS = [[1, 1, 0], [0, 0, 1]]


def build(**options) -> AttentionAccumulator:
    return AttentionAccumulator(**{"labels": LABELS, "map_size": (2, 3), "keys": KEYS, **options})


def fill(accumulator: AttentionAccumulator, seed: int = 0) -> AttentionAccumulator:
    generator = torch.Generator().manual_seed(seed)
    score_maps = torch.randn(2, len(accumulator.counts[0]), 4, 4, generator=generator)
    score_maps[1, 2, 0, 0] = float("nan")
    return accumulator.update(range(2), score_maps, fill_empty=True)


def mean(cumulative, attention, count):  # a user's own, by chance named like a built-in
    return cumulative * attention


def score(logits, labels):  # likewise
    return labels


# There and back


def through_state_dict(accumulator, fresh, tmp_path):
    fresh.load_state_dict(accumulator.state_dict())
    return fresh


def through_torch_save(accumulator, fresh, tmp_path):
    file = io.BytesIO()
    torch.save(accumulator.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def through_file(accumulator, fresh, tmp_path):
    accumulator.save(tmp_path / "maps")
    return AttentionAccumulator.load(tmp_path / "maps")


def through_pickle(accumulator, fresh, tmp_path):  # as to another process
    return pickle.loads(pickle.dumps(accumulator))


def through_deepcopy(accumulator, fresh, tmp_path):
    return copy.deepcopy(accumulator)


class Name(str, enum.Enum):
    A = "a"
    B = "b"


def with_momentum(momentum):
    fusion = ExponentialMovingAverage()
    fusion.momentum = momentum
    return fusion


GIVEN = {
    "keys: array": {"keys": np.array(KEYS)},
    "keys: of numpy": {"keys": [np.str_("a"), "b"]},
    "keys: members": {"keys": list(Name)},
    "map_size: of numpy": {"map_size": (np.int64(2), np.int32(3))},
    "map_size: array": {"map_size": np.array([2, 3], dtype=np.uint8)},
    "map_size: of each": {"map_size": np.array([[2, 3], [4, 4]], dtype=np.int16)},
    "labels: array": {"labels": np.array(LABELS, dtype=np.float16)},
    "labels: table": {
        "labels": PairTable(np.array([0, 2, 3]), np.array([0, 1, 2]), np.int64(3), np.array(KEYS)),
        "keys": None,
    },
    "fusion: its setting of numpy": {"fusion": ExponentialMovingAverage(np.float32(0.5))},
    "fusion: its setting of numpy, later": {"fusion": with_momentum(np.float64(0.5))},
    "fusion: its setting an integer": {"fusion": with_momentum(0)},
    "fusion: a user's": {"fusion": mean},
}

WAYS = [through_state_dict, through_torch_save, through_file, through_pickle, through_deepcopy]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate", ["score", "topk", None])
@pytest.mark.parametrize(
    ("fusion", "dtype"), [("max", torch.uint8), ("max", torch.float16), ("max", torch.float32), ("mean", torch.uint8)]
)
@pytest.mark.parametrize("keys", [KEYS, None])
def test_everything_comes_back_bit_equal(way, fusion, dtype, gate, keys, tmp_path):
    options = {"fusion": fusion, "dtype": dtype, "gate": gate, "keys": keys}
    accumulator = fill(build(**options))
    assert accumulator.skipped
    assert accumulator.accepted
    restored = way(accumulator, build(**options), tmp_path)
    assert same(snapshot(restored), snapshot(accumulator))
    assert repr(restored) == repr(accumulator)
    assert torch.equal(restored[keys or [0, 1]], accumulator[keys or [0, 1]])
    assert restored.merge(accumulator).accepted == 2 * accumulator.accepted


@pytest.mark.parametrize("options", GIVEN.values(), ids=list(GIVEN))
def test_a_checkpoint_is_loaded_as_torch_loads_by_default_whatever_types_were_given(options, tmp_path):
    accumulator = fill(build(**options))
    assert same(snapshot(through_torch_save(accumulator, build(**options), tmp_path)), snapshot(accumulator))


def test_a_file_is_loaded_whatever_type_a_setting_was_given_as(tmp_path):
    accumulator = fill(build(**GIVEN["fusion: its setting of numpy, later"]))
    assert same(snapshot(through_file(accumulator, None, tmp_path)), snapshot(accumulator))


class OnACard(torch.Tensor):
    """Numpy cannot read it before it is brought to the host."""

    def __array__(self, dtype=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("map_size", [(2, 3), [[2, 3], [4, 4]]], ids=["one size", "sizes"])
def test_a_checkpoint_may_be_loaded_onto_a_card(map_size):
    accumulator, fresh = fill(build(map_size=map_size)), build(map_size=map_size)
    state = snapshot(accumulator)
    fresh.load_state_dict({n: v.as_subclass(OnACard) if isinstance(v, torch.Tensor) else v for n, v in state.items()})
    assert same(snapshot(fresh), state)


@pytest.mark.parametrize("indices", [np.array(KEYS), [np.str_("b")], list(Name), np.array([1, 0]), torch.tensor([1])])
def test_a_checkpoint_of_snapshots_is_loaded_as_torch_loads_by_default(indices):
    snapshots = Snapshots(fill(build()), indices, np.arange(3))
    snapshots.take(np.int64(1))
    file = io.BytesIO()
    torch.save(snapshots.state_dict(), file)
    file.seek(0)
    snapshots.load_state_dict(torch.load(file, weights_only=True))
    assert snapshots.taken == [1]


@pytest.mark.parametrize("fusion", ["max", "mean"])
@given(stream=streams(faults=True, fill_empty=True))
def test_going_on_from_a_file_is_the_same_as_never_stopping(fusion, stream, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "maps"
    whole, parts = stream.accumulator(fusion=fusion), stream.accumulator(fusion=fusion)
    for batch in stream.batches:
        batch.give_to(whole)
        batch.give_to(parts)
        parts.save(path)
        parts = AttentionAccumulator.load(path)
    assert same(snapshot(whole), snapshot(parts))


@pytest.mark.parametrize("way", [through_pickle, through_deepcopy])
@pytest.mark.parametrize("fusion", ["max", "mean"])
def test_a_copy_made_in_inference_mode_can_be_updated_outside_of_it(way, fusion, tmp_path):
    accumulator = fill(build(fusion=fusion))
    with torch.inference_mode():
        copied = way(accumulator, None, tmp_path)
    assert same(snapshot(fill(copied, seed=1)), snapshot(fill(accumulator, seed=1)))


def test_loading_takes_a_copy_of_the_state():
    first, second = fill(build(gate=None)), build(gate=None)
    second.load_state_dict(first.state_dict())
    before = snapshot(first)
    fill(second, seed=1)
    assert not torch.equal(second[KEYS], first[KEYS])
    assert same(snapshot(first), before)


def test_loading_forgets_what_was_there():
    first, second = build(), fill(build())
    second.load_state_dict(first.state_dict())
    assert same(snapshot(second), snapshot(build()))


def test_save_replaces_an_existing_file_and_leaves_nothing_else(tmp_path):
    fill(build()).save(tmp_path / "maps.safetensors")
    fill(build(), seed=1).save(str(tmp_path / "maps.safetensors"))
    assert os.listdir(tmp_path) == ["maps.safetensors"]
    assert same(
        snapshot(AttentionAccumulator.load(str(tmp_path / "maps.safetensors"))), snapshot(fill(build(), seed=1))
    )


def test_a_users_fusion_and_gate_are_given_again_when_loading(tmp_path):
    class OwnGate:
        def __call__(self, logits, labels):
            return labels

    gate = OwnGate()
    accumulator = fill(build(fusion=noisy_or, gate=gate))
    accumulator.save(tmp_path / "maps")
    restored = AttentionAccumulator.load(tmp_path / "maps", fusion=noisy_or, gate=gate)
    assert same(snapshot(restored), snapshot(accumulator))
    assert restored.fusion is noisy_or
    assert restored.gate is gate


@pytest.mark.parametrize(
    ("options", "given", "named"),
    [({"fusion": noisy_or}, {}, "noisy_or.*fusion="), ({"gate": lambda logits, labels: labels}, {}, "lambda.*gate=")],
)
def test_a_file_made_with_a_users_part_asks_for_it(options, given, named, tmp_path):
    build(**options).save(tmp_path / "maps")
    with pytest.raises(ValueError, match=named):
        AttentionAccumulator.load(tmp_path / "maps", **given)


@pytest.mark.parametrize("options", [{"fusion": mean}, {"gate": score}], ids=["fusion", "gate"])
def test_a_users_part_is_not_taken_for_the_built_in_of_the_same_name(options, tmp_path):
    fill(build(**options)).save(tmp_path / "maps")
    with pytest.raises(ValueError, match="pass it again"):
        AttentionAccumulator.load(tmp_path / "maps")


def test_a_state_of_a_users_fusion_is_refused_by_the_built_in_of_the_same_name():
    with pytest.raises(ValueError, match="fusion"):
        build(fusion="mean").load_state_dict(build(fusion=mean, dtype=torch.float32).state_dict())


@pytest.mark.parametrize("gate", ["topk", None])
def test_another_gate_can_be_chosen_when_loading(gate, tmp_path):
    build(gate="score").save(tmp_path / "maps")
    assert AttentionAccumulator.load(tmp_path / "maps", gate=gate).gate is build(gate=gate).gate


# What is refused

OTHERS = {
    "more images": {"labels": [*LABELS, [0, 1, 0]], "keys": ["a", "b", "c"]},
    "fewer images": {"labels": LABELS[:1], "keys": ["a"]},
    "more classes": {"labels": [[1, 1, 0, 0], [0, 0, 1, 0]]},
    "more labels": {"labels": [[1, 1, 1], [0, 0, 1]]},
    "other labels": {"labels": [[1, 0, 1], [0, 0, 1]]},
    "labels of other images": {"labels": [[1, 0, 0], [0, 1, 1]]},
    "another order": {"labels": LABELS[::-1]},
    "other keys": {"keys": ["a", "c"]},
    "keys in another order": {"keys": ["b", "a"]},
    "no keys": {"keys": None},
    "another map size": {"map_size": (3, 3)},
    "the map size turned": {"map_size": (3, 2)},
    "another fusion": {"fusion": "mean"},
    "a user's fusion": {"fusion": noisy_or},
}


@pytest.mark.parametrize("other", [*OTHERS.values(), {"dtype": torch.float16}], ids=[*OTHERS, "another dtype"])
def test_the_state_of_another_data_set_or_setting_is_refused_and_changes_nothing(other):
    accumulator = fill(build())
    before = snapshot(accumulator)
    with pytest.raises(ValueError, match=r"expected .*, got "):
        accumulator.load_state_dict(build(**other).state_dict())
    assert same(snapshot(accumulator), before)


@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
def test_merging_another_data_set_or_setting_is_refused_and_changes_nothing(other):
    accumulator = fill(build())
    before = snapshot(accumulator)
    with pytest.raises(ValueError, match=r"expected .*, got "):
        accumulator.merge(build(**other))
    assert same(snapshot(accumulator), before)


@pytest.mark.parametrize("missing", ["maps", "counts", "skipped", "offered", "classes", "keys", "fusion"])
def test_a_state_with_a_missing_entry_is_refused_by_name_and_changes_nothing(missing):
    accumulator = fill(build())
    before, state = snapshot(accumulator), build().state_dict()
    del state[missing]
    with pytest.raises(ValueError, match=f"expected .*got .*{missing}"):
        accumulator.load_state_dict(state)
    assert same(snapshot(accumulator), before)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("maps", torch.zeros(2, 2, 3, dtype=torch.uint8)),
        ("maps", torch.zeros(3, 2, 3)),
        ("counts", torch.zeros(2, dtype=torch.int32)),
        ("skipped", torch.zeros(3)),
        ("offered", "many"),
        ("map_size", None),
        ("offsets", None),
    ],
)
def test_a_state_with_a_malformed_entry_is_refused_and_changes_nothing(entry, value):
    accumulator = fill(build())
    before = snapshot(accumulator)
    with pytest.raises(ValueError, match="expected"):
        accumulator.load_state_dict({**build().state_dict(), entry: value})
    assert same(snapshot(accumulator), before)


class Bomb:
    """Whoever unpickles it creates the file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def write_npz_of_objects(path, bomb):
    with open(path, "wb") as file:
        np.savez(file, plain=np.array([bomb], dtype=object), maps=np.array([bomb], dtype=object))


def write_npy_of_objects(path, bomb):
    with open(path, "wb") as file:
        np.save(file, np.array([bomb], dtype=object))


def write_torch_zip(path, bomb):
    torch.save({"maps": bomb}, path)


def write_torch_legacy(path, bomb):
    torch.save({"maps": bomb}, path, _use_new_zipfile_serialization=False)


def write_npy(path, bomb):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def write_npz_of_strings(path, bomb):
    with open(path, "wb") as file:
        np.savez(file, names=np.array(["conv1", "conv2"]))


def write_npz_of_another_program(path, bomb):
    with open(path, "wb") as file:
        np.savez(file, maps=np.zeros(3), plain=np.frombuffer(b"[1]", dtype=np.uint8))


def write_garbage(path, bomb):
    path.write_bytes(bytes(range(256)) * 3)


def write_text(path, bomb):
    path.write_text("2007_000032 0 14\n")


def write_nothing(path, bomb):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "write",
    [
        write_npz_of_objects,
        write_npy_of_objects,
        write_torch_zip,
        write_torch_legacy,
        write_npy,
        write_npz_of_strings,
        write_npz_of_another_program,
        write_garbage,
        write_text,
        write_nothing,
    ],
)
def test_any_other_file_is_a_value_error_that_names_it_and_runs_nothing(write, tmp_path):
    write(tmp_path / "maps", Bomb(tmp_path / "exploded"))
    with pytest.raises(ValueError, match=r"maps is no accumulator file"):
        AttentionAccumulator.load(tmp_path / "maps")
    assert not (tmp_path / "exploded").exists()


def test_a_truncated_file_is_a_value_error_wherever_it_ends(tmp_path):
    fill(build()).save(tmp_path / "maps")
    whole = (tmp_path / "maps").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "maps").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="no accumulator file"):
            AttentionAccumulator.load(tmp_path / "maps")


def test_a_file_with_a_flipped_byte_is_a_value_error_or_loads_unharmed(tmp_path):
    accumulator = fill(build())
    accumulator.save(tmp_path / "maps")
    whole = (tmp_path / "maps").read_bytes()
    for position in range(0, len(whole), 3):
        (tmp_path / "maps").write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            loaded = AttentionAccumulator.load(tmp_path / "maps")
        except ValueError:
            continue
        assert same(snapshot(loaded), snapshot(accumulator)), position


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="maps"):
        AttentionAccumulator.load(tmp_path / "maps")


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_save_that_fails_leaves_the_old_file_and_no_rest(step, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    old = fill(build())
    old.save(tmp_path / "maps")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        fill(build(), seed=1).save(tmp_path / "maps")
    assert os.listdir(tmp_path) == ["maps"]
    assert same(snapshot(AttentionAccumulator.load(tmp_path / "maps")), snapshot(old))


def test_a_save_that_breaks_off_within_the_arrays_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    old, new = fill(build()), fill(build(), seed=1)
    old.save(tmp_path / "maps")
    calls = itertools.count()
    crc32 = zlib.crc32

    def full_disk(*args):
        if next(calls) == 3:  # the header and two arrays have been written
            raise OSError(28, "No space left on device")
        return crc32(*args)

    monkeypatch.setattr(zlib, "crc32", full_disk)
    with pytest.raises(OSError, match="No space left"):
        new.save(tmp_path / "maps")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["maps"]
    assert same(snapshot(AttentionAccumulator.load(tmp_path / "maps")), snapshot(old))


def test_a_folder_that_does_not_exist_is_an_error_of_the_file_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        build().save(tmp_path / "no" / "maps")


def test_a_state_with_what_only_a_mean_has_is_refused_by_others_and_changes_nothing():
    accumulator = fill(build())
    state, before = dict(accumulator.state_dict()), snapshot(accumulator)
    for name in ("maps", "missed"):
        with pytest.raises(ValueError, match=f"holds base_{name}, which only a mean has"):
            accumulator.load_state_dict({**state, f"base_{name}": state["maps"]})
    assert same(snapshot(accumulator), before)
