"""The quickstart, at a tiny size: its outputs, that it repeats itself, and what it says to bad arguments."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oaa_lib import AttentionAccumulator, ConfusionMatrix

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICKSTART = EXAMPLES / "quickstart.py"
ROWS = ["CAM", "CAM, flip-averaged", "mean", "max", "max + MCE", "max + hybrid"]


def run(*options):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setattr(sys, "argv", ["quickstart.py", *map(str, options)])
        try:
            return runpy.run_path(str(QUICKSTART), run_name="__main__")
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("quickstart") for _ in range(2)]
    for folder in folders:
        run("--images", 24, "--epochs", 2, "--seed", 3, "--out", folder)
    return folders


@pytest.mark.slow
def test_every_row_of_table_2_is_scored(outputs):
    results = json.loads((outputs[0] / "results.json").read_text())
    assert list(results["rows"]) == ROWS
    for row in results["rows"].values():
        assert 0 <= row["reported"] <= 100
        assert 0 < row["threshold"] < 1
    assert results["settings"]["seed"] == 3
    assert results["tuned_on"] == results["reported_on"] == 12


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(outputs):
    first, second = (json.loads((folder / "results.json").read_text()) for folder in outputs)
    assert first["settings"].pop("out") != second["settings"].pop("out")
    assert first == second
    for name in ("maps.safetensors", "contact_sheet.png"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()


@pytest.mark.slow
def test_the_pictures_show_something(outputs):
    for name in ("contact_sheet.png", "cue_miou_over_epochs.png"):
        with Image.open(outputs[0] / name) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10


@pytest.mark.slow
def test_the_maps_can_be_loaded_and_scored_again(outputs):
    """The row of OAA max, recomputed from the saved maps by other means."""
    module = runpy.run_path(str(EXAMPLES / "drawn_images.py"))
    _, labels, masks = module["draw_data"](24, 3)
    maps = AttentionAccumulator.load(outputs[0] / "maps.safetensors")
    assert maps.accepted > 0
    results = json.loads((outputs[0] / "results.json").read_text())
    threshold = results["rows"]["max"]["threshold"]
    matrix = ConfusionMatrix(labels.shape[1] + 1)
    for i in range(12, 24):
        maps_i = torch.nn.functional.interpolate(maps[[i]], masks.shape[1:], mode="bilinear")[0]
        value, winner = (maps_i * labels[i][:, None, None]).max(0)
        matrix.update(torch.where(value > threshold, winner + 1, 0), masks[i])
    assert 100 * matrix.mean_iou() == pytest.approx(results["rows"]["max"]["reported"], abs=1e-6)


@pytest.mark.slow
def test_a_pseudo_label_is_written_for_every_image(outputs):
    paths = sorted((outputs[0] / "pseudo_labels").iterdir())
    assert len(paths) == 24
    with Image.open(paths[0]) as image:
        assert image.mode == "P"
        assert set(np.unique(np.asarray(image))) <= {0, 1, 2, 3, 4, 5, 255}


@pytest.mark.slow
def test_what_is_not_known_is_null_and_a_dash(tmp_path, capsys):
    """Score maps of two steps are negative everywhere: the maps of the first epoch are 0, and similar to none."""
    run("--images", 20, "--epochs", 2, "--out", tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["epochs"][0]["similarity"] is None
    assert "nan" not in capsys.readouterr().out


def test_label_images_of_a_run_with_more_images_do_not_stay(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    write = runpy.run_path(str(QUICKSTART))["write_label_images"]
    write(torch.ones(30, 8, 8), tmp_path)
    (tmp_path / "2007_000032.png").write_bytes(b"of others")
    write(torch.full((20, 8, 8), 2), tmp_path)
    written = [f"{i:04d}.png" for i in range(20)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*written, "2007_000032.png"]
    for name in written:
        with Image.open(tmp_path / name) as image:
            assert np.unique(np.asarray(image)) == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", 0], "--epochs: expected at least 1, got 0"),
        (["--images", 2], "--images: expected at least 20, got 2"),
        (["--seed", -1], "--seed: expected at least 0, got -1"),
        (["--seed", 10**23], "--seed: expected at most 4294967295, got 1000"),
        (["--device", "abacus"], "--device: torch cannot use 'abacus'"),
        (["--device", "meta"], "--device: torch cannot use 'meta'"),
        (["--out", __file__], "--out: expected a folder"),
    ],
)
def test_bad_arguments_are_told(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_images_hold_a_small_part_and_a_larger_body_of_several_classes():
    module = runpy.run_path(str(EXAMPLES / "drawn_images.py"))
    images, labels, masks = module["draw_data"](60, 0)
    assert images.min() >= 0
    assert images.max() <= 1
    assert (labels.sum(1) > 1).any()
    assert labels.any(0).all()
    sizes = torch.stack([(masks[i] == c + 1).sum() for i, c in labels.nonzero().tolist()])
    assert sizes.float().median() > 3 * 81  # the glyph is 9 x 9
