"""Files and states of earlier versions are still read, and gone on with. How they were made: tests/files/make.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from oaa_lib import AttentionAccumulator, View

FILES = Path(__file__).parent / "files"
KEYS = ["a", "b", "c"]
OWNERS = {"labels": [[1, 1, 0], [0, 0, 1], [1, 0, 1]], "keys": KEYS}
SIZES = [[2, 3], [4, 1], [3, 3]]
OPTIONS = {
    "max": {"map_size": (3, 4)},
    "max-float16-sizes": {"map_size": SIZES, "dtype": torch.float16, "gate": "topk"},
    "max-latest": {"map_size": (3, 4)},
    "mean": {"map_size": (3, 4), "fusion": "mean", "gate": None},
    "mean-sizes": {"map_size": SIZES, "fusion": "mean"},
    "ema": {"map_size": (3, 4), "fusion": "ema"},
    "noisy-or": {"map_size": (3, 4), "fusion": "noisy-or"},
}
EXPECTED = json.loads((FILES / "expected.json").read_text())
every_case = pytest.mark.parametrize("case", OPTIONS)


def build(case, **options):
    return AttentionAccumulator(**OWNERS, **OPTIONS[case], **options)


def stream(accumulator, batches):
    """Score maps with a NaN, crops, flips and a repeated image; the same as when the files were made."""
    for number in batches:
        rng = np.random.default_rng(number)
        score_maps = torch.from_numpy(rng.integers(-8, 9, (4, 3, 3, 4)) / 8).float()
        score_maps[0, 0, 0, 0] = float("nan") if number == 1 else 1.0
        views = [View(), View(flip=True), View(0.25, 0, 1, 0.5), View(-0.25, 0.25, 1.25, 1, True)]
        accumulator.update(["a", "b", "c", "a"], score_maps, views=views, fill_empty=True)


def check(accumulator, when):
    """What users see."""
    for key, maps in zip(KEYS, when["attention"], strict=True):
        torch.testing.assert_close(accumulator.attention(key), torch.tensor(maps), rtol=0, atol=1e-6)
    assert accumulator.counts.tolist() == when["counts"]
    assert (accumulator.offered, accumulator.skipped) == (when["offered"], when["skipped"])


def check_and_go_on(case, accumulator):
    check(accumulator, EXPECTED[case]["then"])
    stream(accumulator, range(3, 5))
    check(accumulator, EXPECTED[case]["later"])


@every_case
@pytest.mark.parametrize("kind", ["saved", "mapped"])
def test_a_file_is_loaded(case, kind):
    loaded = AttentionAccumulator.load(FILES / f"{case}.{kind}")
    assert repr(loaded) == repr(build(case))
    check_and_go_on(case, loaded)


@every_case
def test_a_mapped_file_is_gone_on_with(case, tmp_path):
    path = shutil.copy(FILES / f"{case}.mapped", tmp_path / "maps")
    mapped = build(case, path=path, resume=True)
    check_and_go_on(case, mapped)
    del mapped
    check(build(case, path=path, resume=True), EXPECTED[case]["later"])


@every_case
def test_a_state_is_loaded(case):
    accumulator = build(case)
    accumulator.load_state_dict(torch.load(FILES / f"{case}.state.pt", weights_only=True))
    check_and_go_on(case, accumulator)


def test_what_a_killed_process_had_noted_is_repeated(tmp_path):
    path = shutil.copy(FILES / "max.killed", tmp_path / "maps")
    check_and_go_on("max", AttentionAccumulator.load(path))
    check_and_go_on("max", build("max", path=path, resume=True))


def test_a_saved_file_becomes_a_mapped_one(tmp_path):
    mapped = build("mean", path=tmp_path / "maps")
    mapped.load_state_dict(AttentionAccumulator.load(FILES / "mean.saved").state_dict())
    check_and_go_on("mean", mapped)


@pytest.mark.parametrize("kind", ["saved", "mapped"])
def test_maps_of_the_harmonic_fusion_are_refused_in_a_sentence(kind):
    with pytest.raises(ValueError, match=rf"harmonic\.{kind} .*fusion.*'harmonic'; mix a mean and a maximum with oaa_"):
        AttentionAccumulator.load(FILES / f"harmonic.{kind}")


def test_a_state_of_the_harmonic_fusion_is_refused_in_a_sentence():
    state = torch.load(FILES / "harmonic.state.pt", weights_only=True)
    for accumulator in (build("max"), build("mean")):
        with pytest.raises(ValueError, match=r"expected fusion .*, got 'harmonic'"):
            accumulator.load_state_dict(state)
