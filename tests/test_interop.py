"""Other projects' files: round trips, dictionaries as those projects save them, and no pickle without consent."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from oaa_lib import AttentionAccumulator, interop

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
        (np.float64(3), "irn", "expected a dictionary, got float"),
        ([1, 2], "irn", "cannot be read"),
    ],
)
def test_dictionaries_of_another_form_are_told(tmp_path, content, layout, message):
    np.save(tmp_path / "x.npy", content)
    with pytest.raises(ValueError, match=message):
        _ = interop.read_maps(tmp_path, layout=layout, allow_pickle=True)["x"]


def test_a_name_without_a_class_and_a_colour_picture_are_told(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "x_0.png")
    with pytest.raises(ValueError, match="8-bit grey PNG, got mode RGB"):
        _ = interop.read_maps(tmp_path)["x"]
    Image.new("L", (2, 2)).save(tmp_path / "picture.png")
    with pytest.raises(ValueError, match=r"NAME_CLASS\.png .* got picture\.png"):
        interop.read_maps(tmp_path)


def test_an_unknown_name_is_told(tmp_path):
    interop.write_maps(filled(), tmp_path)
    with pytest.raises(KeyError, match="no maps of 'zebra'; there are those of 3 images"):
        _ = interop.read_maps(tmp_path)["zebra"]
