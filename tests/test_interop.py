"""Other projects' files: round trips, dictionaries as those projects save them, and no pickle without consent."""

import os
import pickle
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from oaa_lib import AttentionAccumulator, interop
from oaa_lib.interop_layouts import check_name

LAYOUTS = ["oaa", "irn", "psa", "safetensors"]
CONSENT = {"oaa": {}, "safetensors": {}, "irn": {"allow_pickle": True}, "psa": {"allow_pickle": True}}
LABELS = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]])


def filled(keys=("a", "b_1", "none", "d"), **options):
    accumulator = AttentionAccumulator(LABELS, (5, 7), gate=None, keys=list(keys) if keys else None, **options)
    generator = torch.Generator().manual_seed(0)
    return accumulator.update([0, 1, 3], torch.randn(3, 3, 5, 7, generator=generator))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", [("a", "b_1", "none", "d"), None])
def test_a_round_trip_brings_every_map_back(tmp_path, layout, keys):
    accumulator = filled(keys)
    interop.write_maps(accumulator, tmp_path / "maps", layout=layout)
    maps = interop.read_maps(tmp_path / "maps", layout=layout, **CONSENT[layout])
    names = keys or ("0", "1", "2", "3")
    assert set(maps) == {names[0], names[1], names[3]}  # an image without classes has no file
    for row in (0, 1, 3):
        classes, attention = maps[names[row]]
        assert torch.equal(classes, accumulator.classes(row))
        assert attention.dtype == torch.float32
        assert torch.equal(attention, accumulator.attention(row))
    again = AttentionAccumulator(LABELS, (5, 7), keys=accumulator.pairs.keys)
    interop.load_into(again, maps)
    assert torch.equal(again[range(4)], accumulator[range(4)])
    assert again.gate is not None


@given(st.integers(0, 10**6), st.sampled_from(LAYOUTS))
def test_any_map_survives_within_8_bits(tmp_path_factory, seed, layout):
    folder = tmp_path_factory.mktemp("maps")
    attention = torch.rand(1, 1, 3, 4, generator=torch.Generator().manual_seed(seed))
    accumulator = AttentionAccumulator([[1]], (3, 4), gate=None, dtype=torch.float32)
    accumulator.update([0], attention, normalization=None)
    interop.write_maps(accumulator, folder, layout=layout)
    found = interop.read_maps(folder, layout=layout, **CONSENT[layout])["0"].attention
    assert (found - attention[0]).abs().max() <= (0.5 / 255 + 1e-6 if layout == "oaa" else 0)


def test_the_releases_files_are_what_they_are_expected_to_be(tmp_path):
    accumulator = filled()
    interop.write_maps(accumulator, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a_0.png",
        "b_1_1.png",
        "b_1_2.png",
        "d_0.png",
        "d_1.png",
    ]
    with Image.open(tmp_path / "b_1_2.png") as image:
        assert (image.mode, image.size) == ("L", (7, 5))
        assert np.array_equal(np.asarray(image), (accumulator.attention("b_1")[1] * 255).round().numpy())


def test_dictionaries_are_as_irn_and_psa_save_them(tmp_path):
    accumulator, sizes = filled(), {"a": (18, 30), "b_1": (18, 30), "d": (40, 20)}
    interop.write_maps(accumulator, tmp_path / "irn", layout="irn", sizes=sizes)
    content = np.load(tmp_path / "irn" / "b_1.npy", allow_pickle=True).item()
    assert content.keys() == {"keys", "cam", "high_res"}
    assert content["keys"].tolist() == [1, 2]
    assert isinstance(content["cam"], torch.Tensor)
    assert content["cam"].shape == (2, 5, 8)
    assert isinstance(content["high_res"], np.ndarray)
    assert content["high_res"].shape == (2, 18, 30)
    interop.write_maps(accumulator, tmp_path / "psa", layout="psa", sizes=sizes)
    content = np.load(tmp_path / "psa" / "d.npy", allow_pickle=True).item()
    assert {c: values.shape for c, values in content.items()} == {0: (40, 20), 1: (40, 20)}


