"""examples/report: what the page of a run holds, and that it works in a real browser, which fetches nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data import VOCFolder, write_label
from evaluate_cues import evaluate_maps
from PIL import Image
from test_voc_pipeline import run, trained, voc  # noqa: F401  (two are fixtures)

REPORT = "../report"
CLASSES = ["red<script>alert(1)</script>", "green&amp;\"'"]  # what a data set may call its classes


@pytest.fixture(scope="module")
def data(voc, tmp_path_factory):  # noqa: F811
    """The drawn images, with odd class names."""
    root = tmp_path_factory.mktemp("report") / "voc"
    shutil.copytree(voc, root)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture(scope="module")
def attention(data, trained, tmp_path_factory):  # noqa: F811
    """A run that has only stage 1: two images are watched, one of them with two classes."""
    seed = tmp_path_factory.mktemp("attention") / "seed0"
    shutil.copytree(trained, seed / "attention")
    settings = json.loads((seed / "attention" / "settings.json").read_text())
    settings["data"]["classes"] = CLASSES
    (seed / "attention" / "settings.json").write_text(json.dumps(settings))
    state = torch.load(seed / "attention" / "checkpoint.pt", weights_only=True)
    for kind in ("cumulative", "latest"):
        state["snapshots"][kind] = {name: state["snapshots"][kind][name] for name in ("a", "c")}
    torch.save(state, seed / "attention" / "checkpoint.pt")
    return seed


@pytest.fixture(scope="module")
def seed(data, attention, tmp_path_factory):
    """A run with maps: the CAM shows half of each object, OAA+ all of it, but d elsewhere, and of f as much."""
    seed = tmp_path_factory.mktemp("runs") / "seed0"
    shutil.copytree(attention, seed)
    train = VOCFolder(data, "train")
    for name in train.names:
        truth = train.mask(name).numpy()
        for c in train.class_ids(name):
            whole = truth == c + 1
            half = whole & (np.cumsum(whole, 1) <= 10)
            maps = {"cam": half, "max": whole, "hybrid": {"d": np.roll(whole, 30, 0), "f": half}.get(name, whole)}
            for method, shown in maps.items():
                path = seed / "maps" / method / f"{name}_{c}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((200 * shown).astype(np.uint8)).save(path)
        (seed / "labels" / "hybrid").mkdir(parents=True, exist_ok=True)
        write_label(seed / "labels" / "hybrid" / f"{name}.png", truth)
    for folder in (seed / "maps").iterdir():
        (folder / "scores.json").write_text(json.dumps(evaluate_maps(train, folder)))
    for stage in ("hybrid", "networks/hybrid_100"):
        (seed / stage).mkdir(parents=True)
        (seed / stage / "log.csv").write_text("step,epoch,loss,seconds\n4,1.0,2.5,1\n8,2.0,nan,1\n11,2.75,1.5,1\n")
    (seed / "val" / "hybrid_100").mkdir(parents=True)
    (seed / "val" / "hybrid_100" / "scores.json").write_text(json.dumps({"mean_iou": 0.4321}))
    return seed


@pytest.fixture(scope="module")
def report(data, seed, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert "done: " in run(REPORT, "--voc-root", data, "--run", seed, "--out", out)
    return out


def content(page):
    """What the page's script reads."""
    return json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


# What the page holds


@pytest.mark.slow
def test_watched_pairs_come_first_then_gains_then_failures(report):
    pairs = content(report)["pairs"]
    red, green = CLASSES
    assert [(p["name"], p["class"], p["kinds"]) for p in pairs] == [
        *[("a", red, ["watched", "gain"]), ("c", red, ["watched", "gain"]), ("c", green, ["watched", "gain"])],
        *[("b", green, ["gain"]), ("e", red, ["gain"]), ("d", green, ["failure"])],
    ]
    assert [pair["gain"] for pair in pairs] == [50, 50, 50, 50, 50, -50]
    assert [pair["iou"] for pair in pairs] == [100, 100, 100, 100, 100, 0]
    titles = ["Accumulated", "CAM", "OAA+", "Pseudo label", "Truth"]
    for pair in pairs:
        watched = "watched" in pair["kinds"]
        assert [panel["title"] for panel in pair["panels"]] == (["Latest attention"] if watched else []) + titles
        assert {panel.get("frames", 1) for panel in pair["panels"]} == ({1, 3} if watched else {1})
    assert content(report)["epochs"] == ["1", "2", "2.8"]
    assert [panel["notes"] for panel in pairs[0]["panels"][2:4]] == [["IoU 50 %"], ["IoU 100 %"]]


