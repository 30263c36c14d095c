"""evaluate_cues.py and the figures on masks that leave nothing to compare: that is stated, and no score is printed."""

import json
import shutil

import numpy as np
import pytest
import torch
from compare import counts_of_labels, counts_of_maps, mean_iou, read_counts
from data import VOCFolder, write_label
from evaluate_cues import evaluate_maps
from PIL import Image
from scores import absent_classes, chosen_classes, no_score
from test_voc_pipeline import run

SIZE = (12, 16)


@pytest.fixture
def root(tmp_path):
    """Four images of two classes with masks, maps and pseudo labels that show the truth."""
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "maps", "labels"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    rows = []
    for row, name in enumerate("abcd"):
        Image.new("RGB", SIZE[::-1]).save(tmp_path / f"JPEGImages/{name}.jpg")
        mask = np.zeros(SIZE, np.uint8)
        mask[3:9, 3:9] = row // 2 + 1
        write_label(tmp_path / f"SegmentationClass/{name}.png", mask)
        write_label(tmp_path / f"labels/{name}.png", mask)
        Image.fromarray((mask > 0).astype(np.uint8) * 200).save(tmp_path / f"maps/{name}_{row // 2}.png")
        rows.append(f"{name} {row // 2}\n")
    (tmp_path / "ImageSets/Segmentation/train_cls.txt").write_text("".join(rows))
    return tmp_path


def change(folder, edit, names="abcd"):
    for name in names:
        path = folder / f"{name}.png"
        with Image.open(path) as image:
            mask = np.asarray(image).copy()
        write_label(path, edit(mask))


def evaluate(root, *options, **how):
    options = ["--voc-root", root, "--json", root / "scores.json", *options]
    return run("evaluate_cues.py", *options, **how)


def ignore_all(mask):
    return np.full_like(mask, 255)


def ignore_classes(mask):
    return np.where(mask > 0, 255, 0).astype(np.uint8)


@pytest.mark.parametrize("kind", ["maps", "labels"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (ignore_all, "no score: every pixel of the masks of train is 255 (ignored)"),
        (ignore_classes, "no score: the masks of train show none of the 2 classes, only 0 (background) and 255"),
        (np.zeros_like, "no score: the masks of train show none of the 2 classes"),
    ],
)
def test_masks_without_a_class_give_no_score(root, kind, edit, message):
    change(root / "SegmentationClass", edit)
    text = evaluate(root, f"--{kind}", root / kind, expect=1)
    assert message in text
    assert "100.00" not in text
    assert not (root / "scores.json").exists()


def test_one_class_with_masks_of_0_and_255(root):
    (root / "classes.txt").write_text("cat\n")
    (root / "ImageSets/Segmentation/train_cls.txt").write_text("a 0\nb 0\n")
    change(root / "SegmentationClass", ignore_classes)
    text = evaluate(root, "--maps", root / "maps", expect=1)
    assert "needs 1 in place of 255" in text


def test_the_images_that_choose_the_threshold_must_show_something_too(root):
    (root / "ImageSets/Segmentation/val_cls.txt").write_text("a 0\nc 1\n")
    (root / "ImageSets/Segmentation/train_cls.txt").write_text("b 0\nd 1\n")
    change(root / "SegmentationClass", ignore_classes, "bd")
    text = evaluate(root, "--split", "val", "--maps", root / "maps", "--threshold-from", root / "maps", expect=1)
    assert "no score: the masks of train show none of the 2 classes" in text


def test_a_half_without_classes_cannot_choose_a_threshold(root):
    change(root / "SegmentationClass", ignore_classes, "ac")
    assert "no score: one half of the 4 images of train shows no class" in evaluate(
        root, "--maps", root / "maps", expect=1
    )
    (root / "ImageSets/Segmentation/train_cls.txt").write_text("b 0\n")
    assert "no score: one half of the 1 images" in evaluate(root, "--maps", root / "maps", expect=1)


def test_labels_that_name_other_classes_than_the_masks_show(root):
    change(root / "SegmentationClass", lambda mask: np.where(mask > 0, 2, 0).astype(np.uint8))
    (root / "ImageSets/Segmentation/train_cls.txt").write_text("a 0\nb 0\n")
    text = evaluate(root, "--maps", root / "maps", expect=1)
    assert "no score: the masks of train show ['dog'], the labels name ['cat']; they do not fit" in text


