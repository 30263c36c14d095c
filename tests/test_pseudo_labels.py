import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oaa_lib import pseudo_label_from_cues

DEFAULTS = {
    "foreground_threshold": 0.3,
    "conflict_threshold": 0.9,
    "uncertain_saliency": 32 / 255,
    "strong_attention": 0.8,
    "min_foreground": 0.01,
    "rescale": True,
    "ignore_index": 255,
}


def naive(attention, classes, saliency, background, options):
    """The rule, pixel by pixel, over nested lists."""
    height, width = len(saliency or background), len((saliency or background)[0])
    objects = []
    for values in attention:
        low, high = (min(map(min, values)), max(map(max, values))) if options["rescale"] else (0, 1)
        objects.append([[(v - low) / (high - low) if high > low else 0.0 for v in row] for row in values])
    label = [[0] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            back = background[y][x] if background is not None else 1 - saliency[y][x]
            cues = [values[y][x] for values in objects]
            kept = [value if value >= options["foreground_threshold"] else 0 for value in [back, *cues]]
            winner = kept.index(max(kept))  # the first of equals
            if sum(value > options["conflict_threshold"] for value in [back, *cues]) >= 2:
                label[y][x] = options["ignore_index"]
            elif winner > 0:
                label[y][x] = classes[winner - 1] + 1
            elif (saliency is not None and saliency[y][x] >= options["uncertain_saliency"]) or any(
                value > options["strong_attention"] for value in cues
            ):
                label[y][x] = options["ignore_index"]
    foreground = sum(value not in (0, options["ignore_index"]) for row in label for value in row)
    if foreground / (height * width) < options["min_foreground"]:
        return [[options["ignore_index"]] * width for _ in range(height)]
    return label


@st.composite
def cues(draw):
    """Maps in steps of 1/10 or 1/255, so that values meet thresholds and each other."""
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    steps = draw(st.sampled_from([10, 255]))
    values = st.lists(
        st.lists(st.integers(0, steps).map(lambda k: k / steps), min_size=width, max_size=width),
        min_size=height,
        max_size=height,
    )
    classes = draw(st.lists(st.integers(0, 19), max_size=3, unique=True))
    attention = [draw(values) for _ in classes]
    kind = draw(st.sampled_from(["saliency", "constant", "map", "saliency and map"]))
    saliency = draw(values) if kind.startswith("saliency") else None
    background = draw(values) if kind.endswith("map") else None
    if kind == "constant":
        background = [[draw(st.integers(0, 10)) / 10] * width] * height
    return attention, classes, saliency, background, kind


@st.composite
def options(draw):
    tenths = st.integers(1, 9).map(lambda k: k / 10)
    chosen = {
        "foreground_threshold": draw(tenths),
        "uncertain_saliency": draw(tenths),
        "conflict_threshold": draw(tenths),
        "strong_attention": draw(tenths),
        "min_foreground": draw(st.sampled_from([0.0, 0.01, 0.2, 0.5])),
        "rescale": draw(st.booleans()),
        "ignore_index": draw(st.sampled_from([255, -1, 21])),
    }
    return draw(st.sampled_from([DEFAULTS, chosen]))


def call(attention, classes, saliency, background, kind, chosen):
    def tensor(values):
        return None if values is None else torch.tensor(values, dtype=torch.float64)

    return pseudo_label_from_cues(
        tensor(attention).reshape(len(classes), *tensor(saliency or background).shape),
        classes,
        tensor(saliency),
        background=background[0][0] if kind == "constant" else tensor(background),
        **({} if chosen is DEFAULTS else chosen),
    )


@given(cues(), options())
def test_the_rule_holds_at_every_pixel(case, chosen):
    *inputs, _kind = case
    label = call(*case, chosen)
    assert label.dtype == torch.int64
    assert label.tolist() == naive(*inputs, chosen)


def one_row(attention, saliency=None, classes=(7,), **chosen):
    """A label of one row; nothing is dropped for being too little foreground."""
    maps = torch.tensor(attention)[:, None]
    row = None if saliency is None else torch.tensor([saliency])
    return pseudo_label_from_cues(maps, classes, row, **{"min_foreground": 0, **chosen})[0].tolist()


@pytest.mark.parametrize(
    ("rule", "attention", "saliency", "expected"),
    [
        ("the stronger channel wins", [[0.0, 0.6, 1.0]], [0.0, 0.5, 1.0], [0, 8, 8]),
        ("attention is rescaled over the image", [[0.5, 0.56, 0.6]], [0.0, 0.5, 1.0], [0, 8, 8]),
        ("a tie goes to the background", [[0.0, 0.5, 1.0]], [0.0, 0.5, 1.0], [0, 255, 8]),
        ("nothing above the threshold is background", [[0.0, 0.2, 1.0]], [0.1, 0.8, 1.0], [0, 255, 8]),
        ("attention against background is a conflict", [[0.0, 0.95, 1.0]], [0.0, 0.05, 1.0], [0, 255, 8]),
        ("a salient pixel without attention is uncertain", [[0.0, 0.0, 1.0]], [0.0, 0.2, 1.0], [0, 255, 8]),
        ("a strong attention below the background is uncertain", [[0.0, 0.85, 1.0]], [0.1, 0.12, 1.0], [0, 255, 8]),
    ],
)
def test_one_rule_at_a_time(rule, attention, saliency, expected):
    assert one_row(attention, saliency) == expected, rule


@pytest.mark.parametrize(
    ("rule", "attention", "saliency", "chosen", "expected"),
    [
        ("kept in the foreground", [[0.0, 0.25, 1.0]], [0.0, 1.0, 1.0], {"foreground_threshold": 0.25}, [0, 8, 8]),
        ("no conflict yet", [[0.0, 0.875, 1.0]], [0.0, 0.25, 1.0], {"conflict_threshold": 0.75}, [0, 8, 8]),
        ("no strong attention yet", [[0.0, 0.75, 1.0]], [0.0, 0.0, 1.0], {"strong_attention": 0.75}, [0, 0, 8]),
        (
            "salient enough to be uncertain",
            [[0.0, 0.0, 1.0]],
            [0.0, 0.25, 1.0],
            {"uncertain_saliency": 0.25},
            [0, 255, 8],
        ),
    ],
)
def test_a_value_that_meets_its_threshold_is(rule, attention, saliency, chosen, expected):
    assert one_row(attention, saliency, **chosen) == expected, rule


def test_a_tie_of_two_classes_goes_to_the_one_given_first():
    attention = [[0.0, 0.5, 1.0, 0.0], [0.0, 0.5, 0.0, 1.0]]
    assert one_row(attention, [0.0, 1.0, 1.0, 1.0], classes=(7, 3)) == [0, 8, 8, 4]
    assert one_row(attention, [0.0, 1.0, 1.0, 1.0], classes=(3, 7)) == [0, 4, 4, 8]


def test_two_classes_above_the_conflict_threshold_are_ignored():
    attention = [[0.0, 0.95, 1.0, 0.0], [0.0, 0.95, 0.0, 1.0]]
    assert one_row(attention, [0.0, 1.0, 1.0, 1.0], classes=(7, 3)) == [0, 255, 8, 4]


def test_a_flat_attention_map_is_no_cue():
    assert one_row([[0.7, 0.7]], [0.0, 0.05]) == [0, 0]
    assert one_row([[0.7, 0.7], [0.0, 1.0]], [0.0, 1.0], classes=(7, 3)) == [0, 4]
    assert one_row([[0.0, 1.0], [0.7, 0.7]], [0.0, 1.0], classes=(7, 3)) == [0, 8]


def test_the_share_of_foreground_is_counted_after_ignoring():
    attention = torch.zeros(1, 10, 10)
    attention[0, 0, 0] = 1
    saliency = torch.zeros(10, 10)
    saliency[0, 0] = 1
    label = pseudo_label_from_cues(attention, [7], saliency)
    assert label.flatten().tolist() == [8] + [0] * 99  # exactly 1 % is enough
    assert (pseudo_label_from_cues(attention, [7], saliency, min_foreground=0.011) == 255).all()
    saliency[0, 0] = 0  # now a conflict, so no foreground is left
    assert (pseudo_label_from_cues(attention, [7], saliency) == 255).all()


def test_without_saliency_a_constant_background_decides():
    assert one_row([[0.0, 0.4, 0.6, 1.0]], background=0.5) == [0, 0, 8, 8]
    assert one_row([[0.0, 0.4, 0.6, 1.0]], background=0.0) == [0, 8, 8, 8]
    assert one_row([[0.0, 0.4, 0.6, 1.0]], background=1) == [0, 0, 0, 255]


def test_without_saliency_a_background_map_decides():
    assert one_row([[0.0, 0.5, 0.5, 1.0]], background=torch.tensor([[0.0, 0.4, 0.6, 0.0]])) == [0, 8, 0, 8]


def test_a_background_replaces_one_minus_saliency_but_saliency_still_makes_uncertain():
    assert one_row([[0.0, 0.0, 1.0]], [0.0, 0.5, 1.0], background=0.5) == [0, 255, 8]


def test_an_image_without_classes_is_background_or_uncertain():
    attention, saliency = torch.zeros(0, 1, 3), torch.tensor([[0.0, 0.1, 0.5]])
    assert pseudo_label_from_cues(attention, [], saliency, min_foreground=0).tolist() == [[0, 0, 255]]
    assert pseudo_label_from_cues(attention, [], saliency).tolist() == [[255] * 3]  # no foreground at all
    assert pseudo_label_from_cues(attention, [], background=0.5, min_foreground=0).tolist() == [[0] * 3]


@pytest.mark.parametrize("ignore_index", [-1, -100, 254, 255])
def test_ignored_pixels_take_the_value_asked_for(ignore_index):
    assert one_row([[0.0, 0.95, 1.0]], [0.0, 0.05, 1.0], ignore_index=ignore_index) == [0, ignore_index, 8]
    assert one_row([[0.0, 1.0]], [0.0, 0.0], ignore_index=ignore_index, min_foreground=1) == [ignore_index] * 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("class_id", [0, 19, 127])
def test_class_ids_may_have_any_integer_dtype(class_id, dtype):
    classes = torch.tensor([class_id], dtype=dtype)
    assert one_row([[0.0, 1.0]], [0.0, 1.0], classes) == [0, class_id + 1]


def test_class_ids_beyond_8_bits_do_not_wrap():
    label = one_row([[0.0, 1.0]], [0.0, 1.0], torch.tensor([255], dtype=torch.uint8), ignore_index=-1)
    assert label == [0, 256]
    assert one_row([[0.0, 1.0]], [0.0, 1.0], [1000]) == [0, 1001]


@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("second", [torch.float16, torch.float32, torch.float64])
def test_attention_and_saliency_may_have_any_floating_dtype(first, second):
    label = pseudo_label_from_cues(
        torch.tensor([[[0.0, 0.625, 1.0]]], dtype=first), [7], torch.tensor([[0.0, 0.5, 1.0]], dtype=second)
    )
    assert label.tolist() == [[0, 8, 8]]


def test_arguments_are_not_modified():
    attention, classes, saliency = torch.rand(2, 4, 4), torch.tensor([3, 7]), torch.rand(4, 4)
    before = [x.clone() for x in (attention, classes, saliency)]
    pseudo_label_from_cues(attention, classes, saliency, background=saliency)
    assert all(torch.equal(x, y) for x, y in zip((attention, classes, saliency), before, strict=True))


def test_labels_are_exact_up_to_the_largest_or_refused():
    assert one_row([[0.0, 1.0]], [0.0, 1.0], [2**24 - 2]) == [0, 2**24 - 1]
    assert one_row([[0.0, 1.0]], [0.0, 0.0], min_foreground=1, ignore_index=-(2**24)) == [-(2**24)] * 2
    with pytest.raises(ValueError, match=r"below 2\*\*24.*16777216"):
        one_row([[0.0, 1.0]], [0.0, 1.0], [2**24])
    with pytest.raises(ValueError, match=r"beyond 2\*\*24, got 16777217"):
        one_row([[0.0, 1.0]], [0.0, 1.0], ignore_index=2**24 + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_many_classes_keep_their_ids_in_any_precision(dtype):
    attention = torch.eye(600, dtype=dtype)[:, None]  # class k is shown by pixel k alone
    classes = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    label = pseudo_label_from_cues(attention, classes, background=0.5, ignore_index=-1)
    assert label.tolist() == [(classes + 1).tolist()]


def test_the_layout_in_memory_does_not_matter():
    attention, saliency = torch.rand(3, 7, 5), torch.rand(7, 5)
    expected = pseudo_label_from_cues(attention, [3, 7, 5], saliency)
    turned = pseudo_label_from_cues(attention.mT.contiguous().mT, [3, 7, 5], saliency.mT.contiguous().mT)
    assert torch.equal(turned, expected)
    one = torch.rand(1, 7, 5)
    assert torch.equal(
        pseudo_label_from_cues(one.expand(2, 7, 5), [3, 7], saliency),
        pseudo_label_from_cues(one.repeat(2, 1, 1), [3, 7], saliency),
    )


def test_a_label_of_cues_that_require_gradients_is_plain_and_may_be_written_to():
    attention, saliency = torch.rand(1, 7, 5, requires_grad=True), torch.rand(7, 5, requires_grad=True)
    label = pseudo_label_from_cues(attention, [3], saliency)
    label[:] = 7
    assert label.unique().tolist() == [7]
