"""The dense CRF against a loop-free definition of mean field, and stage 5 with it on drawn images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from crf import dense_crf
from data import VOCFolder
from deeplab import build_segmentation_network
from evaluate import Segmented, write_segmentation
from maps import map_files
from options import replace_checked
from parallel import alongside
from PIL import Image
from recipes import PAPER, RECIPES
from test_voc_pipeline import EXAMPLES, run, voc  # noqa: F401  (a fixture)
from windows import probabilities

from oaa_lib import pixel_adaptive_refinement

TINY = ["--recipe", "small", "--backbone", "efficientnet_lite0", "--weights", "none", "--workers", 0]
TINY += ["--crop", 49, "--batch-size", 2, "--iterations", 1]
CRF = {"crf_iterations": 3, "crf_gaussian": (2, 2), "crf_bilateral": (6, 25, 4)}
needs_pydensecrf = pytest.mark.skipif(sys.version_info >= (3, 13), reason="pydensecrf2 1.1 builds up to Python 3.12")


def options(settings):
    """As they are given on the command line."""
    text = [[f"--{name.replace('_', '-')}", *np.atleast_1d(value)] for name, value in settings.items()]
    return [part for option in text for part in option]


@pytest.mark.parametrize("iterations", [0, pytest.param(3, marks=needs_pydensecrf)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", [(slice(None), 0, 0), (1, 3, 5), (slice(None), slice(None), slice(None))], ids=str)
def test_of_probabilities_that_are_not_finite_no_label_image_is_made(tmp_path, iterations, value, where):
    shown, photograph = drawn(0)
    shown[where] = value
    settings = replace_checked(PAPER.evaluation, CRF | {"crf_iterations": iterations})
    with pytest.raises(SystemExit, match=r"^cat: the network's class probabilities are NaN or infinite in \d+ of 126"):
        write_segmentation(Segmented("cat", photograph, shown), out=tmp_path, settings=settings)
    assert not list(tmp_path.iterdir())


def test_of_refined_maps_that_are_not_finite_none_is_written(tmp_path, voc, monkeypatch):  # noqa: F811
    import refine_cues

    folder = VOCFolder(voc, "train")
    name = next(name for name in folder.names if folder.class_ids(name))
    (tmp_path / "maps").mkdir()
    for file in map_files(folder, name):
        Image.new("L", folder.size(name)[::-1]).save(tmp_path / "maps" / file)
    monkeypatch.setattr(
        refine_cues, "pixel_adaptive_refinement", lambda image, maps, **_: torch.full_like(maps, torch.nan)
    )
    arguments = Namespace(maps=tmp_path / "maps", out=tmp_path, method="pamr", iterations=1, device="cpu")
    with pytest.raises(SystemExit, match=f"^{name}: the refined maps hold NaN"):
        refine_cues.refine_image(name, folder=folder, arguments=arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["maps"]


def mean_field(shown, photograph, *, iterations, gaussian, bilateral):
    """Mean field with exact Gaussian kernels between all pairs of pixels, in float64."""
    places = np.indices(photograph.shape[:2]).reshape(2, -1) / 1.0
    colours = photograph.reshape(-1, 3).T / 1.0

    def kernel(features):
        values = np.exp(-((features[:, :, None] - features[:, None]) ** 2).sum(0) / 2)
        return values / np.sqrt(np.outer(values.sum(0), values.sum(0)))

    pairs = gaussian[1] * kernel(places / gaussian[0])
    pairs += bilateral[2] * kernel(np.concatenate([places / bilateral[0], colours / bilateral[1]]))
    flat = shown.reshape(len(shown), -1).astype(np.float64)
    result = flat
    for _ in range(iterations):
        result = flat * np.exp(result @ pairs)
        result = result / result.sum(0)
    return result.reshape(shown.shape)


def drawn(seed):
    """(3, 9, 14) random probabilities and a photograph of noisy stripes, as wide as three pixels."""
    rng = np.random.default_rng(seed)
    shown = rng.dirichlet(np.ones(3), (9, 14)).transpose(2, 0, 1).astype(np.float32)
    photograph = np.repeat(rng.integers(0, 200, (9, 5, 1)), 3, axis=1)[:, :14] + rng.integers(0, 20, (9, 14, 3))
    return shown, photograph.astype(np.uint8)


@needs_pydensecrf
@pytest.mark.parametrize(("iterations", "tolerance"), [(0, 1e-6), (1, 0.008), (3, 0.016)])
def test_the_crf_is_mean_field_with_gaussian_kernels(iterations, tolerance):
    """The library's lattice is approximate; what a mistake changes is twice the tolerance and more: the next test."""
    settings = {"iterations": iterations, "gaussian": (2, 2), "bilateral": (6, 25, 4)}
    errors = []
    for seed in range(6):
        shown, photograph = drawn(seed)
        result = dense_crf(shown, photograph, **settings)
        assert (result.dtype, result.shape) == (np.float32, (3, 9, 14))
        np.testing.assert_allclose(result.sum(0), 1, atol=1e-5)
        errors.append(np.abs(result - mean_field(shown, photograph, **settings)).mean())
    assert np.mean(errors) < tolerance