@pytest.mark.parametrize("kind", ["maps", "labels"])
def test_classes_that_never_occur_are_stated_before_the_score(root, kind):
    change(root / "SegmentationClass", ignore_classes, "cd")
    lines = evaluate(root, f"--{kind}", root / kind, root / kind).splitlines()
    stated = [i for i, line in enumerate(lines) if "1 of 2 classes are in none of the masks of train: dog" in line]
    scored = [i for i, line in enumerate(lines) if line.startswith(str(root / kind)[:40]) and " train " in line]
    assert len(stated) == 1
    assert len(scored) == 2
    assert stated[0] < scored[0]


def test_labels_that_ignore_all_have_no_score_beside_others_that_have(root):
    (root / "none").mkdir()
    for name in "abcd":
        write_label(root / f"none/{name}.png", np.full(SIZE, 255, np.uint8))
    text = evaluate(root, "--labels", root / "labels", root / "none")
    assert "no score (100.0% of the pixels ignored)" in text
    assert text.splitlines()[-1].startswith(f"done: best is {root / 'labels'} with mIoU 100.00")
    scores = json.loads((root / "scores.json").read_text(), parse_constant=pytest.fail)
    assert scores[str(root / "none")]["mean_iou"] is None
    assert scores[str(root / "none")]["foreground"]["precision"] is None
    text = evaluate(root, "--labels", root / "none", expect=1)
    assert "no score on train" in text


def test_saliency_of_other_images_makes_no_labels(root):
    (root / "saliency").mkdir()
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(root / "saliency/other.png")
    options = ["--voc-root", root, "--maps", root / "maps", "--out", root / "new", "--saliency", root / "saliency"]
    text = run("make_pseudo_labels.py", *options, expect=1)
    assert "has a map of none of the 4 images of train, such as a.png" in text
    assert not (root / "new").exists()
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(root / "saliency/a.png")
    text = run("make_pseudo_labels.py", *options, "--uncertain-saliency", 1.01, expect=1)
    assert text == "--uncertain-saliency: expected a value in [0, 1], got 1.01"
    assert not (root / "new").exists()
    text = run("make_pseudo_labels.py", *options)
    assert "3 images have no saliency map and got no label" in text
    assert [path.name for path in (root / "new").glob("*.png")] == ["a.png"]


def test_methods_are_drawn_on_images_that_have_masks(root, monkeypatch, tmp_path):
    import figures

    shown = []
    monkeypatch.setattr(figures, "contact_sheet", lambda rows, titles, notes: shown.append((rows, notes)) or Figure())
    (tmp_path / "run").mkdir()
    settings = {"recipe": {"iterations": 1}, "arguments": {"backbone": "none"}, "data": {"classes": ["cat", "dog"]}}
    (tmp_path / "run/settings.json").write_text(json.dumps(settings))
    state = {"step": 1, "network": {}, "snapshots": {"latest": {"a": [], "d": []}}}
    torch.save(state, tmp_path / "run/checkpoint.pt")
    (root / "SegmentationClass/a.png").unlink()
    draw = [VOCFolder(root, "train"), tmp_path / "run", {"CAM": root / "maps"}, root / "labels", tmp_path / "f.jpg"]
    figures.comparison(*draw)
    ((rows, notes),) = shown
    assert notes == ["cat", "dog"]  # b and c: a, which is watched, has no mask
    for row, name in zip(rows, "bc", strict=True):
        assert torch.equal(row[-1], draw[0].mask(name))
    for name in "bcd":
        (root / f"SegmentationClass/{name}.png").unlink()
    with pytest.raises(SystemExit, match="no image of train has a mask"):
        figures.comparison(*draw)


def test_an_ignored_image_has_no_place_among_the_figures(root, monkeypatch, tmp_path):
    import figures

    shown = []
    monkeypatch.setattr(figures, "contact_sheet", lambda rows, *_: shown.append(len(rows)) or Figure())
    change(root / "SegmentationClass", ignore_all, "ab")
    figures.segmentations(VOCFolder(root, "train"), {"ours": root / "labels"}, tmp_path / "figure.jpg")
    assert shown == [2]
    change(root / "SegmentationClass", ignore_all, "cd")
    with pytest.raises(SystemExit, match="no score: every pixel of the masks of train"):
        figures.segmentations(VOCFolder(root, "train"), {"ours": root / "labels"}, tmp_path / "figure.jpg")


class Figure:
    def savefig(self, *_, **__):
        pass


def test_a_score_is_one_as_soon_as_a_pixel_of_a_class_is_there():
    assert no_score(torch.tensor([5, 0, 1]), "val") is None
    assert no_score(torch.tensor([0, 0, 1]), "val") is None
    assert "show none" in no_score(torch.tensor([5, 0, 0]), "val")
    assert "every pixel" in no_score(torch.tensor([0, 0, 0]), "val")
    assert absent_classes([1, 2], ["cat", "dog"], "val") == []


