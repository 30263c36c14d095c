"""The stages of examples/voc run whole on a drawn six-image folder in VOC layout, as a user would run them."""

import argparse
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from data import VOCFolder
from evaluate_cues import evaluate_maps, sweep_cues
from networks import Geometry
from options import add_options, resolve
from PIL import Image
from samples import AttentionImages
from scores import foreground
from stream import make_loader

from oaa_lib import AttentionAccumulator, ConfusionMatrix

EXAMPLES = Path(__file__).parents[1] / "examples" / "voc"
BACKBONE = ["--recipe", "small", "--backbone", "efficientnet_lite0", "--weights", "none"]
TINY = [*BACKBONE, "--short-side", 49, "--batch-size", 2, "--workers", 0, "--negatives", "background"]


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


STAGE_1 = [*TINY, "--iterations", 11, "--drop-at", 8, "--gate", "none"]


@pytest.fixture(scope="session")
def trained(voc, tmp_path_factory):
    """Stage 1 run whole: a little more than three passes without a break."""
    out = tmp_path_factory.mktemp("run") / "attention"
    text = run("train_attention.py", "--voc-root", voc, "--out", out, *STAGE_1)
    assert text.splitlines()[-1].startswith("done: 11 iterations, 7 pairs, 0 never accumulated")
    return out


@pytest.mark.slow
def test_training_accumulates_every_pair_and_logs_each_epoch(voc, trained):
    maps = AttentionAccumulator.load(trained / "max.safetensors")
    mean = AttentionAccumulator.load(trained / "mean.safetensors")
    assert maps.pairs.keys == ["a", "b", "c", "d", "e", "f", "none"]
    # 11 steps of 2 images are three passes over 7 images and one image more
    assert 3 * 7 <= maps.accepted == maps.offered <= 3 * 7 + 2
    assert set(maps.counts[VOCFolder(voc, "train", negatives="background").labels.bool()].tolist()) <= {3, 4}
    for name in maps.pairs.keys:  # the largest value is never below the average
        assert (maps.attention(name) >= mean.attention(name) - 0.5 / 255 - 1e-6).all()
    assert [tuple(size) for size in maps.map_size.tolist()] == [(4, 6)] * 3 + [(6, 4)] * 2 + [(4, 4), (4, 6)]
    log = (trained / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in log[1:]] == ["4", "8", "11"]
    assert {"gate_pass_rate", "similarity", "pairs_empty"} <= set(log[0].split(","))
    settings = json.loads((trained / "settings.json").read_text())
    assert settings["recipe"]["iterations"] == 11
    assert settings["arguments"]["backbone"] == "efficientnet_lite0"
    assert settings["data"]["images"] == 7


