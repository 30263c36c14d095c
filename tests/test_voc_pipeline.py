"""The stages of examples/voc run whole on a drawn six-image folder in VOC layout, as a user would run them."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from data import ShapeBatches, VOCFolder
from evaluate_cues import confusion_at_thresholds, count_cues, mean_ious
from networks import Geometry
from PIL import Image

from oaa_lib import AttentionAccumulator, ConfusionMatrix

EXAMPLES = Path(__file__).parents[1] / "examples" / "voc"
TINY = ["--backbone", "efficientnet_lite0", "--weights", "none", "--short-side", 49, "--batch-size", 2, "--workers", 0]


@pytest.fixture(scope="session")
def voc(tmp_path_factory):
    """Six images of three shapes, one with two classes, and a negative; masks are rectangles of flat colour."""
    root = tmp_path_factory.mktemp("voc")
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "Saliency"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("red\ngreen\n")
    rng = np.random.default_rng(0)
    labels = {"a": [0], "b": [1], "c": [0, 1], "d": [1], "e": [0], "f": [1], "none": []}
    sizes = {"a": (60, 90), "b": (60, 90), "c": (60, 90), "d": (90, 60), "e": (90, 60), "f": (60, 60), "none": (60, 90)}
    for name, ids in labels.items():
        height, width = sizes[name]
        pixels = rng.integers(90, 160, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), dtype=np.uint8)
        for i, c in enumerate(ids):
            box = np.s_[15:40, 8 + 25 * i : 28 + 25 * i]
            pixels[box][..., c] = 250
            mask[box] = c + 1
        mask[0] = 255
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        label = Image.fromarray(mask, mode="P")
        label.putpalette([v for k in range(256) for v in (k, k, k)])
        label.save(root / "SegmentationClass" / f"{name}.png")
        Image.fromarray(np.where((mask > 0) & (mask < 255), 255, 0).astype(np.uint8)).save(
            root / "Saliency" / f"{name}.png"
        )
    lists = root / "ImageSets" / "Segmentation"
    for split in ("train", "val"):
        rows = [f"{name} {' '.join(map(str, ids))}" for name, ids in labels.items() if ids]
        (lists / f"{split}_cls.txt").write_text("\n".join(rows) + "\n")
        (lists / f"{split}.txt").write_text("\n".join(row.split()[0] for row in rows) + "\n")
    (lists / "background.txt").write_text("none\n")
    return root


def run(script, *options, expect=0):
    """Run a stage as a user does, but in this process, which has torch loaded; returns what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr(sys, "argv", [script, *map(str, options)])
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
            if isinstance(code, str):
                printed.write(code)
    assert (code == 0) == (expect == 0), printed.getvalue()
    return printed.getvalue()


@pytest.fixture(scope="session")
def trained(voc, tmp_path_factory):
    """Stage 1 run whole: three epochs without a break."""
    out = tmp_path_factory.mktemp("run") / "attention"
    options = ["--voc-root", voc, "--out", out, *TINY, "--epochs", 3, "--negatives", "background", "--gate", "none"]
    text = run("train_attention.py", *options)
    assert text.splitlines()[-1].startswith("done: 3 epochs, 7 pairs")
    return out


@pytest.mark.slow
def test_training_accumulates_every_pair_and_logs_each_epoch(voc, trained):
    maps = AttentionAccumulator.load(trained / "max.safetensors")
    mean = AttentionAccumulator.load(trained / "mean.safetensors")
    assert maps.pairs.keys == ["a", "b", "c", "d", "e", "f", "none"]
    assert maps.accepted == maps.offered == 3 * 7
    assert (maps[range(7)] >= mean[range(7)] - 0.5 / 255 - 1e-6).all()
    log = (trained / "log.csv").read_text().splitlines()
    assert len(log) == 4
    assert {"gate_pass_rate", "cosine_to_previous_epoch", "pairs_empty"} <= set(log[0].split(","))
    assert json.loads((trained / "settings.json").read_text())["backbone"] == "efficientnet_lite0"