# A mean over chosen classes


def spoil(root):
    """Maps of which the best threshold of one class is another than that of all: every dog is shown too large."""
    rng = np.random.default_rng(0)
    for row, name in enumerate("abcd"):
        with Image.open(root / f"SegmentationClass/{name}.png") as image:
            mask = np.asarray(image) > 0
        grown = np.zeros(SIZE, bool)
        grown[1:11, 1:14] = True
        attention = np.where(mask, 200, 90 if row < 2 else np.where(grown, 190, 20)) + rng.integers(0, 9, SIZE)
        Image.fromarray(attention.astype(np.uint8)).save(root / f"maps/{name}_{row // 2}.png")


def test_the_mean_and_the_thresholds_are_of_the_chosen_classes(root):
    spoil(root)
    data = VOCFolder(root, "train")
    labels = {name: data.mask(name).numpy() for name in data.names}
    maps = {n: np.asarray(Image.open(root / f"maps/{n}_{data.class_ids(n)[0]}.png")).astype(int) for n in data.names}

    def iou(names, level, c):
        """Of one class, by loops."""
        both = either = 0
        for name, threshold in zip(names, level, strict=True):
            shown = np.where(maps[name] >= threshold, data.class_ids(name)[0] + 1, 0)
            for ours, theirs in zip(shown.flatten(), labels[name].flatten(), strict=True):
                both += ours == c and theirs == c
                either += c in (ours, theirs)
        return both / either

    def mean(names, level, chosen):
        return sum(iou(names, level, c) for c in chosen) / len(chosen)

    seen = {}
    for text, chosen in (("cat", [1]), ("background,dog", [0, 2]), (None, [0, 1, 2])):
        best = [
            max(range(80, 212), key=lambda level: (mean(names, [level] * 2, chosen), -level))
            for names in (["b", "d"], ["a", "c"])
        ]
        result = evaluate_maps(data, root / "maps", scored=chosen_classes(text, data.classes))
        assert [level * 255 for level in result["thresholds"]] == pytest.approx(best)
        assert result["mean_iou"] == pytest.approx(mean("abcd", best * 2, chosen))
        assert result["score_classes"] == [["background", "cat", "dog"][c] for c in chosen]
        seen[text] = best
    assert len({tuple(best) for best in seen.values()}) > 1


def test_with_saliency_a_pixel_shows_its_strongest_map_where_that_beats_the_rest_of_1(root):
    """By loops, with two classes in one image, a map without contrast, and a threshold for each half."""
    rng, data_lines = np.random.default_rng(0), ["a 0 1", "b 0", "c 1", "d 1"]
    (root / "ImageSets/Segmentation/train_cls.txt").write_text("\n".join(data_lines))
    (root / "saliency").mkdir()
    for line in data_lines:
        name, *classes = line.split()
        for c in classes:
            attention = rng.integers(20, 200, SIZE) if (name, c) != ("d", "1") else np.full(SIZE, 90)
            Image.fromarray(attention.astype(np.uint8)).save(root / f"maps/{name}_{c}.png")
        Image.fromarray(rng.integers(0, 256, SIZE).astype(np.uint8)).save(root / f"saliency/{name}.png")
    data = VOCFolder(root, "train")
    result = evaluate_maps(data, root / "maps", saliency=root / "saliency")
    counts = {c: [0, 0] for c in range(3)}
    for row, name in enumerate("abcd"):
        truth, back = data.mask(name).numpy(), 1 - np.asarray(Image.open(root / f"saliency/{name}.png")) / 255
        cues = {c: np.asarray(Image.open(root / f"maps/{name}_{c}.png")).astype(float) for c in data.class_ids(name)}
        for c, cue in cues.items():
            cues[c] = (cue - cue.min()) / max(cue.max() - cue.min(), 1)
        for place in np.ndindex(SIZE):
            strongest = max(cues, key=lambda c: cues[c][place])
            value = cues[strongest][place]
            found = value > back[place] and round(value * 255) >= round(result["thresholds"][row % 2] * 255)
            shown = strongest + 1 if found else 0
            for c in range(3):
                counts[c][0] += shown == c == truth[place]
                counts[c][1] += c in (shown, truth[place])
    assert result["mean_iou"] == pytest.approx(np.mean([both / either for both, either in counts.values()]))
    assert result["mean_iou"] != evaluate_maps(data, root / "maps")["mean_iou"]
    text = evaluate(root, "--maps", root / "maps", "--saliency", root / "saliency")
    assert f" {100 * result['mean_iou']:.2f}" in text
    assert f", with {root / 'saliency'}" in text
    assert json.loads((root / "scores.json").read_text())[str(root / "maps")]["saliency"] == str(root / "saliency")
    (root / "saliency/d.png").rename(root / "saliency/d.PNG")
    assert evaluate_maps(data, root / "maps", saliency=root / "saliency") == result
    (root / "saliency/c.png").unlink()
    text = evaluate(root, "--maps", root / "maps", "--saliency", root / "saliency", expect=1)
    assert "lacks 1 of the 4 images of train, first c.png" in text
    assert "and maps (--maps)" in evaluate(root, "--labels", root / "labels", "--saliency", root / "saliency", expect=2)