def same_run(folder, other):
    """Whether two trainings have ended in the same state, to the bit."""
    for name in ("max", "mean"):
        maps, others = (AttentionAccumulator.load(f / f"{name}.safetensors") for f in (folder, other))
        assert torch.equal(maps.counts, others.counts)
        assert all(torch.equal(maps.attention(key), others.attention(key)) for key in maps.pairs.keys)
    weights = [torch.load(f / "checkpoint.pt", weights_only=True)["network"] for f in (folder, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_a_training_stopped_by_ctrl_c_and_resumed_ends_like_an_uninterrupted_one(voc, trained, tmp_path):
    """A real process gets SIGINT in the middle of an epoch; it ends its step, and goes on when started again."""
    out = tmp_path / "again"
    options = ["--voc-root", voc, "--out", out, *STAGE_1, "--log-every", 1]
    command = [sys.executable, str(EXAMPLES / "train_attention.py"), *map(str, options)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums in another order would differ
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread)
    while process.poll() is None and not (out / "log.csv").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "the same command goes on from there" in errors
    assert not (out / "max.safetensors").exists()
    assert "resumed after iteration" in run("train_attention.py", *options)
    same_run(trained, out)
    steps = [int(row.split(",")[0]) for row in (out / "log.csv").read_text().splitlines()[1:]]
    assert steps == list(range(1, 12))


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_last_checkpoint(voc, trained, tmp_path):
    out = tmp_path / "again"
    options = ["--voc-root", voc, "--out", out, *STAGE_1, "--log-every", 1, "--checkpoint-every", 2]
    command = [sys.executable, str(EXAMPLES / "train_attention.py"), *map(str, options)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=one_thread)
    while process.poll() is None and not (out / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "max.safetensors").exists()
    assert "resumed after iteration" in run("train_attention.py", *options)
    same_run(trained, out)
    steps = [int(row.split(",")[0]) for row in (out / "log.csv").read_text().splitlines()[1:]]
    assert steps == list(range(1, 12))


@pytest.mark.slow
def test_two_processes_train_as_one(voc, trained, tmp_path):
    """Gradients are averaged and maps synchronised; only the order of sums may differ."""
    run_on_two(EXAMPLES / "train_attention.py", "--voc-root", voc, "--out", tmp_path / "two", *STAGE_1)
    about_the_same(trained, tmp_path / "two")


def run_on_two(script, *options):
    """A script on two processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [*map(str, (script, *options)), "--device", "cpu"]
    paths = os.pathsep.join([str(EXAMPLES), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)
    assert result.returncode == 0, result.stderr


def about_the_same(folder, other):
    """Whether two trainings have seen the same, up to the order of sums."""
    for name in ("max", "mean"):
        one, two = (AttentionAccumulator.load(f / f"{name}.safetensors") for f in (folder, other))
        assert torch.equal(one.counts, two.counts)
        assert torch.equal(one.statistics().offered, two.statistics().offered)
        for key in one.pairs.keys:
            torch.testing.assert_close(one.attention(key), two.attention(key), atol=0.02, rtol=0)


@pytest.mark.slow
def test_a_training_of_one_process_that_goes_on_with_two_has_seen_everything_once(voc, trained, tmp_path):
    options = ["--voc-root", voc, "--out", tmp_path / "run", *STAGE_1, "--checkpoint-every", 4, "--device", "cpu"]
    command = [sys.executable, str(EXAMPLES / "train_attention.py"), *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    run_on_two(EXAMPLES / "train_attention.py", *options)
    about_the_same(trained, tmp_path / "run")


SEVERAL_SHAPES = ["--batch-size", 4, "--iterations", 4, "--drop-at", 4, "--device", "cpu", "--optimizer", "sgd"]


def moved_together(folder, other):
    """Whether two trainings have learnt the same, up to the order of sums."""
    one, two = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, other))
    for number, state in one["optimizer"]["state"].items():  # the momentum: the sum of the gradients, nearly
        momentum, others = (each["momentum_buffer"] for each in (state, two["optimizer"]["state"][number]))
        assert (momentum - others).norm() <= 0.01 * momentum.norm() + 1e-6


@pytest.mark.slow
def test_two_processes_learn_the_same_from_batches_of_several_shapes(voc, trained, tmp_path):
    """A process's share of a batch has one to three parts, and another number of them than the other's."""
    options = ["--voc-root", voc, *TINY, *SEVERAL_SHAPES]
    stage_1 = [EXAMPLES / "train_attention.py", *options, "--gate", "none"]
    run(*stage_1, "--out", tmp_path / "one")
    run_on_two(*stage_1, "--out", tmp_path / "two")
    about_the_same(tmp_path / "one", tmp_path / "two")
    moved_together(tmp_path / "one", tmp_path / "two")
    logs = [(tmp_path / f / "log.csv").read_text().splitlines() for f in ("one", "two")]
    column = logs[0][0].split(",").index("pairs_empty")
    assert [row.split(",")[column] for row in logs[0]] == [row.split(",")[column] for row in logs[1]]
    stage_2 = [EXAMPLES / "train_integral.py", *options, "--maps", trained / "max.safetensors"]
    run(*stage_2, "--out", tmp_path / "integral")
    run_on_two(*stage_2, "--out", tmp_path / "integral_two")
    moved_together(tmp_path / "integral", tmp_path / "integral_two")


@pytest.mark.slow
def test_a_second_training_in_a_folder_is_refused_while_the_first_goes_on(voc, tmp_path):
    options = ["--voc-root", voc, "--out", tmp_path / "run", *STAGE_1, "--iterations", 10**6, "--log-every", 1]
    command = [sys.executable, str(EXAMPLES / "train_attention.py"), *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (tmp_path / "run" / "log.csv").exists():
            time.sleep(0.01)
        second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert "another process is at work there" in second.stderr
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    steps = [row.split(",")[0] for row in (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]]
    assert len(steps) == len({*steps})


A_GATE_OF_MY_OWN = """
import train_attention
from oaa_lib import gating
from training import Run

steps, now = Run.steps, {}

def noting(run, images):
    for step, batch in steps(run, images):
        now.update(step=step, last_pass=run.last_pass)
        yield step, batch

Run.steps = noting
gating.GATES["score"] = lambda logits, labels: labels & PASSES
train_attention.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "iterations"), [("(now['step'] < now['last_pass'][0])", 8), ("False", 11)], ids=["before it", "never"]
)
def test_two_processes_fill_a_pair_once_and_only_if_it_is_empty(voc, tmp_path, passes, iterations):
    """Maps pass the gate in the first of two passes alone, or never; the last whole pass fills what is empty.

    Batches of two hold images of two passes: the first of the second pass, the last of the third. With this seed the
    images in them are shown to one process in one of the passes, and to the other in the other.
    """
    (tmp_path / "mine.py").write_text(A_GATE_OF_MY_OWN.replace("PASSES", passes))
    options = ["--voc-root", voc, "--out", tmp_path / "run", *TINY, "--iterations", iterations, "--drop-at", 9]
    run_on_two(tmp_path / "mine.py", *options, "--fill-empty", "last-epoch", "--seed", 24)
    maps = AttentionAccumulator.load(tmp_path / "run" / "max.safetensors")
    assert maps.counts.sum() == 7
    assert maps.counts.max() == 1