def test_dictionaries_that_others_saved_are_read(tmp_path):
    high_res = np.random.default_rng(0).random((2, 6, 8)).astype(np.float32)
    content = {"keys": torch.tensor([4, 2]), "cam": torch.zeros(2, 2, 2), "high_res": high_res}
    np.save(tmp_path / "x.npy", content)
    classes, attention = interop.read_maps(tmp_path, layout="irn", allow_pickle=True)["x"]
    assert classes.tolist() == [2, 4]
    assert np.array_equal(attention.numpy(), high_res[::-1])
    np.save(tmp_path / "x.npy", {7: high_res[0], 3: high_res[1]})
    classes, attention = interop.read_maps(tmp_path, layout="psa", allow_pickle=True)["x"]
    assert classes.tolist() == [3, 7]
    assert np.array_equal(attention.numpy(), high_res[::-1])


class Bomb:
    def __reduce__(self):
        return (exec, ("raise AssertionError('executed')",))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_in_a_file_is_executed_without_consent(tmp_path, layout):
    path = tmp_path / f"x_0{interop.ENDINGS[layout]}"
    path.write_bytes(pickle.dumps({0: Bomb()}))
    with pytest.raises(ValueError, match="allow_pickle=True if you trust" if ".npy" in path.name else "cannot be read"):
        _ = interop.read_maps(tmp_path, layout=layout)[path.stem.removesuffix("_0") if layout == "oaa" else path.stem]


def test_files_are_read_when_they_are_asked_for(tmp_path):
    interop.write_maps(filled(), tmp_path)
    (tmp_path / "a_0.png").write_bytes(b"no picture")
    maps = interop.read_maps(tmp_path)
    assert len(maps) == 3
    assert len(maps["d"].classes) == 2
    with pytest.raises(ValueError, match=r"a_0.png cannot be read .*; make it again"):
        maps["a"]


def test_maps_of_another_size_are_resized_and_unlabelled_classes_left_out(tmp_path):
    maps = {"a": interop.ImageMaps(torch.tensor([0, 2]), torch.full((2, 11, 13), 0.5))}
    accumulator = AttentionAccumulator(LABELS, (5, 7), keys=["a", "b", "c", "d"], dtype=torch.float32)
    interop.load_into(accumulator, maps)
    assert accumulator.accumulated.sum() == 1
    torch.testing.assert_close(accumulator.attention("a"), torch.full((1, 5, 7), 0.5))


def test_loading_adds_to_what_is_there():
    accumulator = filled()
    before = accumulator.attention("a").clone()
    interop.load_into(accumulator, {"a": interop.ImageMaps(torch.tensor([0]), torch.full((1, 5, 7), 0.4))})
    assert torch.equal(accumulator.attention("a"), before.maximum(torch.tensor(102 / 255)))


def test_writing_again_replaces_and_leaves_nothing_else(tmp_path):
    accumulator = filled()
    interop.write_maps(accumulator, tmp_path)
    accumulator.update(["a"], torch.ones(1, 3, 5, 7))
    interop.write_maps(accumulator, tmp_path)
    assert (interop.read_maps(tmp_path)["a"].attention == 1).all()
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_may_write_into_one_folder_at_once(tmp_path, layout):
    accumulator = AttentionAccumulator(torch.ones(50, 1), (28, 28), gate=None)
    accumulator.update(range(50), torch.rand(50, 1, 7, 7))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: interop.write_maps(accumulator, tmp_path, layout=layout), range(4)))
    assert len(list(tmp_path.iterdir())) == len(interop.read_maps(tmp_path, layout=layout, **CONSENT[layout])) == 50


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: interop.read_maps(p, layout="seam"), ValueError, "expected layout 'oaa', 'irn'"),
        (lambda p: interop.write_maps(filled(), p, layout="seam"), ValueError, "expected layout 'oaa'"),
        (lambda p: interop.read_maps(p / "absent"), FileNotFoundError, "found none"),
        (
            lambda p: interop.write_maps(filled(("a", "../b", "c", "d")), p),
            ValueError,
            "names that can be those of files",
        ),
        (lambda p: interop.write_maps(filled(), p, sizes={"a": (3, 3)}), KeyError, "b_1"),
        (lambda p: interop.load_into(filled(), {"zebra": None}), KeyError, "1 of 1 images are not .* first 'zebra'"),
        (
            lambda p: interop.load_into(filled(), {"a": interop.ImageMaps(torch.tensor([3]), torch.ones(1, 2, 2))}),
            ValueError,
            "classes below 3, got 3; does the other project count the background",
        ),
    ],
)
def test_bad_input_is_told(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path)