def test_saliency_alone_decides_at_the_least_threshold(root):
    """What saliency makes background is no object at threshold 0 either, which compare.py takes and no choice finds."""
    (root / "saliency").mkdir()
    data = VOCFolder(root, "train")
    for row, name in enumerate("abcd"):
        mask = data.mask(name).numpy()
        Image.fromarray(np.uint8(255 * (mask > 0))).save(root / f"saliency/{name}.png")
        attention = np.where(mask == 0, 60, 90).astype(np.uint8)
        Image.fromarray(attention).save(root / f"maps/{name}_{row // 2}.png")
    for level in (0, 1 / 255, None):
        how = {"are_labels": False, "level": level, "saliency": root / "saliency"}
        assert mean_iou(read_counts(data, root / "maps", [0, 1, 2], **how).sum(0), [0, 1, 2]) == 1
    for name in "abcd":
        Image.new("L", SIZE[::-1]).save(root / f"saliency/{name}.png")
    result = evaluate_maps(data, root / "maps", saliency=root / "saliency", scored=[1])
    assert (min(result["thresholds"]), result["mean_iou"], result["oracle_mean_iou"]) == (1 / 255, 0, 0)


def test_what_is_scored_at_a_threshold_is_what_becomes_labels(root):
    """Recipe small leaves maps as they are, at every stage; labels begin a grey level later. Others min-max maps."""
    rng = np.random.default_rng(0)
    for row, name in enumerate("abcd"):
        attention = rng.integers(60, 190, SIZE).astype(np.uint8)
        attention[0, :2] = 60, 189
        Image.fromarray(attention).save(root / f"maps/{name}_{row // 2}.png")
    options = ["--voc-root", root, "--maps", root / "maps", "--background", "threshold", "--background-level", 0.4]
    options += ["--foreground-threshold", 0]
    for recipe, low, high in (("small", 0, 255), ("paper", 60, 189)):
        run("make_pseudo_labels.py", *options, "--recipe", recipe, "--out", root / recipe)
        for row, name in enumerate("abcd"):
            attention = np.asarray(Image.open(root / f"maps/{name}_{row // 2}.png")).astype(float)
            label = np.asarray(Image.open(root / f"{recipe}/{name}.png"))
            expected = (attention - low) / (high - low) > 0.4
            assert ((label == row // 2 + 1) == expected).all()
    data = VOCFolder(root, "train")
    assert torch.equal(counts_of_labels(data, root / "small"), counts_of_maps(data, root / "maps", [103 / 255]))


@pytest.mark.parametrize("kind", ["maps", "labels"])
def test_the_choice_is_printed_with_every_number_and_written(root, kind):
    spoil(root)
    change(root / "labels", lambda mask: np.where(mask == 2, 0, mask).astype(np.uint8))
    lines = evaluate(root, f"--{kind}", root / kind, "--score-classes", "cat,background").splitlines()
    numbers = [line for line in lines if " train " in line or line.startswith("done")]
    assert len(numbers) == 2
    assert all(" over background,cat" in line for line in numbers)
    scores = json.loads((root / "scores.json").read_text())[str(root / kind)]
    assert scores["score_classes"] == ["background", "cat"]
    ious = scores["class_iou"]
    assert scores["mean_iou"] == pytest.approx((ious["background"] + ious["cat"]) / 2)
    text = evaluate(root, f"--{kind}", root / kind)
    assert " over " not in text
    scores = json.loads((root / "scores.json").read_text())[str(root / kind)]
    assert scores["mean_iou"] == pytest.approx(sum(scores["class_iou"].values()) / 3)
    assert scores["score_classes"] == ["background", "cat", "dog"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("background,catt", "the data set has no class 'catt'; did you mean 'cat'?"),
        ("background,zebra", "the data set has no class 'zebra'; there are background, cat, dog"),
        ("cat,dog,cat", "'cat' is there twice"),
        ("background", "expected a class beside background"),
        ("cat,", "the data set has no class ''"),
    ],
)
def test_a_choice_of_classes_that_cannot_be(root, choice, message):
    text = evaluate(root, "--maps", root / "maps", "--score-classes", choice, expect=1)
    assert f"--score-classes: {message}" in text
    assert not (root / "scores.json").exists()


@pytest.mark.parametrize("kind", ["maps", "labels"])
def test_chosen_classes_that_no_mask_shows_give_no_score(root, kind):
    change(root / "SegmentationClass", ignore_classes, "cd")
    text = evaluate(root, f"--{kind}", root / kind, "--score-classes", "background,dog", expect=1)
    assert "no score: the masks of train show none of the classes of --score-classes" in text
    change(root / "SegmentationClass", ignore_classes, "a")
    if kind == "maps":
        text = evaluate(root, "--maps", root / "maps", "--score-classes", "background,cat", expect=1)
        assert "no score: one half of the 4 images of train shows no class of --score-classes" in text


def test_a_list_within_the_list_of_the_maps_is_scored(root):
    (root / "ImageSets/Segmentation/masks_cls.txt").write_text("b 0\nc 1\n")
    (root / "SegmentationClass/a.png").unlink()
    assert "done: best is" in evaluate(root, "--split", "masks", "--maps", root / "maps")
    (root / "maps/source.json").write_text('{"split": "train"}')
    (root / "ImageSets/Segmentation/masks_cls.txt").write_text("b 0\nc 1\ne 1\nf 0\n")
    for name in "ef":
        shutil.copy(root / "JPEGImages/b.jpg", root / f"JPEGImages/{name}.jpg")
        shutil.copy(root / "SegmentationClass/b.png", root / f"SegmentationClass/{name}.png")
    text = evaluate(root, "--split", "masks", "--maps", root / "maps", expect=1)
    assert "2 of its 4 images have no map of one of their classes, first e (dog); the maps there were made for" in text
    assert "run export_attention.py for this split first (--split masks)" in text


def test_images_without_saliency_have_no_label_and_other_missing_labels_are_refused(root):
    (root / "labels/b.png").unlink()
    text = evaluate(root, "--labels", root / "labels", expect=1)
    assert "lacks the label images of 1 of the 4 images of train, first b.png" in text
    (root / "labels/without_saliency.txt").write_text("b\n")
    text = evaluate(root, "--labels", root / "labels")
    assert "of the pixels ignored, 1 images without a label" in text
    scores = json.loads((root / "scores.json").read_text())[str(root / "labels")]
    assert (scores["without_label"], scores["mean_iou"], scores["ignored"]) == (1, 1, 1 / 4)
    for name in "acd":
        (root / f"labels/{name}.png").unlink()
    (root / "labels/without_saliency.txt").write_text("a\nb\nc\nd\n")
    assert "lacks the label images of 4 of the 4" in evaluate(root, "--labels", root / "labels", expect=1)


def test_masks_are_looked_for_before_anything_is_scored(root, monkeypatch):
    (root / "SegmentationClass/d.png").unlink()
    monkeypatch.setattr("evaluate_cues.sweep_cues", lambda *_: pytest.fail("scored"))
    text = evaluate(root, "--maps", root / "maps", expect=1)
    assert "1 of 4 images of train have no mask, first d.png" in text


def test_a_picture_of_no_known_form_comes_after_the_scores(root):
    text = evaluate(root, "--maps", root / "maps", "--curve", root / "curve.none", expect=1)
    assert "curve.none" in text
    assert "the scores are above" in text
    assert (root / "scores.json").exists()


def test_labels_of_other_saliency_are_refused_and_maps_that_lack_an_image_before_work(root):
    for folder, value in (("first", 0), ("second", 255)):
        (root / folder).mkdir()
        for name in "abcd":
            Image.new("L", SIZE[::-1], value).save(root / f"{folder}/{name}.png")
    options = ["--voc-root", root, "--maps", root / "maps", "--out", root / "made"]
    run("make_pseudo_labels.py", *options, "--saliency", root / "first")
    text = run("make_pseudo_labels.py", *options, "--saliency", root / "second", expect=1)
    assert "was made with other settings (saliency:" in text
    (root / "maps/d_1.png").unlink()
    options[-1] = root / "others"
    assert "d_1.png is missing" in run("make_pseudo_labels.py", *options, "--saliency", root / "first", expect=1)
    assert not (root / "others").exists()
