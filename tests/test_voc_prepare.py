"""examples/voc/prepare.py on six drawn images, as a user would run it: VOC + SBD, a folder with a table, COCO."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from data import VOC_CLASSES, VOCFolder
from PIL import Image
from test_voc_pipeline import run as run_script

from oaa_lib.plotting import voc_palette

LABELS = {"a": [0, 14], "b": [7], "c": [11], "d": [11, 14], "e": [19], "f": [0]}  # a, b: train; c: val; c to f: SBD
LISTS = Path("ImageSets/Segmentation")

run = partial(run_script, "prepare.py")


def prepare_voc(root, *options, **how):
    return run("voc", "--voc-root", root, "--allow-other-counts", *options, **how)


def everything(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def draw_mask(ids, size=(60, 40)):
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[0] = 255
    for i, c in enumerate(ids):
        mask[5:30, 3 + 25 * i : 23 + 25 * i] = c + 1
    return mask


def save_mask(path, mask):
    image = Image.fromarray(mask, mode="P")
    image.putpalette(voc_palette().tobytes())
    image.save(path)


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "Annotations", LISTS):
        (root / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, ids in LABELS.items():
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(root / f"JPEGImages/{name}.jpg")
        objects = "".join(
            f"<object><name>{VOC_CLASSES[c]}</name><difficult>{c % 2}</difficult><part><name>hand</name></part>"
            "</object>"
            for c in ids
        )
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{objects}</annotation>")
        if name in "abc":
            save_mask(root / f"SegmentationClass/{name}.png", draw_mask(ids))
        if name in "cdef":
            Image.fromarray(draw_mask(ids)).save(root / f"SegmentationClassAug/{name}.png")
    (root / LISTS / "train.txt").write_text("b\na\n")
    (root / LISTS / "val.txt").write_text("c\n")
    for stray in ("picture.png", "SegmentationClassAug/._c.png"):  # what people and macOS leave behind
        (root / stray).write_bytes(b"no mask")
    return root


def labels_of(root, split):
    data = VOCFolder(root, split)
    return {name: data.class_ids(name) for name in data.names}


def test_voc_lists_are_the_union_minus_val_with_the_labels_of_masks_or_of_xml(voc):
    text = prepare_voc(voc, "--labels-from", "masks")
    assert (voc / LISTS / "trainaug.txt").read_text().split() == ["a", "b", "d", "e", "f"]
    assert labels_of(voc, "trainaug") == {name: ids for name, ids in LABELS.items() if name != "c"}
    assert (voc / LISTS / "train_cls.txt").read_text() == "b 7\na 0 14\n"  # in the order of train.txt
    assert labels_of(voc, "val") == {"c": [11]}
    assert "trainaug: 5 images, 7 (image, class) pairs from masks" in text
    assert "15555" in text
    assert "--background saliency|threshold|power" in text
    assert text.splitlines()[-1].startswith("next: python examples/voc/train_attention.py")
    from_masks = everything(voc)
    prepare_voc(voc, "--labels-from", "xml")
    assert everything(voc) == from_masks
    shutil.rmtree(voc / "SegmentationClassAug")
    assert "pairs from xml" in prepare_voc(voc)  # trainaug.txt and the annotations are enough
    assert "0 files written, 4 were there" in prepare_voc(voc)


def test_the_released_sbd_gives_the_same_lists(voc, tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    prepare_voc(voc)
    expected = everything(voc / LISTS)
    cls = tmp_path / "benchmark_RELEASE/dataset/cls"
    cls.mkdir(parents=True)
    for name in "cdef":
        path = voc / f"SegmentationClassAug/{name}.png"
        label = np.where(np.asarray(Image.open(path)) == 255, 0, np.asarray(Image.open(path)))
        savemat(cls / f"{name}.mat", {"GTcls": {"Boundaries": [0], "Segmentation": label, "CategoriesPresent": [1]}})
        path.unlink()
    shutil.rmtree(voc / LISTS)
    (voc / LISTS).mkdir()
    for split in ("train", "val"):
        (voc / LISTS / f"{split}.txt").write_bytes(expected[Path(f"{split}.txt")])
    assert "from masks" in prepare_voc(voc, "--sbd", tmp_path / "benchmark_RELEASE")
    assert everything(voc / LISTS) == expected


def test_an_own_list_keeps_its_order_and_is_replaced_only_on_demand(voc):
    (voc / LISTS / "trainaug.txt").write_text("f\ne\nd\nb\na\n")
    prepare_voc(voc)
    assert list(labels_of(voc, "trainaug")) == ["f", "e", "d", "b", "a"]
    (voc / LISTS / "train_cls.txt").write_text("a 3\n")
    before = everything(voc)
    assert "train_cls.txt: 1 lines, would become 2" in prepare_voc(voc, expect=1)
    assert everything(voc) == before
    prepare_voc(voc, "--overwrite")
    assert labels_of(voc, "train") == {"b": [7], "a": [0, 14]}


def test_other_counts_than_vocs_are_an_error_that_names_them(voc):
    text = run("voc", "--voc-root", voc, expect=1)
    for part in ("train: 2 images, VOC has 1464", "val: 1 images, VOC has 1449", "trainaug: 5 images, VOC has 10582"):
        assert part in text
    assert not (voc / LISTS / "trainaug.txt").exists()


def test_all_that_is_missing_is_said_at_once_with_where_it_comes_from(tmp_path):
    text = run("voc", "--voc-root", tmp_path, "--saliency", tmp_path / "nowhere", expect=1)
    for part in ("JPEGImages", "SegmentationClass", "train.txt", "val.txt", "Annotations", "SegmentationClassAug"):
        assert part in text
    for place in ("host.robots.ox.ac.uk", "SBD/download.html", "PoolNet"):
        assert place in text
    (tmp_path / "VOC2012").mkdir()
    assert "did you mean" in run("voc", "--voc-root", tmp_path, expect=1)


def truncate(voc):
    path = voc / "JPEGImages/d.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def paint_in_colour(voc):
    with Image.open(voc / "SegmentationClass/b.png") as image:
        image.convert("RGB").save(voc / "SegmentationClass/b.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "d.jpg: image file is truncated"),
        (paint_in_colour, "b.png: mode RGB; expected class indices (prepare.py masks converts"),
        (lambda voc: (voc / "JPEGImages/e.jpg").unlink(), "e.jpg is missing"),
        (lambda voc: (voc / "SegmentationClass/c.png").unlink(), "c.png is missing"),
        (lambda voc: save_mask(voc / "SegmentationClass/a.png", draw_mask([0], (60, 41))), "60 x 41 pixels, its image"),
        (lambda voc: save_mask(voc / "SegmentationClassAug/f.png", draw_mask([36])), "values [37]; expected 0..20"),
        (lambda voc: (voc / "Annotations/e.xml").write_text("<annotation><obj"), "e.xml: unclosed token"),
        (lambda voc: (voc / LISTS / "trainaug.txt").write_text("a\nb\nc\nd\ne\nf\n"), "6 images, 1 of them in val"),
    ],
)
def test_bad_voc_files_are_named_and_nothing_is_written(voc, spoil, message):
    spoil(voc)
    before = everything(voc)
    labels = "xml" if message.startswith("e.xml") else "masks"
    text = prepare_voc(voc, "--labels-from", labels, expect=1)
    assert message in text
    assert "Traceback" not in text
    assert everything(voc) == before


def test_an_image_without_label_is_kept_and_reported(voc):
    Image.fromarray(draw_mask([])).save(voc / "SegmentationClassAug/f.png")
    assert "1 without any label, kept as showing no class:\n  f" in prepare_voc(voc)
    assert labels_of(voc, "trainaug")["f"] == []


def test_missing_saliency_maps_are_counted(voc, tmp_path):
    (tmp_path / "saliency").mkdir()
    shutil.copy(voc / "SegmentationClass/a.png", tmp_path / "saliency/a.png")
    assert "4 of 5 training images have no saliency map" in prepare_voc(voc, "--saliency", tmp_path / "saliency")


def test_colour_masks_become_the_indices_they_were_made_of(voc, tmp_path):
    colour = tmp_path / "colour"
    colour.mkdir()
    for name in "abc":
        with Image.open(voc / f"SegmentationClass/{name}.png") as image:
            image.convert("RGB").save(colour / f"{name}.png")
    run("masks", "--masks", colour, "--out", tmp_path / "indexed")
    assert everything(tmp_path / "indexed") == everything(voc / "SegmentationClass")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(colour / "d.png")
    assert "have none of VOC's colours, e.g. #010203" in run(
        "masks", "--masks", colour, "--out", tmp_path / "i", expect=1
    )
    assert not (tmp_path / "i/d.png").exists()


@pytest.fixture
def pictures(tmp_path):
    """Six images: two JPEGs, one of them turned by EXIF, PNGs, one below a folder, and masks for two."""
    images, masks = tmp_path / "pictures", tmp_path / "masks"
    (images / "more").mkdir(parents=True)
    masks.mkdir()
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("a.jpg", "b 1.jpg", "c.png", "more/d.png", "e.png", "spare.png"):
        image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
        image.save(images / name, **({"exif": turned} if name == "b 1.jpg" else {}))
    save_mask(masks / "a.png", draw_mask([1]))
    save_mask(masks / "b 1.png", draw_mask([0, 1], (40, 60)))
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    (tmp_path / "labels.csv").write_text(
        "image,labels\na.jpg,cat\nb 1.jpg,dog;cat\nc,dog\nmore/d.png,cat ; dog\ne.png,\n"
    )
    return tmp_path


def convert(folder, *options, **how):
    return run(
        *("folder", "--images", folder / "pictures", "--csv", folder / "labels.csv", "--out", folder / "out"),
        *options,
        **how,
    )


def test_a_folder_with_a_table_becomes_a_data_set(pictures):
    options = ["--classes", pictures / "classes.txt", "--masks", pictures / "masks", "--val-share", 0.25]
    text = convert(pictures, *options)
    assert "1 images have no row" in text
    assert "spare.png" in text
    assert "2 of 4 labelled images have no mask" in text
    assert "next: python examples/voc/train_attention.py" in text.splitlines()[-1]
    assert "--negatives background" in text.splitlines()[-1]
    out = pictures / "out"
    train, val = VOCFolder(out, "train", negatives="background"), VOCFolder(out, "val")
    assert train.classes == ["dog", "cat"]
    assert len(val) == 1
    labels = {name: data.class_ids(name) for data in (train, val) for name in data.names}
    assert labels == {"a": [1], "b_1": [0, 1], "c": [0], "d": [0, 1], "e": []}
    for name in labels:
        with Image.open(out / f"JPEGImages/{name}.jpg") as image:
            assert (image.format, image.size) == ("JPEG", (40, 60) if name == "b_1" else (60, 40))
    assert os.path.samefile(out / "JPEGImages/a.jpg", pictures / "pictures/a.jpg")
    assert sorted(np.unique(train.mask("a"))) == [0, 2, 255]
    before = everything(out)
    assert "0 files written, 7 were there" in convert(pictures, *options)
    assert everything(out) == before
    assert "val_cls.txt: 1 lines, would become 2" in convert(pictures, "--val-share", 0.5, expect=1)
    assert everything(out) == before


def test_unreadable_pictures_are_listed_and_the_rest_goes_on(pictures):
    path = pictures / "pictures/c.png"
    path.write_bytes(path.read_bytes()[:-300])
    assert "1 images cannot be read" in convert(pictures)
    assert "c.png: " in (pictures / "out/skipped.txt").read_text()
    names = VOCFolder(pictures / "out", "train").names + VOCFolder(pictures / "out", "val").names
    assert sorted(names) == ["a", "b_1", "d"]


def test_masks_that_contradict_the_table_are_reported(pictures):
    (pictures / "classes.txt").write_text("cat\ndog\n")
    text = convert(pictures, "--classes", pictures / "classes.txt", "--masks", pictures / "masks")
    assert "1 masks show classes that the table does not name" in text
    assert "a.png: ['dog'], table: ['cat']" in text


def add_row(row):
    return lambda folder: (folder / "labels.csv").write_text((folder / "labels.csv").read_text() + row)


def collide(folder):
    shutil.copy(folder / "pictures/c.png", folder / "pictures/more/a.png")
    add_row("more/a.png,dog\n")(folder)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "pictures"), [], "is missing or holds no images"),
        (lambda folder: (folder / "labels.csv").unlink(), [], "labels.csv cannot be read"),
        (
            lambda folder: (folder / "labels.csv").write_text("name;tags\na;cat\n"),
            [],
            "expected a header 'image,labels'",
        ),
        (add_row("z.jpg,dog\n"), [], "z.jpg: no such image"),
        (add_row("a,dog\n"), [], "a: 2 rows or files of this name"),
        (collide, [], "more/a.png"),
        (add_row("spare,hot dog\n"), ["--classes", "classes.txt"], "line 7: class 'hot dog' is not in"),
        (add_row("spare,cow\n"), ["--classes", "classes.txt"], "class 'cow' is not in"),
        (lambda folder: None, ["--masks", "masks"], "--masks needs --classes"),
        (lambda folder: None, ["--val-share", 1], "expected a share in [0, 1)"),
        (lambda folder: None, ["--val-share", 0.9], "too few"),
        (lambda folder: None, ["--classes", "nowhere"], "nowhere is missing"),
        (add_row("spare,dog,cat\n"), [], "more cells than the header"),
        (
            lambda folder: save_mask(folder / "masks/a.png", draw_mask([2])),
            ["--masks", "masks", "--classes", "classes.txt"],
            "a.png: values [3]; expected 0..2 and 255",
        ),
    ],
)
def test_bad_folders_and_tables_are_named_and_nothing_is_written(pictures, spoil, options, message):
    spoil(pictures)
    text = convert(pictures, *[pictures / o if o in ("classes.txt", "masks") else o for o in options], expect=1)
    assert message in text
    assert "Traceback" not in text
    assert not (pictures / "out").exists()


def turn(path, orientation):
    """Store the photograph of a file so that its EXIF entry turns it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as image:
        image.load()
        image.save(path, format="JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("drawn_upright", [True, False])
def test_a_mask_of_a_turned_photograph_fits_either_way(pictures, drawn_upright):
    """As stored "b 1.jpg" has 60 x 40 pixels and is turned by 90 degrees."""
    upright = draw_mask([0, 1], (40, 60))
    save_mask(pictures / "masks/b 1.png", upright if drawn_upright else np.rot90(upright, 1))
    convert(pictures, "--classes", pictures / "classes.txt", "--masks", pictures / "masks", "--val-share", 0)
    data = VOCFolder(pictures / "out", "train")
    assert data.size("b_1") == (60, 40)
    np.testing.assert_array_equal(data.mask("b_1").numpy(), upright)


def test_a_mask_that_would_fit_a_photograph_upside_down_is_refused(pictures):
    turn(pictures / "pictures/a.jpg", 3)
    options = ["--classes", pictures / "classes.txt", "--masks", pictures / "masks"]
    assert "a.png: its photograph has the EXIF orientation 3" in convert(pictures, *options, expect=1)
    assert not (pictures / "out").exists()
    (pictures / "masks/a.png").unlink()
    convert(pictures, *options)  # without a mask there is nothing to mistake


def test_masks_of_0_and_255_are_refused_and_classes_without_mask_are_named(pictures):
    options = ["--classes", pictures / "classes.txt", "--masks", pictures / "masks"]
    for name, size in (("a", (60, 40)), ("b 1", (40, 60))):
        save_mask(pictures / f"masks/{name}.png", np.where(draw_mask([0], size) > 0, 255, 0).astype(np.uint8))
    assert "masks show none of the 2 classes, only 0 (background) and 255" in convert(pictures, *options, expect=1)
    assert not (pictures / "out").exists()
    save_mask(pictures / "masks/a.png", draw_mask([1]))
    assert "1 of 2 classes are in none of the masks:\n  dog" in convert(pictures, *options)


def test_hidden_files_and_other_endings_among_masks(voc, tmp_path):
    colour = tmp_path / "colour"
    colour.mkdir()
    Image.new("RGB", (4, 4)).save(colour / "a.PNG")
    (colour / "._a.PNG").write_bytes(b"\0\5\x16\7")
    (colour / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert "1 label images written" in run("masks", "--masks", colour, "--out", tmp_path / "indexed")
    shutil.rmtree(voc / "JPEGImages")
    (voc / "JPEGImages").mkdir()
    (voc / "JPEGImages/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert "JPEGImages (photographs)" in prepare_voc(voc, expect=1)  # a folder of hidden files is empty


def test_voc_names_with_dots_spaces_and_paths_in_lists(voc):
    """As photographs of others are named; the lists are in the form of other projects."""
    renamed = {"a": "site.v1", "b": "photo 1"}
    for path in [*voc.rglob("*.*")]:
        if path.stem in renamed:
            path.rename(path.with_name(renamed[path.stem] + path.suffix))
    (voc / LISTS / "train.txt").write_text("/JPEGImages/photo 1.jpg\n/JPEGImages/site.v1.jpg\n")
    prepare_voc(voc, "--labels-from", "masks")
    assert labels_of(voc, "train") == {"photo 1": [7], "site.v1": [0, 14]}
    assert (voc / LISTS / "train_cls.txt").read_text() == "photo 1\t7\nsite.v1 0 14\n"
    assert list(labels_of(voc, "trainaug")) == ["d", "e", "f", "photo 1", "site.v1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("b\n../a\n", "train.txt, line 2: expected the name"), ("b\na\nb\n", "train.txt, line 3: 'b' is there twice")],
)
def test_voc_lists_that_are_not_certain_are_refused(voc, content, message):
    (voc / LISTS / "train.txt").write_text(content)
    before = everything(voc)
    assert message in prepare_voc(voc, expect=1)
    assert everything(voc) == before


def test_a_fifo_among_the_annotations_does_not_wait(voc):
    (voc / "Annotations/a.xml").unlink()
    os.mkfifo(voc / "Annotations/a.xml")
    assert "a.xml: it is no regular file" in prepare_voc(voc, "--labels-from", "xml", expect=1)


of_pycocotools = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def box(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


@pytest.fixture
def coco(tmp_path):
    """Three training and one val image; in the first a small cat lies on a large dog, before a crowd."""
    pytest.importorskip("pycocotools")
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": 3, "name": "traffic light"}, {"id": 17, "name": "cat"}, {"id": 90, "name": "dog"}]
    crowd = np.zeros((40, 60), dtype=np.uint8)
    crowd[:, 20:] = 1
    runs = np.diff(np.flatnonzero(np.diff(crowd.T.ravel(), prepend=0, append=0)), prepend=0).tolist()
    instances = [
        {"image_id": 1, "category_id": 17, "area": 25, "iscrowd": 0, "segmentation": box(10, 10, 5, 5)},
        {"image_id": 1, "category_id": 90, "area": 900, "iscrowd": 0, "segmentation": box(0, 0, 30, 30)},
        {
            "image_id": 1,
            "category_id": 3,
            "area": 800,
            "iscrowd": 1,
            "segmentation": {"size": [40, 60], "counts": runs},
        },
        {"image_id": 2, "category_id": 17, "area": 100, "iscrowd": 0, "segmentation": box(0, 0, 10, 10)},
        {"image_id": 4, "category_id": 90, "area": 100, "iscrowd": 0, "segmentation": box(0, 0, 10, 10)},
    ]
    for number, instance in enumerate(instances, 1):
        instance |= {"id": number, "bbox": [0, 0, 1, 1]}
    for split, members in (("train", (1, 2, 3)), ("val", (4, 5))):
        (root / f"{split}2014").mkdir()
        images = [{"id": i, "file_name": f"COCO_{split}2014_{i}.jpg", "width": 60, "height": 40} for i in members]
        for image in images:
            Image.new("L" if image["id"] == 2 else "RGB", (60, 40)).save(root / f"{split}2014" / image["file_name"])
        found = [instance for instance in instances if instance["image_id"] in members]
        content = {"images": images, "annotations": found, "categories": categories}
        (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(content))
    return root


@of_pycocotools
def test_coco_becomes_lists_and_label_images(coco, tmp_path):
    out = tmp_path / "out"
    text = run("coco", "--coco-root", coco, "--out", out)
    train, val = VOCFolder(out, "train", negatives="background"), VOCFolder(out, "val")
    assert train.classes == ["traffic_light", "cat", "dog"]
    first, second, negative = train.names
    assert [train.class_ids(name) for name in train.names] == [[0, 1, 2], [1], []]
    assert [val.class_ids(name) for name in val.names] == [[2], []]
    assert negative == "COCO_train2014_3"
    mask = train.mask(first).numpy()
    assert mask[12, 12] == 2  # the cat, on the dog
    assert mask[2, 2] == mask[2, 25] == 3  # the dog, also where the crowd lies
    assert mask[20, 50] == 255  # the crowd
    assert mask[35, 5] == 0
    assert (train.mask(second) == 2).sum() == 100
    assert "1 training images without objects" in text
    before = everything(out)
    (out / f"SegmentationClass/{first}.png").unlink()  # as if the first run had been stopped
    assert "0 files written, 6 were there" in run("coco", "--coco-root", coco, "--out", out)
    assert everything(out) == before


@of_pycocotools
def test_coco_says_what_is_missing_and_what_is_broken(coco, tmp_path):
    path = coco / "train2014/COCO_train2014_2.jpg"
    path.write_bytes(path.read_bytes()[:-50])
    (coco / "val2014/COCO_val2014_4.jpg").unlink()
    text = run("coco", "--coco-root", coco, "--out", tmp_path / "out", expect=1)
    assert "COCO_train2014_2.jpg: " in text
    assert "COCO_val2014_4.jpg is missing" in text
    assert not (tmp_path / "out/classes.txt").exists()
    text = run("coco", "--coco-root", tmp_path / "nowhere", "--out", tmp_path / "out", expect=1)
    for part in ("instances_train2014.json", "instances_val2014.json", "train2014:", "val2014:", "cocodataset.org"):
        assert part in text


def change(coco, split, edit):
    path = coco / f"annotations/instances_{split}2014.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def without(*keys):
    def edit(content):
        for annotation in content["annotations"]:
            for key in keys:
                annotation.pop(key)

    return edit


@of_pycocotools
def test_coco_without_area_paints_small_on_large_as_with_it(coco, tmp_path):
    run("coco", "--coco-root", coco, "--out", tmp_path / "whole")
    for split in ("train", "val"):
        change(coco, split, without("area"))
    run("coco", "--coco-root", coco, "--out", tmp_path / "out")
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


@of_pycocotools
def test_coco_without_iscrowd_has_no_crowds(coco, tmp_path):
    for split in ("train", "val"):
        change(coco, split, without("iscrowd", "area"))
    run("coco", "--coco-root", coco, "--out", tmp_path / "out")
    mask = VOCFolder(tmp_path / "out", "train").mask("COCO_train2014_1").numpy()
    assert set(np.unique(mask)) == {0, 1, 2, 3}
    assert mask[20, 50] == 1  # the crowd of traffic lights, now one large object below the others
    assert mask[12, 12] == 2


@of_pycocotools
@pytest.mark.parametrize("as_shown", [True, False])
def test_coco_masks_lie_as_the_upright_photograph(coco, tmp_path, as_shown):
    """Annotations of the photograph as it is shown, 60 x 40, or of its pixels as they are stored, 40 x 60."""
    for name in (1, 2, 3):
        Image.new("RGB", (40, 60)).save(coco / f"train2014/COCO_train2014_{name}.jpg")
        turn(coco / f"train2014/COCO_train2014_{name}.jpg", 6)

    def edit(content):
        content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
        for image in content["images"] if not as_shown else []:
            image |= {"width": 40, "height": 60}

    change(coco, "train", edit)
    run("coco", "--coco-root", coco, "--out", tmp_path / "out")
    data = VOCFolder(tmp_path / "out", "train")
    assert data.size("COCO_train2014_2") == (40, 60)
    drawn = np.zeros((40, 60) if as_shown else (60, 40), int)
    drawn[:10, :10] = 2
    np.testing.assert_array_equal(data.mask("COCO_train2014_2").numpy(), drawn if as_shown else np.rot90(drawn, -1))


def edit_first(part, **values):
    def edit(content):
        content[part][0] |= values

    return edit


def drop(part, key):
    def edit(content):
        del content[part][0][key]

    return edit


BAD_COCO = {
    "an unknown category": (edit_first("annotations", category_id=4), "there is no category 4"),
    "an unknown image": (edit_first("annotations", image_id=77), "of image 77: there is no such image"),
    "no outline": (edit_first("annotations", segmentation=[]), "no segmentation to paint"),
    "no file name": (drop("images", "file_name"), "image 1: no file_name"),
    "no size": (drop("images", "height"), "image 1: no height"),
    "no id": (drop("annotations", "id"), "instances_train2014.json cannot be read as COCO annotations"),
    "an image twice": (lambda content: content["images"].append(content["images"][0]), "4 images have 3 different ids"),
    "another folder": (edit_first("images", file_name="../x.jpg"), "the file '../x.jpg' is not below"),
    "a place": (edit_first("images", file_name="/etc/x.jpg"), "the file '/etc/x.jpg' is not below"),
    "other categories": (edit_first("categories", name="tram"), "have different categories"),
    "no categories": (drop("categories", "name"), "category 3: no name"),
    "a list": (lambda content: content.clear(), "instances_train2014.json cannot be read as COCO annotations"),
    "an image of val": (edit_first("images", file_name="more/COCO_val2014_4.jpg"), "images of one name (1"),
}


@of_pycocotools
@pytest.mark.parametrize(("edit", "message"), BAD_COCO.values(), ids=list(BAD_COCO))
def test_bad_annotations_are_named_and_nothing_is_written(coco, tmp_path, edit, message):
    change(coco, "train", edit)
    text = run("coco", "--coco-root", coco, "--out", tmp_path / "out", expect=1)
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


@of_pycocotools
def test_a_category_that_is_the_background_is_refused(coco, tmp_path):
    for split in ("train", "val"):
        change(coco, split, edit_first("categories", name="background"))
    assert "category 3: 'background' is no class" in run(
        "coco", "--coco-root", coco, "--out", tmp_path / "out", expect=1
    )


@pytest.mark.parametrize("command", ["voc", "folder", "coco", "masks"])
def test_help_answers(command):
    assert "usage:" in run(command, "--help")
    assert f"prepare.py {command}" in run("--help")
