"""Image files of others: one thing everywhere whichever way they are stored, and safe to open."""

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from data import VOCFolder, read_label
from images import DRAWN, PHOTOGRAPHS, load, look, photograph, png
from maps import read_map
from PIL import Image, ImageOps
from samples import AttentionImages

ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # the sides are swapped
KEPT = (2, 3, 4)  # turned or mirrored, and the size stays
FORMATS = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}, "tif": {}}


def pattern(height=48, width=80):
    """Four areas of different colours, so that no turn is like another."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (250, 20, 20)
    pixels[: height // 2, width // 2 :] = (20, 250, 20)
    pixels[height // 2 :, : width // 2] = (20, 20, 250)
    return pixels


def save(path, orientation, pixels=None):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pattern() if pixels is None else pixels)
    image.save(path, exif=exif, **FORMATS[path.suffix[1:]])
    return path


def upright(array, orientation):
    """By numpy alone: what each EXIF orientation says is to be done."""
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: np.swapaxes(a, 0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }
    return np.ascontiguousarray(turns[orientation](array))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("ending", FORMATS)
def test_a_photograph_is_upright_in_every_format(tmp_path, ending, orientation):
    path = save(tmp_path / f"a.{ending}", orientation)
    meant = orientation if orientation in range(1, 9) else 1  # 0 and 9 are none that EXIF knows
    expected = upright(pattern(), meant)
    shown = np.asarray(photograph(path)).astype(int)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < 6  # of JPEG
    assert look(path)[:3] == (expected.shape[:2], (48, 80), meant)


@pytest.fixture
def voc(tmp_path):
    """Makes a folder of one photograph and its mask."""

    def make(orientation, mask, pixels=None):
        save(tmp_path / "JPEGImages/a.jpg", orientation, pixels)
        for part in ("SegmentationClass", "ImageSets/Segmentation"):
            (tmp_path / part).mkdir(parents=True)
        Image.fromarray(mask).save(tmp_path / "SegmentationClass/a.png")
        (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
        (tmp_path / "ImageSets/Segmentation/train_cls.txt").write_text("a 0 1 2\n")
        return VOCFolder(tmp_path, "train")

    return make


def truth():
    """The classes of `pattern`'s areas."""
    return (pattern() > 128).argmax(-1).astype(np.uint8) + (pattern() > 128).any(-1)


