"""compare.py: the paired bootstrap against a loop over confusion matrices, its laws, the program on drawn images."""

import json
import random

import numpy as np
import pytest
import torch
from compare import counts_of_maps, marginals, mean_iou, paired_differences, resampled
from data import VOCFolder, write_label
from evaluate_cues import evaluate_maps
from PIL import Image
from scores import evaluate_labels
from test_voc_pipeline import run

from oaa_lib import ConfusionMatrix

CLASSES = 3


def matrices(seed: int, images: int = 12) -> list[ConfusionMatrix]:
    """Of small random images, of which some lack a class."""
    rng = np.random.default_rng(seed)
    found = []
    for image in range(images):
        truth = torch.from_numpy(np.random.default_rng(image).integers(0, 2 + image % 2, (6, 7)))
        shown = torch.from_numpy(np.where(rng.random((6, 7)) < 0.7, truth.numpy(), rng.integers(0, CLASSES, (6, 7))))
        found.append(ConfusionMatrix(CLASSES).update(shown, truth))
    return found


def counts(seed: int) -> torch.Tensor:
    return torch.stack([marginals(matrix) for matrix in matrices(seed)])


@pytest.mark.parametrize("scored", [[0, 1, 2], [0, 2]])
def test_a_resample_is_scored_by_the_summed_confusion_matrices(scored, monkeypatch):
    """The drawn images one by one, their matrices added up."""
    drawn = []

    class Generator:
        def multinomial(self, number, shares, size):
            assert shares == pytest.approx(np.full(12, 1 / 12))
            times = np.random.default_rng(5).multinomial(number, shares, size)
            drawn.extend(times)
            return times

    monkeypatch.setattr(
        np.random, "default_rng", lambda seed, real=np.random.default_rng: Generator() if seed == "x" else real(seed)
    )
    found = resampled(counts(1), scored, resamples=40, seed="x")
    assert len(drawn) == len(found) == 40
    for times, value in zip(drawn, found.tolist(), strict=True):
        assert times.sum() == 12
        total = ConfusionMatrix(CLASSES)
        for image, number in zip(matrices(1), times, strict=True):
            for _ in range(number):
                total.merge(image)
        assert value == pytest.approx(np.nanmean([total.iou()[c].item() for c in scored]), abs=1e-12)


def difference(ours, theirs, scored, **drawing):
    """Of two methods alone."""
    (found,) = paired_differences({"theirs": theirs, "ours": ours}, ["theirs"], scored, **drawing).values()
    return found


def test_the_interval_is_that_of_a_naive_bootstrap():
    """Indices drawn by another generator: the same distribution, to what 4,000 draws can tell."""
    ours, theirs = counts(1), counts(2)
    draw = random.Random(0)
    naive = []
    for _ in range(4000):
        rows = [draw.randrange(12) for _ in range(12)]
        naive.append((mean_iou(ours[rows].sum(0), [0, 1, 2]) - mean_iou(theirs[rows].sum(0), [0, 1, 2])).item())
    found = difference(ours, theirs, [0, 1, 2], resamples=4000)
    low, high = np.quantile(naive, [0.025, 0.975])
    width = high - low
    assert found["interval"] == pytest.approx([low, high], abs=0.06 * width)
    assert found["share_above_0"] == pytest.approx(np.mean(np.array(naive) > 0), abs=0.03)


def test_laws():
    ours, theirs = counts(1), counts(2)
    same = difference(ours, ours, [0, 1, 2], resamples=50)
    assert same["difference"] == same["share_above_0"] == 0
    assert same["interval"] == [0, 0]
    one, other = (difference(*pair, [0, 1, 2], resamples=1200) for pair in ((ours, theirs), (theirs, ours)))
    assert one["interval"] == pytest.approx([-each for each in reversed(other["interval"])], abs=1e-15)
    assert one == difference(ours, theirs, [0, 1, 2], resamples=1200, seed=0)
    assert one["interval"] != difference(ours, theirs, [0, 1, 2], resamples=1200, seed=1)["interval"]
    three = paired_differences({"a": theirs, "b": ours, "c": theirs}, ["a", "b"], [0, 1, 2], resamples=1200)
    assert list(three) == ["b - a", "c - a", "c - b"]
    assert three["b - a"] == one
    assert three["c - b"] == other
    assert three["c - a"]["interval"] == [0, 0]
    found = difference(ours, theirs, [0, 1, 2], resamples=1200)
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    # the same images again and again: nothing is left to luck
    certain = difference(ours[:1].repeat(8, 1, 1), theirs[:1].repeat(8, 1, 1), [0, 1], resamples=50)
    assert certain["interval"] == pytest.approx([certain["difference"]] * 2, abs=1e-15)