@pytest.mark.slow
def test_the_stages_after_training_go_together(voc, trained, tmp_path):
    maps = ["--maps", trained / "max.safetensors"]
    integral = [*TINY, "--iterations", 4, "--drop-at", 3, *maps, "--threshold", 0.3]
    run("train_integral.py", "--voc-root", voc, "--out", tmp_path / "hybrid", *integral)
    assert "share_constrained" in (tmp_path / "hybrid" / "log.csv").read_text().splitlines()[0]
    for source, folder, splits in (
        ("cam_flip", trained, ("train", "val")),
        ("max", trained, ("train",)),
        ("integral", tmp_path / "hybrid", ("train",)),
    ):
        for split in splits:
            out = tmp_path / "maps" / source / split
            options = ["--voc-root", voc, "--run", folder, "--source", source, "--split", split, "--recipe", "small"]
            assert "maps of 6 images written" in run("export_attention.py", *options, "--out", out)
            assert sorted(p.name for p in out.glob("*.png")) == [
                f"{p}.png" for p in ["a_0", "b_1", "c_0", "c_1", "d_1", "e_0", "f_1"]
            ]
            with Image.open(out / "d_1.png") as image:
                assert (image.mode, image.size) == ("L", (60, 90))
    export = ["--voc-root", voc, "--run", trained, "--recipe", "small", "--source"]
    run("export_attention.py", *export, "cam_ms", "--out", tmp_path / "maps/ms")
    views = ["--scales", 0.5, 1, 1.5, 2, "--flip-views"]
    run("export_attention.py", *export, "cam", *views, "--out", tmp_path / "maps/views")
    pictures = [{p.name: p.read_bytes() for p in (tmp_path / "maps" / f).glob("*.png")} for f in ("ms", "views")]
    assert len(pictures[0]) == 7
    assert pictures[0] == pictures[1]
    again = ["--voc-root", voc, "--run", trained, "--source", "max", "--out", tmp_path / "maps/max/train"]
    text = run("export_attention.py", *again, "--recipe", "paper", expect=1)
    assert "other settings (stretch: False there, True asked)" in text
    assert "0 images written, 6 were there" in run("export_attention.py", *again)  # the recipe of the run

    maps, labels = tmp_path / "maps/max/train", tmp_path / "labels"
    make = ["--voc-root", voc, "--maps", maps]
    text = run("make_pseudo_labels.py", *make, "--recipe", "small", "--background-level", 0.4, "--out", labels)
    assert "done: 6 labels written, 0 were there" in text
    run("make_pseudo_labels.py", *make, "--saliency", voc / "Saliency", "--out", tmp_path / "s")
    power = ["--recipe", "small", "--background", "power", "--background-level", 4]
    run("make_pseudo_labels.py", *make, *power, "--out", tmp_path / "p")
    with Image.open(labels / "c.png") as image:
        assert (image.mode, image.size) == ("P", (90, 60))
        assert set(np.unique(np.asarray(image))) <= {0, 1, 2, 255}
        assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    scores = ["--voc-root", voc, "--maps", maps, "--labels", labels, "--json", tmp_path / "scores.json"]
    text = run("evaluate_cues.py", *scores, "--curve", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (1200, 504)
    assert text.splitlines()[-1].startswith("done: best is")
    results = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert len(results[str(maps)]["curve"]) == len(results[str(maps)]["curve_recall"]) == 256
    for name in ("iou", "precision", "recall"):
        assert list(results[str(maps)][f"class_{name}"]) == list(results[str(labels)][f"class_{name}"])
    assert (results[str(maps)]["split"], results[str(maps)]["threshold_from"]) == ("train", "the other half")
    assert 0 <= results[str(labels)]["mean_iou"] <= 1


@pytest.mark.slow
def test_pseudo_labels_go_on_where_they_stopped_and_refuse_other_settings(voc, trained, tmp_path):
    maps, labels = tmp_path / "maps", tmp_path / "labels"
    run(
        "export_attention.py", "--voc-root", voc, "--run", trained, "--source", "max", "--out", maps, "--split", "train"
    )
    options = ["--voc-root", voc, "--maps", maps, "--out", labels, "--recipe", "small"]
    run("make_pseudo_labels.py", *options)
    before = {path.name: path.read_bytes() for path in labels.glob("*.png")}
    (labels / "c.png").unlink()
    assert "1 labels written, 5 were there" in run("make_pseudo_labels.py", *options)
    assert {path.name: path.read_bytes() for path in labels.glob("*.png")} == before
    text = run("make_pseudo_labels.py", *options, "--background-level", 0.9, expect=1)
    assert "made with other settings" in text
    shutil.rmtree(maps)
    again = ["--voc-root", voc, "--run", trained, "--source", "max", "--out", maps, "--device", "cpu"]
    run("export_attention.py", *again, "--stretch")
    text = run("make_pseudo_labels.py", *options, expect=1)
    assert "made with other settings (stretch: False there, True asked)" in text  # of the maps that they are made of


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["last-epoch", "final-model"])
def test_pairs_that_never_passed_the_gate_are_filled_as_the_releases_do(voc, tmp_path, fill):
    options = ["--voc-root", voc, "--out", tmp_path / "run", *TINY, "--iterations", 7, "--drop-at", 7, "--warm-up", 3]
    run("train_attention.py", *options, "--fill-empty", fill)
    maps = AttentionAccumulator.load(tmp_path / "run" / "max.safetensors")
    assert torch.equal(maps.accumulated, VOCFolder(voc, "train", negatives="background").labels.bool())
    assert maps.counts.max() <= 1 + 1


