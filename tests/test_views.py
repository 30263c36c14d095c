"""Views by a slow loop over pixels, the laws of their composition, and what is refused."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as nnf
from torch.utils.data import default_collate

from oaa_lib.views import View, check_views, flips_only, into_image, into_view, mirror, sample

WHOLE = View()
UPPER_RIGHT = View(0.5, 0.0, 1.0, 0.5)
CORNERS = {
    "whole": WHOLE,
    "flipped": View(flip=True),
    "upper right": UPPER_RIGHT,
    "upper right, flipped": UPPER_RIGHT.hflip(),
    "padded": View(-0.25, -0.5, 1.25, 1.125),
    "partly outside, flipped": View(-0.3, 0.4, 0.6, 1.7, True),
    "one pixel": View(0.41, 0.4, 0.42, 0.41),
    "outside": View(1.5, 0.0, 2.0, 1.0),
}

numbers = st.integers(-8, 24).map(lambda step: step / 16)  # exact, and often on an edge
lengths = st.integers(1, 24).map(lambda step: step / 16)
views = st.builds(
    lambda left, top, width, height, flip: View(left, top, left + width, top + height, flip),
    numbers,
    numbers,
    lengths,
    lengths,
    st.booleans(),
)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def random_maps(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(seed))


# The reference: one pixel at a time


def bilinear(pixels: Tensor, x: float, y: float) -> float:
    """The value at a place in [0, 1] x [0, 1]; beyond the outermost centres the outermost value."""
    height, width = pixels.shape
    across = min(max(x * width - 0.5, 0), width - 1)
    down = min(max(y * height - 0.5, 0), height - 1)
    left, upper = int(across), int(down)
    right, lower = min(left + 1, width - 1), min(upper + 1, height - 1)
    to_right, to_lower = across - left, down - upper
    above = pixels[upper, left].item() * (1 - to_right) + pixels[upper, right].item() * to_right
    below = pixels[lower, left].item() * (1 - to_right) + pixels[lower, right].item() * to_right
    return above * (1 - to_lower) + below * to_lower


def slowly(pixels: Tensor, view: View, size: tuple[int, int], *, into: str) -> tuple[Tensor, Tensor]:
    """`sample` of one map (h, w): values (H, W), and where they are inside."""
    values, inside = torch.zeros(size), torch.zeros(size, dtype=torch.bool)
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = (column + 0.5) / size[1], (row + 0.5) / size[0]
            if into == "image":
                x, y = (x - view.left) / (view.right - view.left), (y - view.top) / (view.bottom - view.top)
                x = 1 - x if view.flip else x
            else:
                x = 1 - x if view.flip else x
                x, y = view.left + x * (view.right - view.left), view.top + y * (view.bottom - view.top)
            if 0 <= x <= 1 and 0 <= y <= 1:
                values[row, column], inside[row, column] = bilinear(pixels, x, y), True
    return values, inside


INTO = {"image": into_image, "view": into_view}


def quickly(maps: Tensor, views: list[View], size: tuple[int, int], *, into: str) -> tuple[Tensor, Tensor]:
    return sample(maps, INTO[into](check_views(views, len(views)), size))


def assert_as_the_loop(maps: Tensor, views: list[View], size: tuple[int, int], into: str) -> None:
    values, inside = quickly(maps, views, size, into=into)
    assert values.shape == inside.shape == (len(maps), *size)
    assert (values.dtype, inside.dtype) == (maps.dtype, torch.bool)
    for index, view in enumerate(views):
        expected, expected_inside = slowly(maps[index], view, size, into=into)
        assert torch.equal(inside[index], expected_inside)
        torch.testing.assert_close(values[index], expected, atol=2e-5, rtol=0)
    assert (values[~inside] == 0).all()


@pytest.mark.parametrize("into", list(INTO))
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (10, 14), (16, 3)], ids=str)
def test_each_pixel_of_known_views(into, size):
    assert_as_the_loop(random_maps(len(CORNERS), (5, 7)), list(CORNERS.values()), size, into)


@pytest.mark.parametrize("into", list(INTO))
@given(st.lists(views, min_size=1, max_size=3), sizes, sizes, st.integers(0, 99))
def test_each_pixel_of_any_views(into, drawn, size, new_size, seed):
    assert_as_the_loop(random_maps(len(drawn), size, seed), drawn, new_size, into)


@pytest.mark.parametrize("into", list(INTO))
@given(sizes, sizes)
def test_the_whole_image_is_a_resize(into, size, new_size):
    maps = random_maps(2, size)
    values, inside = quickly(maps, [WHOLE, WHOLE], new_size, into=into)
    assert inside.all()
    expected = nnf.interpolate(maps[None], new_size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(values, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("into", list(INTO))
@given(sizes, views)
def test_a_flip_is_a_flip_of_the_map(into, size, view):
    maps = random_maps(1, size)
    flipped, inside = quickly(maps.flip(2), [view.hflip()], (6, 5), into=into)
    straight, expected_inside = quickly(maps, [view], (6, 5), into=into)
    if into == "view":  # the frame is mirrored instead of the map
        flipped, inside = quickly(maps, [view.hflip()], (6, 5), into=into)
        flipped, inside = flipped.flip(2), inside.flip(2)
    torch.testing.assert_close(flipped, straight, atol=2e-5, rtol=0)
    assert torch.equal(inside, expected_inside)


@given(views, st.data())
def test_whole_pixels_there_and_back(view, data):
    """A frame whose pixels are pixels of the image is cut out and put back exactly."""
    image = random_maps(1, (16, 16)) + 1
    top, left = data.draw(st.integers(0, 15)), data.draw(st.integers(0, 15))
    size = data.draw(st.integers(1, 16 - top)), data.draw(st.integers(1, 16 - left))
    view = WHOLE.crop(top, left, *size, size=(16, 16))._replace(flip=view.flip)
    there = (slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
    crop, inside = quickly(image, [view], size, into="view")
    assert inside.all()
    torch.testing.assert_close(crop, image[there].flip(2) if view.flip else image[there], atol=1e-5, rtol=0)
    back, inside = quickly(crop, [view], (16, 16), into="image")
    torch.testing.assert_close(back[there], image[there], atol=2e-5, rtol=0)
    assert inside[there].all()
    assert inside.sum() == size[0] * size[1]


@pytest.mark.parametrize("into", list(INTO))
def test_no_maps_and_single_pixels(into):
    values, inside = sample(torch.zeros(0, 3, 4), INTO[into](np.zeros((0, 5)), (5, 6)))
    assert values.shape == inside.shape == (0, 5, 6)
    values, inside = quickly(torch.full((1, 1, 1), 0.25), [UPPER_RIGHT], (4, 4), into=into)
    assert torch.equal(values, inside * 0.25)


def test_half_a_pixel_matters():
    """The right half of two pixels in a frame of the image, and in one as large as the crop."""
    values, inside = quickly(torch.tensor([[[1.0, 2.0]]]), [View(0.5, 0.0, 1.0, 1.0)], (1, 4), into="image")
    assert values.tolist() == [[[0.0, 0.0, 1.0, 2.0]]]
    assert inside.tolist() == [[[False, False, True, True]]]
    values, _ = quickly(torch.tensor([[[1.0, 2.0]]]), [View(0.5, 0.0, 1.0, 1.0)], (1, 2), into="view")
    assert values.tolist() == [[[1.75, 2.0]]]  # centres 0.625 and 0.875 of the image, which are 0.75 and 1.25 pixels in
    values, inside = quickly(torch.tensor([[[1.0, 2.0]]]), [View(-0.5, 0.0, 0.5, 1.0, True)], (1, 2), into="image")
    assert inside.tolist() == [[[True, False]]]
    assert values.tolist() == [[[1.0, 0.0]]]  # the padding was on the left, the flip has put it on the right


# Short cuts


@given(st.lists(st.one_of(views, st.sampled_from([WHOLE, WHOLE.hflip()])), min_size=1, max_size=3))
def test_flips_only(drawn):
    assert flips_only(check_views(drawn, len(drawn))) == all(view.hflip() == WHOLE or view == WHOLE for view in drawn)


@given(st.lists(st.booleans(), min_size=1, max_size=4), sizes)
def test_mirrored_maps_are_what_sampling_gives(flips, size):
    maps = random_maps(len(flips), size)
    before = maps.clone()
    boxes = check_views([View(flip=flip) for flip in flips], len(flips))
    mirrored = mirror(maps, boxes)
    assert torch.equal(mirrored, torch.stack([m.flip(-1) if flip else m for m, flip in zip(maps, flips, strict=True)]))
    assert torch.equal(maps, before)
    for into in (into_image, into_view):
        torch.testing.assert_close(sample(maps, into(boxes, size))[0], mirrored, atol=5e-6, rtol=0)


@pytest.mark.parametrize("into", list(INTO))
@given(st.lists(views, min_size=1, max_size=3), sizes)
def test_covers_means_that_all_is_inside(into, drawn, size):
    sampling = INTO[into](check_views(drawn, len(drawn)), size)
    assert sampling.covers() == bool(sample(random_maps(len(drawn), (3, 4)), sampling)[1].all())


# What a View says after crops, paddings and flips: the frame's pixels are from where they were before

frames = st.tuples(st.integers(1, 64), st.integers(1, 64))
edges = st.integers(-20, 60)


def place(view: View, row: int, column: int, frame: tuple[int, int]) -> tuple[float, float]:
    """(x, y) in the image of a pixel of a frame of the view; beyond its edges too."""
    x, y = (column + 0.5) / frame[1], (row + 0.5) / frame[0]
    x = 1 - x if view.flip else x
    return view.left + x * (view.right - view.left), view.top + y * (view.bottom - view.top)


def assert_same_places(
    view: View, frame: tuple[int, int], before: View, first: tuple[int, int], step: int, old: tuple[int, int]
) -> None:
    """Pixel (i, j) of one frame is where (first row + i, first column + step * j) of the other was."""
    for i, j in ((0, 0), (frame[0] - 1, frame[1] - 1), (frame[0] // 2, frame[1] // 3)):
        expected = place(before, first[0] + i, first[1] + step * j, old)
        assert place(view, i, j, frame) == pytest.approx(expected, abs=1e-9)


@given(views, frames, edges, edges, frames)
def test_a_crop_shows_these_pixels(view, frame, top, left, size):
    assert_same_places(view.crop(top, left, *size, size=frame), size, view, (top, left), 1, frame)


@given(views, frames, *[st.integers(0, 20)] * 4)
def test_padding_adds_pixels_around(view, frame, left, top, right, bottom):
    padded = frame[0] + top + bottom, frame[1] + left + right
    assert_same_places(view.pad(left, top, right, bottom, size=frame), padded, view, (-top, -left), 1, frame)


@given(views, frames)
def test_a_flip_shows_the_columns_from_the_right(view, frame):
    assert_same_places(view.hflip(), frame, view, (0, frame[1] - 1), -1, frame)


@given(views, frames, st.integers(1, 30))
def test_laws_of_composition(view, frame, by):
    assert view.hflip().hflip() == view
    assert view.pad(0, 0, 0, 0, size=frame) == view.crop(0, 0, *frame, size=frame) == pytest.approx(view)
    there = view.pad(by, 2, 3, by, size=frame)
    back = there.crop(2, by, *frame, size=(frame[0] + 2 + by, frame[1] + 3 + by))
    assert back == pytest.approx(view)


@given(views, frames, edges, edges, frames, edges, edges, frames)
def test_a_crop_of_a_crop_is_one_crop(view, frame, top, left, size, more_top, more_left, smaller):
    twice = view.crop(top, left, *size, size=frame).crop(more_top, more_left, *smaller, size=size)
    assert twice == pytest.approx(view.crop(top + more_top, left + more_left, *smaller, size=frame), abs=1e-9)


@given(views, frames, edges, edges, frames)
def test_a_crop_of_a_flip_is_a_flip_of_the_other_crop(view, frame, top, left, size):
    mirrored = view.crop(top, frame[1] - left - size[1], *size, size=frame).hflip()
    assert view.hflip().crop(top, left, *size, size=frame) == pytest.approx(mirrored, abs=1e-9)


@given(views, frames, edges, edges, frames, st.integers(2, 5))
def test_the_resolution_does_not_matter(view, frame, top, left, size, by):
    finer = view.crop(by * top, by * left, by * size[0], by * size[1], size=(by * frame[0], by * frame[1]))
    assert finer == pytest.approx(view.crop(top, left, *size, size=frame), abs=1e-9)


# What check_views takes

TWO = [View(0.25, 0.0, 1.0, 0.5, True), View(-0.5, 0.25, 0.75, 1.5)]
ROWS = [[0.25, 0.0, 1.0, 0.5, 1.0], [-0.5, 0.25, 0.75, 1.5, 0.0]]
FORMS = {
    "views": TWO,
    "a tuple of views": tuple(TWO),
    "plain tuples": [tuple(view) for view in TWO],
    "lists": ROWS,
    "numbers of numpy": [View(*(np.float64(value) for value in view)) for view in TWO],
    "array": np.array(ROWS),
    "array of float32": np.array(ROWS, np.float32),
    "tensor": torch.tensor(ROWS),
    "tensor that requires a gradient": torch.tensor(ROWS, requires_grad=True),
    "rows of a tensor": list(torch.tensor(ROWS)),
    "collated": default_collate(TWO),
    "collated from arrays": View(*np.array(ROWS).T),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_forms_of_views(form):
    boxes = check_views(form, 2)
    assert boxes.dtype == np.float64
    assert boxes.tolist() == ROWS


def test_a_data_loader_makes_one_view_of_five_tensors():
    collated = default_collate(TWO)
    assert isinstance(collated, View)
    assert [column.shape for column in collated] == [(2,)] * 5
    assert collated.left.dtype == torch.float64  # nothing is rounded on the way
    for batch in (1, 2, 5):  # five views are no five columns
        drawn = [View(0.1 * i, 0.2, 0.9, 0.3 + 0.1 * i, i % 2 == 0) for i in range(batch)]
        assert np.array_equal(check_views(default_collate(drawn), batch), check_views(drawn, batch))


@given(st.lists(views, min_size=1, max_size=5))
def test_checked_views_are_the_views(drawn):
    assert [View(*row) for row in check_views(drawn, len(drawn))] == drawn


def changed(**values: object) -> list[View]:
    return [TWO[0], TWO[1]._replace(**values)]


NAN, INF = float("nan"), float("inf")
BAD = {
    "one view alone": (WHOLE, TypeError, "one View per image, got View alone; pass a list"),
    "None": (None, TypeError, "one View per image, got NoneType"),
    "a number": (1.0, TypeError, "one View per image, got float"),
    "a set": (set(TWO), TypeError, "one View per image, got set"),
    "a generator": ((view for view in TWO), TypeError, "one View per image, got generator"),
    "a string": ("ab", TypeError, r"View\(left, top, right, bottom, flip\), got 'ab'"),
    "strings": (["a", "b"], TypeError, r"View\(left, top, right, bottom, flip\), got \['a', 'b'\]"),
    "numbers": ([0.0, 1.0], TypeError, r"View\(left, top, right, bottom, flip\), got \[0.0"),
    "Nones": ([None, None], TypeError, r"View\(left, top, right, bottom, flip\), got \[None"),
    "rows of different length": ([TWO[0], (0, 0, 1, 1)], TypeError, r"View\(left"),
    "too few": ([WHOLE], ValueError, r"for each of the 2 images, got \(1, 5\)"),
    "too many": ([WHOLE] * 3, ValueError, r"for each of the 2 images, got \(3, 5\)"),
    "none at all": ([], ValueError, r"for each of the 2 images, got \(0"),
    "boxes without flip": ([(0, 0, 1, 1)] * 2, ValueError, r"for each of the 2 images, got \(2, 4\)"),
    "an array of boxes": (np.zeros((2, 4)), ValueError, r"for each of the 2 images, got \(2, 4\)"),
    "one row": (np.array(ROWS[0]), ValueError, r"for each of the 2 images, got \(5,\)"),
    "a tensor of columns": (torch.tensor(ROWS).T, ValueError, r"for each of the 2 images, got \(5, 2\)"),
    "collated from three": (default_collate([WHOLE] * 3), ValueError, r"for each of the 2 images, got \(3,\)"),
    "one view of tensors": (View(*torch.tensor(ROWS[0])), ValueError, r"for each of the 2 images, got \(\)"),
    "a short column": (View(*torch.zeros(4, 2), torch.zeros(1)), ValueError, "for each of the 2 images, got"),
    "NaN": (changed(left=NAN), ValueError, "finite views.*nan"),
    "infinite": (changed(bottom=INF), ValueError, "finite views.*inf"),
    "left is right": (changed(right=-0.5), ValueError, "left < right.*got"),
    "left after right": (changed(right=-0.75), ValueError, "left < right.*got"),
    "top is bottom": (changed(bottom=0.25), ValueError, "top < bottom.*got"),
    "top below bottom": (changed(top=2.0), ValueError, "top < bottom.*got"),
    "half a flip": (changed(flip=0.5), ValueError, "flip 0 or 1.*got"),
    "flip 2": (torch.tensor(ROWS) * 2, ValueError, "flip 0 or 1.*got"),
    "flip NaN": (changed(flip=NAN), ValueError, "finite views.*nan"),
    "far away": (changed(bottom=1e300), ValueError, "finite views.*1e\\+300"),
    "thinner than rounding": (changed(left=0.5, right=0.5 + 1e-12), ValueError, "left < right.*got"),
    "subnormal": (changed(left=0.0, right=1e-320), ValueError, "left < right.*got"),
}


@pytest.mark.parametrize(("views", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_views_are_refused(views, error, message):
    with pytest.raises(error) as raised:
        check_views(views, 2)
    assert re.search(f"expected.*{message}", str(raised.value)), raised.value


CROPS = {
    "a size of 0": (lambda: WHOLE.crop(0, 0, 1, 1, size=(0, 4)), ValueError, "size >= 1, got 0"),
    "one side": (lambda: WHOLE.crop(0, 0, 1, 1, size=4), TypeError, r"size as \(height, width\), got 4"),
    "three sides": (lambda: WHOLE.crop(0, 0, 1, 1, size=(4, 4, 4)), ValueError, r"size as \(height, width\), got"),
    "half a pixel of size": (lambda: WHOLE.crop(0, 0, 1, 1, size=(4.5, 4)), TypeError, "size as an integer, got float"),
    "no height": (lambda: WHOLE.crop(0, 0, 0, 1, size=(4, 4)), ValueError, "height in.*got 0"),
    "a negative width": (lambda: WHOLE.crop(0, 0, 1, -1, size=(4, 4)), ValueError, "width in.*got -1"),
    "a top that is NaN": (lambda: WHOLE.crop(NAN, 0, 1, 1, size=(4, 4)), ValueError, "top in.*got nan"),
    "a left in words": (lambda: WHOLE.crop(0, "left", 1, 1, size=(4, 4)), TypeError, "left as a number.*got str"),
    "padding in words": (lambda: WHOLE.pad(0, 0, "1", 0, size=(4, 4)), TypeError, "right as a number.*got str"),
    "padding without a frame": (
        lambda: WHOLE.pad(0, 0, 1, 0, size=None),
        TypeError,
        r"size as \(height, width\), got None",
    ),
    "padding away": (lambda: WHOLE.pad(-2, 0, -2, 0, size=(4, 4)), ValueError, "width in.*got 0"),
    "a crop of a batch": (lambda: default_collate(TWO).crop(0, 0, 1, 1, size=(4, 4)), TypeError, "one View"),
    "a flip of a batch": (lambda: default_collate(TWO).hflip(), TypeError, "one View, got those of a batch"),
}


@pytest.mark.parametrize(("call", "error", "message"), CROPS.values(), ids=list(CROPS))
def test_what_no_crop_can_be_is_refused(call, error, message):
    with pytest.raises(error, match=f"expected {message}"):
        call()


@pytest.mark.parametrize("far", [1e9, -1e9])
def test_views_as_far_as_they_may_be_do_not_overflow(far):
    boxes = check_views([View(min(0, far), min(0, far), max(1, far), max(1, far)), View(far / 2, 0, far / 2 + 1, 1)], 2)
    with np.errstate(all="raise"):
        for into in INTO.values():
            values, _ = sample(random_maps(2, (3, 4)), into(boxes, (5, 5)))
            assert values.isfinite().all()


CUDA = {
    "tensor": lambda: torch.empty(2, 5, device="cuda"),
    "collated": lambda: View(*(torch.empty(2, device="cuda") for _ in range(5))),
    "one column": lambda: View(*np.zeros((4, 2)), torch.empty(2, device="cuda")),
    "list of tensors": lambda: list(torch.empty(2, 5, device="cuda")),
    "views of tensors": lambda: [View(*torch.empty(5, device="cuda"))] * 2,
}


@pytest.mark.parametrize(
    "views",
    [pytest.param(views, id=name) for name, views in CUDA.items()],
)
def test_views_on_a_device_are_refused_before_they_are_read(views):
    with FakeTensorMode(), pytest.raises(ValueError, match=r"expected views on the host, got a tensor on cuda"):
        check_views(views(), 2)


@pytest.mark.parametrize("into", list(INTO))
@pytest.mark.parametrize("form", ["views", "tensor", "collated"])
def test_maps_on_a_device_never_make_it_wait(form, into):
    with FakeTensorMode():
        maps = torch.empty(2, 5, 6, device="cuda")
        boxes = check_views(FORMS[form], 2)
        values, inside = sample(maps, INTO[into](boxes, (4, 3)))
        assert mirror(maps, boxes).device.type == "cuda"
    assert (values.device.type, values.shape, values.dtype) == ("cuda", (2, 4, 3), torch.float32)
    assert (inside.device.type, inside.shape, inside.dtype) == ("cuda", (2, 4, 3), torch.bool)


def test_nothing_is_changed():
    rows, maps = np.array(ROWS), random_maps(2, (3, 4))
    again = maps.clone()
    quickly(maps, TWO, (5, 5), into="image")
    assert check_views(rows, 2).tolist() == rows.tolist() == ROWS
    assert torch.equal(maps, again)


@pytest.mark.parametrize("flip", [False, True])
def test_a_pixel_centre_on_the_very_edge_is_inside_however_it_is_rounded(flip):
    """1/6 and 5/6 of 9/8 are 3/16 and 15/16: the first and the last column of three lie on the image's edges."""
    for view, column in ((View(-0.1875, 0, 0.9375, 1, flip), 0), (View(0.0625, 0, 1.1875, 1, flip), 2)):
        _, inside = quickly(torch.ones(1, 3, 3), [view], (3, 3), into="view")
        assert inside[0, 0, 2 - column if flip else column]
        assert inside.all()