@pytest.mark.parametrize(
    ("content", "layout", "message"),
    [
        ({0: np.full((2, 2), 7.0)}, "psa", r"attention in \[0, 1\], got 7 to 7"),
        ({0: np.ones((2, 2)), 1: np.ones((3, 2))}, "psa", "of one size"),
        ({"keys": [0]}, "psa", "from class id to map"),
        ({0: np.ones((2, 2))}, "irn", "with keys, cam, high_res"),
        ({"keys": [0]}, "irn", "with keys, cam, high_res"),
        ({"cam": np.ones((1, 2, 2))}, "irn", "with keys, cam, high_res"),
        (np.float64(3), "irn", "expected a dictionary, got float"),
        ([1, 2], "irn", "cannot be read"),
    ],
)
def test_dictionaries_of_another_form_are_told(tmp_path, content, layout, message):
    np.save(tmp_path / "x.npy", content)
    with pytest.raises(ValueError, match=message):
        _ = interop.read_maps(tmp_path, layout=layout, allow_pickle=True)["x"]


@pytest.mark.parametrize("mode", ["RGB", "P", "1", "LA", "RGBA", "I;16"])
def test_a_picture_that_is_not_grey_is_refused(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "x_0.png")
    with pytest.raises(ValueError, match=r"x_0\.png: expected an 8-bit grey PNG, got mode"):
        _ = interop.read_maps(tmp_path)["x"]


def test_an_unknown_name_is_told(tmp_path):
    interop.write_maps(filled(), tmp_path)
    with pytest.raises(KeyError, match="no maps of 'zebra'; there are those of 3 images"):
        _ = interop.read_maps(tmp_path)["zebra"]


# Files of others, whatever is in them


def write_file(path, layout, maps, keys=None):
    """The maps (K, h, w) of classes 0 .. K - 1, or of others, as another program saves them."""
    keys = range(len(maps)) if keys is None else keys
    if layout == "irn":
        np.save(path, {"keys": np.array(keys), "high_res": np.asarray(maps)})
    elif layout == "psa":
        np.save(path, dict(zip(keys, maps, strict=True)))
    else:
        save_file({str(key): torch.as_tensor(m).contiguous() for key, m in zip(keys, maps, strict=True)}, path)


def read_one(folder, layout="oaa", name="x"):
    return interop.read_maps(folder, layout=layout, **CONSENT[layout])[name]


def assert_refused(folder, message, layout="oaa", name="x"):
    """One sentence, which names a file, and is short whatever the file holds."""
    with pytest.raises(ValueError, match=message) as raised:
        read_one(folder, layout, name)
    assert str(folder) in str(raised.value)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_hair_outside_is_clipped_and_more_is_refused(tmp_path, layout):
    path = tmp_path / f"x{interop.ENDINGS[layout]}"
    maps = torch.tensor([[[-1e-3, -1e-7], [0.5, 1 + 1e-7]], [[0.25, 1.0009765625], [1.001, 1]]])
    write_file(path, layout, maps.numpy())
    assert torch.equal(read_one(tmp_path, layout).attention, maps.clamp(0, 1))
    for value, shown in ((1.002, "1.002"), (-0.002, "-0.002"), (torch.nan, "nan"), (torch.inf, "inf"), (255, "255")):
        wrong = maps.clone()
        wrong[0, 0, 0] = value
        write_file(path, layout, wrong.numpy())
        assert_refused(tmp_path, rf"expected attention in \[0, 1\], got .*{shown}", layout)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.bool], ids=str
)
def test_maps_of_any_number_type_are_read(tmp_path, dtype):
    maps = (torch.rand(1, 3, 4) > 0.5) if dtype == torch.bool else torch.rand(1, 3, 4).to(dtype)
    write_file(tmp_path / "x.safetensors", "safetensors", maps)
    assert torch.equal(read_one(tmp_path, "safetensors").attention, maps.float())
    np.save(tmp_path / "x.npy", {3: maps[0].float().numpy().astype(">f4"), 1: maps[0].double().numpy()})
    assert torch.equal(read_one(tmp_path, "psa").attention, maps.float().repeat(2, 1, 1))
    if dtype != torch.float8_e4m3fn:  # pickles of which are newer than the oldest torch
        np.save(tmp_path / "x.npy", {"keys": torch.tensor([3]), "cam": maps})
        assert torch.equal(read_one(tmp_path, "irn").attention, maps.float())


