"""multi_scale_attention against a loop over images, classes, scales and mirror images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from oaa_lib import CAMHead, multi_scale_attention, wrap_classifier


def network():
    torch.manual_seed(0)
    head = CAMHead(6, 4, hidden_channels=8, num_convs=1)
    nn.init.normal_(head.class_aware.weight)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.Tanh(), head).eval()


def by_loop(model, images, scales, flip, size):
    out = torch.zeros(len(images), 4, *size)
    views = [(scale, mirrored) for scale in scales for mirrored in ([False, True] if flip else [False])]
    for b, image in enumerate(images):
        for scale, mirrored in views:
            sides = (round(image.shape[1] * scale), round(image.shape[2] * scale))
            shown = F.interpolate(image[None], sides, mode="bilinear", align_corners=False)
            maps = model(shown.flip(-1) if mirrored else shown).score_maps[0]
            for c in range(4):
                one = maps[c].clamp(min=0)
                one = one / one.max() if one.max() > 0 else one
                one = one.flip(-1) if mirrored else one
                out[b, c] += F.interpolate(one[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    return out / len(views)


@given(
    st.integers(0, 100),
    st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.5, 2.0]), min_size=1, max_size=3),
    st.booleans(),
)
def test_equals_the_naive_loop(seed, scales, flip):
    model = network()
    images = torch.randn(2, 3, 24, 36, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = multi_scale_attention(model, images, scales=scales, flip=flip)
        expected = by_loop(model, images, scales, flip, tuple(found.shape[-2:]))
    torch.testing.assert_close(found, expected)
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_size_is_that_of_scale_1_wherever_it_stands():
    images = torch.rand(1, 3, 24, 36)
    assert multi_scale_attention(network(), images).shape[-2:] == (6, 9)
    assert multi_scale_attention(network(), images, scales=(2.0, 1.0)).shape[-2:] == (6, 9)
    assert multi_scale_attention(network(), images, scales=(2.0,)).shape[-2:] == (12, 18)
    assert multi_scale_attention(network(), images, size=(24, 36)).shape[-2:] == (24, 36)


def test_a_mirrored_image_has_mirrored_attention():
    images = torch.rand(2, 3, 25, 33)  # 4 x + 1: cells are mirrored onto cells
    model = network()
    torch.testing.assert_close(
        multi_scale_attention(model, images.flip(-1), scales=(1.0,)),
        multi_scale_attention(model, images, scales=(1.0,)).flip(-1),
    )


def test_model_and_images_are_left_as_they_are():
    model, images = network().train(), torch.rand(1, 3, 24, 24, requires_grad=True)
    before = images.detach().clone()
    out = multi_scale_attention(model, images)
    assert model.training
    assert not out.requires_grad
    assert torch.equal(images.detach(), before)


def test_a_wrapped_classifier_goes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    ).eval()
    assert multi_scale_attention(wrap_classifier(model), torch.rand(2, 3, 32, 32), scales=(1, 2)).shape == (2, 5, 8, 8)


def test_it_stays_on_the_device():
    with FakeTensorMode(), torch.device("cuda"):
        head = CAMHead(6, 4, hidden_channels=8, num_convs=1)
        model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), head)
        out = multi_scale_attention(model, torch.empty(2, 3, 32, 48))
        assert (out.device.type, out.shape) == ("cuda", (2, 4, 8, 12))


@pytest.mark.parametrize(
    ("images", "scales", "message"),
    [
        (torch.rand(3, 24, 24), (1.0,), "expected images"),
        (torch.zeros(1, 3, 24, 24, dtype=torch.uint8), (1.0,), "uint8"),
        (torch.rand(1, 3, 24, 24), (), "scales above 0"),
        (torch.rand(1, 3, 24, 24), (1.0, 0.0), "scales above 0"),
    ],
)
def test_bad_input_is_told(images, scales, message):
    with pytest.raises(ValueError, match=message):
        multi_scale_attention(network(), images, scales=scales)


def test_nan_stays_in_sight():
    model, images = network(), torch.rand(2, 3, 24, 36)
    images[0, :, 3, 3] = torch.nan
    found = multi_scale_attention(model, images, scales=(1.0,), flip=False)
    assert found[0].isnan().any()
    assert not found[1].isnan().any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scales": 1.0}, TypeError, "scales as a sequence of numbers, got float"),
        ({"scales": ("half",)}, TypeError, "scales as a number"),
        ({"scales": (float("nan"),)}, ValueError, "scales in .*got nan"),
        ({"scales": (1e9,)}, ValueError, "scales in .*got 1e"),
        ({"size": 7}, TypeError, r"size as \(height, width\), got 7"),
        ({"size": (7, 7, 7)}, ValueError, r"size as \(height, width\), got \(7, 7, 7\)"),
        ({"size": (7, 0)}, ValueError, "size >= 1, got 0"),
        ({"flip": "no"}, TypeError, "flip as True or False, got str"),
        ({"model": None}, TypeError, "model to be callable, got NoneType"),
    ],
)
def test_arguments_of_another_kind_are_named(options, error, message):
    with pytest.raises(error, match=f"expected {message}"):
        multi_scale_attention(**{"model": network(), "images": torch.rand(1, 3, 24, 24), **options})


def test_a_model_without_score_maps_is_told():
    with pytest.raises(TypeError, match=r"use wrap_classifier\(model\)"):
        multi_scale_attention(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 24, 24))
