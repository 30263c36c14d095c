"""What users run into: damaged, missing and foreign files, and full disks. A sentence each, and nothing is lost."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data import VOCFolder, write_label
from files import write_image, write_text
from PIL import Image
from test_voc_pipeline import BACKBONE, EXAMPLES, TINY, run, voc  # noqa: F401  (voc is a fixture)

from oaa_lib import AttentionAccumulator

pytestmark = pytest.mark.slow
LISTS = Path("voc/ImageSets/Segmentation")
ATTENTION = [*TINY, "--device", "cpu", "--iterations", 2, "--drop-at", 2, "--gate", "none"]
SEGMENTATION = [*BACKBONE, "--device", "cpu", "--workers", 0, "--crop", 49, "--batch-size", 2, "--iterations", 4]
EVALUATION = ["--recipe", "small", "--device", "cpu", "--workers", 0, "--window", 49]


@pytest.fixture(scope="session")
def stages(voc, tmp_path_factory):  # noqa: F811
    """The data, and folders of the stages that later ones read; made, as later used, from within."""
    root = tmp_path_factory.mktemp("stages")
    shutil.copytree(voc, root / "voc")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run(*COMMANDS["attention"], "--out", "attention")
        run(*COMMANDS["integral"], "--out", "integral")
        run(*COMMANDS["segmentation"], "--out", "segmentation")
        run(*COMMANDS["export"], "--out", "maps")
    return root


@pytest.fixture
def place(stages, tmp_path, monkeypatch):
    """A copy of all that to spoil, as the working directory. Checkpoints are large and linked: replace, never write."""

    def copy_or_link(source, target):
        (os.link if source.endswith("checkpoint.pt") else shutil.copy)(source, target)

    shutil.copytree(stages, tmp_path, dirs_exist_ok=True, copy_function=copy_or_link)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content):
    return lambda: (Path(path).parent.mkdir(parents=True, exist_ok=True), Path(path).write_bytes(content.encode()))


def image(path, mode="L", size=(90, 60), value=0):
    return lambda: Image.new(mode, size, value).save(path)


def cut(path):
    def spoil():
        whole = Path(path).read_bytes()
        Path(path).unlink()
        Path(path).write_bytes(whole[: len(whole) // 2])

    return spoil


def remove(path):
    return lambda: Path(path).unlink()


def copy(source, target):
    return lambda: (Path(target).unlink(), shutil.copy(source, target))


VOC = ["--voc-root", "voc"]
COMMANDS = {
    "attention": ["train_attention.py", *VOC, "--out", "new", *ATTENTION],
    "attention again": ["train_attention.py", *VOC, "--out", "attention", *ATTENTION],
    "integral": ["train_integral.py", *VOC, "--out", "new", *ATTENTION[:-2], "--maps", "attention/max.safetensors"],
    "segmentation": ["train_segmentation.py", *VOC, "--out", "new", *SEGMENTATION, "--labels", "voc/SegmentationClass"],
    "export": ["export_attention.py", *VOC, "--out", "new", "--device", "cpu", "--run", "attention", "--source", "max"],
    "labels": ["make_pseudo_labels.py", *VOC, "--out", "new", "--maps", "maps", "--saliency", "voc/Saliency"],
    "cues": ["evaluate_cues.py", *VOC, "--maps", "maps"],
    "scores": ["evaluate_cues.py", *VOC, "--labels", "voc/SegmentationClass"],
    "refine": ["refine_cues.py", *VOC, "--out", "new", "--maps", "maps", "--method", "pamr", "--device", "cpu"],
    "evaluate": ["evaluate.py", *VOC, "--out", "new", "--run", "segmentation", *EVALUATION],
    "masks": ["prepare.py", "masks", "--masks", "voc/Saliency", "--out", "new"],
}
TRAIN, PHOTOGRAPH, MASK = LISTS / "train_cls.txt", "voc/JPEGImages/d.jpg", "voc/SegmentationClass/b.png"
VAL, TRUTH = "voc/JPEGImages/a.jpg", "voc/SegmentationClass/a.png"
TWO_WORKERS = ["--workers", 2]
CASES = {
    "no image shows a class": ("attention", write(TRAIN, "a\nb\n"), [], "shows a class: nothing to learn"),
    "a label that is no number": ("attention", write(TRAIN, "a cat\n"), [], "expected lines NAME ID [ID ...]"),
    "a list that is no text": ("attention", copy(PHOTOGRAPH, TRAIN), [], "cannot be read as text"),
    "no class": ("attention", write("voc/classes.txt", ""), [], "names no class"),
    "an empty photograph": ("attention", write(PHOTOGRAPH, ""), [], "d.jpg cannot be read"),
    "a cut photograph, by a worker": (
        "attention",
        cut(PHOTOGRAPH),
        ["--workers", 2, "--iterations", 4],
        "d.jpg cannot be read",
    ),
    "no weights": ("attention", write("w", "hello"), ["--weights", "w"], "--weights: w cannot be read as weights"),
    "absent weights": ("attention", lambda: None, ["--weights", "w"], "expected 'default', 'none' or a file that fits"),
    "a file as --out": ("attention", write("new", ""), [], "--out new: [Errno 17] File exists"),
    "foreign settings": ("attention", write("new/settings.json", "[]"), [], "is not one of ours"),
    "a warm-up to the end": ("attention", lambda: None, ["--warm-up", 2], "nothing is accumulated in 2 iterations"),
    "no such device": ("attention", lambda: None, ["--device", "gpu"], "--device gpu: "),
    "fewer than no workers": ("attention", lambda: None, ["--workers", -1], "a whole number of at least 0, got -1"),
    "fewer than no images": ("attention", lambda: None, ["--snapshots", -1], "a whole number of at least 0, got -1"),
    "no image to watch": (
        "attention",
        lambda: None,
        ["--snapshots", 0],
        "--snapshots: expected at least 1 image, got 0",
    ),
    "decay below 0": ("attention", lambda: None, ["--weight-decay", -1], "--weight-decay: expected at least 0, got -1"),
    "a rate below 0": ("attention", lambda: None, ["--backbone-lr", -1, 1], "--backbone-lr: expected factors of at"),
    "all momentum": ("attention", lambda: None, ["--momentum", 2], "--momentum: expected a value in [0, 1], got 2"),
    "a hue of 1": ("attention", lambda: None, ["--color-jitter", 1, 1, 1, 1], "a hue of at most 0.5, got 1 1 1 1"),
    "half settings": (
        "attention again",
        cut("attention/settings.json"),
        [],
        "remove attention to start its stage anew",
    ),
    "a foreign checkpoint": (
        "attention again",
        copy("segmentation/checkpoint.pt", "attention/checkpoint.pt"),
        [],
        "attention/checkpoint.pt: Error(s) in loading state_dict",
    ),
    "labels changed": (
        "attention again",
        write(TRAIN, "a 0\nb 1\nc 0 1\nd 1\ne 1\nf 1\n"),
        [],
        "first at image 4; it is of other images, labels or settings",
    ),
    "half a file of maps": (
        "integral",
        cut("attention/max.safetensors"),
        [],
        "expected a file that train_attention.py",
    ),
    "maps without attention": (
        "integral",
        lambda: AttentionAccumulator.load("attention/max.safetensors").reset().save("attention/max.safetensors"),
        [],
        "attention/max.safetensors holds no attention",
    ),
    "a folder as maps": ("integral", lambda: None, ["--maps", "attention"], "expected a file that train_attention.py"),
    "maps with other labels": (
        "integral",
        write(TRAIN, "a 0\nb 1\nc 0 1\nd 1\ne 1\nf 1\n"),
        [],
        "(expected the same labels, got others, first at image 4)",
    ),
    "maps of other classes": ("integral", write("voc/classes.txt", "r\ng\nb\n"), [], "expected num_classes = 3, got 2"),
    "run of another stage": ("integral", lambda: None, ["--out", "attention"], "made with other settings"),
    "a cut label, by a worker": ("segmentation", cut(MASK), TWO_WORKERS, "b.png cannot be read"),
    "a label in RGB": ("segmentation", image(MASK, "RGB"), [], "expected an indexed label image, got mode RGB"),
    "a label with other values": ("segmentation", image(MASK, value=9), [], "values above 2 other than 255"),
    "labels that are ignored as a whole": (
        "segmentation",
        lambda: [write_label(path, np.full((60, 90), 255, np.uint8)) for path in Path(MASK).parent.iterdir()],
        [],
        "every pixel of every label is ignored, so nothing can be learnt",
    ),
    "maps of a segmentation": (
        "export",
        lambda: None,
        ["--run", "segmentation"],
        "needs a folder of train_attention.py",
    ),
    "cams of stage 2": ("export", lambda: None, ["--run", "integral"], "needs a folder of train_attention.py"),
    "integral of stage 1": ("export", lambda: None, ["--source", "integral"], "needs a folder of train_integral.py"),
    "views of what was accumulated": ("export", lambda: None, ["--flip-views"], "has no --scales and --flip-views"),
    "no maps in the run": ("export", remove("attention/max.safetensors"), [], "run train_attention.py again"),
    "a cut checkpoint": ("export", cut("attention/checkpoint.pt"), [], "remove it to start this stage anew"),
    "other labels than trained on": ("export", write(TRAIN, "a 0 1\nb 1\n"), [], "1 images of train have other labels"),
    "a part that is not": ("export", lambda: None, ["--part", "5/4"], "such as 0/4, got 5/4"),
    "maps of another source": (
        "export",
        lambda: None,
        ["--out", "maps", "--source", "mean"],
        "other settings (source: max there, mean asked)",
    ),
    "maps of other views": (
        "export",
        lambda: None,
        ["--out", "maps", "--stretch"],
        "other settings (stretch: False there, True asked)",
    ),
    "no folder of maps": ("labels", lambda: None, ["--maps", "absent"], "absent is missing"),
    "no folder of saliency": ("labels", lambda: None, ["--saliency", "absent"], "absent is missing"),
    "a map missing": ("labels", remove("maps/c_1.png"), [], "c_1.png is missing; run export_attention.py"),
    "a small map": (
        "labels",
        image("maps/c_1.png", size=(9, 9)),
        [],
        "photograph's size (60, 90), got mode L and (9, 9)",
    ),
    "a map in RGB": ("labels", image("maps/b_1.png", "RGB"), [], "b_1.png: expected 8-bit grey (mode L)"),
    "1-bit saliency": ("labels", image("voc/Saliency/b.png", "1"), [], "b.png: expected 8-bit grey (mode L)"),
    "a cut map": ("labels", cut("maps/b_1.png"), [], "b_1.png cannot be read"),
    "run of a training": ("labels", lambda: None, ["--out", "attention"], "made with other settings"),
    "a small map to score": ("cues", image("maps/c_1.png", size=(9, 9)), [], "c_1.png: expected 8-bit grey"),
    "no mask": ("cues", remove(MASK), [], "1 of 6 images of train have no mask, first b.png"),
    "a small mask": (
        "cues",
        image(MASK, size=(9, 9)),
        [],
        "b.png: expected the photograph's size (60, 90), got (9, 9)",
    ),
    "a mask with other values": ("cues", image(MASK, value=9), [], "b.png: expected 0..2 and 255 (ignored), got 9"),
    "a small label to score": (
        "scores",
        lambda: (shutil.copytree("voc/SegmentationClass", "l"), image("l/b.png", size=(9, 9))()),
        ["--labels", "l"],
        "expected a label image of the size (60, 90), values 0..2 and 255, got (9, 9)",
    ),
    "no folder of maps to refine": (
        "refine",
        lambda: None,
        ["--maps", "absent"],
        "absent is missing: expected the folder of maps",
    ),
    "a map to refine missing": ("refine", remove("maps/c_1.png"), [], "c_1.png is missing; run export_attention.py"),
    "a small map to refine": (
        "refine",
        image("maps/c_1.png", size=(9, 9)),
        [],
        "photograph's size (60, 90), got mode L and (9, 9)",
    ),
    "a cut map to refine": ("refine", cut("maps/b_1.png"), [], "b_1.png cannot be read"),
    "a cut photograph to refine by": ("refine", cut(PHOTOGRAPH), [], "d.jpg cannot be read"),
    "maps over maps": ("refine", lambda: None, ["--out", "maps"], "maps holds the maps to refine"),
    "a file as the folder of refined maps": ("refine", write("new", ""), [], "--out new: [Errno 17] File exists"),
    "a classifier to evaluate": (
        "evaluate",
        lambda: None,
        ["--run", "attention"],
        "attention is no folder of train_segmentation.py",
    ),
    "no run to evaluate": ("evaluate", lambda: None, ["--run", "absent"], "absent is no folder of a training stage"),
    "a cut checkpoint to evaluate": (
        "evaluate",
        cut("segmentation/checkpoint.pt"),
        [],
        "segmentation/checkpoint.pt cannot be read",
    ),
    "no checkpoint to evaluate": ("evaluate", remove("segmentation/checkpoint.pt"), [], "it has no checkpoint.pt"),
    "classes changed since": (
        "evaluate",
        write("voc/classes.txt", "r\ng\nb\n"),
        [],
        "trained on other classes than those of voc",
    ),
    "a cut photograph of val": ("evaluate", cut(VAL), [], "a.jpg cannot be read"),
    "no photograph of val": ("evaluate", remove(VAL), [], "1 of 6 images are missing, first a.jpg"),
    "a small mask of val": (
        "evaluate",
        image(TRUTH, size=(9, 9)),
        [],
        "a.png: expected the photograph's size (60, 90), got (9, 9)",
    ),
    "an absent split": (
        "evaluate",
        lambda: None,
        ["--split", "absent"],
        "absent.txt does not exist; expected one image name a line",
    ),
    "an empty split": ("evaluate", write(LISTS / "val.txt", ""), [], "val.txt names no image"),
    "a label image of another size": (
        "evaluate",
        lambda: (Path("new").mkdir(), image("new/a.png", size=(9, 9))()),
        [],
        "new/a.png: expected prediction and target of one shape, got (9, 9) and (60, 90)",
    ),
    "a file as the folder of label images": ("evaluate", write("new", ""), [], "--out new: [Errno 17] File exists"),
    "a file as the folder of masks": ("masks", write("new", ""), [], "prepare.py masks: [Errno 17] File exists"),
}


@pytest.mark.parametrize(("command", "spoil", "options", "message"), CASES.values(), ids=list(CASES))
def test_bad_input_is_told_in_a_sentence_and_nothing_is_lost(place, command, spoil, options, message):
    spoil()
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert message in run(*COMMANDS[command], *options, expect=1)
    assert {path: path.read_bytes() for path in before} == before
    assert not list(place.rglob("*.partial"))


def test_what_may_be_left_out_is_left_out_and_told(place):
    for path in (MASK, "voc/Saliency/b.png"):
        Path(path).unlink()
    assert "1 of 6 images have no label and are left out" in run(*COMMANDS["segmentation"])
    assert "1 images have no saliency map and got no label: listed in" in run(*COMMANDS["labels"], "--out", "labels")
    assert "1 of 6 images have no mask and are not scored" in run(*COMMANDS["evaluate"], "--out", "val")
    (place / TRAIN).write_text("a 0\nb\n")
    text = run("export_attention.py", *VOC, "--run", "attention", "--source", "cam", "--out", "cams", "--device", "cpu")
    assert "1 of 2 images show no class and have no maps" in text
    assert "done: maps of 1 images written, 0 were there" in text


def test_scores_of_one_list_are_not_replaced_by_those_of_another(place):
    run(*COMMANDS["evaluate"])
    before = Path("new/scores.json").read_bytes()
    assert "split: val there, train asked" in run(*COMMANDS["evaluate"], "--split", "train", expect=1)
    assert Path("new/scores.json").read_bytes() == before


def test_masks_that_ignore_all_give_label_images_and_no_score(place):
    for path in Path("voc/SegmentationClass").iterdir():
        with Image.open(path) as mask:
            write_label(path, np.full((mask.height, mask.width), 255, np.uint8))
    text = run(*COMMANDS["evaluate"])
    assert "done: 6 label images -> new; no score: every pixel of the masks of val is 255 (ignored)" in text
    assert not Path("new/scores.json").exists()
    assert len(list(Path("new").glob("*.png"))) == 6


def test_classes_without_a_mask_are_stated_before_the_score(place):
    for path in Path("voc/SegmentationClass").iterdir():
        with Image.open(path) as mask:
            write_label(path, np.where(np.asarray(mask) == 2, 255, np.asarray(mask)).astype(np.uint8))
    lines = run(*COMMANDS["evaluate"]).splitlines()
    stated = lines.index("1 of 2 classes are in none of the masks of val: green")
    assert stated < next(number for number, line in enumerate(lines) if line.startswith("background "))
    json.loads(Path("new/scores.json").read_text(), parse_constant=pytest.fail)  # no NaN


def test_a_photograph_turned_by_its_exif_entry_is_the_same_to_every_stage(place):
    """The pixels of d lie on their side in the file; maps, labels, refined maps and segmentations are as before."""
    commands = ("export", "labels", "refine", "evaluate")
    for command in commands:
        run(*COMMANDS[command], "--out", f"before {command}")
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(PHOTOGRAPH) as upright:
        upright.convert("RGB").transpose(Image.Transpose.ROTATE_90).save("voc/JPEGImages/d.png", exif=exif)
    Path(PHOTOGRAPH).unlink()
    for command in commands:
        run(*COMMANDS[command], "--out", f"after {command}")
        for path in Path(f"before {command}").iterdir():
            if path.suffix in (".png", ".json"):
                assert Path(f"after {command}", path.name).read_bytes() == path.read_bytes()
    assert "done: best is maps" in run(*COMMANDS["cues"])


def test_saliency_and_labels_of_others_that_fit_a_photograph_both_ways_are_refused(place):
    """Upside down: the size is the same either way. Labels that this pipeline made are of the upright photograph."""
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(PHOTOGRAPH) as upright:
        upright.transpose(Image.Transpose.ROTATE_180).save(PHOTOGRAPH, exif=exif)
    for command in ("labels", "segmentation"):
        assert "d.jpg: what belongs to it cannot be used" in run(*COMMANDS[command], expect=1)
    options = ["--maps", "maps", "--background", "threshold", "--background-level", "0.5"]
    run("make_pseudo_labels.py", *VOC, *options, "--out", "labels")
    run(*COMMANDS["segmentation"][:-2], "--labels", "labels", "--out", "segmentation of them")


def test_a_bad_photograph_stops_a_training_which_goes_on_once_it_is_mended(place):
    """After the last good step there is a checkpoint, though none was due."""
    options = [*COMMANDS["segmentation"][:-2], "--labels", "voc/SegmentationClass"]
    whole = Path(PHOTOGRAPH).read_bytes()
    run(*options, "--out", "whole")
    cut(PHOTOGRAPH)()
    text = run(*options, "--workers", 1, expect=1)
    assert "d.jpg cannot be read" in text
    reached = torch.load("new/checkpoint.pt", weights_only=True)["step"]
    assert 0 < reached < 4
    Path(PHOTOGRAPH).write_bytes(whole)
    assert f"resumed after iteration {reached} of 4" in run(*options)
    same_weights("whole", "new")


def same_weights(folder, other):
    weights, others = (torch.load(f"{f}/checkpoint.pt", weights_only=True)["network"] for f in (folder, other))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


# Full disks


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_the_training_goes_on(place, monkeypatch):
    options = [*COMMANDS["segmentation"], "--checkpoint-every", 2]
    run(*options, "--out", "whole")
    save, calls = torch.save, []

    def half(state, file):
        calls.append(None)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", half)
    text = run(*options, expect=1)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert "the checkpoint of iteration 4 cannot be written ([Errno 28] No space left on device" in text
    assert "the one before is whole, and the same command goes on from it" in text
    assert sorted(path.name for path in Path("new").iterdir()) == [
        "checkpoint.pt",
        "in_use.lock",
        "log.csv",
        "settings.json",
    ]
    assert "resumed after iteration 2 of 4" in run(*options)
    same_weights("whole", "new")


def limited(size):
    """What a process calls before it starts: no file may grow beyond so many bytes."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("size", [0, 100, 2**20])