STRANGE = ["._a_0.png", ".a_1.png", "picture.png", "a_x.png", "a_.png", "_0.png", "a_0.png.partial", ".DS_Store"]


def test_files_that_are_no_maps_are_passed_over_and_counted(tmp_path):
    accumulator = filled()
    interop.write_maps(accumulator, tmp_path)
    for name in STRANGE:
        (tmp_path / name).write_bytes(b"Mac OS X")
    maps = interop.read_maps(tmp_path)
    assert set(maps) == {"a", "b_1", "d"}
    assert {path.name for path in maps.passed_over} == set(STRANGE[:6])
    assert repr(maps) == "MapFolder(3 images, 6 files passed over)"
    again = AttentionAccumulator(LABELS, (5, 7), keys=accumulator.pairs.keys)
    assert interop.load_into(again, maps) == (5, 0, 0)
    assert torch.equal(again[range(4)], accumulator[range(4)])


def test_where_nothing_but_these_is_there_it_is_said(tmp_path):
    (tmp_path / "picture.png").touch()
    with pytest.raises(FileNotFoundError, match=r"NAME_CLASS\.png .* found none but 1 others, such as picture\.png"):
        interop.read_maps(tmp_path)


@pytest.mark.parametrize("layout", ["irn", "psa"])
def test_dictionaries_without_classes_are_counted(tmp_path, layout):
    write_file(tmp_path / "a.npy", layout, np.full((1, 5, 7), 0.5))
    np.save(tmp_path / "b.npy", {})
    if layout == "irn":
        np.save(tmp_path / "c.npy", {"keys": torch.zeros(0), "cam": torch.zeros(0, 2, 2), "high_res": np.zeros((0,))})
    write_file(tmp_path / "d.npy", layout, np.full((3, 5, 7), 0.5))
    accumulator = AttentionAccumulator(LABELS, (5, 7), keys=["a", "b", "c", "d"])
    maps = interop.read_maps(tmp_path, layout=layout, allow_pickle=True)
    assert len(maps["b"].classes) == len(maps["b"].attention) == 0
    done = interop.load_into(accumulator, maps)
    assert (done.maps, done.unlabelled, done.without_classes) == (3, 1, 2 if layout == "irn" else 1)
    assert accumulator.accumulated.tolist() == [[True, False, False], [False] * 3, [False] * 3, [True, True, False]]


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["x_1.png", "x_01.png"], "oaa"),
        (["x_1.png", "x_1.PNG"], "oaa"),
        (["x.npy", "x.NPY"], "psa"),
        (["x.safetensors", "x.SafeTensors"], "safetensors"),
    ],
)
def test_two_files_of_one_map_are_refused(tmp_path, names, layout):
    for name in names:
        (tmp_path / name).touch()
    assert_refused(tmp_path, rf"{min(names)}|{max(names)} and .* are two files of one map; remove one", layout)


def test_endings_in_capitals_are_read(tmp_path):
    interop.write_maps(filled(), tmp_path)
    (tmp_path / "a_0.png").rename(tmp_path / "a_0.PNG")
    assert torch.equal(read_one(tmp_path, name="a").attention, filled().attention("a"))