def test_cue_counts_equal_the_metric_at_every_threshold(voc, tmp_path):
    data = VOCFolder(voc, "train")
    rng = np.random.default_rng(1)
    for name in data.names:
        for c in data.class_ids(name):
            size = tuple(data.mask(name).shape)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / f"{name}_{c}.png")
    even, odd = sweep_cues(data, tmp_path)
    curve = evaluate_maps(data, tmp_path)["curve"]
    assert int(even.counts.sum() + odd.counts.sum()) == sum(int((data.mask(n) != 255).sum()) for n in data.names)
    for level in (0, 1, 77, 200, 255):
        matrix = ConfusionMatrix(3)
        for name in data.names:
            ids = data.class_ids(name)
            maps = np.stack([np.asarray(Image.open(tmp_path / f"{name}_{c}.png")) for c in ids])
            label = np.where(maps.max(0) >= level, np.array(ids)[maps.argmax(0)] + 1, 0)
            matrix.update(torch.from_numpy(label), data.mask(name))
        assert curve[level] == pytest.approx(matrix.mean_iou(), abs=1e-12)


def test_precision_and_recall_are_of_the_pixels_of_all_classes():
    generator = torch.Generator().manual_seed(0)
    shown, truth = (torch.randint(3, (400,), generator=generator).tolist() for _ in range(2))
    right = sum(a == b != 0 for a, b in zip(shown, truth, strict=True))
    scores = foreground(ConfusionMatrix(3).update(torch.tensor([shown]), torch.tensor([truth])))
    assert scores["precision"] == pytest.approx(right / sum(a != 0 for a in shown))
    assert scores["recall"] == pytest.approx(right / sum(b != 0 for b in truth))