def test_a_real_limit_on_files_is_told_and_the_same_command_goes_on(place, size):
    """No room for settings.json, for the whole of it, for the checkpoint."""
    script, *options = COMMANDS["segmentation"]
    command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, preexec_fn=limited(size)
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    told = "the checkpoint of iteration 4 cannot be written" if size > 100 else "--out new: [Errno 27] File too large"
    assert told in result.stderr
    kept = ["in_use.lock", "log.csv", "settings.json"] if size > 100 else []
    assert sorted(path.name for path in Path("new").iterdir()) == kept
    run(*COMMANDS["segmentation"])
    same_weights("segmentation", "new")


@pytest.mark.parametrize("log", ["", "step,epoch\n", "step,epoch\n2,0.5\n4,1", "step,epoch\n2,0.5\nhello\n4,1\n"])
def test_a_log_cut_short_by_a_full_disk_is_taken_up(place, log):
    Path("segmentation/log.csv").write_text(log)
    run(*COMMANDS["segmentation"], "--out", "segmentation")
    rows = Path("segmentation/log.csv").read_text().splitlines(keepends=True)
    assert rows == [row for row in log.splitlines(keepends=True) if row.endswith("\n") and row != "hello\n"]


def test_a_log_that_cannot_be_written_is_told(place):
    Path("new/log.csv").mkdir(parents=True)
    assert "new/log.csv cannot be read as text: it is no regular file" in run(*COMMANDS["segmentation"], expect=1)