@pytest.mark.parametrize(
    ("keys", "layout"),
    [
        (["1", "01"], "safetensors"),
        (["9" * 5000], "safetensors"),
        (["16777216"], "safetensors"),
        (["-1"], "safetensors"),
        (["1.0"], "safetensors"),
        ([" 1"], "safetensors"),
        (["1_0"], "safetensors"),
        (["\u0661"], "safetensors"),  # a digit, for Python
        (["cat"], "safetensors"),
        ([1, 1], "irn"),
        ([-1], "irn"),
        ([0.0], "irn"),
        ([True], "irn"),
        ([10**20], "irn"),
        ([[0]], "irn"),
        ([0, 1, 2], "irn"),
        ([-1], "psa"),
        ([True], "psa"),
        ([1.0], "psa"),
        ([10**5000], "psa"),
        ([10**5000, "cat"], "psa"),
        ([None], "psa"),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, str) else None,
)
def test_what_is_no_class_id_is_refused(tmp_path, keys, layout):
    maps = np.zeros((len(keys) if len(keys) < 3 else 2, 2, 2), np.float32)
    if layout == "irn":
        np.save(tmp_path / "x.npy", {"keys": np.array(keys), "cam": maps})
    else:
        write_file(tmp_path / f"x{interop.ENDINGS[layout]}", layout, maps, keys)
    assert_refused(tmp_path, "expected .*class", layout)


def test_a_class_id_of_many_digits_in_a_name_is_refused(tmp_path):
    (tmp_path / f"x_{'9' * 200}.png").touch()
    assert_refused(tmp_path, "class id from 0 and below 16777216, got 200 characters")


MAPS = {
    "a number": 0.5,
    "None": None,
    "words": [["0.5"]],
    "a vector": np.zeros(3),
    "three axes": np.zeros((1, 2, 2)),
    "no pixels": np.zeros((0, 3)),
    "ragged": [[0.0], [0.0, 1.0]],
    "complex": np.zeros((2, 2), complex),
    "a complex tensor": torch.zeros(2, 2, dtype=torch.complex64),
    "objects": np.array([[{}]]),
}


@pytest.mark.parametrize("values", MAPS.values(), ids=list(MAPS))
def test_what_is_no_map_is_refused(tmp_path, values):
    np.save(tmp_path / "x.npy", {0: values}, allow_pickle=True)
    assert_refused(tmp_path, r"x\.npy cannot be read", "psa")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_breaks_off_is_refused_wherever_it_does(tmp_path, layout):
    path = tmp_path / f"x{'_0' if layout == 'oaa' else ''}{interop.ENDINGS[layout]}"
    if layout == "oaa":
        Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(path)
    else:
        write_file(path, layout, np.random.default_rng(0).random((2, 3, 4)).astype(np.float32))
    whole = path.read_bytes()
    for length in range(0, len(whole) - (4 if layout == "oaa" else 1), 3):  # a PNG may lack its very last checksum
        path.write_bytes(whole[:length])
        assert_refused(tmp_path, f"{path.name} cannot be read", layout)


def test_a_png_with_a_flipped_bit_is_refused_or_the_same(tmp_path):
    path, draw = tmp_path / "x_0.png", random.Random(0)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8)).save(path)
    whole, expected, refused = path.read_bytes(), read_one(tmp_path).attention, 0
    for place in range(8 * len(whole)):
        if draw.random() < 0.5:
            continue
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with suppress(ValueError):
            refused += 1
            assert torch.equal(read_one(tmp_path).attention, expected)
            refused -= 1
    assert refused > 3 * len(whole)


@pytest.mark.parametrize("form", ["BMP", "JPEG", "GIF", "TIFF", "PPM", "EPS"])
def test_a_png_is_a_png(tmp_path, form, monkeypatch):
    """A PostScript file of that name would start Ghostscript."""
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: started.append(True) or Image.new("L", (2, 2)).im)
    Image.new("L", (2, 2)).save(tmp_path / "x_0.png", format=form)
    assert_refused(tmp_path, "x_0.png cannot be read")
    assert not started