def test_a_constant_background_below_the_releases_threshold_counts(voc, tmp_path):
    (tmp_path / "maps").mkdir()
    data = VOCFolder(voc, "train")
    for name in data.names:
        ramp = np.linspace(0, 255, data.mask(name).numel()).reshape(tuple(data.mask(name).shape)).astype(np.uint8)
        for c in data.class_ids(name):
            Image.fromarray(ramp).save(tmp_path / "maps" / f"{name}_{c}.png")
    options = ["--voc-root", voc, "--maps", tmp_path / "maps", "--out", tmp_path / "labels"]
    run("make_pseudo_labels.py", *options, "--recipe", "small", "--background-level", 0.1)
    with Image.open(tmp_path / "labels" / "a.png") as image:
        assert np.mean(np.asarray(image) == 1) == pytest.approx(0.9, abs=0.01)


class Shape:
    """What `AttentionImages` asks of a network."""

    geometry, mean, std = Geometry(16, centred=True), (0.5,) * 3, (0.5,) * 3


def drawn(voc, first, last, rank=0, world=1):
    images = AttentionImages(VOCFolder(voc, "train", negatives="background"), Shape, short_side=49, flip=0.5)
    return list(make_loader(images, 2, first, last, seed=3, workers=0, rank=rank, world=world))


def contents(batches):
    return [
        (name, view, image) for batch in batches for part in batch for name, view, image in zip(*part[:3], strict=True)
    ]


def test_the_stream_shows_every_image_once_in_a_pass(voc):
    shown = [name for name, _, _ in contents(drawn(voc, 0, 14))]
    assert len(shown) == 28
    passes = [[*shown[start : start + 7]] for start in range(0, 28, 7)]
    assert passes[0] != passes[1]
    # batches are reordered within themselves by shape only, so count over whole passes of both
    assert all(shown[:14].count(name) == 2 for name in "abcdef")


def test_images_of_one_shape_come_as_one_part(voc):
    for batch in drawn(voc, 0, 7):
        shapes = [tuple(part.images.shape[1:]) for part in batch]
        assert len(set(shapes)) == len(shapes)
        assert sum(len(part.names) for part in batch) == 2


def test_a_stream_entered_later_goes_on_as_the_whole_one(voc):
    whole, later = contents(drawn(voc, 0, 9)), contents(drawn(voc, 5, 9))
    for (name, view, image), (same_name, same_view, same_image) in zip(whole[10:], later, strict=True):
        assert (name, view) == (same_name, same_view)
        assert torch.equal(image, same_image)


