"""Crops, flips and sizes of their own: what `AttentionAccumulator` does with `views` and with a map size per image."""

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import FUSIONS, Batch, NaiveAccumulator, Stream, noisy_or, same, show, snapshot, some_view, streams
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.data import default_collate

import oaa_lib.fusion
from oaa_lib import AttentionAccumulator, View

STORAGE = (torch.uint8, torch.float16, torch.float32)
# Half of the last step that storage can tell apart, and a little for arithmetic in float32.
ROUNDING = {torch.uint8: 0.5 / 255 + 1e-5, torch.float16: 2**-12 + 1e-5, torch.float32: 1e-5}
LEFT, RIGHT, LOWER = View(right=0.5), View(left=0.5), View(top=0.5)
NOWHERE = {"beside the image": View(1.25, 0, 1.5, 1), "between two centres": View(0.45, 0.45, 0.55, 0.55)}
ALL_FUSIONS = [*oaa_lib.fusion.FUSIONS, pytest.param(noisy_or, id="user's")]


def built_in(fusion: str):
    return noisy_or if fusion == "noisy_or" else fusion


def everything(accumulator: AttentionAccumulator) -> list[Tensor]:
    """(K, H, W) of each image."""
    return [accumulator.attention(image) for image in range(len(accumulator)) if len(accumulator.classes(image))]


def assert_near(first: AttentionAccumulator, second: AttentionAccumulator, atol: float = 1e-5) -> None:
    """The same but for the maps, and these to a tolerance."""
    for values, expected in zip(everything(first), everything(second), strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=atol)
    states = [{**snapshot(accumulator), "maps": None} for accumulator in (first, second)]
    assert same(*states)


def assert_agrees(accumulator: AttentionAccumulator, naive: NaiveAccumulator) -> None:
    counts = naive.dense_counts()
    # Maximum commutes with rounding; any other fusion adds one rounding for each map it takes.
    roundings = 1 if naive.fusion == "max" else max(1, int(counts.max()))
    for image, target in zip(*np.nonzero(naive.labels), strict=True):
        place = accumulator.classes(image).tolist().index(target)
        torch.testing.assert_close(
            accumulator.attention(image)[place].double(),
            naive.attention(image)[target],
            rtol=0,
            atol=ROUNDING[accumulator.dtype] * roundings,
        )
    assert torch.equal(accumulator.counts.long(), counts)
    assert (accumulator.offered, accumulator.skipped) == (naive.offered, naive.skipped)


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Against the loops of tests/reference.py


@pytest.mark.parametrize("sizes", ["the score maps'", "another", "each"])
@pytest.mark.parametrize("fusion", FUSIONS)
@given(data=st.data(), dtype=st.sampled_from(STORAGE), gate=st.sampled_from(("score", "topk", None)))
def test_each_pixel_holds_what_the_views_have_shown_of_it(fusion, sizes, data, dtype, gate):
    stream = data.draw(streams(views=True, faults=True, fill_empty=True, sizes=sizes))
    naive = NaiveAccumulator(stream.labels, stream.size, fusion, gate)
    accumulator = stream.accumulator(fusion=built_in(fusion), gate=gate, dtype=dtype)
    for batch in stream.batches:
        naive.update(batch)
        batch.give_to(accumulator)
        assert_agrees(accumulator, naive)


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
@given(stream=streams(views=True, faults=True, sizes="another"))
def test_a_pixel_holds_what_an_accumulator_of_this_pixel_alone_would(fusion, stream):
    naive = NaiveAccumulator(stream.labels, stream.size, "max", None)
    accumulator = stream.accumulator(fusion=fusion, gate=None, dtype=torch.float32)
    for batch in stream.batches:
        naive.update(batch)
        batch.give_to(accumulator)
    for (image, target), history in naive.histories.items():
        alone = AttentionAccumulator(torch.ones(math.prod(stream.size), 1), (1, 1), fusion=fusion, dtype=torch.float32)
        for pixel, values in enumerate(itertools.chain(*history)):
            if values:
                maps = torch.tensor(values).view(-1, 1, 1, 1)
                alone.update([pixel] * len(values), maps, normalization=None)
        torch.testing.assert_close(
            accumulator.soft_labels([image])[0, target].flatten(), alone.soft_labels(range(len(alone))).flatten()
        )


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
@given(stream=streams(views=True, faults=True, sizes="another"), dtype=st.sampled_from(STORAGE))
def test_pixels_that_a_batch_does_not_show_stay_bit_equal(fusion, dtype, stream):
    accumulator = stream.accumulator(fusion=fusion, dtype=dtype, gate=None)
    for batch in stream.batches:
        before = accumulator[range(len(accumulator))]
        batch.give_to(accumulator)
        changed = accumulator[range(len(accumulator))] != before
        for image, view in zip(batch.indices, batch.views or [View()] * len(batch.indices), strict=True):
            shown = torch.tensor([[value is not None for value in row] for row in show([[0.0]], view, stream.size)])
            changed[image] &= ~shown
        assert not changed.any()


