"""reproduce.py: tables and figures from drawn images on, skipping what is done."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import figures
import numpy as np
import paper_tables
import pytest
import reproduce
import seeds
from data import VOCFolder
from PIL import Image
from test_voc_pipeline import EXAMPLES, run, voc  # noqa: F401  (a fixture)

OPTIONS = ["--recipe", "small", "--backbone", "efficientnet_lite0", "--weights", "none", "--workers", 0]
TINY = ["--short-side 49 --batch-size 2 --iterations 4 --drop-at 3", "--crop 49 --batch-size 2 --iterations 1"]
OPTIONS += ["--attention", f"{TINY[0]} --gate none --snapshots 2", "--integral", TINY[0], "--segmentation", TINY[1]]
REFINE = "crf" if sys.version_info < (3, 13) else "pamr"  # where pydensecrf2 builds


@pytest.fixture
def launched(monkeypatch):
    """Stages run in this process, and are noted."""
    calls = []

    def launch(script, options, processes):
        calls.append((script, options))
        run(script, *options)

    monkeypatch.setattr(seeds, "launch", launch)
    return calls


def list_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def reproduce_with(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, options)])
    reproduce.main()


@pytest.mark.slow
def test_tables_and_figures_from_photographs_on(voc, tmp_path, monkeypatch, launched, capsys):  # noqa: F811
    options = ["--voc-root", voc, "--out", tmp_path, "--negatives", "background", *OPTIONS]
    reproduce_with(monkeypatch, *options, "--seeds", 0, 1, "--table", 1)
    scripts = [script for script, _ in launched]
    # what rows have in common is made once for each seed
    assert {script: scripts.count(script) for script in set(scripts)} == {
        "train_attention.py": 2,
        "train_integral.py": 2,
        "export_attention.py": 4,
        "make_pseudo_labels.py": 4,
        "train_segmentation.py": 4,
        "evaluate.py": 4,
    }
    table = json.loads((tmp_path / "table1.json").read_text())
    assert [row["row"] for row in table["rows"]] == ["OAA", "OAA+"]
    assert [row["paper_val"] for row in table["rows"]] == [61.6, 63.1]
    assert table["stages"]["attention"]["recipe"]["iterations"] == 4
    assert {"commit", "recipe", "data", "evaluation"} <= table.keys()
    text = (tmp_path / "table1.md").read_text()
    assert "val: 6 images of val; cues: 6 images of train, each half" in text
    assert "means over all classes that occur" in text
    for row in table["rows"]:
        for seed in ("0", "1"):
            scores = row["seeds"][seed]
            out = tmp_path / f"seed{seed}" / "val" / {"OAA": "max_100", "OAA+": "hybrid_100"}[row["row"]]
            assert scores["val"] == json.loads((out / "scores.json").read_text())
            assert scores["background_level"] == scores["cues"]["thresholds"][1]
        values = [100 * row["seeds"][seed]["val"]["mean_iou"] for seed in ("0", "1")]
        assert f"| {np.mean(values):.1f} | {np.std(values, ddof=1):.1f} | {values[0]:.1f} {values[1]:.1f} |" in text
    assert text.strip() in capsys.readouterr().out

    # what is done is skipped: a second table and the figures need only what they add
    launched.clear()
    reproduce_with(monkeypatch, *options, "--seeds", 0, "--table", 3, "--figure", 1, 4, 5)
    assert [script for script, _ in launched] == [
        *["train_segmentation.py", "evaluate.py"] * 3,
        *["export_attention.py", "train_integral.py", "export_attention.py"],  # CAM, MCE
    ]
    proportions = [o[o.index("--proportion") + 1] for script, o in launched if script == "train_segmentation.py"]
    assert proportions == ["0.2", "0.5", "0.8"]
    for number, (rows, columns) in {1: (2, 3), 4: (6, 4), 5: (2, 7)}.items():
        with Image.open(tmp_path / f"figure{number}.jpg") as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.std() > 10
        assert pixels.shape[1] == pytest.approx(209 * columns, abs=1)
        assert rows * 60 / 90 < pixels.shape[0] / 209 <= rows * 90 / 60 + 0.2  # photographs and a line of titles
    launched.clear()
    reproduce_with(monkeypatch, *options, "--seeds", 0, "--table", 1)
    assert (tmp_path / "table1.md").read_text() != text
    reproduce_with(monkeypatch, *options, "--seeds", 0, 1, "--table", 1)  # of the results that are kept
    assert (tmp_path / "table1.md").read_text() == text
    reproduce_with(monkeypatch, *options, "--seeds", 0, "--table", 1)
    assert launched == []

    # refined maps: the stages after them once more, beside the others
    seed = tmp_path / "seed0"
    before = (seed / "maps/max/scores.json").read_bytes(), list_files(seed / "labels/max")
    reproduce_with(monkeypatch, *options, "--seeds", 0, "--table", 1, "--refine", REFINE)
    refined = ["refine_cues.py", "make_pseudo_labels.py", "train_segmentation.py", "evaluate.py"]
    assert [script for script, _ in launched] == refined * 2
    given = [[option for option in options if option != "--no-stretch"] for _, options in launched[:4]]
    refinement, labels, training, _ = (dict(zip(o[::2], o[1::2], strict=True)) for o in given)
    assert "--no-stretch" in launched[1][1]  # the level was chosen on maps as they are
    row = json.loads((tmp_path / "table1.json").read_text())["rows"][0]["seeds"]["0"]
    level = str(row["background_level"])  # of the unrefined maps
    assert refinement.get("--background-level") == {"crf": level, "pamr": None}[REFINE]
    assert labels["--maps"] == refinement["--out"] == str(seed / "maps" / f"max_{REFINE}")
    assert training["--labels"] == labels["--out"]
    table = json.loads((tmp_path / f"table1_{REFINE}.json").read_text())
    assert table["refinement"] == REFINE
    cues = json.loads((seed / "maps" / f"max_{REFINE}" / "scores.json").read_text())
    assert table["rows"][0]["seeds"]["0"]["cues"]["mean_iou"] == cues["mean_iou"] != row["cues"]["mean_iou"]
    assert float(labels["--background-level"]) == max(cues["thresholds"][1] - 0.5 / 255, 0)
    assert f"maps refined by {REFINE}" in (tmp_path / f"table1_{REFINE}.md").read_text()
    assert "maps as they are" in (tmp_path / "table1.md").read_text()
    assert ((seed / "maps/max/scores.json").read_bytes(), list_files(seed / "labels/max")) == before
    launched.clear()
    reproduce_with(monkeypatch, *options, "--seeds", 0, "--table", 1)
    assert launched == []


def test_scores_are_of_the_list_and_the_classes_that_are_asked_for(voc, tmp_path, monkeypatch):  # noqa: F811
    (voc / "ImageSets/Segmentation/part_cls.txt").write_text("b 1\nc 0 1\nd 1\n")
    maps, evaluated = tmp_path / "maps", []
    maps.mkdir()
    for name, c, size in (("a", 0, (90, 60)), ("b", 1, (90, 60)), ("c", 0, (90, 60)), ("c", 1, (90, 60))):
        Image.new("L", size, 100).save(maps / f"{name}_{c}.png")
    for name, c, size in (("d", 1, (60, 90)), ("e", 0, (60, 90)), ("f", 1, (60, 60))):
        Image.new("L", size, 100).save(maps / f"{name}_{c}.png")

    def evaluate_maps(data, *arguments, **options):
        evaluated.append((data.split, options["scored"]))
        return real(data, *arguments, **options)

    real = seeds.evaluate_maps
    monkeypatch.setattr(seeds, "evaluate_maps", evaluate_maps)
    monkeypatch.setattr(seeds.Seed, "network", lambda *_: tmp_path / "networks" / "max_100")
    stages = []
    monkeypatch.setattr(seeds.Seed, "_stage", lambda self, *arguments, **_: stages.append(arguments))
    plain = {"voc_root": voc, "out": tmp_path, "background": "threshold", "refine": None, "recipe": "small"}

    def seed(split, classes):
        asked = {"score_split": split, "score_classes": classes, "evaluation": ["--split", "part"]}
        return seeds.Seed(argparse.Namespace(**plain, **asked), 0)

    for split, classes, rows in (
        ("train", None, [0, 1, 2]),
        ("part", None, [0, 1, 2]),
        ("part", "background,green", [0, 2]),
    ):
        found = [seed(split, classes).scores(maps) for _ in range(2)]  # the second one is read
        assert evaluated == [(split, rows)]
        assert found[0] == found[1]
        assert (found[0]["split"], len(found[0]["score_classes"])) == (split, len(rows))
        seed(split, classes).val("max")
        asked = [] if classes is None else ["--score-classes", classes]
        assert stages[-1][2][4:] == ["--split", "part", *asked]
        evaluated.clear()


@pytest.mark.slow
def test_rows_that_are_left_out_are_not_trained(voc, tmp_path, monkeypatch, launched, capsys):  # noqa: F811
    saliency = tmp_path / "saliency"
    saliency.mkdir()
    for file in (voc / "JPEGImages").iterdir():
        with Image.open(file) as photograph:
            Image.new("L", photograph.size, 200).save(saliency / f"{file.stem}.png")
    options = ["--voc-root", voc, "--out", tmp_path / "out", *OPTIONS, "--seeds", 0]
    options += ["--background", "saliency", "--saliency", saliency]
    (voc / "ImageSets/Segmentation/others_cls.txt").write_text("b 1\nc 0 1\nd 1\n")
    options += ["--segmentation", f"{TINY[1]} --split others"]
    reproduce_with(monkeypatch, *options, "--table", 2, "--rows", "max", "cam")
    exported = [o[o.index("--source") + 1] for script, o in launched if script == "export_attention.py"]
    assert exported == ["cam", "max"]  # in the table's order
    assert "train_integral.py" not in [script for script, _ in launched]
    table = json.loads((tmp_path / "out/table2.json").read_text())
    assert [row["row"] for row in table["rows"]] == ["CAM", "OAA, max (Eq. 5)"]
    assert table["stages"].keys() == {"attention", "max_100"}
    text = (tmp_path / "out/table2.md").read_text()
    assert "accumulation" in text
    assert "Attention trained on train of " in text
    assert ", segmentation on others; val: 6 images of val" in text
    assert "N-" not in text  # there is no integral model whose soft labels could be
    labels = json.loads((tmp_path / "out/seed0/labels/max/settings.json").read_text())
    # the release's rule, though recipe small has another for a constant
    assert (labels["foreground_threshold"], labels["stretch"]) == (0.3, True)
    maps = tmp_path / "out/seed0/maps/max"
    expected = {
        None: table["rows"][1]["seeds"]["0"]["cues"],
        saliency: table["rows"][1]["seeds"]["0"]["cues_with_saliency"],
    }
    for folder, cues in expected.items():
        assert cues["mean_iou"] == seeds.evaluate_maps(VOCFolder(voc, "train"), maps, saliency=folder)["mean_iou"]
        assert f" {100 * cues['mean_iou']:.1f} " in text
    assert len({cues["mean_iou"] for cues in expected.values()}) == 2
    launched.clear()
    (saliency / "a.png").unlink()
    reproduce_with(monkeypatch, *options, "--table", 2, "--rows", "max", "cam")
    assert launched == []
    assert (tmp_path / "out/table2.md").read_text().count("| - | - | - |") == 2  # a mean over the rest would be another
    with pytest.raises(SystemExit):
        reproduce_with(monkeypatch, *options, "--table", 1, 2, "--rows", "cam", "mce")
    assert "table 1 has no row of cam or mce" in capsys.readouterr().err
    for asked in (["--figure", 1], ["--table", 1]):
        with pytest.raises(SystemExit):
            reproduce_with(monkeypatch, *options, *asked, "--rows", "max", "cam")
        assert "none of the tables asked for (--table) has that row" in capsys.readouterr().err


def test_an_option_of_stage_2_is_not_for_mce_where_the_paper_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds.Seed, "attention", lambda _: tmp_path)
    monkeypatch.setattr(seeds.Seed, "_stage", lambda *arguments: arguments[3])
    plain = {"out": tmp_path, "background": "threshold", "refine": None, "recipe": "small", "weights": "none"}
    plain |= {"negatives": None, "amp": False, "attention_backbone": "vgg16"}
    arguments = argparse.Namespace(**plain, integral=["--threshold", "0.75", "--iterations", "9"])
    for loss, threshold in (("hybrid", "0.75"), ("mce", "0")):
        options = seeds.Seed(arguments, 0).integral(loss)
        taken = dict(zip(options[::2], options[1::2], strict=True))  # the last of equal options, as argparse takes it
        assert (taken["--threshold"], taken["--iterations"]) == (threshold, "9")


def test_what_was_made_of_another_training_is_not_taken_for_this_one(tmp_path, monkeypatch):
    """Stage 1 made anew with other settings: everything made of the old one is refused, at whatever distance."""

    def launch(script, options, processes):
        out = Path(options[options.index("--out") + 1])
        (out / "result").write_text(script)

    monkeypatch.setattr(seeds, "launch", launch)
    plain = {"out": tmp_path, "voc_root": tmp_path, "device": "cpu", "workers": 0, "processes": 1}
    seed = seeds.Seed(argparse.Namespace(**plain, refine=None, background="threshold"), 0)

    def stages(rate):
        attention = seed._stage("train_attention.py", "attention", ["--lr", rate])
        maps = seed._stage("export_attention.py", "maps/max", ["--run", attention, "--source", "max"], data=True)
        return seed._stage("make_pseudo_labels.py", "labels/max", ["--maps", maps])

    assert stages(0.1) == stages(0.1)
    shutil.rmtree(tmp_path / "seed0/attention")
    with pytest.raises(SystemExit, match=r"seed0/maps/max was made with other settings .*0.1 there, .*0.2 asked"):
        stages(0.2)
    shutil.rmtree(tmp_path / "seed0/maps")
    with pytest.raises(SystemExit, match=r"seed0/labels/max was made with other settings .*0.1 there, .*0.2 asked"):
        stages(0.2)
    shutil.rmtree(tmp_path / "seed0/labels")
    assert (stages(0.2) / "result").exists()


def test_what_was_made_before_a_stage_was_made_anew_is_not_taken(tmp_path, monkeypatch):
    """With the same options, too: another network has come of them."""
    monkeypatch.setattr(seeds, "launch", lambda script, options, processes: None)
    plain = {"out": tmp_path, "voc_root": tmp_path, "device": "cpu", "workers": 0, "processes": 1}
    seed = seeds.Seed(argparse.Namespace(**plain, refine=None, background="threshold"), 0)
    for _ in range(2):
        attention = seed._stage("train_attention.py", "attention", [])
        maps = seed._stage("export_attention.py", "maps/max", ["--run", attention], data=True)
        (maps / "a_0.png").touch()
    shutil.rmtree(attention)
    seed._stage("train_attention.py", "attention", [])
    with pytest.raises(SystemExit, match="seed0/maps/max was made with other settings"):
        seed._stage("export_attention.py", "maps/max", ["--run", attention], data=True)


def test_a_folder_is_of_its_training_images_wherever_they_are(voc, tmp_path):  # noqa: F811
    shutil.copytree(voc, tmp_path / "moved")
    plain = {"out": tmp_path / "out", "negatives": "background", "refine": None, "background": "threshold"}
    seed, moved = (seeds.Seed(argparse.Namespace(**plain, voc_root=root), 0) for root in (voc, tmp_path / "moved"))
    seed.bind()
    (seed.folder / "attention").mkdir()
    moved.bind()
    lists = tmp_path / "moved/ImageSets/Segmentation/train_cls.txt"
    lists.write_text(lists.read_text().replace("a 0", "a 1"))
    with pytest.raises(SystemExit, match=r"seed0 was made with other settings \(images_and_labels: "):
        moved.bind()


@pytest.mark.parametrize(
    ("stage", "given"),
    [
        ("attention", "--seed 7"),
        ("integral", "--device=cuda"),
        ("labels", "--background-level 0.4"),
        ("export", "--split val"),
        ("segmentation", "--proportion 0.5"),
        ("evaluation", "--part 0/2"),
    ],
)
def test_what_the_tables_choose_is_not_taken_from_the_options_of_a_stage(voc, tmp_path, stage, given):  # noqa: F811
    options = ["--voc-root", voc, "--out", tmp_path / "out", *OPTIONS, "--table", 2, "--background", "threshold"]
    text = run("reproduce.py", *options, f"--{stage}={given}", expect=1)
    assert f"--{stage} '{given}': reproduce.py chooses {given.replace('=', ' ').split()[0]} itself" in text
    assert not (tmp_path / "out").exists()


def test_a_stage_that_fails_stops_everything_and_is_not_done(tmp_path):
    with pytest.raises(SystemExit, match="the same command goes on"):
        seeds.launch("train_attention.py", ["--voc-root", str(tmp_path), "--out", str(tmp_path / "run")], 1)
    assert not (tmp_path / "run" / "done.txt").exists()


def test_what_the_log_does_not_know_is_null_and_a_dash(tmp_path):
    """As of the first row of a log, whose maps are similar to none before."""
    columns = "gate_pass_rate,similarity,pairs_empty,accumulation_seconds,seconds,share_constrained"
    (tmp_path / "log.csv").write_text(f"{columns}\n0.5,nan,1,1,10,nan\n0.75,0.987654,0,1,10,nan\n")
    seed = argparse.Namespace(attention=lambda: tmp_path, integral=lambda _: tmp_path)
    told = paper_tables.diagnostics(seed, paper_tables.TABLES[1])
    assert json.loads(json.dumps(told), parse_constant=pytest.fail)["similarity"] == [None, 0.988]
    line = paper_tables.diagnosis("0", told)
    assert "latest two maps - 0.99; accumulation 10.00% of the training time" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to make"),
        (["--table", 2], "got saliency without --saliency"),
        (["--table", 2, "--background", "power", "--saliency", "x"], "got power and --saliency"),
        (["--table", 2, "--saliency", "x"], "x is missing: expected a folder of saliency maps"),
    ],
)
def test_bad_options_are_told(voc, tmp_path, monkeypatch, capsys, options, message):  # noqa: F811
    with pytest.raises(SystemExit) as stopped:
        reproduce_with(monkeypatch, "--voc-root", voc, "--out", tmp_path / "out", *options)
    assert message in f"{capsys.readouterr().err} {stopped.value}"


def without_masks(root, *names):
    for name in names:
        (root / f"SegmentationClass/{name}.png").unlink()


LATE = [  # options, what is wrong with the folder, the sentence
    (["--recipe", "paper"], None, "the CRF needs pydensecrf"),
    (["--evaluation", "--crf-iterations 1"], None, "the CRF needs pydensecrf"),
    (["--refine", "crf"], None, "the CRF needs pydensecrf"),
    (["--score-classes", "background,gren"], None, "no class 'gren'; did you mean 'green'?"),
    (["--evaluation", "--score-classes rad"], None, "no class 'rad'; did you mean 'red'?"),
    (["--score-split", "trian"], None, "trian.txt does not exist"),
    (["--score-split", "background"], None, "background: expected a part of train"),
    ([], lambda root: without_masks(root, "c"), "1 of 6 images of train have no mask, first c.png"),
    ([], lambda root: (root / "ImageSets/Segmentation/val.txt").unlink(), "val.txt does not exist"),
    (["--evaluation", "--split vall"], None, "vall.txt does not exist"),
    (["--evaluation", "--split background"], lambda root: without_masks(root, "none"), "there is nothing to score"),
    (["--segmentation", "--split others"], None, "others.txt does not exist"),
    (["--negatives", "nothing"], None, "nothing.txt does not exist"),
    (["--voc-root", "nowhere"], None, "nowhere is not in VOC layout"),
    (["--evaluation", "--window 0 --test-flipp"], None, "error: unrecognized arguments: --test-flipp"),
    (["--integral", "--threshold much"], None, "error: argument --threshold: invalid float value: 'much'"),
    (["--attention", "--lr 1 --gates none"], None, "error: unrecognized arguments: --gates none"),
    (["--export", "--flip-views yes"], None, "error: unrecognized arguments: yes"),
    (["--labels", "--strech --min-foreground 0"], None, "error: unrecognized arguments: --strech"),
    (["--labels", "--background-level 2"], None, "reproduce.py chooses --background-level itself"),
    (["--segmentation", "--iterations 0"], None, "--iterations: expected at least 1, got 0"),
    (["--segmentation", "--crop 50"], None, "--crop: efficientnet_lite0 takes whole cells, such as 49, got 50"),
]


@pytest.mark.parametrize(("options", "spoil", "message"), LATE)
def test_what_a_stage_would_refuse_hours_later_is_told_at_once(
    request, tmp_path, monkeypatch, capsys, launched, options, spoil, message
):
    root = shutil.copytree(request.getfixturevalue("voc"), tmp_path / "voc")
    Image.new("P", (90, 60)).save(root / "SegmentationClass/none.png")
    for name in ("others_cls", "part_cls"):  # of other tests
        (root / f"ImageSets/Segmentation/{name}.txt").unlink(missing_ok=True)
    if spoil:
        spoil(root)
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    plain = ["--voc-root", root, "--out", tmp_path / "out", "--background", "threshold", *OPTIONS, "--table", 1]
    with pytest.raises(SystemExit) as stopped:
        reproduce_with(monkeypatch, *plain, *options)
    said = f"{capsys.readouterr().err} {stopped.value.code}"
    assert message in said
    if "error: " in said:
        assert f"{options[0]} '{options[1]}': these options cannot be used, see above" in said
    assert launched == []
    assert not (tmp_path / "out").exists()


def test_figure_4_is_of_the_list_that_is_evaluated(voc, tmp_path, monkeypatch, capsys):  # noqa: F811
    root, drawn = shutil.copytree(voc, tmp_path / "voc"), []
    (root / "ImageSets/Segmentation/few.txt").write_text("e\nb\n")
    (root / "ImageSets/Segmentation/few_cls.txt").write_text("e 0\nb 1\n")
    monkeypatch.setattr(seeds.Seed, "val", lambda _, method: method)
    monkeypatch.setattr(figures, "segmentations", lambda data, results, _: drawn.append((data.names, results)))
    options = ["--voc-root", root, "--out", tmp_path, "--background", "threshold", *OPTIONS, "--figure", 4]
    reproduce_with(monkeypatch, *options, "--evaluation", "--split few")
    assert drawn == [(["e", "b"], {"OAA": "max", "OAA+": "hybrid"})]
    without_masks(root, "b")
    (root / "ImageSets/Segmentation/part_cls.txt").write_text("a 0\nd 1\n")
    with pytest.raises(SystemExit, match="1 of the 2 images of few have no mask, first b: figure 4 needs a mask of"):
        reproduce_with(monkeypatch, *options, "--score-split", "part", "--evaluation", "--split few")


def test_failures_are_drawn_last_and_examples_from_the_best_on(voc, tmp_path, monkeypatch):  # noqa: F811
    from data import write_label

    data = VOCFolder(voc, "val")
    wrong = {name: place / 10 for place, name in enumerate(data.names)}  # share of the rows that is painted over
    for name, share in wrong.items():
        label = data.mask(name).numpy()
        label[: round(share * len(label))] = 3
        write_label(tmp_path / f"{name}.png", label)
    drawn = []

    def sheet(rows, titles, notes):
        drawn.append((titles, notes))
        return figures_contact_sheet(rows, titles, notes)

    figures_contact_sheet = figures.contact_sheet
    monkeypatch.setattr(figures, "contact_sheet", sheet)
    figures.segmentations(data, {"OAA+": tmp_path}, tmp_path / "f.jpg", examples=2, failures=1)
    ((titles, notes),) = drawn
    assert titles == ["image", "OAA+", "truth"]
    shares = [float(note.rstrip("%")) for note in notes]
    assert shares[0] == 100
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 3


def test_figure_5_without_masks_is_refused_before_anything_is_trained(voc, tmp_path, monkeypatch, launched):  # noqa: F811
    root = shutil.copytree(voc, tmp_path / "voc", ignore=shutil.ignore_patterns("SegmentationClass"))
    with pytest.raises(SystemExit, match="no image of train has a mask"):
        reproduce_with(
            monkeypatch, "--voc-root", root, "--out", tmp_path / "out", *OPTIONS, "--table", 2, "--figure", 5
        )
    assert launched == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "send"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_a_signal_ends_the_stage_too_and_the_same_command_goes_on(voc, tmp_path, number, send):  # noqa: F811
    """SIGTERM, as a cluster sends it, or Ctrl-C, which all processes of a terminal get: nothing is left running."""
    long = TINY[0].replace("--iterations 4", "--iterations 10000")
    options = ["--voc-root", voc, "--out", tmp_path, *OPTIONS, "--attention", long, "--seeds", 0, "--table", 1]
    command = [sys.executable, EXAMPLES / "reproduce.py", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    with subprocess.Popen(list(map(str, command)), **how, start_new_session=True) as process:  # a group of its own
        while process.poll() is None and not (tmp_path / "seed0" / "attention" / "log.csv").exists():
            time.sleep(0.02)
        send(process.pid, number)
        assert process.wait(timeout=120) == 1
        with pytest.raises(ProcessLookupError):  # the stage has ended before
            os.killpg(process.pid, 0)
        text, _ = process.communicate()
    assert "train_attention.py stopped; when the cause is fixed, the same command goes on" in text
    assert "the same command goes on from there" in text  # said by the stage, once its step was done
    assert "Traceback" not in text
    assert not (tmp_path / "seed0" / "attention" / "done.txt").exists()