def test_the_processes_share_the_stream(voc):
    whole = contents(drawn(voc, 0, 7))
    shares = [contents(drawn(voc, 0, 7, rank=rank, world=2)) for rank in (0, 1)]
    assert sorted((n, v) for n, v, _ in whole) == sorted((n, v) for share in shares for n, v, _ in share)


def test_a_mirrored_sample_is_the_mirror_image_and_its_view_says_so(voc):
    folder = VOCFolder(voc, "train")
    plain, mirrored = (AttentionImages(folder, Shape, short_side=49, flip=p)[3] for p in (0, 1))
    assert torch.equal(mirrored.image.flip(-1), plain.image)
    assert (plain.view.flip, mirrored.view.flip) == (False, True)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train_attention.py", ["--voc-root", "nowhere", "--out", "OUT"], "not in VOC layout"),
        (
            "train_attention.py",
            ["--voc-root", "VOC", "--out", "OUT", "--iterations", 0],
            "--iterations: expected at least 1",
        ),
        ("train_attention.py", ["--voc-root", "VOC", "--out", "OUT", "--negatives", "absent"], "does not exist"),
        (
            "train_attention.py",
            ["--voc-root", "VOC", "--out", "OUT", "--seed", 20261126],  # a date, beyond what is left of 64 bits
            "argument --seed: expected a whole number from 0 to 16777215, got 20261126",
        ),
        (
            "train_attention.py",
            ["--voc-root", "VOC", "--out", "OUT", "--negatives", "val"],
            "but 6 have labels in train",
        ),
        (
            "export_attention.py",
            ["--voc-root", "VOC", "--run", "OUT", "--source", "cam", "--out", "OUT"],
            "settings.json",
        ),
        ("make_pseudo_labels.py", ["--voc-root", "VOC", "--maps", "OUT", "--out", "OUT"], "without --saliency"),
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
    options = ["--voc-root", voc, "--out", trained, *STAGE_1, "--lr", 1]
    text = run("train_attention.py", *options, expect=1)
    assert "made with other settings (lr: 0.0003 there, 1.0 asked)" in text
    assert (trained / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
def test_a_half_written_checkpoint_is_told(voc, tmp_path):
    options = ["--voc-root", voc, "--out", tmp_path / "run", *TINY, "--iterations", 1, "--drop-at", 1]
    run("train_attention.py", *options)
    whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    text = run("train_attention.py", *options, expect=1)
    assert "cannot be read" in text
    assert "remove it to start this stage anew" in text


@pytest.mark.slow
def test_a_truncated_photograph_is_told_by_name(voc, tmp_path):
    shutil.copytree(voc, tmp_path / "voc")
    photograph = tmp_path / "voc" / "JPEGImages" / "d.jpg"
    photograph.write_bytes(photograph.read_bytes()[:800])
    options = ["--voc-root", tmp_path / "voc", "--out", tmp_path / "run", *TINY, "--iterations", 4, "--drop-at", 4]
    text = run("train_attention.py", *options, expect=1)
    assert "d.jpg cannot be read" in text


def test_every_recipe_resolves_with_what_is_given():
    parser = argparse.ArgumentParser()
    add_options(parser, "attention")
    settings = resolve(parser.parse_args(["--recipe", "release", "--lr", "0.5", "--no-nesterov"]), "attention", "vgg16")
    assert (settings.lr, settings.nesterov, settings.gate, settings.weight_decay) == (0.5, False, "topk", 5e-4)
    with pytest.raises(SystemExit, match="--flip: expected a value in"):
        resolve(parser.parse_args(["--flip", "1.5"]), "attention", "vgg16")


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(p.name for p in EXAMPLES.glob("*.py") if "\ndef main" in p.read_text()))
def test_help_answers(script):
    assert "usage:" in run(script, "--help")