# The laws


def in_every_form(views: list[View]):
    """Views as `update` takes them: in lists, as an array, as data loaders collate them."""
    numbers = [[float(value) for value in view] for view in views]
    return {
        "list of views": views,
        "tuple of views": tuple(views),
        "list of tuples": [tuple(view) for view in views],
        "list of lists": numbers,
        "list of tensors": [View(*map(torch.tensor, view)) for view in views],
        "tensor": torch.tensor(numbers, dtype=torch.float64),
        "single precision": torch.tensor(numbers, dtype=torch.float32, requires_grad=True),
        "array": np.array(numbers),
        "collated": default_collate(views),
        "collated arrays": View(*(np.array(column) for column in zip(*views, strict=True))),
        "collated lists": View(*(list(column) for column in zip(*views, strict=True))),
    }


FORMS = list(in_every_form([View()]))


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
@given(stream=streams(faults=True, sizes="another"), dtype=st.sampled_from(STORAGE), form=st.sampled_from(FORMS))
def test_the_whole_image_as_a_view_is_no_view(fusion, dtype, form, stream):
    options = {"fusion": fusion, "dtype": dtype}
    without, within = stream.give_to(stream.accumulator(**options)), stream.accumulator(**options)
    for batch in stream.batches:
        views = in_every_form([View()] * len(batch.indices))[form]
        within.update(batch.indices, batch.score_maps, batch.logits, views)
        assert torch.equal(within.soft_labels(batch.indices, views), within[batch.indices])
    assert same(snapshot(within), snapshot(without))


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
@given(stream=streams(sizes="another"))
def test_the_whole_image_beside_a_crop_is_no_view_to_a_rounding(fusion, stream):
    labels = [*stream.labels, [1] * len(stream.labels[0])]  # one more image, which is always cropped
    options = {"fusion": fusion, "dtype": torch.float32, "gate": None}
    first, second = (AttentionAccumulator(labels, stream.size, **options) for _ in range(2))
    for batch in stream.batches:
        score_maps, views = torch.cat([batch.score_maps, batch.score_maps[:1]]), [View()] * len(batch.indices)
        first.update(batch.indices, batch.score_maps)
        first.update([len(stream.labels)], batch.score_maps[:1], views=[LEFT])
        second.update([*batch.indices, len(stream.labels)], score_maps, views=[*views, LEFT])
    assert_near(first, second)