class Network:
    """What `AttentionImages` asks of one."""

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    class geometry:  # noqa: N801
        side = staticmethod(lambda pixels: round(pixels))
        cells = staticmethod(lambda side: side // 8)


@pytest.mark.parametrize("drawn_upright", [True, False])
@pytest.mark.parametrize("orientation", [1, *TURNED])
def test_photograph_size_training_and_mask_lie_the_same_way(voc, orientation, drawn_upright):
    """A mask of either orientation fits: its size shows which one it has."""
    expected = upright(truth(), orientation)
    data = voc(orientation, expected if drawn_upright else truth())
    shown = np.asarray(data.photograph("a")).astype(int)
    assert data.size("a") == data.drawn_size("a") == shown.shape[:2] == expected.shape
    np.testing.assert_array_equal(data.mask("a").numpy(), expected)
    areas = (shown > 128).argmax(-1) + (shown > 128).any(-1)
    assert (areas == expected).mean() > 0.99
    images = AttentionImages(data, Network, short_side=48)
    assert images.map_sizes.tolist() == [[side // 8 for side in expected.shape]]
    assert images[0].image.shape[1:] == expected.shape


@pytest.mark.parametrize("orientation", KEPT)
def test_a_mask_that_fits_both_ways_is_refused(voc, orientation):
    data = voc(orientation, truth())
    assert np.asarray(data.photograph("a")).shape[:2] == data.size("a")
    for ask in (data.mask, data.drawn_size):
        with pytest.raises(SystemExit, match=f"EXIF orientation {orientation}, which keeps the size"):
            ask("a")


def test_a_square_photograph_does_not_show_which_way_a_mask_lies(voc):
    data = voc(6, truth()[:, :48], pattern()[:, :48])
    with pytest.raises(SystemExit, match=r"a\.png: its photograph has the EXIF orientation 6"):
        data.mask("a")


def test_a_mask_of_another_size_is_refused_with_the_upright_size(voc):
    data = voc(6, truth()[:40])
    with pytest.raises(SystemExit, match=r"a\.png: expected the photograph's size \(80, 48\), got \(40, 80\)"):
        data.mask("a")


def test_sixteen_bits_are_refused_not_cut_to_white(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="expected 8 bits a channel"):
        photograph(tmp_path / "a.png")


# Safe to open

POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
%
%ImageData: 8 8 8 1 0 8 2 "beginimage"
(any program) run
%%EOF
"""


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge():
    """A PNG of 60,000 x 60,000 pixels in some sixty bytes."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def drawn(mode):
    """A small PNG of three areas, of one of the modes: a label (P), a map or saliency (L), a photograph (RGB)."""
    pixels = np.repeat(np.repeat(np.array([[0, 3], [7, 3]], np.uint8), 6, 0), 5, 1)
    image = Image.fromarray(np.stack([pixels, pixels * 9, pixels * 30], -1) if mode == "RGB" else pixels, mode=mode)
    if mode == "P":
        image.putpalette(bytes(range(24)))
    stream = BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def noise():
    path = Path("noise.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)).save(path)
    return path.read_bytes()


BAD_FILES = {
    "PostScript": lambda: POSTSCRIPT,
    "a decompression bomb": huge,
    "nothing": lambda: b"",
    "text": lambda: b"hello",
    "half a file": lambda: noise()[:800],
}
READERS = {
    "photograph": lambda path: photograph(path),
    "look": lambda path: load(path, PHOTOGRAPHS),
    "label": read_label,
    "map": lambda path: read_map(path, (40, 40)),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=list(BAD_FILES))
@pytest.mark.parametrize("read", READERS.values(), ids=list(READERS))
def test_a_file_that_is_no_image_is_a_sentence_and_starts_no_program(tmp_path, monkeypatch, read, content):
    monkeypatch.chdir(tmp_path)
    Path("gs").write_text('#!/bin/sh\ncase "$*" in *BATCH*) touch started;; esac\n')
    Path("gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    Path("a.png").write_bytes(content())
    with pytest.raises((ValueError, SystemExit)) as stopped:
        read(Path("a.png"))
    assert str(stopped.value)
    assert not Path("started").exists()


@pytest.mark.parametrize("read", READERS.values(), ids=list(READERS))
def test_a_fifo_is_refused_without_waiting(tmp_path, read):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises((ValueError, SystemExit), match="no regular file"):
        read(tmp_path / "a.png")


def test_maps_and_labels_are_png_whatever_their_name_says(tmp_path):
    Image.new("L", (40, 40)).save(tmp_path / "a.png", format="BMP")
    with pytest.raises(ValueError, match="formats PNG"):
        load(tmp_path / "a.png", DRAWN)
    assert load(tmp_path / "a.png", PHOTOGRAPHS).size == (40, 40)


CHECKED = {
    "P": read_label,
    "L": lambda path: read_map(path, (12, 10)),
    "RGB": lambda path: torch.from_numpy(np.asarray(photograph(path)).copy()),
}


@pytest.mark.parametrize("mode", CHECKED)
def test_no_flipped_bit_of_a_png_gives_other_pixels(tmp_path, mode):
    """Every bit of the file: it is refused, or the pixels are those that were written."""
    path, content, refused = tmp_path / "a.png", drawn(mode), 0
    path.write_bytes(content)
    expected = CHECKED[mode](path)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            pixels = CHECKED[mode](path)
        except (ValueError, SystemExit):
            refused += 1
        else:
            assert torch.equal(pixels, expected), f"bit {bit}"
    assert refused > 4 * len(content)


def test_pixels_that_are_whole_but_not_what_the_checksum_says_are_refused(tmp_path):
    """Decoding succeeds here: the rows are all there, and their compression's own checksum is right."""
    content = drawn("L")
    start = content.index(b"IDAT")
    length = int.from_bytes(content[start - 4 : start], "big")
    other = zlib.compress(bytes(12 * 11))
    kept = content[: start - 4] + len(other).to_bytes(4, "big") + b"IDAT" + other
    (tmp_path / "a.png").write_bytes(kept + content[start + 4 + length :])
    with pytest.raises(SystemExit, match=r"a\.png cannot be read \(.*checksum.*\)"):
        read_map(tmp_path / "a.png", (12, 10))


@pytest.mark.parametrize("parts", [1, 3])
def test_pixels_in_several_chunks_and_bytes_behind_the_end_are_read(tmp_path, parts):
    content = drawn("L")
    start = content.index(b"IDAT")
    data = content[start + 4 : start + 4 + int.from_bytes(content[start - 4 : start], "big")]
    size = -(-len(data) // parts)
    cut = [data[i : i + size] for i in range(0, len(data), size)]
    chunks = b"".join(chunk(b"IDAT", part) for part in cut) + chunk(b"IEND", b"") + b"behind the end"
    (tmp_path / "a.png").write_bytes(content[: start - 4] + chunks)
    (tmp_path / "b.png").write_bytes(content)
    pixels = [read_map(tmp_path / name, (12, 10)) for name in ("a.png", "b.png")]
    assert torch.equal(*pixels)


@pytest.mark.parametrize("stored", ["caf\u00e9.png", "cafe\u0301.png", "caf\u00e9.PNG"])
def test_a_png_is_found_by_its_name_in_either_unicode_form(tmp_path, stored):
    Image.new("L", (4, 4)).save(tmp_path / stored)
    for name in ("caf\u00e9", "cafe\u0301"):
        assert png(tmp_path, name).exists()
    assert png(tmp_path, "b") == tmp_path / "b.png"


def test_the_reference_of_this_file_turns_as_pillow_does():
    for orientation in range(1, 9):
        image = Image.fromarray(pattern())
        image.getexif()[ORIENTATION] = orientation
        np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(image)), upright(pattern(), orientation))
