import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from oaa_lib import AttentionAccumulator, Snapshots
from oaa_lib.plotting import Overlay, contact_sheet, evolution, overlay, voc_palette

PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def drawn(figure):
    """What the axes of a figure show, and their titles."""
    return [(axis.get_title(), np.asarray(axis.images[0].get_array())) for axis in figure.axes if axis.images]


@pytest.mark.parametrize(
    "image",
    [
        PHOTOGRAPH,
        PHOTOGRAPH.transpose(2, 0, 1),
        torch.tensor(PHOTOGRAPH).permute(2, 0, 1),
        torch.tensor(PHOTOGRAPH).permute(2, 0, 1) / 255,
        Image.fromarray(PHOTOGRAPH),
    ],
    ids=["array", "channels first", "tensor", "floating point", "pillow"],
)
def test_every_form_of_a_photograph_is_shown_as_it_is(image):
    ((title, shown),) = drawn(overlay(image, torch.zeros(0, 6, 8)))
    assert title == "image"
    np.testing.assert_array_equal(shown, PHOTOGRAPH)


def test_attention_is_blended_in_even_colours_at_the_size_of_the_photograph():
    maps = torch.stack([torch.zeros(6, 8), torch.rand(6, 8)])
    shown = drawn(overlay(PHOTOGRAPH, maps, ["none", "some"], opacity=0.4))
    assert [title for title, _ in shown] == ["image", "none", "some"]
    for (_, picture), values in zip(shown[1:], maps, strict=True):
        heat = colormaps["inferno"](values.numpy())[..., :3] * 255
        np.testing.assert_allclose(picture, 0.6 * PHOTOGRAPH + 0.4 * heat, atol=0.51)
    small = torch.tensor([[0.0, 1.0]])
    large = torch.nn.functional.interpolate(small[None, None], (6, 8), mode="bilinear")[0, 0]
    np.testing.assert_array_equal(
        drawn(overlay(PHOTOGRAPH, small))[1][1], drawn(overlay(PHOTOGRAPH, large.numpy()))[1][1]
    )


def test_the_colours_are_even():
    """Lightness rises all the way: more attention never looks like less."""
    ramp = colormaps["inferno"](np.linspace(0, 1, 256))[:, :3]
    linear = np.where(ramp <= 0.04045, ramp / 12.92, ((ramp + 0.055) / 1.055) ** 2.4)
    assert (np.diff(linear @ [0.2126, 0.7152, 0.0722]) > 0).all()


def test_a_sheet_has_pictures_overlays_labels_and_gaps_in_their_places():
    label = torch.tensor([[0, 1], [255, 20]])
    rows = [[PHOTOGRAPH, Overlay(PHOTOGRAPH, np.ones((2, 2)), 1.0), label], [PHOTOGRAPH, None, label]]
    figure = contact_sheet(rows, ["image", "OAA", "truth"], ["cat", "dog"])
    shown = drawn(figure)
    assert [title for title, _ in shown] == ["image", "OAA", "truth", "", ""]
    assert {tuple(colour) for colour in shown[1][1].reshape(-1, 3)} == {(252, 255, 164)}  # inferno's end
    assert shown[2][1].tolist() == [[[0, 0, 0], [128, 0, 0]], [[255, 255, 255], [0, 64, 128]]]
    assert [axis.texts[0].get_text() for axis in figure.axes if axis.texts] == ["cat", "dog"]


def test_the_palette_is_that_of_voc_files():
    known = {1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {label: tuple(voc_palette()[label].tolist()) for label in known} == known


def test_evolution_shows_snapshots_first_and_last_among_them():
    accumulator = AttentionAccumulator([[1, 1]], (3, 4), gate=None)
    snapshots = Snapshots(accumulator, [0], range(100))
    for step in range(7):
        accumulator.update([0], torch.rand(1, 2, 3, 4))
        snapshots.take(10 * step)
    figure = evolution(PHOTOGRAPH, snapshots.cumulative(0), snapshots.taken, ["cat", "dog"], columns=3)
    shown = drawn(figure)
    assert [title for title, _ in shown] == ["image", "step 0", "step 30", "step 60", "", "", "", ""]
    final = drawn(overlay(PHOTOGRAPH, accumulator.attention(0)))
    np.testing.assert_array_equal(shown[3][1], final[1][1])
    np.testing.assert_array_equal(shown[7][1], final[2][1])
    assert len(drawn(evolution(PHOTOGRAPH, torch.rand(1, 1, 3, 4), [5]))) == 2


def test_figures_are_written_and_nothing_is_kept(tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    overlay(PHOTOGRAPH, torch.rand(6, 8)).savefig(tmp_path / "a.png")
    assert pyplot.get_fignums() == before
    with Image.open(tmp_path / "a.png") as image:
        assert len(np.unique(np.asarray(image))) > 10


def test_the_core_and_the_module_load_no_matplotlib():
    code = "import sys, oaa_lib, oaa_lib.plotting; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: overlay(PHOTOGRAPH[..., 0], torch.rand(6, 8)), r"photograph \(3, H, W\) or \(H, W, 3\)"),
        (lambda: overlay(PHOTOGRAPH / 100, torch.rand(6, 8)), "undo the normalisation first"),
        (lambda: overlay(PHOTOGRAPH, torch.full((6, 8), 2.0)), r"in \[0, 1\], got \[2, 2\]; call normalize_attention"),
        (lambda: overlay(PHOTOGRAPH, torch.full((6, 8), torch.nan)), r"got \[nan, nan\]"),
        (lambda: overlay(PHOTOGRAPH, torch.rand(6, 8), ["a", "b"]), "each of the 1 maps, got 2"),
        (lambda: overlay(PHOTOGRAPH, torch.rand(6, 8), opacity=2), r"opacity in \[0, 1\], got 2"),
        (lambda: overlay(PHOTOGRAPH, torch.rand(1, 2, 6, 8)), r"\(K, h, w\), got \(1, 2, 6, 8\)"),
        (lambda: contact_sheet([[Overlay(PHOTOGRAPH, torch.rand(2, 6, 8))]]), r"\(h, w\), got \(2, 6, 8\)"),
        (lambda: contact_sheet([]), "at least 1"),
        (lambda: contact_sheet([[None], [None, None]]), r"got lengths \[1, 2\]"),
        (lambda: contact_sheet([[None]], ["a", "b"]), "expected 1 titles, got 2"),
        (lambda: contact_sheet([[torch.full((2, 2), 300)]]), r"0\.\.255, got \[300, 300\]"),
        (lambda: evolution(PHOTOGRAPH, torch.rand(2, 1, 3, 4), [1]), r"\(2, 1, 3, 4\) and 1"),
        (lambda: evolution(PHOTOGRAPH, torch.rand(2, 1, 3, 4), [1, 2], columns=1), "columns >= 2"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