def test_the_tolerance_tells_mistakes_apart():
    right = {"iterations": 3, "gaussian": (2, 2), "bilateral": (6, 25, 4)}
    mistakes = {
        "one iteration less": right | {"iterations": 2},
        "widths swapped": right | {"bilateral": (25, 6, 4)},
        "kernels swapped": right | {"gaussian": (6, 4), "bilateral": (2, 25, 2)},
        "weights swapped": right | {"gaussian": (2, 4), "bilateral": (6, 25, 2)},
    }
    images = [drawn(seed) for seed in range(6)]
    expected = [mean_field(*image, **right) for image in images]
    for name, wrong in mistakes.items():
        errors = [np.abs(mean_field(*image, **wrong) - e).mean() for image, e in zip(images, expected, strict=True)]
        assert np.mean(errors) > 0.032, name
    turned = []
    for (shown, photograph), right_one in zip(images, expected, strict=True):
        result = mean_field(shown.reshape(3, 14, 9), photograph.reshape(14, 9, 3), **right)
        turned.append(np.abs(result.reshape(3, 9, 14) - right_one).mean())
    assert np.mean(turned) > 0.032


@needs_pydensecrf
def test_a_ragged_boundary_snaps_to_the_edge_of_the_photograph():
    rng = np.random.default_rng(0)
    truth = np.zeros((24, 50), dtype=np.int64)
    truth[:, 31:] = 1
    photograph = np.where(truth[..., None] == 1, 180, 60) + rng.integers(-8, 9, (24, 50, 3))
    ragged = np.arange(50) >= 31 + rng.integers(-7, 8, (24, 1))
    shown = np.stack([np.where(ragged, 0.3, 0.7), np.where(ragged, 0.7, 0.3)]).astype(np.float32)
    assert (shown.argmax(0) != truth).mean() > 0.05
    values = PAPER.evaluation
    kernels = {"gaussian": values.crf_gaussian, "bilateral": values.crf_bilateral}
    result = dense_crf(shown, photograph.astype(np.uint8), iterations=values.crf_iterations, **kernels)
    assert np.array_equal(result.argmax(0), truth)


@needs_pydensecrf
def test_certain_probabilities_stay_finite():
    shown, photograph = drawn(0)
    certain = (shown == shown.max(0)).astype(np.float32)
    result = dense_crf(certain, photograph, iterations=3, gaussian=(2, 2), bilateral=(6, 25, 4))
    np.testing.assert_allclose(result.sum(0), 1, atol=1e-5)