@pytest.mark.slow
def test_a_resumed_training_ends_like_an_uninterrupted_one(voc, trained, tmp_path):
    """The process is stopped in its second epoch, by the same means as a user's Ctrl-C, then started again."""
    options = ["--voc-root", voc, "--out", tmp_path / "again", *TINY, "--epochs", 3, "--negatives", "background"]
    options += ["--gate", "none"]
    stop = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]\n"
        "import training, train_attention\n"
        "save = training.Run.save\n"
        "def save_and_stop(self, **state):\n"
        "    save(self, **state)\n"
        "    raise KeyboardInterrupt\n"
        "training.Run.save = save_and_stop\n"
        "train_attention.main()\n"
    )
    command = [sys.executable, "-c", stop, str(EXAMPLES), "train_attention.py", *map(str, options)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums in another order would differ
    assert subprocess.run(command, capture_output=True, check=False, env=one_thread).returncode != 0
    assert not (tmp_path / "again" / "max.safetensors").exists()
    assert "resumed after epoch 1" in run("train_attention.py", *options)
    for name in ("max", "mean"):
        whole, resumed = (
            AttentionAccumulator.load(folder / f"{name}.safetensors") for folder in (trained, tmp_path / "again")
        )
        assert torch.equal(whole[range(7)], resumed[range(7)])
        assert torch.equal(whole.counts, resumed.counts)
    weights = [torch.load(f / "checkpoint.pt", weights_only=True)["network"] for f in (trained, tmp_path / "again")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_the_stages_after_training_go_together(voc, trained, tmp_path):
    integral = [
        *TINY,
        "--epochs",
        1,
        "--negatives",
        "background",
        "--maps",
        trained / "max.safetensors",
        "--threshold",
        0.3,
    ]
    text = run("train_integral.py", "--voc-root", voc, "--out", tmp_path / "hybrid", *integral)
    assert "share_constrained" in text
    for source, folder, splits in (
        ("cam_flip", trained, ("train", "val")),
        ("max", trained, ("train",)),
        ("integral", tmp_path / "hybrid", ("train",)),
    ):
        for split in splits:
            out = tmp_path / "maps" / source / split
            options = ["--voc-root", voc, "--workers", 0, "--run", folder, "--source", source, "--split", split]
            assert "maps of 6 images written" in run("export_attention.py", *options, "--out", out)
            assert sorted(p.name for p in out.iterdir()) == [
                f"{p}.png" for p in ["a_0", "b_1", "c_0", "c_1", "d_1", "e_0", "f_1"]
            ]
            with Image.open(out / "d_1.png") as image:
                assert (image.mode, image.size) == ("L", (60, 90))
    again = ["--voc-root", voc, "--run", trained, "--source", "max", "--out", tmp_path / "maps/max/train"]
    assert "0 images written, 6 were there" in run("export_attention.py", *again)

    maps, labels = tmp_path / "maps/max/train", tmp_path / "labels"
    run("make_pseudo_labels.py", "--voc-root", voc, "--maps", maps, "--background", 0.4, "--out", labels)
    run(
        "make_pseudo_labels.py",
        "--voc-root",
        voc,
        "--maps",
        maps,
        "--saliency",
        voc / "Saliency",
        "--out",
        tmp_path / "s",
    )
    with Image.open(labels / "c.png") as image:
        assert (image.mode, image.size) == ("P", (90, 60))
        assert set(np.unique(np.asarray(image))) <= {0, 1, 2, 255}
        assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    scores = ["--voc-root", voc, "--maps", maps, "--labels", labels, "--json", tmp_path / "scores.json"]
    text = run("evaluate_cues.py", *scores)
    assert text.splitlines()[-1].startswith("done: best is")
    results = json.loads((tmp_path / "scores.json").read_text())
    assert len(results[str(maps)]["curve"]) == 256
    assert 0 <= results[str(labels)]["mean_iou"] <= 1

    sheet = ["--voc-root", voc, "--run", trained, "--maps", maps, "--labels", labels, "--out", tmp_path / "sheet.png"]
    run("contact_sheet.py", *sheet)
    with Image.open(tmp_path / "sheet.png") as image:
        assert np.asarray(image.convert("L")).std() > 10


def test_cue_counts_equal_the_metric_at_every_threshold(voc, tmp_path):
    data = VOCFolder(voc, "train")
    rng = np.random.default_rng(1)
    for name in data.names:
        for c in data.class_ids(name):
            size = tuple(data.mask(name).shape)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / f"{name}_{c}.png")
    curve = mean_ious(confusion_at_thresholds(count_cues(data, tmp_path).sum(0)))
    for level in (0, 1, 77, 200, 255):
        matrix = ConfusionMatrix(3)
        for name in data.names:
            ids = data.class_ids(name)
            maps = np.stack([np.asarray(Image.open(tmp_path / f"{name}_{c}.png")) for c in ids])
            label = np.where(maps.max(0) >= level, np.array(ids)[maps.argmax(0)] + 1, 0)
            matrix.update(torch.from_numpy(label), data.mask(name))
        assert curve[level].item() == pytest.approx(matrix.mean_iou(), abs=1e-12)


def test_a_constant_background_below_the_releases_threshold_counts(voc, tmp_path):
    (tmp_path / "maps").mkdir()
    data = VOCFolder(voc, "train")
    for name in data.names:
        ramp = np.linspace(0, 255, data.mask(name).numel()).reshape(tuple(data.mask(name).shape)).astype(np.uint8)
        for c in data.class_ids(name):
            Image.fromarray(ramp).save(tmp_path / "maps" / f"{name}_{c}.png")
    options = ["--voc-root", voc, "--maps", tmp_path / "maps", "--out", tmp_path / "labels"]
    run("make_pseudo_labels.py", *options, "--background", 0.1)
    with Image.open(tmp_path / "labels" / "a.png") as image:
        assert np.mean(np.asarray(image) == 1) == pytest.approx(0.9, abs=0.01)


def test_batches_share_a_shape_and_cover_every_image_once(voc):
    data = VOCFolder(voc, "train", negatives="background")
    data.prepare(49, Geometry(16, centred=True), (0.5,) * 3, (0.5,) * 3)
    batches = ShapeBatches(data, 2, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        batches.epoch = epoch
        drawn = list(batches)
        assert len(drawn) == len(batches)
        assert sorted(index for batch in drawn for index, _ in batch) == list(range(7))
        assert all(len({data.sizes[data.names[index]] for index, _ in batch}) == 1 for batch in drawn)
        orders.append(drawn)
    assert orders[0] == orders[2] != orders[1]


def test_a_mirrored_sample_is_the_mirror_image(voc):
    data = VOCFolder(voc, "train")
    data.prepare(49, Geometry(16, centred=True), (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(data[3, True].image.flip(-1), data[3, False].image)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train_attention.py", ["--voc-root", "nowhere", "--out", "OUT"], "not in VOC layout"),
        ("train_attention.py", ["--voc-root", "VOC", "--out", "OUT", "--epochs", 0], "expected --epochs"),
        ("train_attention.py", ["--voc-root", "VOC", "--out", "OUT", "--negatives", "absent"], "does not exist"),
        (
            "export_attention.py",
            ["--voc-root", "VOC", "--run", "OUT", "--source", "cam", "--out", "OUT"],
            "settings.json",
        ),
        ("make_pseudo_labels.py", ["--voc-root", "VOC", "--maps", "OUT", "--out", "OUT"], "--saliency --background"),
        ("evaluate_cues.py", ["--voc-root", "VOC"], "at least one folder"),
        ("evaluate_cues.py", ["--voc-root", "VOC", "--maps", "OUT"], "is missing; run export_attention.py"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_told_in_a_sentence(voc, tmp_path, script, options, message):
    places = {"VOC": voc, "OUT": tmp_path / "out"}
    text = run(script, *[places.get(option, option) for option in options], expect=1)
    assert message in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_run_folder_of_other_settings_is_refused(voc, trained):
    before = (trained / "checkpoint.pt").read_bytes()
    options = ["--voc-root", voc, "--out", trained, *TINY, "--epochs", 5, "--negatives", "background", "--gate", "none"]
    assert "made with other settings (epochs)" in run("train_attention.py", *options, expect=1)
    assert (trained / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(p.name for p in EXAMPLES.glob("*.py") if "def main" in p.read_text()))
def test_help_answers(script):
    assert "usage:" in run(script, "--help")