@pytest.mark.slow
def test_numbers_of_pairs_and_what_is_a_failure_are_chosen(data, seed, tmp_path):
    options = ["--voc-root", data, "--run", seed, "--out", tmp_path / "r.html"]
    run(REPORT, *options, "--images", 0)
    assert [pair["name"] for pair in content(tmp_path / "r.html")["pairs"]] == ["a", "c", "c"]
    run(REPORT, *options, "--failure", 60, "--images", 2)
    assert [pair["name"] for pair in content(tmp_path / "r.html")["pairs"]] == ["a", "c", "c", "d", "f"]


@pytest.mark.slow
def test_scores_and_logs_are_tables_and_curves(report):
    text = report.read_text(encoding="utf-8")
    for title in (
        *("Classifier: loss", "Does attention still move?", "Pairs that hold nothing"),
        *("Integral attention models: loss", "Segmentation networks: loss", "Cues over the threshold"),
        "Cues: precision over recall",
    ):
        assert f"<figcaption>{title}" in text
    assert "<td>43.2</td>" in text
    assert "Not in this run" not in text
    assert "highest 2.5" in text  # the text alternative; a NaN is a gap


@pytest.mark.slow
def test_a_run_of_stage_1_alone_has_its_page_which_says_what_is_missing(data, attention, tmp_path):
    run(REPORT, "--voc-root", data, "--run", attention, "--out", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    for missing in ("maps/cam", "maps/hybrid", "pseudo labels", "No segmentation network"):
        assert missing in text
    assert "Nothing has been scored" in text
    pairs = content(tmp_path / "r.html")["pairs"]
    assert [pair["gain"] for pair in pairs] == [None] * 3
    assert [panel["title"] for panel in pairs[0]["panels"]] == ["Latest attention", "Accumulated", "Truth"]

    (attention / "attention" / "log.csv").rename(tmp_path / "log.csv")
    try:
        run(REPORT, "--voc-root", data, "--run", attention, "--out", tmp_path / "r.html")
    finally:
        (tmp_path / "log.csv").rename(attention / "attention" / "log.csv")
    assert "no curves of stage 1" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_names_from_the_data_set_are_escaped(report):
    text = report.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "red&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "green&amp;amp;&quot;&#x27;" in text
    assert text.count("</script>") == 2  # the page's own two


@pytest.mark.slow
def test_wrong_folders_end_in_a_sentence(voc, data, seed, tmp_path):  # noqa: F811
    def told(**changed):
        options = {"--voc-root": data, "--run": seed, "--out": tmp_path / "r.html"} | changed
        return run(REPORT, *(part for option in options.items() for part in option), expect=1)

    assert "is no run: expected a folder attention" in told(**{"--run": tmp_path})
    assert "is not in VOC layout" in told(**{"--voc-root": tmp_path})
    assert "was trained on other classes" in told(**{"--voc-root": voc})
    assert "is a folder; expected a file" in told(**{"--out": tmp_path})
    assert "choose a place that can be written to" in told(**{"--out": seed / "attention" / "log.csv" / "r.html"})
    told(**{"--images": -1})
    told(**{"--failure": 101})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_page_that_cannot_be_completed_leaves_the_old_one(data, seed, tmp_path, monkeypatch):
    (tmp_path / "r.html").write_text("before")
    lost = tmp_path / "seed0"
    shutil.copytree(seed, lost)
    (lost / "maps" / "hybrid" / "e_0.png").write_bytes(b"no picture")
    options = ["--voc-root", data, "--out", tmp_path / "r.html"]
    assert "e_0.png cannot be read" in run(REPORT, *options, "--run", lost, expect=1)

    def full(path, text, **_):
        path.write_bytes(text[:1000].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device; make room" in run(REPORT, *options, "--run", seed, expect=1)
    assert (tmp_path / "r.html").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "seed0"]
