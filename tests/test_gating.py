import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import oaa_lib

GATES = {"score": oaa_lib.score_gate, "topk": oaa_lib.topk_gate}


@st.composite
def batches(draw):
    """Scores from few values, so that ties are common."""
    num_classes = draw(st.integers(1, 5))
    row = st.tuples(
        st.lists(st.integers(-2, 2), min_size=num_classes, max_size=num_classes),
        st.lists(st.booleans(), min_size=num_classes, max_size=num_classes),
    )
    rows = draw(st.lists(row, min_size=1, max_size=4))
    return [scores for scores, _ in rows], [labels for _, labels in rows]


@pytest.mark.parametrize("name", GATES)
@given(batches())
def test_a_gate_does_what_its_sentence_says(name, batch):
    scores, labels = batch
    passed = GATES[name](torch.tensor(scores, dtype=torch.float32), torch.tensor(labels))
    for i, (row, shown) in enumerate(zip(scores, labels, strict=True)):
        targets = [c for c, is_target in enumerate(shown) if is_target]
        expected = [c in targets and reference.GATES[name](row, targets, c) for c in range(len(row))]
        assert passed[i].tolist() == expected


@pytest.mark.parametrize("name", GATES)
@given(batches())
def test_only_the_order_of_the_scores_matters(name, batch):
    scores, labels = torch.tensor(batch[0], dtype=torch.float32), torch.tensor(batch[1])
    assert torch.equal(GATES[name](scores, labels), GATES[name](scores.sigmoid(), labels))


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_may_have_any_floating_dtype(name, dtype):
    scores, labels = torch.tensor([[3, 0.5, 1]], dtype=dtype), torch.tensor([[True, True, False]])
    assert GATES[name](scores, labels).tolist() == [[True, False, False]]


@pytest.mark.parametrize("name", GATES)
def test_an_image_that_shows_every_class_passes_whole(name):
    assert GATES[name](torch.tensor([[-3.0, 0.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)).all()


@pytest.mark.parametrize("name", GATES)
def test_an_image_without_label_passes_nothing(name):
    assert not GATES[name](torch.tensor([[-3.0, 0.0, 2.0]]), torch.zeros(1, 3, dtype=torch.bool)).any()


def test_a_tie_with_a_non_target_does_not_outscore_it():
    assert oaa_lib.score_gate(torch.tensor([[1.0, 1.0]]), torch.tensor([[True, False]])).tolist() == [[False, False]]


def test_a_tie_with_the_kth_best_is_among_the_k_best():
    assert oaa_lib.topk_gate(torch.tensor([[1.0, 1.0]]), torch.tensor([[True, False]])).tolist() == [[True, False]]


def test_the_gates_differ_where_a_target_is_outscored_but_still_among_the_k_best():
    scores, labels = torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([[True, False, True, True]])
    assert oaa_lib.score_gate(scores, labels).tolist() == [[True, False, True, False]]
    scores = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    assert oaa_lib.score_gate(scores, labels).tolist() == [[False, False, False, False]]
    assert oaa_lib.topk_gate(scores, labels).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("name", GATES)
def test_arguments_are_not_modified(name):
    scores, labels = torch.tensor([[3.0, 0.5, 1.0]]), torch.tensor([[True, True, False]])
    GATES[name](scores, labels)
    assert scores.tolist() == [[3.0, 0.5, 1.0]]
    assert labels.tolist() == [[True, True, False]]


@pytest.mark.parametrize("gate", ["topk", "score", None, lambda logits, labels: labels & (logits > 2)])
def test_another_gate_takes_its_place_at_any_time_by_name_too(gate):
    score_maps, logits = torch.rand(1, 3, 2, 2), torch.tensor([[3.0, 0.5, 1.0]])
    expected = oaa_lib.AttentionAccumulator([[1, 1, 0]], (2, 2), gate=gate)
    accumulator = oaa_lib.AttentionAccumulator([[1, 1, 0]], (2, 2), gate="score")
    accumulator.gate = gate
    assert accumulator.gate is expected.gate
    assert repr(accumulator) == repr(expected)
    for each in (accumulator, expected):
        each.update([0], score_maps, logits)
    assert torch.equal(accumulator.counts, expected.counts)


@pytest.mark.parametrize(("gate", "error"), [("prob", ValueError), (0.5, TypeError), (type, TypeError)])
def test_what_is_no_gate_does_not_take_its_place(gate, error):
    accumulator = oaa_lib.AttentionAccumulator([[1]], (2, 2))
    with pytest.raises(error, match="expected gate to be one of"):
        accumulator.gate = gate
    assert accumulator.gate is oaa_lib.score_gate


def test_the_class_of_a_gate_is_refused_in_favour_of_an_instance():
    class Confident:
        def __call__(self, logits, labels):
            return labels

    with pytest.raises(TypeError, match="got the class Confident; pass an instance"):
        oaa_lib.AttentionAccumulator([[1]], (1, 1), gate=Confident)
    oaa_lib.AttentionAccumulator([[1]], (1, 1), gate=Confident())


@pytest.mark.parametrize("gate", [oaa_lib.score_gate, oaa_lib.topk_gate])
def test_a_batch_may_be_empty_but_not_the_classes(gate):
    assert gate(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)
    with pytest.raises(ValueError, match="C at least 1"):
        gate(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))
