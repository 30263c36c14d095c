import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oaa_lib import HybridLoss, MultiLabelCrossEntropy, hybrid_loss, multilabel_cross_entropy

NORMALIZATIONS = ("class", "pooled")
LOSSES = {
    "class": partial(hybrid_loss, normalization="class"),
    "pooled": partial(hybrid_loss, normalization="pooled"),
    "plain": multilabel_cross_entropy,
}
THRESHOLDS = (0.0, 0.001, 0.25)
LOG_2 = math.log(2)


def log_sigmoid(score: float) -> float:
    return -math.log1p(math.exp(-score))


def split_loss(pixels: list[tuple[float, float]], threshold: float) -> float:
    """Eq. 7 plus Eq. 8 over (score, soft label) of one set N; log(1 - sigmoid(s)) is log(sigmoid(-s))."""
    enhance = [p * log_sigmoid(s) for s, p in pixels if p > threshold]
    constrain = [log_sigmoid(-s) for s, p in pixels if not p > threshold]
    loss = 0.0
    if enhance:
        loss -= sum(enhance) / len(enhance)
    if constrain:
        loss -= sum(constrain) / len(constrain)
    return loss


def plain_loss(pixels: list[tuple[float, float]], threshold: float) -> float:
    """Eq. 6."""
    terms = [
        p * log_sigmoid(s) + (1 - p) * log_sigmoid(-s) for s, p in ((s, p if p > threshold else 0) for s, p in pixels)
    ]
    return -sum(terms) / len(terms)


def naive(name: str, score_maps: Tensor, soft_labels: Tensor, threshold: float) -> float:
    """The mean over the samples of the sum over the classes (pooled: of all classes as one set)."""
    total = 0.0
    for scores, labels in zip(score_maps.tolist(), soft_labels.tolist(), strict=True):
        classes = [
            [(s, p) for rows in zip(*maps, strict=True) for s, p in zip(*rows, strict=True)]
            for maps in zip(scores, labels, strict=True)
        ]
        if name == "class":  # Eq. 9
            total += sum(split_loss(pixels, threshold) for pixels in classes)
        elif name == "pooled":
            total += split_loss([pixel for pixels in classes for pixel in pixels], threshold)
        else:
            total += sum(plain_loss(pixels, threshold) for pixels in classes)
    return total / len(score_maps)


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Scores and soft labels; about half of the soft labels are 0, some are exactly a threshold."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    soft_labels = torch.rand(*shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 5, shape, generator=generator)
    soft_labels[kind >= 3] = 0
    soft_labels[kind == 2] = 0.25
    return scores.to(dtype), soft_labels.to(dtype)


@pytest.mark.parametrize("name", LOSSES)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 2**32 - 1),
    st.sampled_from(THRESHOLDS),
)
def test_the_value_is_that_of_the_equations(name, shape, seed, threshold):
    score_maps, soft_labels = inputs(*shape, seed=seed)
    value = LOSSES[name](score_maps, soft_labels, threshold=threshold)
    assert value.item() == pytest.approx(naive(name, score_maps, soft_labels, threshold), rel=1e-9)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name, threshold):
    score_maps, soft_labels = inputs(2, 3, 2, 3)
    assert torch.autograd.gradcheck(
        lambda scores: LOSSES[name](scores, soft_labels, threshold=threshold), score_maps.requires_grad_()
    )


