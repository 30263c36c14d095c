"""Stage 4: crops that fit their labels, the loss against a loop, and a whole run on drawn images."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Geometry
from options import replace_checked
from PIL import Image
from recipes import PAPER
from test_voc_pipeline import run, voc  # noqa: F401  (a fixture)
from train_segmentation import random_crop, segmentation_loss
from windows import probabilities, starts, windowed

TINY = ["--recipe", "small", "--backbone", "efficientnet_lite0", "--weights", "none", "--workers", 0]
TINY += ["--crop", 49, "--batch-size", 2]


def test_a_crop_keeps_image_and_label_together():
    label = torch.arange(30 * 20).view(30, 20) % 200
    image = label.float().expand(3, -1, -1)
    for side in (10, 25, 40):
        cropped, cropped_label = random_crop(image, label, side)
        assert cropped.shape == (3, side, side)
        valid = cropped_label != 255
        assert int(valid.sum()) == min(side, 30) * min(side, 20)
        assert torch.equal(cropped[0][valid].long(), cropped_label[valid])
        assert (cropped[0][~valid] == 0).all()


def test_crops_reach_every_place():
    label = torch.arange(5 * 4).view(5, 4)
    corners = {int(random_crop(label.expand(3, -1, -1).float(), label, 2)[1][0, 0]) for _ in range(400)}
    assert corners == {4 * top + left for top in range(4) for left in range(3)}


def test_the_loss_is_the_mean_of_each_images_valid_pixels():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64).float()
    labels = torch.randint(4, (3, 5, 5), generator=generator)
    labels[0, :3] = 255
    labels[2] = 255  # nothing to learn from: counts 0
    expected = 0.0
    for image in range(3):
        terms = [
            -scores[image, :, y, x].log_softmax(0)[labels[image, y, x]].item()
            for y in range(5)
            for x in range(5)
            if labels[image, y, x] != 255
        ]
        expected += sum(terms) / len(terms) / 3 if terms else 0
    assert segmentation_loss(scores, labels, align_corners=True).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_training_resumes_to_the_same_weights(voc, tmp_path):  # noqa: F811
    labels = voc / "SegmentationClass"
    options = ["--voc-root", voc, "--labels", labels, *TINY, "--iterations", 5, "--checkpoint-every", 2]
    text = run("train_segmentation.py", *options, "--out", tmp_path / "whole")
    assert text.splitlines()[-1].startswith("done: 5 iterations on 6 images")
    state = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 5
    with pytest.MonkeyPatch.context() as patch:
        import training

        save = training.Run._save

        def save_and_stop(self, step):
            save(self, step)
            raise SystemExit("stopped")

        patch.setattr(training.Run, "_save", save_and_stop)
        run("train_segmentation.py", *options, "--out", tmp_path / "again", expect=1)
    assert "resumed after iteration 2 of 5" in run("train_segmentation.py", *options, "--out", tmp_path / "again")
    again = torch.load(tmp_path / "again" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(again["network"][key], value) for key, value in state["network"].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "EMPTY"], "has no label image of any of the 6 images"),
        (["--labels", "SMALL"], "a: expected a label image of the photograph's size (60, 90), got (2, 2)"),
        (["--labels", "MASKS", "--crop", 50], "takes whole cells, such as 49, got 50"),
        (["--labels", "MASKS", "--proportion", 0], "--proportion: expected a share above 0"),
    ],
)
def test_bad_input_is_told(voc, tmp_path, options, message):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "small" / "a.png")
    places = {"EMPTY": tmp_path / "empty", "SMALL": tmp_path / "small", "MASKS": voc / "SegmentationClass"}
    given = [places.get(option, option) for option in options]
    base = ["--voc-root", voc, "--out", tmp_path / "run", *TINY, "--iterations", 2]
    assert message in run("train_segmentation.py", *base, *given, expect=1)


@pytest.mark.slow
def test_a_proportion_of_the_images_is_drawn_by_the_seed(voc, tmp_path):  # noqa: F811
    base = ["--voc-root", voc, "--labels", voc / "SegmentationClass", *TINY, "--iterations", 1, "--proportion", 0.5]
    assert "on 3 images" in run("train_segmentation.py", *base, "--out", tmp_path / "half")


class Colours(torch.nn.Module):
    """Scores that are the pixels themselves at stride 8, so that what windows and mirror images do is known."""

    geometry, mean, std = Geometry(8, centred=True), (0.0,) * 3, (1.0,) * 3

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(4.0))

    def forward(self, images):
        return self.gain * images[..., ::8, ::8]


@given(length=st.integers(1, 400), side=st.integers(1, 200), overlap=st.floats(0, 0.9))
def test_windows_cover_the_image_overlap_and_end_at_its_border(length, side, overlap):
    begins = starts(length, side, overlap)
    assert begins[0] == 0
    assert begins == sorted(set(begins))
    if length > side:
        assert begins[-1] + side == length
        assert max(np.diff(begins)) <= max(round(side * (1 - overlap)), 1) <= side


def test_probabilities_stay_probabilities_and_windows_do_not_change_them():
    pixels = np.kron(np.random.default_rng(0).integers(0, 255, (4, 6, 3)), np.ones((24, 24, 1))).astype(np.uint8)
    photograph, network = Image.fromarray(pixels), Colours()
    whole = probabilities(network, photograph, PAPER.evaluation)
    assert whole.shape == (3, 96, 144)
    torch.testing.assert_close(whole.sum(0), torch.ones(96, 144))
    several = {"test_scales": (0.5, 1.0, 1.5), "test_flip": True, "window": 57}
    averaged = probabilities(network, photograph, replace_checked(PAPER.evaluation, several))
    torch.testing.assert_close(averaged.sum(0), torch.ones(96, 144))
    assert (averaged.argmax(0) == whole.argmax(0)).float().mean() > 0.8


def test_overlapping_windows_are_averaged():
    image = torch.rand(1, 3, 25, 41, generator=torch.Generator().manual_seed(0))
    settings = replace_checked(PAPER.evaluation, {"window": 17, "overlap": 0.5})
    network = Colours()
    total, count = torch.zeros(1, 3, 25, 41), torch.zeros(25, 41)
    for top in (0, 8):
        for left in (0, 8, 16, 24):
            part = network(image[..., top : top + 17, left : left + 17])
            part = torch.nn.functional.interpolate(part, (17, 17), mode="bilinear", align_corners=True).softmax(1)
            total[..., top : top + 17, left : left + 17] += part
            count[top : top + 17, left : left + 17] += 1
    torch.testing.assert_close(windowed(network, image, settings), total / count)


@pytest.mark.slow
def test_a_trained_network_is_evaluated_and_goes_on_where_it_stopped(voc, tmp_path):  # noqa: F811
    options = ["--voc-root", voc, "--labels", voc / "SegmentationClass", *TINY, "--iterations", 1]
    run("train_segmentation.py", *options, "--out", tmp_path / "run")
    evaluate = ["--voc-root", voc, "--run", tmp_path / "run", "--out", tmp_path / "val", "--recipe", "small"]
    text = run("evaluate.py", *evaluate)
    assert text.splitlines()[-1].endswith("on 6 images of val")
    scores = json.loads((tmp_path / "val" / "scores.json").read_text())
    assert list(scores["class_iou"]) == ["background", "red", "green"]
    with Image.open(tmp_path / "val" / "d.png") as image:
        assert (image.mode, image.size) == ("P", (60, 90))
        assert image.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    (tmp_path / "val" / "d.png").unlink()
    run("evaluate.py", *evaluate)
    assert json.loads((tmp_path / "val" / "scores.json").read_text()) == scores
    text = run("evaluate.py", *evaluate, "--score-classes", "green,background")
    assert text.splitlines()[-1].endswith(" over background,green on 6 images of val")
    chosen = json.loads((tmp_path / "val" / "scores.json").read_text())
    assert chosen["score_classes"] == ["background", "green"]
    assert chosen["mean_iou"] == pytest.approx(sum(scores["class_iou"][c] for c in ("background", "green")) / 2)
    assert "did you mean 'green'?" in run("evaluate.py", *evaluate, "--score-classes", "gren", expect=1)
    assert "made with other settings" in run("evaluate.py", *evaluate, "--test-flip", expect=1)
