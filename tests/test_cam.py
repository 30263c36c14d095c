import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from oaa_lib import CAMHead, normalize_attention

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
METHODS = ("max", "minmax")


def score_maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4), st.sampled_from(METHODS))
def test_each_map_is_normalized_by_itself_as_eq_2_says(seed, height, width, method):
    values = score_maps(2, 3, height, width, seed=seed, dtype=torch.float64)
    attention = normalize_attention(values, method=method)
    for image in range(2):
        for c in range(3):
            expected = reference.normalize(values[image, c].tolist(), method)
            torch.testing.assert_close(attention[image, c], torch.tensor(expected, dtype=torch.float64))


def test_max_is_the_default():
    values = score_maps(2, 4, 5)
    assert torch.equal(normalize_attention(values), normalize_attention(values, method="max"))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 5, 3, 4), (2, 1, 5, 3, 4), (0, 3, 4)])
def test_leading_dimensions_are_free(shape):
    assert normalize_attention(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype_is_kept_and_the_values_fill_zero_to_one(dtype, method):
    attention = normalize_attention(score_maps(3, 4, 5, dtype=dtype), method=method)
    assert attention.dtype == dtype
    assert torch.equal(attention.amax((-2, -1)), torch.ones(3, dtype=dtype))
    assert torch.equal(attention.amin((-2, -1)), torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_the_scale_of_the_scores_does_not_matter(scale):
    values = score_maps(2, 3, 4)
    torch.testing.assert_close(normalize_attention(values * scale), normalize_attention(values))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0.0, -0.0, -2.0])
def test_a_map_without_positive_score_becomes_zero(value, dtype, method):
    values = torch.full((2, 3, 4), value, dtype=dtype)
    assert torch.equal(normalize_attention(values, method=method), torch.zeros_like(values))


def test_a_flat_positive_map_is_one_under_max_and_zero_under_minmax():
    values = torch.full((3, 4), 5.0)
    assert torch.equal(normalize_attention(values, method="max"), torch.ones(3, 4))
    assert torch.equal(normalize_attention(values, method="minmax"), torch.zeros(3, 4))


@pytest.mark.parametrize("method", METHODS)
def test_the_input_is_not_modified(method):
    values = score_maps(2, 3, 4)
    before = values.clone()
    normalize_attention(values, method=method)
    assert torch.equal(values, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_visible_and_stay_in_their_map(fault, method):
    values = score_maps(2, 3, 4)
    healthy = normalize_attention(values, method=method)
    values[0, 1, 2] = fault
    attention = normalize_attention(values, method=method)
    assert attention[0].isnan().any()
    assert torch.equal(attention[1], healthy[1])


def test_max_passes_gradcheck():
    values = score_maps(2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(normalize_attention, values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [torch.zeros(2, 2), -torch.ones(2, 2), torch.ones(2, 2), torch.eye(2)])
def test_the_gradient_is_finite_even_for_flat_maps(values, method):
    values = values.clone().requires_grad_()
    normalize_attention(values, method=method).square().sum().backward()
    assert values.grad.isfinite().all()


@pytest.mark.parametrize("num_convs", [0, 1, 3])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_score_maps_keep_the_size_of_the_features(num_convs, size):
    out = CAMHead(4, 6, hidden_channels=5, num_convs=num_convs)(score_maps(2, 4, *size))
    assert out.score_maps.shape == (2, 6, *size)
    assert out.logits.shape == (2, 6)


def test_the_output_unpacks_into_logits_and_score_maps():
    logits, maps = CAMHead(4, 6, hidden_channels=5)(score_maps(2, 4, 3, 5))
    assert (logits.shape, maps.shape) == ((2, 6), (2, 6, 3, 5))


def test_logits_are_the_global_average_of_the_score_maps():
    out = CAMHead(4, 6, hidden_channels=5)(score_maps(2, 4, 3, 5))
    for image in range(2):
        for c in range(6):
            average = sum(out.score_maps[image, c].flatten().tolist()) / 15
            assert out.logits[image, c].item() == pytest.approx(average, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("num_convs", [0, 1, 3])
def test_the_head_is_3x3_convolutions_with_relu_and_a_class_aware_1x1(num_convs):
    head = CAMHead(4, 6, hidden_channels=5, num_convs=num_convs)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    features = score_maps(2, 4, 3, 5)
    *convs, class_aware = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(3, 3)] * num_convs
    assert class_aware.kernel_size == (1, 1)
    expected = features
    for conv in convs:
        expected = F.relu(F.conv2d(expected, conv.weight, conv.bias, padding=1))
    expected = F.conv2d(expected, class_aware.weight, class_aware.bias)
    torch.testing.assert_close(head(features).score_maps, expected)


def test_the_papers_head_is_the_default():
    convs = [module for module in CAMHead(8, 20).modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [512, 512, 512, 20]


def test_new_layers_start_from_a_narrow_normal_and_zero_bias():
    torch.manual_seed(0)
    for layer in CAMHead(64, 1000, hidden_channels=64).modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
            assert abs(layer.weight.mean().item()) < 0.0005
            assert not layer.bias.any()


@pytest.mark.parametrize("num_convs", [0, 2])
def test_the_features_are_not_modified(num_convs):
    features = score_maps(2, 4, 3, 5)
    before = features.clone()
    CAMHead(4, 6, hidden_channels=5, num_convs=num_convs)(features)
    assert torch.equal(features, before)


def test_gradients_reach_every_parameter_and_the_features():
    head, features = CAMHead(4, 6, hidden_channels=5), score_maps(2, 4, 3, 5).requires_grad_()
    head(features).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert features.grad.isfinite().all()


def test_a_saved_head_returns_the_same():
    first, second, features = CAMHead(4, 6, hidden_channels=5), CAMHead(4, 6, hidden_channels=5), score_maps(2, 4, 3, 5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(features).score_maps, second(features).score_maps)