def png_of(width, height):
    """A small file that claims so many pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9000, 9800, 60000, 2**31 - 1])
@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, side, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (tmp_path / "x_0.png").write_bytes(png_of(side, side))
    assert_refused(tmp_path, "x_0.png cannot be read .*pixels")


def test_a_png_of_gigabytes_is_refused_unread(tmp_path):
    with open(tmp_path / "x_0.png", "wb") as file:
        file.write(png_of(2, 2))
        file.truncate(2**40)  # sparse
    assert_refused(tmp_path, "expected up to 268435456 bytes, got 1099511627776")


def test_an_array_that_claims_to_be_large_is_refused_unread(tmp_path):
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    assert_refused(tmp_path, "expected a dictionary, got float64", "psa")


@pytest.mark.parametrize("content", ["a zip", "text", "nothing", "a plain pickle"])
@pytest.mark.parametrize("layout", ["irn", "psa"])
def test_npy_files_of_another_form_are_refused(tmp_path, content, layout):
    path = tmp_path / "x.npy"
    if content == "a zip":
        with open(path, "wb") as file:
            np.savez(file, a=np.zeros(3))
    else:
        path.write_bytes({"text": b"0.5 0.5\n", "nothing": b"", "a plain pickle": pickle.dumps({0: 1})}[content])
    assert_refused(tmp_path, r"x\.npy cannot be read", layout)


class Missing:
    """Of a class that the reader's program does not have."""

    def __reduce__(self):
        return (getattr, ("numpy", "of_a_later_version"))


def test_a_pickle_that_cannot_be_made_again_here_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", {0: Missing()})
    assert_refused(tmp_path, r"x\.npy cannot be read .*of_a_later_version", "psa")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to nothing", "an endless device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, layout, kind):
    path = tmp_path / f"x{'_0' if layout == 'oaa' else ''}{interop.ENDINGS[layout]}"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "an endless device" else tmp_path / "nothing")
    assert_refused(tmp_path, "cannot be read: it is no file", layout)


# Names and sizes of a folder to write


@pytest.mark.parametrize(
    "name", ["", "..", "../b", "/b", "b/../../c", "b\\c", ".b", "b\nc", "b" * 250, "\u00e4" * 125], ids=repr
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_name_that_leads_elsewhere_is_refused_and_nothing_written(tmp_path, name, layout):
    with pytest.raises(ValueError, match="expected names that can be those of files, got"):
        interop.write_maps(filled(("a", name, "c", "d")), tmp_path / "out", layout=layout)
    assert not list(tmp_path.iterdir())


def test_a_name_as_long_as_a_file_can_have_it_is_written(tmp_path):
    name = "b" * (255 - len("_2.safetensors"))
    interop.write_maps(filled(("a", name, "c", "d")), tmp_path, layout="safetensors")
    assert name in interop.read_maps(tmp_path, layout="safetensors")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"], ids=repr)
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(ValueError, match="expected names that can be those of files"):
        check_name(name, "oaa", 2)


GOOD = {"a": (3, 3), "b_1": (3, 3), "d": (3, 3)}


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (GOOD | {"d": (0, 3)}, ValueError, "sizes of 'd' >= 1, got 0"),
        (GOOD | {"d": (3, -1)}, ValueError, "sizes of 'd' >= 1, got -1"),
        (GOOD | {"d": (3, 10**9)}, ValueError, "sizes of 'd' <= 32768, got 1000000000"),
        (GOOD | {"d": (3, 2.5)}, TypeError, "sizes of 'd' as an integer, got float"),
        (GOOD | {"d": 3}, TypeError, r"sizes of 'd' as \(height, width\), got 3"),
        (GOOD | {"d": (3, 3, 3)}, ValueError, r"sizes of 'd' as \(height, width\), got \(3, 3, 3\)"),
        ({"a": (3, 3), "b_1": (3, 3)}, KeyError, "sizes of all 3 images, got none of 'd'"),
        ((3, 3), TypeError, "sizes as a mapping.*got tuple"),
    ],
)
def test_sizes_are_checked_before_anything_is_written(tmp_path, sizes, error, message):
    with pytest.raises(error, match=message):
        interop.write_maps(filled(), tmp_path / "out", sizes=sizes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["irn", "psa"])
def test_a_resize_leads_no_map_out_of_zero_to_one(tmp_path, layout):
    accumulator = AttentionAccumulator([[1]], (1, 1), gate=None).update([0], torch.ones(1, 1, 1, 1))
    interop.write_maps(accumulator, tmp_path, layout=layout, sizes={"0": (17, 29)})
    content = np.load(tmp_path / "0.npy", allow_pickle=True).item()
    assert content["high_res" if layout == "irn" else 0].max() == 1