@pytest.mark.parametrize("write_file", [lambda path: write_text(path, "new"), lambda path: write_image(path, NOISE)])
def test_small_files_are_never_cut_by_a_full_disk(tmp_path, monkeypatch, write_file):
    (tmp_path / "file").write_text("old")
    pid = os.fork()
    if pid == 0:
        limited(1)()
        try:
            write_file(tmp_path / "file")
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300), dtype=np.uint8))


@pytest.mark.parametrize("command", ["export", "labels"])
def test_images_for_which_there_is_no_room_are_told_and_made_by_the_next_run(place, monkeypatch, command):
    run(*COMMANDS[command], "--out", "whole")
    save, calls = Image.Image.save, []

    def full(self, path, **options):
        calls.append(None)
        if len(calls) == 3:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left on device" in run(*COMMANDS[command], expect=1)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert len(list(Path("new").glob("*.png"))) == 2
    run(*COMMANDS[command])
    made, expected = ({path.name: path.read_bytes() for path in Path(f).iterdir()} for f in ("new", "whole"))
    assert made == expected


def test_maps_for_which_there_is_no_room_are_told_and_written_by_the_next_run(place, monkeypatch):
    Path("attention/max.safetensors").unlink()
    monkeypatch.setattr(AttentionAccumulator, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert "attention/max.safetensors: [Errno 28] No space left; make room" in run(
        *COMMANDS["attention again"], expect=1
    )
    monkeypatch.undo()
    monkeypatch.chdir(place)
    run(*COMMANDS["attention again"])
    assert (
        AttentionAccumulator.load("attention/max.safetensors").pairs.keys
        == VOCFolder(Path("voc"), "train", negatives="background").names
    )


def test_the_scores_of_a_long_run_have_a_place_before_it_starts(place):
    run(*COMMANDS["cues"], "--json", "a/new/folder/scores.json")
    assert json.loads(Path("a/new/folder/scores.json").read_text())["maps"]["images"] == 6