@pytest.fixture
def root(tmp_path):
    """Nine images with masks, two folders of maps and two of label images."""
    for part in (
        "JPEGImages",
        "SegmentationClass",
        "ImageSets/Segmentation",
        "a",
        "b",
        "a_whole",
        "b_whole",
        "labels_a",
        "labels_b",
    ):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    rng, rows = np.random.default_rng(0), []
    for number in range(9):
        name, c = f"image{number}", number // 2 % 2
        size = (10 + number % 2, 14)
        Image.new("RGB", size[::-1]).save(tmp_path / f"JPEGImages/{name}.jpg")
        mask = np.zeros(size, np.uint8)
        mask[2:8, 2 : 5 + number] = c + 1
        mask[0] = 255
        write_label(tmp_path / f"SegmentationClass/{name}.png", mask)
        for method, noise in (("a", 60), ("b", 120)):
            attention = np.where((mask > 0) & (mask < 255), 150, 60) + rng.integers(-noise, noise, size)
            attention = attention.clip(0, 255).astype(np.uint8)
            Image.fromarray(attention).save(tmp_path / f"{method}/{name}_{c}.png")
            Image.fromarray(attention).save(tmp_path / f"{method}_whole/{name}.png")
            label = np.where(attention > 100, c + 1, 0).astype(np.uint8)
            label[:, 0] = 255
            write_label(tmp_path / f"labels_{method}/{name}.png", label)
        rows.append(f"{name} {c}\n")
    (tmp_path / "ImageSets/Segmentation/train_cls.txt").write_text("".join(rows))
    return tmp_path


def test_each_folder_is_scored_as_evaluate_cues_does(root):
    data = VOCFolder(root, "train")
    compare = ["--voc-root", root, "--json", root / "out/d.json", "--resamples", 200]
    text = run("compare.py", *compare, "--against", root / "b", "--maps", root / "a", root / "b")
    found = json.loads((root / "out/d.json").read_text())
    ours, theirs = (evaluate_maps(data, root / method)["mean_iou"] for method in "ab")
    assert found[str(root / "a")]["mean_iou"] == pytest.approx(ours, abs=1e-12)
    assert found[str(root / "a")]["against_mean_iou"] == pytest.approx(theirs, abs=1e-12)
    assert f"= {100 * (ours - theirs):+.2f}, 95 % interval +" in text  # far less noise: better for any choice of images
    assert found[str(root / "b")]["interval"] == [0, 0]
    assert "; on 9 images of train" in text
    assert found[str(root / "a")]["score_classes"] == ["background", "cat", "dog"]

    text = run("compare.py", *compare, "--against", root / "labels_b", "--labels", root / "labels_a")
    found = json.loads((root / "out/d.json").read_text())[str(root / "labels_a")]
    scores = [evaluate_labels(data, root / f"labels_{method}")["mean_iou"] for method in "ab"]
    assert [found["mean_iou"], found["against_mean_iou"]] == pytest.approx(scores, abs=1e-12)

    text = run("compare.py", *compare, "--against", root / "b", "--maps", root / "a", "--saliency", root / "a_whole")
    found = json.loads((root / "out/d.json").read_text())[str(root / "a")]
    scores = [evaluate_maps(data, root / method, saliency=root / "a_whole")["mean_iou"] for method in "ab"]
    assert [found["mean_iou"], found["against_mean_iou"]] == pytest.approx(scores, abs=1e-12)
    assert abs(scores[0] - ours) > 0.01

    fixed = [*compare, "--background-level", 0.4, "--score-classes", "background,dog"]
    text = run("compare.py", *fixed, "--against", root / "b", "--maps", root / "a")
    assert " over background,dog on 9 images" in text
    found = json.loads((root / "out/d.json").read_text())[str(root / "a")]
    total = counts_of_maps(data, root / "a", [0.4]).sum(0)
    assert found["mean_iou"] == pytest.approx(mean_iou(total, [0, 2]).item())
    matrix = ConfusionMatrix(3)
    for name in data.names:
        c = data.class_ids(name)[0]
        shown = torch.from_numpy(np.asarray(Image.open(root / f"a/{name}_{c}.png")).copy())
        matrix.update((shown >= 102).long() * (c + 1), data.mask(name))
    assert found["mean_iou"] == pytest.approx(matrix.iou()[[0, 2]].mean().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--maps", "absent", "--against", "a"], "is missing; run export_attention.py for this split first"),
        (["--maps", "a", "--against", "absent"], "is missing; run export_attention.py for this split first"),
        (["--maps", "a", "--against", "b", "--resamples", 0], "expected --resamples of at least 1"),
        (["--maps", "a", "--against", "b", "--background-level", 1.5], "expected a threshold of maps in [0, 1]"),
        (["--labels", "labels_a", "--against", "labels_b", "--background-level", 0.5], "expected a threshold of maps"),
        (["--labels", "labels_a", "--against", "a"], "lacks the label images of 9 of the 9 images"),
        (["--maps", "a", "--against", "b", "--score-classes", "cat,dgo"], "did you mean 'dog'?"),
        (["--maps", "a", "--against", "b", "--saliency", "absent"], "absent: expected a folder, and maps (--maps)"),
        (["--against", "b"], "one of the arguments --maps --labels is required"),
    ],
)
def test_bad_input_is_stated_and_nothing_is_written(root, options, message):
    options = [
        root / option if str(option) in ("a", "b", "absent", "labels_a", "labels_b") else option for option in options
    ]
    assert message in run("compare.py", "--voc-root", root, "--json", root / "d.json", *options, expect=1)
    assert not (root / "d.json").exists()


def test_one_image_is_no_sample(root):
    (root / "ImageSets/Segmentation/train_cls.txt").write_text("image0 0\n")
    text = run("compare.py", "--voc-root", root, "--against", root / "a", "--maps", root / "b", expect=1)
    assert "a bootstrap needs at least 2" in text