@pytest.mark.parametrize("folder", [None, 3, b"x", "a\0b"], ids=repr)
def test_a_folder_is_a_path(folder):
    with pytest.raises(TypeError, match="expected folder as a path"):
        interop.read_maps(folder)
    with pytest.raises(TypeError, match="expected folder as a path"):
        interop.write_maps(filled(), folder)


def test_a_folder_that_is_a_file_holds_no_maps(tmp_path):
    (tmp_path / "a_0.png").touch()
    with pytest.raises(FileNotFoundError, match="found none"):
        interop.read_maps(tmp_path / "a_0.png")


# Maps to take in

ONE, TWO = torch.ones(1, 2, 2), torch.ones(2, 2, 2)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        ((torch.tensor([-1]), ONE), ValueError, "a: expected classes below 3, got -1"),
        ((torch.tensor([0, 0]), TWO), ValueError, "a: expected classes .*none of them twice"),
        ((torch.tensor([0]), TWO), ValueError, "a: expected classes"),
        ((torch.tensor([True]), ONE), ValueError, "a: expected classes"),
        ((torch.tensor([0.0]), ONE), TypeError, "classes of 'a' as an integer tensor, got torch.float32"),
        (([0], ONE), TypeError, "classes of 'a' as an integer tensor, got list"),
        ((torch.tensor([0]), ONE.byte()), ValueError, r"attention of 'a' \(K, h, w\) floating point, got.*uint8"),
        ((torch.tensor([0]), ONE[0]), ValueError, "attention of 'a'"),
        ((torch.tensor([0]), ONE.numpy()), TypeError, "attention of 'a' as a tensor"),
        ((torch.tensor([0]), ONE * 2), ValueError, r"attention of 'a' in \[0, 1\]"),
        ((torch.tensor([0, 1]), torch.stack([ONE[0], -ONE[0]])), ValueError, r"attention of 'a' in \[0, 1\]"),
        ((torch.tensor([0]), ONE * torch.nan), ValueError, r"attention of 'a' in \[0, 1\], got \[nan"),
        ((torch.tensor([0]), ONE * torch.inf), ValueError, r"attention of 'a' in \[0, 1\], got \[inf"),
        (ONE, TypeError, "maps of 'a' as ImageMaps"),
        (None, TypeError, "maps of 'a' as ImageMaps"),
    ],
)
def test_maps_of_another_kind_are_refused_and_the_gate_stays(found, error, message):
    accumulator = AttentionAccumulator(LABELS, (5, 7), keys=["a", "b", "c", "d"])
    gate = accumulator.gate
    with pytest.raises(error, match=message):
        interop.load_into(accumulator, {"a": found})
    assert accumulator.gate is gate is not None
    assert not accumulator.accumulated.any()


def test_arguments_of_another_kind_are_named(tmp_path):
    with pytest.raises(TypeError, match="expected accumulator as an AttentionAccumulator, got int"):
        interop.load_into(1, {})
    with pytest.raises(TypeError, match="expected accumulator as an AttentionAccumulator, got list"):
        interop.write_maps([], tmp_path / "out")
    with pytest.raises(TypeError, match=r"expected maps as a mapping.*got list"):
        interop.load_into(filled(), [])
    with pytest.raises(ValueError, match="expected layout"):
        interop.read_maps(tmp_path, layout=None)
    with pytest.raises(ValueError, match="expected layout"):
        interop.read_maps(tmp_path, layout=["oaa"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fusion", ["max", "mean", "latest"])
def test_classes_without_a_file_stay_as_they_are(fusion):
    accumulator = AttentionAccumulator([[1, 1], [1, 1]], (2, 2), fusion=fusion)
    gate = accumulator.gate
    interop.load_into(accumulator, {"0": interop.ImageMaps(torch.tensor([0, 1]), torch.ones(2, 2, 2))})
    for name in ("0", "1"):
        interop.load_into(accumulator, {name: interop.ImageMaps(torch.tensor([1]), torch.full((1, 2, 2), 0.25))})
    assert accumulator.counts.tolist() == [[1, 2], [0, 1]]
    assert accumulator.attention(0)[0].eq(1).all()
    assert accumulator.statistics().never_accumulated.tolist() == [1, 0]
    assert accumulator.gate is gate