def test_the_paper_is_the_default():
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    expected = hybrid_loss(score_maps, soft_labels, normalization="class", threshold=0)
    assert torch.equal(hybrid_loss(score_maps, soft_labels), expected)
    expected = multilabel_cross_entropy(score_maps, soft_labels, threshold=0)
    assert torch.equal(multilabel_cross_entropy(score_maps, soft_labels), expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_the_modules_equal_the_functions(normalization, threshold):
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    module = HybridLoss(normalization=normalization, threshold=threshold)
    expected = hybrid_loss(score_maps, soft_labels, normalization=normalization, threshold=threshold)
    assert torch.equal(module(score_maps, soft_labels), expected)
    module = MultiLabelCrossEntropy(threshold=threshold)
    expected = multilabel_cross_entropy(score_maps, soft_labels, threshold=threshold)
    assert torch.equal(module(score_maps, soft_labels), expected)
    assert torch.equal(HybridLoss()(score_maps, soft_labels), hybrid_loss(score_maps, soft_labels))
    assert torch.equal(
        MultiLabelCrossEntropy()(score_maps, soft_labels), multilabel_cross_entropy(score_maps, soft_labels)
    )


def test_the_modules_show_their_settings():
    assert "normalization='pooled', threshold=0.1" in repr(HybridLoss(normalization="pooled", threshold=0.1))
    assert "threshold=0.1" in repr(MultiLabelCrossEntropy(threshold=0.1))


# Limits that can be checked by hand


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_of_hard_labels_costs_nothing(name):
    soft_labels = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    assert LOSSES[name]((soft_labels * 2 - 1) * 1e4, soft_labels).item() == 0


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("class", [[1.0, 0.0], [1.0, 0.0]], 4 * LOG_2),  # two classes, each with N+ and N-
        ("pooled", [[1.0, 0.0], [1.0, 0.0]], 2 * LOG_2),
        ("class", [[0.0, 0.0], [0.0, 0.0]], 2 * LOG_2),  # N+ empty
        ("pooled", [[0.0, 0.0], [0.0, 0.0]], LOG_2),
        ("class", [[1.0, 1.0], [1.0, 1.0]], 2 * LOG_2),  # N- empty
        ("pooled", [[1.0, 1.0], [1.0, 1.0]], LOG_2),
        ("class", [[1.0, 1.0], [0.0, 0.0]], 2 * LOG_2),
        ("class", [[0.5, 0.0], [0.0, 0.0]], 2.5 * LOG_2),  # Eq. 7 weighs by p
        ("plain", [[0.5, 0.0], [1.0, 0.0]], 2 * LOG_2),
    ],
)
def test_at_score_zero_every_mean_counts_log_2(name, labels, expected):
    soft_labels = torch.tensor(labels, dtype=torch.float64)[None, :, None]
    assert LOSSES[name](torch.zeros_like(soft_labels), soft_labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_soft_label_equal_to_the_threshold_counts_as_zero(name):
    score_maps = torch.tensor([[[[1.0, -2.0, 0.5]]]], dtype=torch.float64)
    at, below, above = (torch.tensor([[[[p, 0.0, 1.0]]]], dtype=torch.float64) for p in (0.25, 0.0, 0.26))
    loss = partial(LOSSES[name], score_maps, threshold=0.25)
    assert loss(at) == loss(below)
    assert loss(at) != loss(above)


@pytest.mark.parametrize("name", ["class", "pooled"])
def test_without_threshold_the_faintest_attention_is_enhanced(name):
    score_maps = torch.full((1, 1, 1, 1), -3.0)
    assert LOSSES[name](score_maps, torch.full((1, 1, 1, 1), 1e-6)).item() == pytest.approx(3.0486e-6, rel=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_the_batch_is_averaged(name):
    score_maps, soft_labels = inputs(3, 2, 4, 5)
    singles = [LOSSES[name](score_maps[i : i + 1], soft_labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(LOSSES[name](score_maps, soft_labels), sum(singles) / 3)


@pytest.mark.parametrize("name", ["class", "plain"])
def test_the_classes_are_summed(name):
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    singles = [LOSSES[name](score_maps[:, c : c + 1], soft_labels[:, c : c + 1]) for c in range(3)]
    torch.testing.assert_close(LOSSES[name](score_maps, soft_labels), sum(singles))


@pytest.mark.parametrize("name", LOSSES)
def test_the_size_of_the_maps_does_not_matter(name):
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    large = [x.repeat_interleave(3, 2).repeat_interleave(2, 3) for x in (score_maps, soft_labels)]
    torch.testing.assert_close(LOSSES[name](*large), LOSSES[name](score_maps, soft_labels))


def test_a_class_with_many_pixels_does_not_outweigh_one_with_few():
    def enhance_only(few: float, many: float, normalization: str) -> float:
        """One enhanced pixel in class 0, all others in class 1; nothing to constrain but at -1e4, which is free."""
        soft_labels = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
        soft_labels[0, 0, 0, 0], soft_labels[0, 1] = 1, 1
        score_maps = torch.full_like(soft_labels, -1e4)
        score_maps[0, 0, 0, 0], score_maps[0, 1] = few, many
        return hybrid_loss(score_maps, soft_labels, normalization=normalization).item()

    assert enhance_only(2, -1, "class") == pytest.approx(-log_sigmoid(2) - log_sigmoid(-1))
    assert enhance_only(2, -1, "class") == pytest.approx(enhance_only(-1, 2, "class"))
    assert enhance_only(2, -1, "pooled") == pytest.approx(-log_sigmoid(2) / 17 - log_sigmoid(-1) * 16 / 17)


# Stability


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 20.0, 100.0, 1e4])
def test_extreme_scores_give_finite_value_and_gradient(name, scale, dtype, autocast):
    signs, soft_labels = inputs(2, 3, 4, 5)
    score_maps = (signs.sign() * scale).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = LOSSES[name](score_maps, soft_labels.to(dtype))
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert score_maps.grad.isfinite().all()
    assert score_maps.grad.dtype == dtype
    expected = naive("plain", torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0) if scale == 0 else scale
    assert 0 < loss <= 10 * expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_confident_mistake_costs_its_score_and_keeps_its_gradient(dtype):
    score_maps = torch.tensor([[[[-8192.0, 8192.0]]]], dtype=dtype, requires_grad=True)
    loss = hybrid_loss(score_maps, torch.tensor([[[[1.0, 0.0]]]], dtype=dtype))
    loss.backward()
    assert loss.item() == 16384
    assert score_maps.grad.flatten().tolist() == [-1, 1]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_large_maps_right(name, dtype):
    score_maps = torch.zeros(1, 1, 300, 300, dtype=dtype)
    soft_labels = torch.zeros_like(score_maps)
    soft_labels[..., :150, :] = 1
    expected = 1 if name == "plain" else 2
    assert LOSSES[name](score_maps, soft_labels).item() == pytest.approx(expected * LOG_2, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("first", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("second", [torch.float16, torch.float32, torch.float64])
def test_scores_and_soft_labels_may_differ_in_dtype(name, first, second):
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    expected = naive(name, score_maps.to(first), soft_labels.to(second), 0)
    assert LOSSES[name](score_maps.to(first), soft_labels.to(second)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_arguments_are_not_modified(name):
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    before = score_maps.clone(), soft_labels.clone()
    LOSSES[name](score_maps, soft_labels, threshold=0.25)
    assert torch.equal(score_maps, before[0])
    assert torch.equal(soft_labels, before[1])


# The gradient is written by hand


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradgradcheck(name, threshold):
    score_maps, soft_labels = inputs(2, 2, 2, 3)
    soft_labels[0, 0], soft_labels[1, 1] = 0, 1  # an empty N+, an empty N-
    assert torch.autograd.gradgradcheck(
        lambda scores: LOSSES[name](scores, soft_labels, threshold=threshold), score_maps.requires_grad_()
    )


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_the_gradient_scales_with_what_the_loss_is_multiplied_by(name):
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    loss = LOSSES[name](score_maps.requires_grad_(), soft_labels)
    (once,) = torch.autograd.grad(loss, score_maps, retain_graph=True)
    (again,) = torch.autograd.grad(loss, score_maps, retain_graph=True)
    assert torch.equal(once, again)
    for create_graph in (True, False):
        (thrice,) = torch.autograd.grad(3 * loss, score_maps, create_graph=create_graph)
        torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("name", LOSSES)
def test_the_layout_in_memory_does_not_matter(name):
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    expected = LOSSES[name](score_maps, soft_labels)
    for scores, labels in (
        (score_maps.to(memory_format=torch.channels_last), soft_labels),
        (score_maps, soft_labels.to(memory_format=torch.channels_last)),
        (score_maps.mT.contiguous().mT, soft_labels.mT.contiguous().mT),
    ):
        torch.testing.assert_close(LOSSES[name](scores, labels), expected)
    one = soft_labels[:1, :1]
    torch.testing.assert_close(
        LOSSES[name](score_maps, one.expand_as(soft_labels)), LOSSES[name](score_maps, one.repeat(2, 3, 1, 1))
    )


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_soft_labels_are_constants(name):
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    LOSSES[name](score_maps.requires_grad_(), soft_labels.requires_grad_()).backward()
    assert score_maps.grad is not None
    assert soft_labels.grad is None


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_one_tensor_of_the_scores_size_waits_for_the_backward_pass(name):
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    kept = {}

    def keep(values: Tensor) -> Tensor:
        kept[values.data_ptr()] = values.nbytes
        return values

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        LOSSES[name](score_maps.requires_grad_(), soft_labels)
    del kept[score_maps.data_ptr()]
    assert sum(kept.values()) <= score_maps.nbytes


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_is_the_same(name):
    score_maps, soft_labels = inputs(2, 3, 4, 5)
    loss = partial(LOSSES[name], soft_labels=soft_labels, threshold=0.25)
    expected, compiled = loss(score_maps.requires_grad_()), torch.compile(loss, backend="aot_eager")(score_maps)
    assert compiled == expected
    assert torch.equal(*(torch.autograd.grad(value, score_maps)[0] for value in (compiled, expected)))
