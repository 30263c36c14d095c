"""Lists, class files and tables as people have them: read right, or refused with file and line; nothing is dropped."""

import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from class_names import read_classes
from data import VOCFolder
from hypothesis import given
from hypothesis import strategies as st
from label_tables import read_folder
from lists import Images, read_names
from PIL import Image
from texts import numbered_lines

EXAMPLES = Path(__file__).parents[1] / "examples"
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def encode(content):
    return content if isinstance(content, bytes) else content.encode()


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Makes a folder in VOC layout of one-colour images; lists and class file as given, to the byte."""

    def make(images=("a.jpg", "b.jpg"), classes="cat\ndog\n", masks=(), **lists):
        for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (tmp_path / part).mkdir(parents=True)
        for image in images:
            draw(tmp_path / "JPEGImages" / image)
        (tmp_path / "classes.txt").write_bytes(encode(classes))
        for name, value in dict(masks).items():
            Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / f"SegmentationClass/{name}.png")
        for name, content in lists.items():
            (tmp_path / f"ImageSets/Segmentation/{name}.txt").write_bytes(encode(content))
        return tmp_path

    return make


def ids(data):
    return {name: data.class_ids(name) for name in data.names}


def stop(call, *arguments, **options):
    with pytest.raises(SystemExit) as stopped:
        call(*arguments, **options)
    return str(stopped.value)


# NAME ID [ID ...]

PLAIN = {"a": [0], "b": [0, 1]}
SAME_LISTS = {
    "plain": "a 0\nb 0 1\n",
    "no last line end": "a 0\nb 1 0",
    "Windows": "a 0\r\nb 0 1\r\n",
    "old Macintosh": "a 0\rb 0 1\r",
    "byte order mark": b"\xef\xbb\xbfa 0\nb 0 1\n",
    "UTF-16": "a 0\nb 0 1\n".encode("utf-16"),
    "two marked files in one": b"\xef\xbb\xbfa 0\n\xef\xbb\xbfb 0 1\n",
    "blank lines": "\n\na 0\n  \nb 0 1\n\n",
    "a line for each pair": "a 0\nb 0\nb 1\n",
    "a pair twice": "a 0\nb 0\na 0\nb 1\nb 0\n",
    "semicolons": "a 0\nb 0;1\n",
    "commas": "a,0\nb,0,1\n",
    "commas and spaces": "a 0\nb 0, 1\n",
    "JSON": "a [0]\nb [0, 1]\n",
    "tabs": "a\t0\nb\t0\t1\n",
    "endings": "a.jpg 0\nb.jpg 0 1\n",
    "paths": "/JPEGImages/a.jpg 0\nVOC2012/JPEGImages/b.jpg 0 1\n",
}


@pytest.mark.parametrize("content", SAME_LISTS.values(), ids=list(SAME_LISTS))
def test_labels_in_every_form_are_the_same(folder, content):
    assert ids(VOCFolder(folder(train_cls=content), "train")) == PLAIN


NAMES = {
    "spaces": ("photo.jpg", "photo (1).jpg"),
    "numbers": ("photo.jpg", "photo 2020.jpg"),
    "dots": ("site.v1.jpg", "site.v2.jpg"),
    "dots like endings": ("a.png.jpg", "b.jpg"),
    "composed": (f"{COMPOSED}.jpg", "b.jpg"),
    "decomposed": (f"{DECOMPOSED}.jpg", "b.jpg"),
    "other endings": ("a.JPG", "b.jpeg"),
    "other formats": ("a.png", "b.webp"),
    "line separators": ("a\u2028b.jpg", "c\x0cd.jpg"),
}


@pytest.mark.parametrize("images", NAMES.values(), ids=list(NAMES))
def test_names_are_kept_whole(folder, images):
    first, second = (image.rpartition(".")[0].replace(DECOMPOSED, COMPOSED) for image in images)
    root = folder(images, train_cls=f"{first}\t1\n{second}\t0 1\n", train=f"{first}\n{second}\n")
    data = VOCFolder(root, "train")
    assert ids(data) == {first: [1], second: [0, 1]}
    assert VOCFolder(root, "train", labelled=False).names == [first, second]
    assert data.photograph(first).size == (8, 8)


@pytest.mark.parametrize("written", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("stored", [COMPOSED, DECOMPOSED])
def test_a_name_is_one_in_either_unicode_form(folder, written, stored):
    root = folder([f"{stored}.jpg"], masks={stored: 1}, train=f"{written}\n")
    data = VOCFolder(root, "train")
    assert ids(data) == {COMPOSED: [0]}
    assert data.has_mask(COMPOSED)


def test_a_photograph_with_the_usual_ending_is_meant_where_there_are_two(folder):
    root = folder(["a.png", "a.jpg", "._a.jpg"], train_cls="a 0\n")
    assert VOCFolder(root, "train").image_path("a").name == "a.jpg"


def test_the_lists_of_other_projects_are_read(folder):
    root = folder(train="/JPEGImages/a.jpg /SegmentationClassAug/a.png\nJPEGImages/b.jpg\n")
    assert VOCFolder(root, "train", labelled=False).names == ["a", "b"]


BAD_LABELS = {
    "not UTF-8": (b"a 0\nb\xe9 1\n", "line 2: cannot be read as text"),
    "a word": ("a 0\nb dog\n", "line 2: expected lines NAME ID"),
    "a negative id": ("a 0\nb -1\n", "line 2: expected lines NAME ID"),
    "a fraction": ("a 0.0\n", "line 1: expected lines NAME ID"),
    "a digit of another script": ("a \u0661\n", "line 1: expected lines NAME ID"),
    "5,000 digits": ("a " + 5000 * "1" + "\n", "line 1: expected"),
    "10 digits": ("a " + 10 * "1" + "\n", "line 1: expected lines NAME ID"),
    "a name of 5,000 letters": ("a 0\n" + 5000 * "x" + " 1\n", "line 2: expected at most"),
    "ids from 1": ("a 1\nb 2\n", "line 2: b has the class ids [2]; expected 0..1; do they count from 1?"),
    "ids far out": ("a 1\nb 7\n", "line 2: b has the class ids [7]; expected 0..1"),
    "with and without": ("a 0\nb 1\na\n", "line 3: a has no class here, unlike in line 1"),
    "without and with": ("a\nb 1\na 0\n", "line 3: a has classes here, unlike in line 1"),
    "another folder": ("a 0\n../b 1\n", "line 2: expected the name of an image, without folders"),
    "a place": ("/etc/passwd 1\n", "line 1: expected the name of an image, without folders"),
    "a place behind a mark": ("x/JPEGImages/../a.jpg 1\n", "line 1: expected the name of an image"),
    "a Windows path": ("more\\b 1\n", "line 1: expected the name of an image"),
    "NUL": ("a\0 1\n", "line 1: expected the name of an image"),
    "a hidden file": ("._a 1\n", "line 1: expected the name of an image"),
    "a missing image": ("a 0\nz 1\n", "1 of 2 images are missing, first z.jpg ("),
    "brackets left open": ("a [0, 1\n", "line 1)"),
}


@pytest.mark.parametrize(("content", "message"), BAD_LABELS.values(), ids=list(BAD_LABELS))
def test_a_line_that_is_not_certain_is_refused_and_named(folder, content, message):
    text = stop(VOCFolder, folder(["a.jpg", "b.jpg", "._a.jpg"], train_cls=content), "train")
    assert message in text
    assert "train_cls.txt" in text
    assert len(text) < 600


def test_a_number_that_may_belong_to_the_name_is_refused_and_a_tab_decides(folder):
    root = folder(["photo.jpg", "photo 1.jpg"], train_cls="photo 1\n")
    assert "line 1: 'photo 1' could be each of the images ['photo', 'photo 1']" in stop(VOCFolder, root, "train")
    (root / "ImageSets/Segmentation/train_cls.txt").write_text("photo\t1\nphoto 1\t0\n")
    assert ids(VOCFolder(root, "train")) == {"photo": [1], "photo 1": [0]}


def test_ids_from_1_are_noticed_by_the_masks_where_no_id_is_too_large(folder):
    root = folder(masks={"a": 1, "b": 1}, train_cls="a 1\nb 1\n")
    assert "line 1: a has the class ids [1], its mask shows [0]" in stop(VOCFolder, root, "train")
    Image.fromarray(np.full((8, 8), 2, np.uint8)).save(root / "SegmentationClass/b.png")
    assert ids(VOCFolder(root, "train")) == {"a": [1], "b": [1]}  # one mask shows what the list says


BAD_NAMES = {
    "a name twice": ("a\nb\na\n", "line 3: 'a' is there twice, first in line 1"),
    "a name in two forms": ("a\na.jpg\n", "line 2: 'a.jpg' is there twice"),
    "one class of VOC's": ("a  1\nb -1\n", "first a  1.jpg ("),
    "paths that differ": ("/JPEGImages/a.jpg /SegmentationClassAug/b.png\n", "line 1: expected the name"),
    "two files of a name": ("c\n", "line 1: expected one image c, found c.png, c.webp"),
    "another folder": ("a\nmore/b\n", "line 2: expected the name of an image, without folders"),
}


@pytest.mark.parametrize(("content", "message"), BAD_NAMES.values(), ids=list(BAD_NAMES))
def test_a_list_of_names_is_refused_likewise(folder, content, message):
    root = folder(["a.jpg", "b.jpg", "c.png", "c.webp"], train=content)
    text = stop(VOCFolder, root, "train", labelled=False)
    assert message in text
    assert "train.txt" in text


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=6))
def test_lines_are_cut_at_line_ends_alone(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes("\r\n".join(lines).encode())
    lines = [line.removeprefix("\ufeff") for line in lines]  # a mark of the file, not of its first line
    assert numbered_lines(path) == [(n, line) for n, line in enumerate(lines, 1) if line.strip()]


# Class files

CLASS_FILES = {
    "plain": ("cat\ntraffic light\n", ["cat", "traffic light"]),
    "mark, Windows, blanks": (b"\xef\xbb\xbfcat\r\n\r\ntraffic light \r\n\r\n", ["cat", "traffic light"]),
    "UTF-16": ("cat\ntraffic light\n".encode("utf-16"), ["cat", "traffic light"]),
    "with commas": ("tench, Tinca tinca\ngoldfish\n", ["tench, Tinca tinca", "goldfish"]),
    "numbered from 0": ("0 cat\n1 dog\n", ["0 cat", "1 dog"]),
    "numbered from 1": ("1: cat\n2: dog\n", ["1: cat", "2: dog"]),
    "numbers in names": ("3 series\n5 series\n", ["3 series", "5 series"]),
    "decomposed": (f"{DECOMPOSED}\n", [COMPOSED]),
}


@pytest.mark.parametrize(("content", "expected"), CLASS_FILES.values(), ids=list(CLASS_FILES))
def test_a_line_is_a_class(tmp_path, content, expected):
    (tmp_path / "classes.txt").write_bytes(encode(content))
    assert read_classes(tmp_path / "classes.txt") == expected


BAD_CLASS_FILES = {
    "background first": ("background\ncat\n", "line 1: 'background' is no class"),
    "as detectors write it": ("\n__background__\ncat\n", "line 2: '__background__' is no class"),
    "numbered": ("0 background\n1 cat\n", "line 1: '0 background' is no class"),
    "last": ("cat\nBackground\n", "line 2: 'Background' is no class"),
    "a class twice": ("cat\ndog\ncat\n", "line 3: class 'cat' is there twice"),
    "a class in two forms": (f"{COMPOSED}\n{DECOMPOSED}\n", "line 2: class"),
    "all in one line": ("cat dog\n", "line 1: 'cat dog' could be one class or several"),
    "one line of a table": ("cat,dog", "line 1: 'cat,dog' could be one class or several"),
    "numbers with gaps": ("1 person\n2 bicycle\n4 bus\n", "line 3: '4 bus' has the number 4 where 3 is next"),
    "a control character": ("cat\nd\x07og\n", "line 2: expected a class name"),
    "more than masks can hold": ("".join(f"c{c}\n" for c in range(255)), "line 255: expected at most 254 classes"),
    "none": ("\n \n", "names no class"),
    "not UTF-8": (b"cat\n\xffdog\n", "line 2: cannot be read as text"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CLASS_FILES.values(), ids=list(BAD_CLASS_FILES))
def test_classes_that_would_shift_ids_are_refused(tmp_path, content, message):
    (tmp_path / "classes.txt").write_bytes(encode(content))
    text = stop(read_classes, tmp_path / "classes.txt")
    assert message in text
    assert "classes.txt" in text


# Tables: prepare.py folder and custom_dataset.py read the same


@pytest.fixture
def photos(tmp_path):
    for name in ("a.jpg", "b.JPG", "more/c.png", f"{DECOMPOSED}.webp", ".hidden.jpg", "._a.jpg", ".thumbnails/b.jpg"):
        draw(tmp_path / "photos" / name)
    (tmp_path / "photos/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return tmp_path / "photos"


def classes_of_both(photos, content, *options):
    """What each script makes of a table: the classes of each image by its stem, or the sentence it ends with."""
    table, found = photos.parent / "table.csv", []
    table.write_bytes(encode(content))
    sys_path = [*sys.path]
    try:
        pictures = runpy.run_path(str(EXAMPLES / "custom_dataset.py"))["Pictures"]
        data = pictures(photos, table, *options)
        shown = (np.flatnonzero(row).tolist() for row in data.labels.numpy())
        found.append({path.stem: [data.classes[c] for c in ids] for path, ids in zip(data.paths, shown, strict=True)})
    except SystemExit as stopped:
        found.append(str(stopped))
    finally:
        sys.path[:] = sys_path
    out = photos.parent / "out"
    arguments = ["prepare.py", "folder", "--images", photos, "--csv", table, "--out", out, "--val-share", 0]
    arguments += ["--classes", *options] if options else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLES / "voc/prepare.py"), run_name="__main__")
            data = VOCFolder(out, "train", negatives="background")
            found.append({name: [data.classes[c] for c in data.class_ids(name)] for name in data.names})
        except SystemExit as stopped:
            found.append(str(stopped))
    return found


ROWS = {"a": ["cat", "dog"], "b": ["dog"], "c": ["cat"], COMPOSED: []}
PLAIN_TABLE = f"a.jpg,cat;dog\nb.JPG,dog\nmore/c.png,cat\n{COMPOSED}.webp,\n"
SAME_TABLES = {
    "without header": PLAIN_TABLE,
    "with header": f"image,labels\n{PLAIN_TABLE}",
    "another order": f"Labels, split , image\ncat;dog,x,a\ndog,x,b\ncat,x,more/c\n,x,{COMPOSED}\n",
    "mark and Windows": b"\xef\xbb\xbf" + PLAIN_TABLE.replace("\n", "\r\n\r\n").encode(),
    "UTF-16": PLAIN_TABLE.encode("utf-16"),
    "decomposed": PLAIN_TABLE.replace(COMPOSED, DECOMPOSED),
    "spaces": PLAIN_TABLE.replace(",", " , ").replace(";", " ; "),
    "empty parts": PLAIN_TABLE.replace("cat;dog", ";dog;;cat;"),
    "commas": PLAIN_TABLE.replace("cat;dog", '"cat, dog"'),
    "words": PLAIN_TABLE.replace("cat;dog", "dog cat"),
    "JSON": PLAIN_TABLE.replace("cat;dog", '"[""dog"", ""cat""]"').replace("webp,", "webp,[]"),
    "pandas": PLAIN_TABLE.replace("cat;dog", "\"['dog', 'cat']\""),
    "a row for each class": PLAIN_TABLE.replace("cat;dog", "cat") + "a.jpg,dog\nb.JPG,dog\n",
}


@pytest.mark.parametrize("content", SAME_TABLES.values(), ids=list(SAME_TABLES))
def test_a_table_in_every_form_is_the_same_to_both_scripts(photos, content):
    first, second = classes_of_both(photos, content)
    assert {key.replace(DECOMPOSED, COMPOSED): value for key, value in first.items()} == second == ROWS


@pytest.mark.parametrize("content", ["a,traffic light;\nb,hot dog\n", "a,traffic light;hot dog\nb,hot dog\n"])
def test_class_names_of_several_words_are_whole(photos, content):
    first, second = classes_of_both(photos, content)
    assert first == second
    assert first["b"] == ["hot dog"]


def test_the_class_file_says_what_is_a_name_and_the_order_of_ids(photos, tmp_path):
    (tmp_path / "classes.txt").write_text("traffic light\nhaze\nclear\n")
    first, second = classes_of_both(photos, "a,traffic light\nb,clear haze\n", tmp_path / "classes.txt")
    assert first == second == {"a": ["traffic light"], "b": ["haze", "clear"]}
    assert (tmp_path / "out/classes.txt").read_text() == "traffic light\nhaze\nclear\n"


BAD_TABLES = {
    "words that may be one name": ("a,traffic light\nb,hot dog\n", "line 1: 'traffic light' could be one class or"),
    "commas that may be in a name": ('a,"tench, Tinca"\nb,cat\n', "line 1: 'tench, Tinca' could be one class or"),
    "words that are classes elsewhere": ("a,cat;dog\nb,cat dog\n", "line 2: 'cat dog' could be one class or several"),
    "a list that is none": ('a,"[cat, dog"\n', 'line 1: expected labels such as ["dog", "cat"]'),
    "a program": ("a,\"[__import__('os').getcwd()]\"\n", "line 1: expected labels such as"),
    "only separators": ('a,cat;dog\nb,","\n', "line 2: expected labels, got ','"),
    "half a character": ('a,"[""\\ud800""]"\nb,cat\n', "line 1: expected a class name"),
    "brackets without end": (f"a,{'[' * 20000}\n", "line 1: expected labels such as"),
    "another header": ("filename,label\na,dog\n", "line 1: filename: no such image"),
    "semicolons between cells": ("image;labels\na;dog\n", "expected a header 'image,labels'"),
    "tabs between cells": ("a\tdog\n", "expected a header 'image,labels'"),
    "a row too long": ("a,dog\n\nb,dog,cat\n", "line 3: ['b', 'dog', 'cat']"),
    "a row too short": ("image,labels\na,dog\nb\n", "line 3: ['b']"),
    "an open quote": ('a,dog\nb,"cat\nmore/c,cat\n', "from line 2: cannot be read as CSV"),
    "the background": ("a,cat\nb,background\n", "line 2: 'background' is no class"),
    "another folder": ("a,cat\n../photos/b.JPG,cat\n", "line 2: ../photos/b.JPG: no such image"),
    "a place": ("a,cat\n/etc/passwd,cat\n", "line 2: /etc/passwd: no such image"),
    "a hidden image": ("a,cat\n.hidden.jpg,cat\n", "line 2: .hidden.jpg: no such image"),
    "no image": ("a,cat\n,cat\n", "line 2: (empty): no such image"),
    "one image twice": ("a.jpg,dog\na,cat\n", "a: 2 rows or files of this name: lines 1 (a.jpg), 2"),
    "with and without": ("a,dog\nb,cat\na,\n", "line 3: a has no class here, unlike in line 1"),
    "a line end in a name": ('a,"c\nat;dog"\n', "line 1: expected a class name"),
    "not UTF-8": (b"a,dog\nb,c\xe9\n", "line 2: cannot be read as text"),
    "empty": ("", "got none"),
    "a header alone": ("image,labels\n", "expected a row for each image"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TABLES.values(), ids=list(BAD_TABLES))
def test_a_table_that_is_not_certain_is_refused_by_both_scripts(photos, content, message):
    first, second = classes_of_both(photos, content)
    assert message in first
    assert first == second
    assert not (photos.parent / "out").exists()


def test_folders_that_are_links_are_walked_once_and_loops_end(tmp_path):
    draw(tmp_path / "disk/a.jpg")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "first").symlink_to(tmp_path / "disk")
    (photos / "b.jpg").symlink_to(tmp_path / "disk/a.jpg")
    (photos / "again").symlink_to(photos)
    (tmp_path / "disk/up").symlink_to(photos)
    assert [str(path.relative_to(photos)) for path in Images(photos, deep=True).paths] == ["b.jpg", "first/a.jpg"]
    (tmp_path / "t.csv").write_text("first/a.jpg,cat\nb.jpg,cat\n")
    assert [image.name for image in read_folder(photos, tmp_path / "t.csv").images] == ["first/a.jpg", "b.jpg"]


def test_two_images_whose_maps_would_have_one_name_are_refused(tmp_path):
    for name in ("more/a.jpg", "more_a.jpg"):
        draw(tmp_path / "photos" / name)
    pictures = runpy.run_path(str(EXAMPLES / "custom_dataset.py"))["Pictures"]
    (tmp_path / "t.csv").write_text("more/a.jpg,cat\n")
    assert pictures(tmp_path / "photos", tmp_path / "t.csv").names == ["more_a.jpg"]
    (tmp_path / "t.csv").write_text("more/a.jpg,cat\nmore_a.jpg,cat\n")
    assert "one name (1):\n  more_a.jpg" in stop(pictures, tmp_path / "photos", tmp_path / "t.csv")


def test_a_fifo_in_place_of_a_file_does_not_wait(folder):
    root = folder(["a.jpg"], train_cls="a 0\n")
    os.mkfifo(root / "fifo")
    assert "no regular file" in stop(read_names, root / "fifo", Images(root))
    os.mkfifo(root / "JPEGImages/z.jpg")
    (root / "ImageSets/Segmentation/train_cls.txt").write_text("a 0\nz 0\n")
    assert "z.jpg cannot be read (it is no regular file)" in stop(VOCFolder(root, "train").size, "z")
