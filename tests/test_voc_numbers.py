"""The pipeline of examples/voc on six drawn images, with seeds: the numbers that files/voc_numbers.json keeps.

A change of the pipeline that is meant to leave its results alone leaves these alone. They are compared within what
another CPU's or another torch's rounding does to so short a training. When a change alters them on purpose,
CHANGELOG.md says so, and the file that a failing test names takes the place of the kept one.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_voc_pipeline import BACKBONE, TINY, run, voc  # noqa: F401  (a fixture)

from oaa_lib import AttentionAccumulator

KEPT = Path(__file__).parent / "files" / "voc_numbers.json"
VARIED = ["--gate", "topk", "--warm-up", 2, "--fill-empty", "last-epoch", "--drop", 0.5, "--drop-above", 0.3]


def run_all(voc, out):  # noqa: F811
    """Every stage once, from photographs to scores of a segmentation network."""
    data, cpu, maps = ["--voc-root", voc], ["--device", "cpu"], ["--maps", out / "attention" / "max.safetensors"]
    learning = [*data, *cpu, *TINY, "--seed", 4]
    run("train_attention.py", *learning, "--out", out / "attention", "--iterations", 11, "--drop-at", 8, *VARIED)
    constrained = ["--threshold", 0.75, "--constrain-below", "threshold"]  # seven steps of `small` leave maps of zeros
    options = ["--out", out / "integral", "--iterations", 7, "--drop-at", 5, *maps, *constrained]
    run("train_integral.py", *learning, *options)
    for source, folder in (("cam_flip", "attention"), ("max", "attention"), ("integral", "integral")):
        options = [*data, *cpu, "--run", out / folder, "--source", source, "--out", out / "maps" / source]
        run("export_attention.py", *options, "--recipe", "paper", *(["--scales", 1, 1.5] if source != "max" else []))
    labels = ["--maps", out / "maps" / "max", "--saliency", voc / "Saliency", "--out", out / "labels"]
    run("make_pseudo_labels.py", *data, *labels)
    options = [*data, *cpu, *BACKBONE, "--workers", 0, "--crop", 49, "--batch-size", 2, "--seed", 4]
    options += ["--weights", "default", "--lr", 1e-3]
    options += ["--labels", out / "labels", "--proportion", 0.7, "--iterations", 6]
    run("train_segmentation.py", *options, "--out", out / "segmentation")
    views = ["--recipe", "small", "--test-flip", "--test-scales", 1, 1.5]
    run("evaluate.py", *data, *cpu, "--run", out / "segmentation", "--out", out / "val", *views)
    run("evaluate_cues.py", *data, "--maps", *sorted((out / "maps").iterdir()), "--json", out / "cues.json")


def numbers(out):
    """What the stages wrote, as a few numbers for each file."""
    found = {}
    for stage in ("attention", "integral", "segmentation"):
        with open(out / stage / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        found[f"{stage} log"] = {
            name: [None if row[name] == "nan" else float(row[name]) for row in rows]
            for name in rows[0]
            if "seconds" not in name
        }
    for fusion in ("max", "mean"):
        maps = AttentionAccumulator.load(out / "attention" / f"{fusion}.safetensors")
        found[f"{fusion} counts"] = {key: maps.counts[row].tolist() for row, key in enumerate(maps.pairs.keys)}
        found[f"{fusion} maps"] = {key: maps.attention(key).mean((1, 2)).tolist() for key in maps.pairs.keys}
    for path in sorted((out / "maps").glob("*/*.png")):
        found[f"{path.parent.name} {path.stem}"] = np.asarray(Image.open(path)).mean() / 255
    for path in sorted((out / "labels").glob("*.png")):
        values = np.bincount(np.asarray(Image.open(path)).ravel(), minlength=256)
        found[f"label {path.stem}"] = (values / values.sum())[[0, 1, 2, 255]].tolist()
    found["val score"] = json.loads((out / "val" / "scores.json").read_text())["mean_iou"]
    cues = json.loads((out / "cues.json").read_text())
    found["cue scores"] = {Path(folder).name: result["mean_iou"] for folder, result in cues.items()}
    return found


@pytest.mark.slow
def test_every_stage_gives_the_numbers_that_were_kept(voc, tmp_path):  # noqa: F811
    run_all(voc, tmp_path)
    kept, found = json.loads(KEPT.read_text()), numbers(tmp_path)
    (tmp_path / KEPT.name).write_text(json.dumps(found, indent=1) + "\n")
    assert list(found) == list(kept), f"see {tmp_path / KEPT.name}"
    wrong = [f"{name}: {found[name]}, kept {kept[name]}" for name in kept if not near(found[name], kept[name])]
    assert not wrong, "\n".join([*wrong, f"all of them: {tmp_path / KEPT.name}"])


def near(found, kept):
    """Whether numbers are the same up to rounding, which these few steps amplify to 0.0003 where we have tried."""
    if isinstance(kept, dict):
        return list(found) == list(kept) and all(near(found[name], kept[name]) for name in kept)
    if isinstance(kept, list):
        return len(found) == len(kept) and all(near(*both) for both in zip(found, kept, strict=True))
    if kept is None or found is None:
        return found is kept
    return found == pytest.approx(kept, rel=0.005, abs=0.003)
