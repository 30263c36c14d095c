"""when_it_pays.py: what is read off a run, against loops; the line at the end of stage 1; the table with masks."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import figures
import numpy as np
import pytest
import torch
from compare import paired_differences, read_counts
from data import VOCFolder
from evaluate_cues import evaluate_maps
from PIL import Image
from signs import EMPTY, GROWN, LEVEL, Signs, expectation, from_json, signs, to_json
from test_voc_pipeline import TINY, run, voc  # noqa: F401  (a fixture)
from when_it_pays import maps_of

from oaa_lib import AttentionAccumulator

LABELS = [[1, 0], [0, 1], [1, 1], [0, 0]]
SIZES = [[3, 4], [5, 2], [4, 4], [3, 3]]
LOG = "step,epoch,loss,gate_pass_rate,pairs_empty,similarity\n2,1.0,0.5,0.25,3,nan\n4,2.0,0.4,0.5,1,0.75\n"
STEADY = Signs([1.0, 2.0], [0.5, 0.9], [0.8, 0.9], 100, 0, 2.0, GROWN + 0.01)


@pytest.fixture
def finished_run(tmp_path):
    """A folder as train_attention.py leaves it, and the two accumulators."""
    both = [AttentionAccumulator(LABELS, SIZES, fusion=fusion, gate=None) for fusion in ("max", "latest")]
    generator = torch.Generator().manual_seed(0)
    for image in (0, 2, 2, 0, 2):
        maps = torch.rand(1, 2, *SIZES[image], generator=generator)
        for accumulator in both:
            accumulator.update([image], maps)
    settings = {"recipe": {"iterations": 4}, "arguments": {"backbone": "none"}, "data": {"classes": ["cat", "dog"]}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    torch.save({"step": 4, "network": {}, "latest": both[1].state_dict()}, tmp_path / "checkpoint.pt")
    both[0].save(tmp_path / "max.safetensors")
    (tmp_path / "log.csv").write_text(LOG)
    return tmp_path, *both


def test_what_is_read_off_a_run_is_what_loops_count(finished_run):
    path, maximum, latest = finished_run
    areas = []
    for accumulator in (maximum, latest):
        area = 0
        for image in range(4):
            for cells in accumulator.attention(image):
                for value in cells.flatten().tolist():
                    area += value >= LEVEL
        areas.append(area)
    found = signs(path)
    assert found.growth == pytest.approx(areas[0] / areas[1])
    assert areas[0] > areas[1] > 0
    assert (found.pairs, found.empty, found.maps_a_pair) == (4, 1, 8 / 4)
    assert (found.epochs, found.pass_rate) == ([1, 2], [0.25, 0.5])
    assert np.isnan(found.similarity[0])
    assert found.similarity[1] == 0.75


@pytest.mark.parametrize(("rest", "epochs"), [("2.1", [1, 2]), ("2.5", [1, 2, 2.5])])
def test_the_few_batches_after_the_last_whole_epoch_tell_nothing(finished_run, rest, epochs):
    path, _, _ = finished_run
    (path / "log.csv").write_text(f"{LOG}5,{rest},0.4,1.0,1,0.99\n")
    found = signs(path)
    assert found.epochs == epochs
    assert (found.pass_rate[-1], found.last_similarity) == ((1.0, 0.99) if len(epochs) == 3 else (0.5, 0.75))


@pytest.mark.parametrize(("fill", "empty"), [("no", 1), ("final-model", 1), ("last-epoch", 3)])
def test_pairs_that_were_filled_count_as_empty(finished_run, fill, empty):
    """Of two passes over the images the second fills; the log has 3 empty pairs after the first, then 1."""
    path, maximum, _ = finished_run
    settings = json.loads((path / "settings.json").read_text())
    settings["recipe"] |= {"batch_size": 2, "fill_empty": fill}
    settings["data"]["images"] = 4
    (path / "settings.json").write_text(json.dumps(settings))
    if fill != "no":
        maximum.update([1], torch.ones(1, 2, 5, 2), fill_empty=True)
        maximum.save(path / "max.safetensors")
        assert not maximum.statistics().never_accumulated.any()
    assert signs(path).empty == empty


def test_the_last_row_before_the_filling_is_found_by_its_step(finished_run):
    """With 106 images in batches of 16, epochs are 7 steps long in the log, and a little less in truth."""
    path, _, _ = finished_run
    settings = json.loads((path / "settings.json").read_text())
    settings["recipe"] |= {"iterations": 100, "batch_size": 16, "fill_empty": "last-epoch"}
    settings["data"]["images"] = 106
    (path / "settings.json").write_text(json.dumps(settings))
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"step": 100}, path / "checkpoint.pt")
    first = max(100 * 16 // 106 - 1, 0) * 106 // 16  # the step with which it begins
    rows = [f"{step},{step / 7:.2f},0.5,0.5,{4 if step <= first else 0},0.9\n" for step in (*range(7, 99, 7), 100)]
    (path / "log.csv").write_text(LOG.splitlines()[0] + "\n" + "".join(rows))
    assert signs(path).empty == 4


def test_maps_of_the_final_model_do_not_count_as_grown(finished_run):
    path, maximum, _ = finished_run
    before = signs(path).growth
    maximum.update([1], torch.ones(1, 2, 5, 2), fill_empty=True)
    maximum.save(path / "max.safetensors")
    assert signs(path).growth == before


def test_maps_that_stay_do_not_grow(finished_run):
    path, maximum, latest = finished_run
    assert signs(path).growth > 1
    for accumulator in (maximum, latest):
        accumulator.reset()
        for _ in range(3):
            accumulator.update([0], torch.ones(1, 2, 3, 4).tril())
    torch.save({"step": 4, "network": {}, "latest": latest.state_dict()}, path / "checkpoint.pt")
    maximum.save(path / "max.safetensors")
    assert signs(path).growth == 1


@pytest.mark.parametrize(
    ("change", "pays", "text"),
    [
        ({}, True, "similarity 0.90 after epoch 2, area grew 2.0 times: accumulation may beat the flip-averaged CAM"),
        ({"growth": GROWN - 0.1}, False, "is not expected to beat"),
        (
            {"empty": round(100 * EMPTY) + 1},
            False,
            "% of the pairs have no map that passed the gate: accumulation is not expected",
        ),
        ({"similarity": [0.5, np.nan]}, True, "similarity 0.50 after epoch 1"),
        ({"similarity": [np.nan, np.nan]}, False, "no pair has accepted two maps"),
    ],
)
def test_the_rule(change, pays, text):
    found = expectation(dataclasses.replace(STEADY, **change))
    assert found[0] == pays
    assert text in found[1]
    assert "\n" not in found[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", "step,loss\n1,2\n", "expected the columns epoch, gate_pass_rate, similarity"),
        ("log.csv", "", "expected the columns epoch, gate_pass_rate, similarity"),
        ("max.safetensors", "no maps", "it is of other images, labels or settings"),
        ("settings.json", "{}", "is not one of a training stage"),
    ],
)
def test_a_folder_of_something_else_is_refused(finished_run, name, content, message):
    path, _, _ = finished_run
    (path / name).write_text(content)
    assert message in run("when_it_pays.py", "--run", path, expect=1)


def test_a_checkpoint_without_the_latest_maps_is_refused(finished_run):
    path, _, _ = finished_run
    torch.save({"step": 4, "network": {}}, path / "checkpoint.pt")
    assert "it is of other images" in run("when_it_pays.py", "--run", path, expect=1)


@pytest.mark.slow
def test_the_line_at_the_end_of_stage_1_and_the_table(voc, tmp_path):  # noqa: F811
    train = ["--voc-root", voc, *TINY, "--iterations", 8, "--drop-at", 7, "--gate", "none", "--split", "train"]
    lines = run("train_attention.py", *train, "--out", tmp_path / "attention").splitlines()
    assert lines[-1].startswith("done: ")
    found_signs = signs(tmp_path / "attention")
    assert expectation(found_signs)[1] in lines
    assert "similarity " in expectation(found_signs)[1]
    saliency = tmp_path / "saliency"
    saliency.mkdir()
    data = VOCFolder(voc, "train")
    for name in data.names:
        Image.fromarray(np.uint8(255 * (data.mask(name) > 0))).save(saliency / f"{name}.png")
    options = ["--run", tmp_path, "--voc-root", voc, "--split", "train", "--score-classes", "background,green"]
    out = tmp_path / "new" / "law.json"
    text = run("when_it_pays.py", *options, "--saliency", saliency, "--json", out, "--figure", tmp_path / "law.png")
    result = json.loads(out.read_text(), parse_constant=pytest.fail)[str(tmp_path)]
    cam = evaluate_maps(data, tmp_path / "maps_train" / "cam", scored=[0, 2])
    scores = result["scores"]
    assert (scores["constant"]["mean_iou"]["cam"], scores["cam"]) == (cam["mean_iou"], cam["foreground"])
    pairs = ["cam_flip - cam", *(f"{each} - {control}" for each in ("mean", "max") for control in ("cam", "cam_flip"))]
    for background, folder in (("constant", None), ("saliency", saliency)):
        kinds = [tmp_path / "maps_train" / kind for kind in ("max", "cam_flip")]
        counts = [read_counts(data, maps, [0, 2], are_labels=False, saliency=folder) for maps in kinds]
        best = evaluate_maps(data, kinds[0], scored=[0, 2], saliency=folder)
        assert scores[background]["thresholds"]["max"] == best["thresholds"]
        gains = scores[background]["gains"]
        assert list(gains) == pairs
        again = paired_differences(dict(zip(("cam_flip", "max"), reversed(counts), strict=True)), ["cam_flip"], [0, 2])
        assert gains["max - cam_flip"] == again["max - cam_flip"]
        low, high = gains["max - cam_flip"]["interval"]
        assert f"{100 * gains['max - cam_flip']['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" in text
    assert f"{tmp_path}: means over background,green on 6 images of train" in text
    with Image.open(tmp_path / "law.png") as picture:
        assert picture.size[0] > 500

    (saliency / "a.png").unlink()
    text = run("when_it_pays.py", *options, "--saliency", saliency, expect=1)
    assert "lacks 1 of the 6 images of train, first a.png" in text

    # what is there stays, whether it was made by this script or by another; a run may be put beside others
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*.png")}
    for source in ("cam_ms", "max"):
        export = ["--voc-root", voc, "--run", tmp_path / "attention", "--source", source, "--split", "train"]
        run("export_attention.py", *export, "--recipe", "small", "--out", tmp_path / "maps" / source)
    (tmp_path / "hybrid").mkdir()  # a stage 2 that has not got anywhere
    text = run("when_it_pays.py", *options, "--beside", out, "--json", tmp_path / "both.json")
    assert "hybrid is left out: " in text
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not (tmp_path / "maps_train/cam_ms").exists()
    again = json.loads((tmp_path / "both.json").read_text())[str(tmp_path)]["scores"]["constant"]
    assert again["gains"]["max - cam_flip"] == result["scores"]["constant"]["gains"]["max - cam_flip"]
    assert "max - cam_ms" in again["gains"]

    text = run("when_it_pays.py", "--run", tmp_path / "attention", "--beside", out, "--json", tmp_path / "both.json")
    both = json.loads((tmp_path / "both.json").read_text())
    assert list(both) == [str(tmp_path), str(tmp_path / "attention")]
    assert both[str(tmp_path)] == result
    assert both[str(tmp_path / "attention")] == {"signs": to_json(found_signs)}
    assert text.count("| no |") + text.count("| may pay |") == 2
    run("when_it_pays.py", "--run", tmp_path, "--beside", out, "--json", out)  # without masks the scores stay
    earlier = json.loads(out.read_text())
    del earlier[str(tmp_path)]["scores"]["saliency"]["thresholds"]  # as it was scored at 0.3
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    assert "score it again" in run("when_it_pays.py", "--beside", tmp_path / "earlier.json", expect=1)
    assert json.loads(out.read_text())[str(tmp_path)] == result
    assert "--figure" in run("when_it_pays.py", "--beside", out, "--figure", tmp_path / "law.nonsense", expect=1)

    run("export_attention.py", *export, "--out", tmp_path / "stretched", "--recipe", "paper")
    shutil.rmtree(tmp_path / "maps" / "max")
    (tmp_path / "stretched").rename(tmp_path / "maps" / "max")
    assert "of different --stretch" in run("when_it_pays.py", *options, expect=1)


def test_numbers_survive_json():
    found = dataclasses.replace(STEADY, similarity=[np.nan, 0.5], growth=np.nan)
    written = json.dumps(to_json(found), allow_nan=False)
    assert repr(from_json(json.loads(written))) == repr(found)


@pytest.mark.parametrize(
    "content", ['{"runs/seed0": {"signs": {"epochs": [1]}}}', "[1]", '{"runs/seed0": 1}', "{", "[" * 9999]
)
def test_another_json_is_refused(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    text = run("when_it_pays.py", "--beside", tmp_path / "other.json", expect=1)
    assert "expected a file of an earlier --json" in text
    assert "remove" not in text
    assert "none.json cannot be read" in run("when_it_pays.py", "--beside", tmp_path / "none.json", expect=1)
    assert "--run" in run("when_it_pays.py", expect=2)


def test_points_are_named_by_what_tells_them_apart():
    assert figures.short(["runs/voc/seed0", "runs/other/seed0"]) == ["voc/seed0", "other/seed0"]
    assert figures.short(["study/max", "study/lse"]) == ["max", "lse"]
    assert figures.short(["runs/seed0"]) == ["seed0"]
    assert figures.short(["a", "a/b"]) == ["a", "a/b"]


def test_maps_of_another_training_in_the_folder_are_refused(finished_run):
    path, _, _ = finished_run
    data = SimpleNamespace(names=["a"], split="train", class_ids=lambda _: [0])
    (path / "maps/cam").mkdir(parents=True)
    (path / "maps/cam/a_0.png").touch()
    record, settings = path / "maps/cam/source.json", json.loads((path / "settings.json").read_text())
    for run_of_maps in (None, settings):
        if run_of_maps:
            record.write_text(json.dumps({"run": run_of_maps}))
        assert maps_of(path, "cam", data) == path / "maps/cam"
    record.write_text(json.dumps({"run": settings | {"recipe": {"iterations": 9}}}))
    with pytest.raises(SystemExit, match="maps/cam has maps of another training than"):
        maps_of(path, "cam", data)
