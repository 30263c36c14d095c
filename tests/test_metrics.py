import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oaa_lib import ConfusionMatrix

IGNORED = 255


@st.composite
def data_sets(draw):
    """A number of classes and a few images: rows of (target, prediction); predictions on ignored pixels are free."""
    num_classes = draw(st.integers(1, 4))
    known = st.integers(0, num_classes - 1)
    pixel = st.one_of(st.tuples(known, known), st.tuples(st.just(IGNORED), st.integers(0, 255)))
    return num_classes, draw(st.lists(st.lists(pixel, min_size=1, max_size=12), min_size=1, max_size=4))


def count(matrix, pixels):
    return matrix.update(torch.tensor([p for _, p in pixels]), torch.tensor([t for t, _ in pixels]))


def naive_counts(num_classes, pixels):
    counts = [[0] * num_classes for _ in range(num_classes)]
    for target, prediction in pixels:
        if target != IGNORED:
            counts[target][prediction] += 1
    return counts


def naive_iou(pixels, c):
    intersection = sum(target == c and prediction == c for target, prediction in pixels)
    union = sum(target != IGNORED and c in (target, prediction) for target, prediction in pixels)
    return intersection / union if union else math.nan


@given(data_sets())
def test_counts_and_iou_are_those_of_the_whole_data_set(data_set):
    num_classes, images = data_set
    matrix = ConfusionMatrix(num_classes)
    for pixels in images:
        count(matrix, pixels)
    everything = [pixel for pixels in images for pixel in pixels]
    assert matrix.counts.tolist() == naive_counts(num_classes, everything)
    expected = [naive_iou(everything, c) for c in range(num_classes)]
    assert matrix.iou().tolist() == pytest.approx(expected, nan_ok=True)
    present = [value for value in expected if not math.isnan(value)]
    mean = sum(present) / len(present) if present else math.nan
    assert matrix.mean_iou() == pytest.approx(mean, nan_ok=True)


@given(data_sets())
def test_merged_matrices_are_one_that_saw_everything(data_set):
    num_classes, images = data_set
    whole, merged = ConfusionMatrix(num_classes), ConfusionMatrix(num_classes)
    for pixels in images:
        count(whole, pixels)
        part = count(ConfusionMatrix(num_classes), pixels)
        before = part.counts.clone()
        assert merged.merge(part) is merged
        assert torch.equal(part.counts, before)
    assert torch.equal(merged.counts, whole.counts)


def test_iou_is_taken_of_the_sums_and_not_averaged_over_images():
    matrix = ConfusionMatrix(2)
    count(matrix, [(1, 1)] * 1)
    count(matrix, [(1, 0)] * 9)
    assert matrix.iou()[1].item() == pytest.approx(1 / 10)  # the mean over images would be 1/2


def test_rows_are_targets_and_columns_predictions():
    assert count(ConfusionMatrix(3), [(0, 2), (0, 2), (1, 0)]).counts.tolist() == [[0, 0, 2], [1, 0, 0], [0, 0, 0]]


def test_a_class_that_never_occurs_is_nan_and_left_out_of_the_mean():
    matrix = count(ConfusionMatrix(3), [(0, 0), (1, 0)])
    assert matrix.iou().tolist() == pytest.approx([0.5, 0.0, math.nan], nan_ok=True)
    assert matrix.mean_iou() == 0.25


def test_a_class_that_is_only_predicted_counts_as_zero():
    assert count(ConfusionMatrix(3), [(0, 0), (0, 2)]).mean_iou() == pytest.approx((0.5 + 0) / 2)


def test_nothing_is_known_before_the_first_update():
    matrix = ConfusionMatrix(3)
    assert matrix.iou().isnan().all()
    assert math.isnan(matrix.mean_iou())


def test_an_image_that_is_ignored_whole_counts_nothing():
    assert not count(ConfusionMatrix(2), [(IGNORED, 0), (IGNORED, 99)]).counts.any()


def test_a_label_with_ignored_pixels_is_scored_on_the_others():
    label, truth = torch.tensor([[0, IGNORED, 1]]), torch.tensor([[0, 1, 1]])
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=r"got 255; score the pixels that are known, update\(prediction\[known\]"):
        matrix.update(label, truth)
    known = label != IGNORED
    assert matrix.update(label[known], truth[known]).counts.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("ignore_index", [-1, 2, 100])
def test_another_value_can_be_ignored(ignore_index):
    matrix = ConfusionMatrix(2, ignore_index=ignore_index)
    matrix.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, ignore_index]))
    assert matrix.counts.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("prediction", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("target", [torch.uint8, torch.int16, torch.int64])
def test_labels_may_have_any_integer_dtype_and_shape(prediction, target):
    labels = torch.tensor([[[0, 20], [20, 13]]])
    matrix = ConfusionMatrix(21).update(labels.to(prediction), labels.to(target))
    assert matrix.counts.diagonal()[[0, 13, 20]].tolist() == [1, 1, 2]
    assert matrix.counts.sum() == 4


def test_counts_are_64_bit_integers():
    assert ConfusionMatrix(2).counts.dtype == torch.int64


def test_reset_forgets_everything_and_returns_the_matrix():
    matrix = count(ConfusionMatrix(2), [(0, 1), (1, 1)])
    assert matrix.reset() is matrix
    assert not matrix.counts.any()


def test_update_returns_the_matrix_and_leaves_its_arguments():
    prediction, target = torch.tensor([0, 1]), torch.tensor([1, IGNORED])
    matrix = ConfusionMatrix(2)
    assert matrix.update(prediction, target) is matrix
    assert (prediction.tolist(), target.tolist()) == ([0, 1], [1, IGNORED])
