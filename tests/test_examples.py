"""The short examples run, at a tiny size, and do what they say."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import find
from PIL import Image

from oaa_lib import AttentionAccumulator
from oaa_lib.testing import assert_monotone, attention_streams

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    def call(script, *options):
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.slow
@pytest.mark.parametrize("script", ["wrap_torchvision.py", "wrap_timm_vit.py"])
def test_attention_of_a_wrapped_classifier_grows(run, script):
    lines = run(script, "--images", 20, "--size", 64, "--epochs", 2).splitlines()
    first, second = (float(line.rsplit(" ", 1)[1]) for line in lines[:2])
    assert 0 <= first <= second <= 1
    assert lines[-1].startswith("done: ")


def test_the_maximum_keeps_what_the_mean_and_a_fading_one_lose(run):
    rows = [line.split() for line in run("own_fusion.py").splitlines()[1:]]
    values = {" ".join(row[:-8]): [float(value) for value in row[-8:]] for row in rows}
    assert values["max"] == [1.0] * 8
    assert values["mean"] == pytest.approx([1 / 8] * 8, abs=0.006)
    assert values["fading max"] == pytest.approx([0.9 ** (7 - cell) for cell in range(8)], abs=0.02)


def test_the_property_test_of_the_own_fusion_holds_and_can_fail():
    module = runpy.run_path(str(EXAMPLES / "own_fusion.py"))
    module["test_fading_max_is_a_fusion"]()
    module["test_without_fading_it_never_falls"]()

    def breaks(maps):
        try:
            assert_monotone(module["FadingMax"](0.9), maps)
        except AssertionError:
            return True
        return False

    assert find(attention_streams(), breaks)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.png", "d.png"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "labels.csv").write_text("a.png,dog\nb.jpg,cat;dog\nc.png,\nd.png,cat\n")
    return tmp_path


@pytest.mark.slow
def test_own_pictures_get_maps_by_name_and_go_on(run, photos):
    options = ["--images", photos / "photos", "--csv", photos / "labels.csv", "--out", photos / "run", "--size", 64]
    assert "done: classes cat, dog are 0 to 1" in run("custom_dataset.py", *options, "--batch-size", 2, "--epochs", 1)
    maps = sorted(path.name for path in (photos / "run" / "maps").iterdir())
    assert maps == ["a.png_1.png", "b.jpg_0.png", "b.jpg_1.png", "d.png_0.png"]
    before = AttentionAccumulator.load(photos / "run" / "attention.maps")
    run("custom_dataset.py", *options, "--batch-size", 2, "--epochs", 1, "--resume")
    after = AttentionAccumulator.load(photos / "run" / "attention.maps")
    assert after.offered == 2 * before.offered > 0
    # the same seed: the network sees what it has seen
    assert all((after.attention(name) == before.attention(name)).all() for name in ("a.png", "b.jpg", "d.png"))


@pytest.mark.slow
def test_own_pictures_have_the_maps_of_a_seed_and_of_no_other_settings(run, photos, capsys):
    options = ["--images", photos / "photos", "--csv", photos / "labels.csv", "--size", 64, "--batch-size", 3]

    def kept(out, *more):
        run("custom_dataset.py", *options, "--epochs", 1, "--out", photos / out, *more)
        maps = AttentionAccumulator.load(photos / out / "attention.maps")
        return [maps.attention(name).tolist() for name in ("a.png", "b.jpg", "d.png")]

    first = kept("first")  # its last batch is one image
    assert kept("second") == first
    assert kept("third", "--seed", 1) != first
    before = (photos / "first" / "attention.maps").read_bytes()
    for more, message in (
        ([], "first/attention.maps is there; pass --resume to go on with these maps, or take another folder"),
        (["--resume", "--model", "mobilenet_v2"], "other settings (model: resnet18 there, mobilenet_v2 asked)"),
        (["--resume", "--seed", 1], "other settings (seed: 0 there, 1 asked)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            kept("first", *more)
        assert message in f"{capsys.readouterr().err} {stopped.value}"
    (photos / "labels.csv").write_text("a.png,dog\nb.jpg,cat;dog\n")
    with pytest.raises(SystemExit, match=r"belongs to another data set or setting.*; take another folder"):
        kept("first", "--resume")
    assert (photos / "first" / "attention.maps").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", 0], "--epochs: expected at least 1, got 0"),
        (["--batch-size", 0], "--batch-size: expected at least 1, got 0"),
        (["--size", 0], "--size: expected at least 64, got 0"),
        (["--size", 32, "--batch-size", 3], "--size: expected at least 64, got 32"),
        (["--seed", -1], "argument --seed: expected a whole number from 0 to 16777215, got -1"),
    ],
)
def test_impossible_options_of_own_pictures_are_told(run, photos, options, message, capsys):
    where = ["--images", photos / "photos", "--csv", photos / "labels.csv", "--out", photos / "run"]
    with pytest.raises(SystemExit) as stopped:
        run("custom_dataset.py", *where, *options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (photos / "run").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("a.png,dog,cat\n", "expected rows FILE,CLASS"),
        ("", "got none"),
        ("a.png,dog\nz.png,dog\n", "line 2: z.png: no such image"),
    ],
)
def test_a_bad_table_is_told(run, photos, table, message):
    (photos / "labels.csv").write_text(table)
    with pytest.raises(SystemExit, match=message):
        run("custom_dataset.py", "--images", photos / "photos", "--csv", photos / "labels.csv", "--out", photos / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nope"], "torchvision has no --model nope with --weights None"),
        (["--weights", "nope"], "torchvision has no --model resnet18 with --weights nope"),
        (["--model", "squeezenet1_0"], "--model squeezenet1_0: expected one with a linear last layer"),
    ],
)
def test_a_model_that_cannot_be_taken_is_told(run, photos, options, message, capsys):
    where = ["--images", photos / "photos", "--csv", photos / "labels.csv", "--out", photos / "run"]
    with pytest.raises(SystemExit):
        run("custom_dataset.py", *where, *options)
    assert message in capsys.readouterr().err
    assert not (photos / "run").exists()


def test_own_pictures_are_upright(run, photos):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(photos / "photos/e.jpg", exif=exif)
    (photos / "labels.csv").write_text("a,dog\ne,cat\n")
    pictures = runpy.run_path(str(EXAMPLES / "custom_dataset.py"))["Pictures"](photos / "photos", photos / "labels.csv")
    assert [picture.size for picture in (pictures[0], pictures[1])] == [(60, 40), (40, 60)]
    (photos / "photos/e.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"e\.jpg cannot be read"):
        pictures[1]
