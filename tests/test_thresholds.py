"""A sweep is, at each threshold, the confusion matrix of the maps cut there."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oaa_lib import ConfusionMatrix, ThresholdSweep, two_fold

CLASSES = 3


@st.composite
def images(draw):
    """(attention (K, 1, W) in steps of 1/255, classes, target)."""
    ids = draw(st.lists(st.integers(0, CLASSES - 1), unique=True, max_size=CLASSES))
    width = draw(st.integers(1, 6))
    levels = draw(
        st.lists(st.lists(st.integers(0, 255), min_size=width, max_size=width), min_size=len(ids), max_size=len(ids))
    )
    target = draw(st.lists(st.sampled_from([*range(CLASSES + 1), 255]), min_size=width, max_size=width))
    return torch.tensor(levels, dtype=torch.uint8).view(len(ids), 1, width), ids, torch.tensor([target])


def cut(attention, ids, threshold):
    """The naive loop: what each pixel shows."""
    shown = []
    for x in range(attention.shape[-1]):
        best, strength = 0, -1
        for k, c in enumerate(ids):
            value = int(attention[k, 0, x]) / 255
            if value > strength:
                best, strength = c + 1, value
        shown.append(best if strength >= threshold else 0)
    return torch.tensor([shown])


@given(st.lists(images(), max_size=4), st.sampled_from([0, 1, 76, 128, 254, 255]))
def test_each_threshold_is_the_confusion_matrix_of_maps_cut_there(data, level):
    sweep, matrix, threshold = ThresholdSweep(CLASSES), ConfusionMatrix(CLASSES + 1), level / 255
    for attention, ids, target in data:
        sweep.update(attention, ids, target)
        matrix.update(cut(attention, ids, threshold), target)
    assert torch.equal(sweep.at(threshold).counts, matrix.counts)
    assert sweep.thresholds[level] == threshold
    for name in ("iou", "precision", "recall"):
        values, expected = getattr(sweep, name)()[level], getattr(matrix, name)()
        assert values.tolist() == pytest.approx(expected.tolist(), nan_ok=True)
    assert sweep.mean_iou()[level].item() == pytest.approx(matrix.mean_iou(), nan_ok=True)


@given(images(), images())
def test_merged_sweeps_are_one_that_saw_everything(first, second):
    whole = ThresholdSweep(CLASSES).update(*first).update(*second)
    merged = ThresholdSweep(CLASSES).update(*second).merge(ThresholdSweep(CLASSES).update(*first))
    assert torch.equal(merged.counts, whole.counts)
    assert not merged.reset().counts.any()


@given(images())
def test_float_maps_count_as_their_8_bit_form(image):
    attention, ids, target = image
    as_float = ThresholdSweep(CLASSES).update(attention.float() / 255, ids, target)
    assert torch.equal(as_float.counts, ThresholdSweep(CLASSES).update(attention, ids, target).counts)


def test_precision_and_recall_by_hand():
    attention = torch.tensor([[[1.0, 0.8, 0.6, 0.0]]])
    sweep = ThresholdSweep(1).update(attention, [0], torch.tensor([[1, 0, 1, 1]]))
    level = 178  # 0.698: shows the first two
    assert sweep.precision()[level].tolist() == [0.0, 0.5]
    assert sweep.recall()[level].tolist() == pytest.approx([0, 1 / 3])
    assert math.isnan(ThresholdSweep(1).precision()[0, 0])
    assert math.isnan(ThresholdSweep(1).mean_iou()[0])


def test_a_threshold_between_two_levels_keeps_only_what_reaches_it():
    sweep = ThresholdSweep(1).update(torch.tensor([[[100, 101]]], dtype=torch.uint8), [0], torch.tensor([[1, 1]]))
    assert sweep.at(100 / 255).counts.tolist() == [[0, 0], [0, 2]]
    assert sweep.at(100.5 / 255).counts.tolist() == [[0, 0], [1, 1]]


def test_the_best_threshold_is_the_lowest_of_the_best():
    sweep = ThresholdSweep(1).update(torch.tensor([[[200, 100]]], dtype=torch.uint8), [0], torch.tensor([[1, 0]]))
    assert sweep.best_threshold() == 101 / 255
    assert ThresholdSweep(1).best_threshold() == 0


@given(st.lists(images(), min_size=1, max_size=3), st.lists(images(), min_size=1, max_size=3))
def test_two_fold_never_looks_at_the_half_that_it_scores(first, second):
    halves = [ThresholdSweep(CLASSES), ThresholdSweep(CLASSES)]
    for half, data in zip(halves, (first, second), strict=True):
        for image in data:
            half.update(*image)
    matrix, thresholds = two_fold(*halves)
    assert thresholds == (halves[1].best_threshold(), halves[0].best_threshold())
    assert torch.equal(matrix.counts, halves[0].at(thresholds[0]).counts + halves[1].at(thresholds[1]).counts)


MAPS, TARGET = torch.rand(2, 3, 4), torch.zeros(3, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("attention", "classes", "target", "error", "message"),
    [
        (MAPS, [0, 1], TARGET.float(), TypeError, "target as an integer tensor, got torch.float32"),
        (MAPS.long(), [0, 1], TARGET, TypeError, "floating point or uint8 tensor, got torch.int64"),
        (MAPS[0], [0], TARGET, ValueError, r"got \(3, 4\), \(1,\) and \(3, 4\); resize"),
        (MAPS, [0], TARGET, ValueError, r"classes \(K,\)"),
        (MAPS, [0, 1], TARGET[:2], ValueError, "resize the attention first"),
        (MAPS, [0, 3], TARGET, ValueError, r"classes in 0\.\.2, without background, got \[0, 3\]"),
        (MAPS, [0, 1], TARGET + 4, ValueError, r"target in 0\.\.3 or 255, got up to 4"),
        (MAPS, [0, 1], TARGET - 7, ValueError, r"target in 0\.\.3 or 255, got -7"),
        (MAPS, [True, False], TARGET, TypeError, "classes.*as integers, got torch.bool; pass ids, not a 0/1 row"),
        (MAPS, torch.tensor([0.9, 1.2]), TARGET, TypeError, "classes.*as an integer tensor, got torch.float32"),
        (MAPS, ["cat", "dog"], TARGET, TypeError, "classes.*as integers, got list"),
        (MAPS, [10**30, 1], TARGET, TypeError, "classes.*as integers"),
        (MAPS, [1, 1], TARGET, ValueError, r"classes without repetition, got \[1, 1\]; pass ids, not a 0/1 row"),
        (MAPS.to_sparse(), [0, 1], TARGET, TypeError, "attention as a floating point or uint8 tensor, got.*sparse"),
        (MAPS.to("meta"), [0, 1], TARGET, TypeError, "attention.*got.*meta device"),
        (MAPS, [0, 1], TARGET.to("meta"), TypeError, "target.*got one on the meta device"),
        (MAPS * 0 - 0.01, [0, 1], TARGET, ValueError, r"attention in \[0, 1\], got \[-0.01, -0.01\]"),
        (MAPS * 0 + 2, [0, 1], TARGET, ValueError, r"attention in \[0, 1\], got \[2, 2\]; call normalize"),
        (MAPS * torch.nan, [0, 1], TARGET, ValueError, r"attention in \[0, 1\], got \[nan"),
    ],
)
def test_bad_input_is_refused_and_nothing_counted(attention, classes, target, error, message):
    sweep = ThresholdSweep(CLASSES)
    with pytest.raises(error, match=message):
        sweep.update(attention, classes, target)
    assert not sweep.counts.any()


def test_a_hair_outside_is_taken_for_0_and_1():
    hair = torch.tensor([[[-1e-5, 1 + 1e-5]]])
    sweep = ThresholdSweep(1).update(hair, [0], torch.tensor([[0, 1]]))
    assert torch.equal(sweep.counts, ThresholdSweep(1).update(hair.clamp(0, 1), [0], torch.tensor([[0, 1]])).counts)
    assert sweep.at(1.0).counts.tolist() == [[1, 0], [0, 1]]


def test_bad_settings():
    with pytest.raises(TypeError, match="first as a ThresholdSweep, got int"):
        two_fold(1, ThresholdSweep(1))
    with pytest.raises(TypeError, match="second as a ThresholdSweep, got ConfusionMatrix"):
        two_fold(ThresholdSweep(1), ConfusionMatrix(2))
    with pytest.raises(ValueError, match=r"threshold in.*got nan"):
        ThresholdSweep(1).at(math.nan)
    with pytest.raises(ValueError, match="num_classes >= 1"):
        ThresholdSweep(0)
    with pytest.raises(ValueError, match=r"ignore_index outside 0\.\.3"):
        ThresholdSweep(3, ignore_index=3)
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\], got 1.5"):
        ThresholdSweep(3).at(1.5)
    with pytest.raises(ValueError, match="= \\(3, 255\\), got \\(2, 255\\)"):
        ThresholdSweep(3).merge(ThresholdSweep(2))
    with pytest.raises(TypeError, match="got ConfusionMatrix"):
        ThresholdSweep(3).merge(ConfusionMatrix(4))