def test_a_flip_and_a_flip_is_the_same_view():
    assert View().hflip() != View()
    assert View().hflip().hflip() == View()
    assert LEFT.hflip().hflip() == LEFT


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
@given(stream=streams(views=True, faults=True, sizes="another"), dtype=st.sampled_from(STORAGE))
def test_a_mirrored_map_in_a_flipped_view_is_the_map_in_the_view(fusion, dtype, stream):
    options = {"fusion": fusion, "dtype": dtype}
    straight, flipped = stream.accumulator(**options), stream.accumulator(**options)
    for batch in stream.batches:
        views = batch.views or [View()] * len(batch.indices)
        logits = batch.score_maps.mean((-2, -1)) if batch.logits is None else batch.logits
        straight.update(batch.indices, batch.score_maps, logits, views)
        flipped.update(batch.indices, batch.score_maps.flip(-1), logits, [view.hflip() for view in views])
        read = straight.soft_labels(batch.indices, views)
        read_flipped = straight.soft_labels(batch.indices, [view.hflip() for view in views]).flip(-1)
        torch.testing.assert_close(read_flipped, read, rtol=0, atol=1e-5)
    steps = 1 if fusion in ("max", "latest") else sum(len(batch.indices) for batch in stream.batches)
    assert_near(flipped, straight, atol=2 * steps * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("size", [(3, 4), (5, 2)])
def test_accumulating_and_reading_flipped_is_the_map_bit_for_bit(size, dtype):
    maps, views = random_maps(2, 1, 3, 4), [View(flip=True), View()]
    straight, flipped = (AttentionAccumulator([[1], [1]], size, dtype=dtype) for _ in range(2))
    straight.update([0, 1], maps)
    flipped.update([0, 1], maps.flip(-1), views=[View(flip=True)] * 2)
    assert same(snapshot(flipped), snapshot(straight))
    there = AttentionAccumulator([[1], [1]], (3, 4), dtype=dtype).update([0, 1], maps, views=views)
    expected = AttentionAccumulator([[1], [1]], (3, 4), dtype=dtype).update([0, 1], maps)
    assert torch.equal(there[[0]], expected[[0]].flip(-1))
    assert torch.equal(there.soft_labels([0, 1], views), expected[[0, 1]])


grid = st.integers(-8, 24).map(lambda step: step / 16)
lengths = st.integers(2, 24).map(lambda step: step / 16)
boxes = st.builds(lambda x, y, w, h, flip: View(x, y, x + w, y + h, flip), grid, grid, lengths, lengths, st.booleans())
some_size = st.tuples(st.integers(2, 9), st.integers(2, 9))


def centres(view: View, size: tuple[int, int]) -> list[list[tuple[Fraction, Fraction]]]:
    """Where in the image each pixel of a view is."""
    left, top, right, bottom = map(Fraction, view[:4])
    rows = []
    for row in range(size[0]):
        across = [Fraction(2 * column + 1, 2 * size[1]) for column in range(size[1])]
        x = [left + (1 - a if view.flip else a) * (right - left) for a in across]
        y = top + Fraction(2 * row + 1, 2 * size[0]) * (bottom - top)
        rows.append([(each, y) for each in x])
    return rows


def a_plane(view: View, size: tuple[int, int]) -> Tensor:
    """Attention that rises linearly over the image, as the view shows it: bilinear interpolation keeps it exactly."""
    return torch.tensor([[float(x / 4 + y / 8 + Fraction(1, 4)) for x, y in row] for row in centres(view, size)])


def around(place: Fraction, pixels: int) -> list[int]:
    """The pixels that a bilinear value may be made of, and, where a rounding may decide, those beside them."""
    inner = place * pixels - Fraction(1, 2)
    near = range(math.floor(inner - Fraction(1, 1000)), math.ceil(inner + Fraction(1, 1000)) + 1)
    return sorted({min(max(pixel, 0), pixels - 1) for pixel in near})


@given(boxes, boxes, some_size, some_size, some_size)
def test_what_was_accumulated_in_one_view_is_read_in_another_inside_and_nothing_outside(
    view, other, score_size, map_size, size
):
    accumulator = AttentionAccumulator([[1]], map_size, gate=None, dtype=torch.float32)
    maps = a_plane(view, score_size)
    assume(maps.min() >= 0 and maps.max() <= 1)
    accumulator.update([0], maps.view(1, 1, *score_size), views=[view], normalization=None)
    read = accumulator.soft_labels([0], [other], size=size)[0, 0]
    # Towards the view's edge, beyond the outermost centres of its pixels, a map goes on flat: exact only within.
    margin = [
        (far - near) / pixels / 2 for near, far, pixels in zip(view[:2], view[2:4], score_size[::-1], strict=True)
    ]

    def shown(row: int, column: int, inset: tuple[float, float] = (0, 0)) -> bool:
        x, y = Fraction(2 * column + 1, 2 * map_size[1]), Fraction(2 * row + 1, 2 * map_size[0])
        return view.left + inset[0] <= x <= view.right - inset[0] and view.top + inset[1] <= y <= view.bottom - inset[1]

    for row, column in np.ndindex(*size):
        x, y = centres(other, size)[row][column]
        if not (0 <= x <= 1 and 0 <= y <= 1):
            assert read[row, column] == 0
            continue
        pixels = list(itertools.product(around(y, map_size[0]), around(x, map_size[1])))
        if not any(shown(*pixel) for pixel in pixels):
            assert read[row, column] == 0
        middle = 0.5 / map_size[1] <= x <= 1 - 0.5 / map_size[1] and 0.5 / map_size[0] <= y <= 1 - 0.5 / map_size[0]
        if middle and all(shown(*pixel, margin) for pixel in pixels):
            assert read[row, column].item() == pytest.approx(float(x / 4 + y / 8 + Fraction(1, 4)), abs=1e-5)


@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(STORAGE))
def test_a_crop_of_whole_pixels_is_read_back_as_it_was(seed, flip, dtype):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 7, 2).tolist()
    top, left = rng.integers(-2, 7, 2).tolist()  # of an image of 8 x 9 pixels: also beyond its edges
    view = View().crop(top, left, height, width, size=(8, 9))._replace(flip=flip)
    accumulator = AttentionAccumulator([[1, 1]], (8, 9), gate=None, dtype=dtype)
    maps = random_maps(1, 2, height, width, seed=seed)
    accumulator.update([0], maps, views=[view], normalization=None)
    inside = torch.zeros(8 + 10, 9 + 10, dtype=torch.bool)
    inside[2 : 2 + 8, 2 : 2 + 9] = True
    inside = inside[2 + top : 2 + top + height, 2 + left : 2 + left + width]
    expected = maps[0] * (inside.flip(-1) if flip else inside)
    read = accumulator.soft_labels([0], [view], size=(height, width))[0]
    torch.testing.assert_close(read, expected, rtol=0, atol=ROUNDING[dtype])
    whole = accumulator.attention(0)
    beside = torch.ones(8, 9, dtype=torch.bool)
    beside[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = False
    assert not whole[:, beside].any()


@given(streams(views=True, faults=True, sizes="another"), st.sampled_from(STORAGE), st.randoms(use_true_random=False))
def test_max_does_not_depend_on_the_order_of_views(stream, dtype, rng):
    singles = [single for batch in stream.batches for single in batch.single()]
    first = Stream(stream.labels, stream.size, list(singles)).give_to(stream.accumulator(dtype=dtype, gate=None))
    rng.shuffle(singles)
    second = Stream(stream.labels, stream.size, singles).give_to(stream.accumulator(dtype=dtype, gate=None))
    assert same(snapshot(first), snapshot(second))


@pytest.mark.parametrize("fusion", [name for name, fusion in oaa_lib.fusion.FUSIONS.items() if fusion.order_free])
@given(stream=streams(views=True, faults=True, sizes="another"), rng=st.randoms(use_true_random=False))
def test_no_order_free_fusion_depends_on_the_order_of_views_nor_on_how_batches_are_cut(fusion, stream, rng):
    shuffled = [single for batch in stream.batches for single in batch.single()]
    rng.shuffle(shuffled)
    options = {"fusion": fusion, "gate": None, "dtype": torch.float32}
    first = stream.give_to(stream.accumulator(**options))
    second = Stream(stream.labels, stream.size, shuffled).give_to(stream.accumulator(**options))
    assert_near(first, second)


@pytest.mark.parametrize("view", NOWHERE.values(), ids=list(NOWHERE))
@pytest.mark.parametrize("fusion", ALL_FUSIONS)
@pytest.mark.parametrize("map_size", [(2, 2), [(2, 2), (4, 6)]], ids=["one size", "sizes"])
def test_a_view_that_shows_no_pixel_is_offered_and_changes_nothing(map_size, fusion, view):
    options = {"fusion": fusion, "gate": None}
    accumulator = AttentionAccumulator([[1, 0], [1, 1]], map_size, **options)
    for _ in range(2):  # once with nothing there, once with maps
        before = snapshot(accumulator)
        accumulator.update([1, 0, 1], random_maps(3, 2, 3, 3), views=[view] * 3, fill_empty=True)
        assert same({**snapshot(accumulator), "offered": before["offered"]}, before)
        assert accumulator.statistics().offered.tolist() == (before["offered"] + torch.tensor([3, 2])).tolist()
        accumulator.update([0, 1], random_maps(2, 2, 3, 3))
    assert accumulator.skipped == 0


def test_a_pair_that_was_shown_nothing_stays_empty_for_the_fill():
    accumulator = AttentionAccumulator([[1, 0]], (2, 2))
    closed = torch.tensor([[0.0, 1.0]])
    accumulator.update([0], random_maps(1, 2, 3, 3), closed, [View(1.25, 0, 1.5, 1)], fill_empty=True)
    assert accumulator.accepted == 0
    accumulator.update([0], random_maps(1, 2, 3, 3), closed, [LEFT], fill_empty=True)
    assert accumulator.accepted == 1
    accumulator.update([0], random_maps(1, 2, 3, 3), closed, [RIGHT], fill_empty=True)
    assert accumulator.accepted == 1  # holds something, if not everywhere
    assert not accumulator.attention(0)[:, :, 1].any()


def test_a_fusion_is_told_how_often_each_pixel_was_shown():
    counts = []

    def fusion(cumulative, attention, count):
        counts.append(count.broadcast_to(attention.shape)[0].tolist())
        return (count / 10).broadcast_to(attention.shape)

    accumulator = AttentionAccumulator([[1]], (1, 2), fusion=fusion, gate=None, dtype=torch.float32)
    half = torch.full((1, 1, 1, 1), 0.5)
    for view in (LEFT, LEFT, View()):
        accumulator.update([0], half, views=[view], normalization=None)
    assert accumulator.attention(0).flatten().tolist() == pytest.approx([0.2, 0.5])  # M_1 = A_1 on the right
    assert [count[0][0] for count in counts] == [1, 1, 2]  # at least 1, also where nothing was seen
    accumulator.update([0, 0], half.expand(2, -1, -1, -1), views=[LEFT, View()], normalization=None)
    assert accumulator.attention(0).flatten().tolist() == pytest.approx([0.4, 0.1])


def test_a_mean_counts_per_pixel():
    accumulator = AttentionAccumulator([[1]], (2, 2), fusion="mean", gate=None)
    for value, view in ((1.0, LEFT), (0.5, View()), (0.0, LOWER)):
        accumulator.update([0], torch.full((1, 1, 1, 1), value), views=[view], normalization=None)
    torch.testing.assert_close(accumulator.attention(0)[0], torch.tensor([[0.75, 0.5], [0.5, 0.25]]))
    assert accumulator.counts.tolist() == [[3]]


def test_normalization_is_over_the_whole_view_also_where_it_is_outside_the_image():
    score_maps = torch.tensor([[[[1.0, 4.0]]]])  # the highest score lies in the padding on the right
    accumulator = AttentionAccumulator([[1]], (1, 1), dtype=torch.float32)
    accumulator.update([0], score_maps, views=[View(0, 0, 2, 1)])
    assert accumulator.attention(0).item() == pytest.approx(0.25)


def test_a_padded_view_keeps_its_scale():
    """An image of 4 x 4, padded by 2 on the left and 4 on top, then flipped: as a network sees it, 8 x 6."""
    view = View().pad(left=2, top=4, right=0, bottom=0, size=(4, 4)).hflip()
    image = random_maps(4, 4)
    seen = torch.zeros(1, 1, 8, 6)
    seen[0, 0, 4:, :4] = image.flip(-1)
    accumulator = AttentionAccumulator([[1]], (4, 4), gate=None, dtype=torch.float32)
    accumulator.update([0], seen, views=[view], normalization=None)
    torch.testing.assert_close(accumulator.attention(0)[0], image, rtol=0, atol=1e-5)
    torch.testing.assert_close(accumulator.soft_labels([0], [view], size=(8, 6)), seen, rtol=0, atol=1e-5)


@given(stream=streams(views=True), form=st.sampled_from(FORMS))
def test_views_in_every_form_are_the_same(form, stream):
    first, second = (stream.accumulator(fusion="mean", gate=None) for _ in range(2))
    for batch in stream.batches:
        views = batch.views or [View(flip=True)] * len(batch.indices)
        other = in_every_form(views)[form]
        first.update(batch.indices, batch.score_maps, views=views)
        second.update(batch.indices, batch.score_maps, views=other)
        assert torch.equal(first.soft_labels(batch.indices, views), second.soft_labels(batch.indices, other))
    assert same(snapshot(first), snapshot(second))


def test_views_are_not_modified():
    views = torch.tensor([[0.5, 0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    before = views.clone()
    accumulator = AttentionAccumulator([[1]], (2, 2)).update([0], random_maps(1, 1, 2, 2), views=views)
    accumulator.soft_labels([0], views)
    assert torch.equal(views, before)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("read", [False, True], ids=["update", "soft_labels"])
@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        (View(), TypeError, "pass a list of them"),
        (3, TypeError, "one View per image, got int"),
        ("whole", TypeError, "expected views as View"),
        ([None, None], TypeError, "expected views as View"),
        ([(0, 0, 1, 1, "left")] * 2, TypeError, "expected views as View"),
        ([View()], ValueError, "each of the 2 images"),
        ([View()] * 3, ValueError, "each of the 2 images"),
        ([], ValueError, "each of the 2 images"),
        ([(0, 0, 1, 1)] * 2, ValueError, r"\(2, 4\)"),
        (torch.zeros(2, 4), ValueError, r"\(2, 4\)"),
        (View(*torch.zeros(5, 3)), ValueError, "each of the 2 images"),
        (default_collate([View()] * 2)._replace(flip=torch.zeros(3)), ValueError, "2 images"),
        (torch.zeros(2, 5, device="meta"), ValueError, "on the host"),
        (View(*torch.zeros(5, 2, device="meta")), ValueError, "on the host"),
        ([View(), View(0.5, 0, 0.5, 1)], ValueError, "left < right"),
        ([View(), View(0, 1, 1, 0)], ValueError, "top < bottom"),
        ([View(), View(NAN)], ValueError, "finite"),
        ([View(), View(right=INF)], ValueError, "finite"),
        ([View(), View(flip=2)], ValueError, "flip 0 or 1"),
        ([View(), View(flip=NAN)], ValueError, "flip 0 or 1"),
        (torch.zeros(2, 5), ValueError, "left < right"),
    ],
)
def test_wrong_views_are_errors_and_change_nothing(views, error, message, read):
    accumulator = AttentionAccumulator([[1, 0], [1, 1]], (2, 2), fusion="mean", gate=None)
    accumulator.update([0, 1], random_maps(2, 2, 2, 2))
    before = snapshot(accumulator)
    arguments = ([0, 1],) if read else ([0, 1], random_maps(2, 2, 2, 2, seed=1))
    with pytest.raises(error, match=message):
        (accumulator.soft_labels if read else accumulator.update)(*arguments, views=views)
    assert same(snapshot(accumulator), before)


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
def test_every_map_stays_in_zero_to_one_through_views(fusion):
    rng = np.random.default_rng(0)
    for _ in range(100):
        map_size, score_size, size = ((int(h), int(w)) for h, w in rng.integers(1, 40, (3, 2)))
        left, top, width, height = rng.uniform((-0.5, -0.5, 0.1, 0.1), 1).tolist()
        view = View(left, top, left + width, top + height, bool(rng.integers(2)))
        accumulator = AttentionAccumulator([[1]], map_size, fusion=fusion, gate=None, dtype=torch.float32)
        for _ in range(2):
            accumulator.update([0], torch.ones(1, 1, *score_size), views=[view])
        for values in (accumulator.attention(0), accumulator.soft_labels([0], [view], size=size)):
            assert values.min() >= 0
            assert values.max() <= 1


# Joining and keeping what views have shown


class MergeableNoisyOr:
    def __call__(self, cumulative, attention, count):
        return noisy_or(cumulative, attention, count)

    def merge(self, first, second, first_count, second_count):
        return noisy_or(first, second, first_count)


MERGEABLE = ["max", "mean", "noisy-or", pytest.param(MergeableNoisyOr(), id="user's")]


@pytest.mark.parametrize("fusion", MERGEABLE)
@given(
    stream=st.sampled_from(["another", "each"]).flatmap(lambda sizes: streams(views=True, faults=True, sizes=sizes)),
    gate=st.sampled_from(["score", None]),
)
def test_merged_is_what_one_accumulator_would_have_seen(fusion, stream, gate):
    whole, first, second = (stream.accumulator(fusion=fusion, gate=gate, dtype=torch.float32) for _ in range(3))
    stream.give_to(whole)
    for i, batch in enumerate(stream.batches):
        batch.give_to((first, second)[i % 2])
    before = snapshot(second)
    first.merge(second)
    if fusion == "max":
        assert same(snapshot(first), snapshot(whole))
    assert_near(first, whole)
    assert same(snapshot(second), before)
    stream.give_to(first)
    stream.give_to(whole)
    assert_near(first, whole)


def test_merging_keeps_what_only_one_of_two_has_seen_of_a_pixel():
    def build(value: float, view: View) -> AttentionAccumulator:
        accumulator = AttentionAccumulator([[1]], (1, 3), fusion="mean", gate=None)
        return accumulator.update([0], torch.full((1, 1, 1, 1), value), views=[view], normalization=None)

    two_thirds, last = View(right=0.7), View(left=0.3)
    merged = build(1.0, two_thirds).merge(build(0.5, last))
    torch.testing.assert_close(merged.attention(0).flatten(), torch.tensor([1.0, 0.75, 0.5]))
    merged.update([0], torch.zeros(1, 1, 1, 1), normalization=None)
    torch.testing.assert_close(merged.attention(0).flatten(), torch.tensor([0.5, 0.5, 0.25]))
    merged = build(1.0, View()).merge(build(0.5, last))  # only the other one has missed something
    merged.update([0], torch.zeros(1, 1, 1, 1), normalization=None)
    torch.testing.assert_close(merged.attention(0).flatten(), torch.tensor([0.5, 0.5, 0.5]))


def through_state_dict(stream, accumulator, options, path):
    fresh = stream.accumulator(**options)
    fresh.load_state_dict(accumulator.state_dict())
    return fresh


def through_a_file(stream, accumulator, options, path):
    accumulator.save(path)
    fusion = options["fusion"] if callable(options["fusion"]) else None
    return AttentionAccumulator.load(path, fusion=fusion)


@pytest.mark.parametrize("way", [through_state_dict, through_a_file])
@pytest.mark.parametrize("sizes", ["another", "each"])
@given(data=st.data(), fusion=st.sampled_from([*oaa_lib.fusion.FUSIONS, noisy_or]))
def test_going_on_from_a_state_is_the_same_as_never_stopping(sizes, way, fusion, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "maps"
    stream = data.draw(streams(views=True, faults=True, fill_empty=True, sizes=sizes))
    options = {"fusion": fusion}
    whole = parts = stream.accumulator(**options)
    for batch in stream.batches:
        parts = way(stream, parts, options, path)
        batch.give_to(parts)
        if parts is not whole:
            batch.give_to(whole)
    assert same(snapshot(parts), snapshot(whole))
    images = range(len(whole))
    assert torch.equal(parts.soft_labels(images, size=(3, 4)), whole.soft_labels(images, size=(3, 4)))


@given(streams(views=True, faults=True, sizes="each"), st.sampled_from(["max", "mean", "latest"]))
def test_maps_in_a_file_are_the_same_as_in_memory(tmp_path_factory, stream, fusion):
    path = tmp_path_factory.mktemp("state") / "maps"
    in_memory = stream.accumulator(fusion=fusion)
    for batch in stream.batches:
        on_disk = stream.accumulator(fusion=fusion, path=path, resume=True)
        batch.give_to(on_disk)
        batch.give_to(in_memory)
        assert same(snapshot(on_disk), snapshot(in_memory))
        del on_disk


def test_reset_forgets_what_views_have_shown():
    accumulator = AttentionAccumulator([[1]], (2, 2), fusion="mean", gate=None)
    fresh = snapshot(accumulator)
    accumulator.update([0], random_maps(1, 1, 2, 2), views=[LEFT])
    assert same(snapshot(accumulator.reset()), fresh)


# A size for every image


SIZES = [(2, 3), (5, 4), (1, 1)]


@pytest.mark.parametrize("views", [False, True], ids=["whole images", "views"])
@pytest.mark.parametrize("fusion", ALL_FUSIONS)
@given(data=st.data(), dtype=st.sampled_from(STORAGE))
def test_sizes_of_their_own_are_as_many_accumulators_of_one_image(fusion, dtype, views, data):
    stream = data.draw(streams(views=views, faults=True, fill_empty=True, sizes="each"))
    options = {"fusion": fusion, "dtype": dtype}
    together = stream.give_to(stream.accumulator(**options))
    for image, labels in enumerate(stream.labels):
        if not any(labels):
            continue
        alone = AttentionAccumulator([labels], stream.size[image], **options)
        for batch in stream.batches:
            places = [place for place, index in enumerate(batch.indices) if index == image]
            if places:
                logits = None if batch.logits is None else batch.logits[places]
                shown = None if batch.views is None else [batch.views[place] for place in places]
                Batch([0] * len(places), batch.score_maps[places], logits, batch.fill_empty, shown).give_to(alone)
        assert together.counts[image].tolist() == alone.counts[0].tolist()
        # Beside a crop a whole image is put in place by the same arithmetic as the crop: a rounding more.
        steps = 1 if fusion in ("max", "latest") else max(1, int(alone.counts.max()))
        exact = 0 if fusion in ("max", "latest") else 1e-6  # arithmetic of many maps at once may round otherwise
        atol = 2 * steps * ROUNDING[dtype] if views else exact
        pairs = [
            (together.attention(image), alone.attention(0)),
            (together.soft_labels([image]), alone[[0]]),
        ]
        for values, expected in pairs:
            torch.testing.assert_close(values, expected, rtol=0, atol=atol)


@given(streams(views=True, faults=True), st.sampled_from(STORAGE))
def test_one_size_given_for_each_image_is_the_one_size(stream, dtype):
    one, each = (
        stream.give_to(stream.accumulator(map_size=map_size, dtype=dtype, fusion="mean"))
        for map_size in (stream.size, [stream.size] * len(stream.labels))
    )
    images = range(len(one))
    assert torch.equal(one[images], each[images])
    assert torch.equal(one.counts, each.counts)


@pytest.mark.parametrize(
    "map_size",
    [SIZES, tuple(SIZES), np.array(SIZES), torch.tensor(SIZES), np.array(SIZES, dtype=np.uint16), [*map(list, SIZES)]],
    ids=["list", "tuple", "array", "tensor", "small integers", "lists"],
)
def test_an_image_has_maps_of_its_own_size(map_size):
    accumulator = AttentionAccumulator([[1, 0], [1, 1], [1, 0]], map_size)
    accumulator.update([0, 1, 2], random_maps(3, 2, 3, 3))
    assert [tuple(accumulator.attention(image).shape) for image in range(3)] == [(1, 2, 3), (2, 5, 4), (1, 1, 1)]
    assert isinstance(accumulator.map_size, np.ndarray)
    assert accumulator.map_size.tolist() == [[2, 3], [5, 4], [1, 1]]
    assert "one of every image" in repr(accumulator)
    assert accumulator.state_dict()["maps"].numel() == 6 + 2 * 20 + 1


def test_an_image_without_label_has_no_maps_of_its_own_size():
    accumulator = AttentionAccumulator([[1, 0], [0, 0]], [(2, 3), (5, 4)])
    assert accumulator.attention(1).shape == (0, 5, 4)
    assert accumulator.soft_labels([1]).shape == (1, 2, 5, 4)
    assert accumulator.update([1], random_maps(1, 2, 3, 3)).offered == 0


def test_images_of_several_sizes_are_read_at_one_size():
    accumulator = AttentionAccumulator([[1, 0], [1, 1], [0, 0], [0, 1]], [(2, 3), (5, 4), (9, 9), (2, 3)])
    accumulator.update([0, 1, 3], random_maps(3, 2, 3, 3))
    for indices in ([0, 1], [0, 2]):
        with pytest.raises(ValueError, match=re.escape("soft_labels(indices, size=(h, w))")):
            accumulator[indices]
        with pytest.raises(ValueError, match="different sizes"):
            accumulator.soft_labels(indices, [LEFT, LEFT])
    assert accumulator[[3, 0, 3]].shape == (3, 2, 2, 3)
    read = accumulator.soft_labels([1, 0, 2, 3], size=(4, 7))
    assert read.shape == (4, 2, 4, 7)
    for place, (image, target) in {(0, 0): (1, 0), (0, 1): (1, 1), (1, 0): (0, 0), (3, 1): (3, 1)}.items():
        of_image = accumulator.attention(image)
        expected = nnf.interpolate(of_image[None], (4, 7), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(read[place], expected[accumulator.classes(image).tolist().index(target)])
    assert not read[[1, 2, 2, 3], [1, 0, 1, 0]].any()


@given(streams(views=True, sizes="each"), some_size, st.integers(0, 2**32 - 1))
def test_reading_in_views_at_a_size_is_reading_each_image_alone(stream, size, seed):
    accumulator = stream.give_to(stream.accumulator(gate=None))
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, len(accumulator), 5).tolist()
    views = [some_view(rng) for _ in indices]
    together = accumulator.soft_labels(indices, views, size=size)
    for place, (index, view) in enumerate(zip(indices, views, strict=True)):
        alone = accumulator.soft_labels([index], [view], size=size)[0]
        torch.testing.assert_close(together[place], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("map_size", "error"),
    [
        ([(2, 3)], ValueError),
        ([(2, 3)] * 3, ValueError),
        ([(2, 3), (0, 3)], ValueError),
        ([(2, 3), (-1, 3)], ValueError),
        ([(2, 3, 1)] * 2, ValueError),
        ([2, 3, 4], ValueError),
        ([[(2, 3), (2, 3)]], ValueError),
        ([], (TypeError, ValueError)),
        ([(2.0, 3.0)] * 2, TypeError),
        (torch.ones(2, 2), TypeError),
        ([(2, 3), (2,)], TypeError),
        ([("2", "3")] * 2, TypeError),
        ([(True, True)] * 2, TypeError),
        (2, TypeError),
        (None, TypeError),
        ("ab", TypeError),
    ],
    ids=repr,
)
def test_bad_sizes_are_errors(map_size, error):
    with pytest.raises(error, match="expected map_size"):
        AttentionAccumulator([[1], [1]], map_size)


@pytest.mark.parametrize("map_size", [(2, 3), SIZES], ids=["one size", "sizes"])
@pytest.mark.parametrize("views", [None, [LEFT]], ids=["whole", "view"])
@pytest.mark.parametrize(
    ("size", "error"),
    [
        ((0, 3), ValueError),
        ((-1, 3), ValueError),
        ((3,), ValueError),
        ((2, 3, 4), ValueError),
        (3, TypeError),
        ((2.5, 3), TypeError),
        ("ab", TypeError),
    ],
    ids=repr,
)
def test_a_bad_size_to_read_at_is_an_error(size, error, views, map_size):
    accumulator = AttentionAccumulator([[1], [1], [1]], map_size)
    with pytest.raises(error, match="expected size"):
        accumulator.soft_labels([1], views, size=size)


def test_a_state_of_other_sizes_is_refused():
    accumulator = AttentionAccumulator([[1], [1]], [(2, 3), (3, 2)]).update([0, 1], random_maps(2, 1, 2, 2))
    before = snapshot(accumulator)
    for other in ([(3, 2), (2, 3)], (2, 3), [(2, 3), (2, 3)]):
        stranger = AttentionAccumulator([[1], [1]], other)
        with pytest.raises(ValueError, match="map_size"):
            accumulator.load_state_dict(stranger.state_dict())
        with pytest.raises(ValueError, match="map_size"):
            accumulator.merge(stranger)
    assert same(snapshot(accumulator), before)