def test_a_photograph_of_another_size_is_refused():
    shown, photograph = drawn(0)
    with pytest.raises(ValueError, match=r"expected a photograph of shape \(9, 14, 3\), got \(14, 9, 3\)"):
        dense_crf(shown, photograph.swapaxes(0, 1), iterations=1, gaussian=(2, 2), bilateral=(6, 25, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crf_iterations": -1}, "--crf-iterations: expected at least 0, got -1"),
        (
            {"crf_gaussian": (0, 3)},
            "--crf-gaussian: expected widths above 0 and, last, a weight of at least 0, got 0 3",
        ),
        ({"crf_bilateral": (80, -13, 10)}, "--crf-bilateral: expected widths above 0 .* got 80 -13 10"),
        ({"crf_bilateral": (80, 13, -1)}, "--crf-bilateral: expected widths above 0 .* got 80 13 -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(SystemExit, match=message):
        replace_checked(PAPER.evaluation, change)
    for recipe in RECIPES.values():
        replace_checked(recipe.evaluation, {})


class Drawn:
    """Items that note how many of them were drawn."""

    def __init__(self, values):
        self.values, self.drawn = values, 0

    def __iter__(self):
        for value in self.values:
            self.drawn += 1
            yield value


@pytest.mark.slow
def test_work_beside_is_done_once_each_with_a_bounded_number_in_flight():
    places = 2 * os.cpu_count()
    items = Drawn(range(-5 * places, 0))
    results = []
    for result in alongside(abs, items):
        results.append(result)
        assert items.drawn - len(results) <= places
    assert sorted(results) == list(range(1, 5 * places + 1))


@pytest.mark.slow
def test_a_process_that_is_ended_is_told():
    with pytest.raises(SystemExit, match="by a signal or for want of memory; the same command goes on from there"):
        list(alongside(os._exit, [1]))


@pytest.fixture(scope="module")
def network(voc, tmp_path_factory):  # noqa: F811
    """The folder of a network that says something else from place to place: its last layer is random, and large."""
    out = tmp_path_factory.mktemp("segmentation") / "run"
    run("train_segmentation.py", "--voc-root", voc, "--labels", voc / "SegmentationClass", *TINY, "--out", out)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    shape, generator = state["network"]["score.weight"].shape, torch.Generator().manual_seed(0)
    state["network"]["score.weight"] = torch.randn(shape, generator=generator)
    torch.save(state, out / "checkpoint.pt")
    return out


def labels(folder):
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


@pytest.mark.slow
@needs_pydensecrf
def test_label_images_are_those_of_the_crf_and_go_on_where_they_stopped(voc, network, tmp_path):  # noqa: F811
    evaluate = ["--voc-root", voc, "--run", network, "--recipe", "small", *options(CRF)]
    text = run("evaluate.py", *evaluate, "--out", tmp_path / "val")
    assert text.splitlines()[-1].endswith("on 6 images of val")
    assert "6/6" in text

    state = torch.load(network / "checkpoint.pt", weights_only=True)
    model = build_segmentation_network("efficientnet_lite0", 3, weights="none").eval()
    model.load_state_dict(state["network"])
    model = model.to(memory_format=torch.channels_last)
    folder, settings = VOCFolder(voc, "val"), replace_checked(RECIPES["small"].evaluation, CRF)
    written, plain = labels(tmp_path / "val"), {}
    assert list(written) == folder.names
    for name, label in written.items():
        photograph = folder.photograph(name)
        shown = probabilities(model, photograph, settings).numpy()
        kernels = {"gaussian": settings.crf_gaussian, "bilateral": settings.crf_bilateral}
        refined = dense_crf(shown, np.asarray(photograph), iterations=settings.crf_iterations, **kernels)
        assert np.array_equal(label, refined.argmax(0)), name
        plain[name] = shown.argmax(0)
    assert any((written[name] != plain[name]).any() for name in written)

    (tmp_path / "val" / "d.png").unlink()
    scores = (tmp_path / "val" / "scores.json").read_text()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "val").glob("*.png")}
    run("evaluate.py", *evaluate, "--out", tmp_path / "val")
    assert np.array_equal(labels(tmp_path / "val")["d"], written["d"])
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert (tmp_path / "val" / "scores.json").read_text() == scores
    other = [*evaluate, "--crf-bilateral", 6, 24, 4, "--out", tmp_path / "val"]
    assert "made with other settings" in run("evaluate.py", *other, expect=1)
    assert not list((tmp_path / "val").glob("*.partial"))


@pytest.mark.slow
@needs_pydensecrf
def test_an_error_beside_names_the_image_and_the_others_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    images = [
        Segmented(name, rng.integers(0, 255, (20, width, 3), dtype=np.uint8), np.full((2, 20, 30), 0.5, np.float32))
        for name, width in {"a": 30, "b": 30, "c": 29}.items()  # the last photograph does not fit
    ]
    write = partial(write_segmentation, out=tmp_path, settings=replace_checked(PAPER.evaluation, CRF))
    with pytest.raises(SystemExit, match=r"c: no label image could be made \(ValueError: expected a photograph"):
        list(alongside(write, iter(images)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.slow
@needs_pydensecrf
def test_ctrl_c_leaves_whole_label_images_and_the_same_command_goes_on(voc, network, tmp_path):  # noqa: F811
    """A real process group gets SIGINT, as a terminal sends it, while the CRF is at work on several images."""
    shutil.copytree(voc, tmp_path / "voc")
    for path in ("JPEGImages/a.jpg", "SegmentationClass/a.png"):  # done long before the others
        with Image.open(tmp_path / "voc" / path) as image:
            small = image.crop((0, 0, 30, 30))
        small.save(tmp_path / "voc" / path)
    slow = options(CRF | {"crf_iterations": 150})
    evaluate = ["--voc-root", tmp_path / "voc", "--run", network, "--recipe", "small", *slow, "--out", tmp_path / "val"]
    command = [sys.executable, str(EXAMPLES / "evaluate.py"), *map(str, evaluate)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not list((tmp_path / "val").glob("*.png")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "of 6 images; the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "val").glob("*.partial"))
    stopped = labels(tmp_path / "val")  # every one can be read
    assert f"stopped after {len(stopped)} of 6" in errors
    run("evaluate.py", *evaluate)
    whole = labels(tmp_path / "val")
    assert len(whole) == 6
    assert all(np.array_equal(whole[name], label) for name, label in stopped.items())


@pytest.mark.slow
def test_without_the_package_the_extra_is_named_before_anything_is_done(voc, network, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    evaluate = ["--voc-root", voc, "--run", network, "--out", tmp_path / "val"]
    text = run("evaluate.py", *evaluate, "--recipe", "paper", expect=1)
    assert "pip install 'oaa_lib[crf]'" in text
    assert "--crf-iterations 0" in text
    assert not (tmp_path / "val").exists()
    assert "on 6 images of val" in run("evaluate.py", *evaluate, "--recipe", "paper", "--crf-iterations", 0)


@pytest.mark.slow
def test_parts_share_a_split_and_the_whole_command_scores_it(voc, network, tmp_path):  # noqa: F811
    evaluate = ["--voc-root", voc, "--run", network, "--recipe", "small"]
    run("evaluate.py", *evaluate, "--out", tmp_path / "whole")
    shared = [*evaluate, "--out", tmp_path / "parts"]
    text = run("evaluate.py", *shared, "--part", "1/4")
    assert "2 label images of part 1/4" in text
    assert "the same command without --part scores them" in text
    assert list(labels(tmp_path / "parts")) == ["b", "f"]
    for part in ("0/4", "2/4", "3/4"):
        run("evaluate.py", *shared, "--part", part)
    assert list(labels(tmp_path / "parts")) == ["a", "b", "c", "d", "e", "f"]
    assert not (tmp_path / "parts" / "scores.json").exists()
    run("evaluate.py", *shared)
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("whole", "parts")]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["evaluate.py", "export_attention.py"])
@pytest.mark.parametrize("part", ["4/4", "-1/4", "1", "a/b", "0/0"])
def test_a_part_that_is_none_is_refused(script, part):
    needed = ["--voc-root", "x", "--run", "x", "--out", "x", *(["--source", "cam"] * (script != "evaluate.py"))]
    text = run(script, *needed, f"--part={part}", expect=1)
    assert f"--part: expected I/N with I from 0 to N - 1, such as 0/4, got {part}" in text


@pytest.fixture
def maps(voc, tmp_path):  # noqa: F811
    rng = np.random.default_rng(0)
    data = VOCFolder(voc, "train")
    (tmp_path / "maps").mkdir()
    for name in data.names:
        for c in data.class_ids(name):
            values = rng.integers(0, 256, tuple(data.mask(name).shape), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / "maps" / f"{name}_{c}.png")
    return tmp_path / "maps"


@needs_pydensecrf
@pytest.mark.slow
def test_refined_cues_are_written_like_the_cues_and_go_on(voc, maps, tmp_path):  # noqa: F811
    data = VOCFolder(voc, "train")
    for method, options in {"pamr": ["--iterations", 2], "crf": ["--background-level", 0.4]}.items():
        out = tmp_path / method
        command = ["--voc-root", voc, "--maps", maps, "--out", out, "--method", method, *options, "--device", "cpu"]
        assert "done: maps of 6 images refined (" in run("refine_cues.py", *command)
        assert sorted(path.name for path in out.glob("*.png")) == sorted(path.name for path in maps.iterdir())
        expected = refined(data, maps, "c", method)
        for c, values in zip(data.class_ids("c"), expected, strict=True):
            found = np.asarray(Image.open(out / f"c_{c}.png"))
            np.testing.assert_allclose(found, 255 * values, atol=0.51)
        (out / "d_1.png").unlink()
        assert "done: maps of 1 images refined (" in run("refine_cues.py", *command)
        assert "done: maps of 0 images refined, 6 were there" in run("refine_cues.py", *command)
        text = run("refine_cues.py", *command, "--iterations", 3, expect=1)
        assert "made with other settings" in text
        (out / "d_1.png").unlink()
        (maps / "d_1.png").rename(maps / "kept.png")
        assert "d_1.png is missing; run export_attention.py" in run("refine_cues.py", *command, expect=1)
        (maps / "kept.png").rename(maps / "d_1.png")


def refined(data, maps, name, method):
    attention = np.stack(
        [np.asarray(Image.open(maps / f"{name}_{c}.png")) / np.float32(255) for c in data.class_ids(name)]
    )
    photograph = np.asarray(data.photograph(name))
    if method == "pamr":
        image = torch.tensor(photograph).permute(2, 0, 1)[None].float()
        return pixel_adaptive_refinement(image, torch.from_numpy(attention)[None], iterations=2)[0].numpy()
    scores = np.concatenate([np.full_like(attention[:1], 0.4), attention])
    release = {"gaussian": (1, 3), "bilateral": (67, 3, 4)}  # recipes: dense CRF of the PyTorch release
    return dense_crf(scores / scores.sum(0), photograph, iterations=10, **release)[1:]


def test_a_missing_map_or_a_level_out_of_range_is_told(voc, maps, tmp_path):  # noqa: F811
    command = ["--voc-root", voc, "--maps", maps, "--out", tmp_path / "out", "--method", "pamr", "--device", "cpu"]
    assert "--background-level in (0, 1]" in run("refine_cues.py", *command, "--background-level", 0, expect=2)
    (maps / "e_0.png").unlink()
    assert "e_0.png is missing; run export_attention.py" in run("refine_cues.py", *command, expect=1)
    for path in maps.iterdir():
        path.unlink()
    command[5] = tmp_path / "none"
    for iterations in (10, 1):  # a start that failed leaves its settings and no map, and binds nothing
        text = run("refine_cues.py", *command, "--iterations", iterations, expect=1)
        assert "is missing; run export_attention.py" in text
