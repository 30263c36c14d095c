"""attention_drop against a loop over pixels, its rate, and what it leaves alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from oaa_lib import AttentionAccumulator, AttentionDrop, attention_drop


def drop_by_loop(images, attention, labels, threshold):
    """Every image is treated."""
    out = images.clone()
    for b in range(len(images)):
        for c in range(labels.shape[1]):
            if labels[b, c]:
                full = F.interpolate(
                    attention[b, c][None, None], images.shape[-2:], mode="bilinear", align_corners=False
                )
                for y in range(images.shape[2]):
                    for x in range(images.shape[3]):
                        if full[0, 0, y, x] > threshold:
                            out[b, :, y, x] = 0
    return out


@given(st.integers(0, 1000), st.sampled_from([1, 3, 40]), st.floats(0, 1))
def test_all_images_treated_equal_the_loop(seed, classes, threshold):
    generator = torch.Generator().manual_seed(seed)
    images, attention = torch.randn(2, 3, 6, 9, generator=generator), torch.rand(2, classes, 2, 3, generator=generator)
    labels = torch.rand(2, classes, generator=generator) < 0.1
    before = images.clone()
    found = attention_drop(images, attention, labels, rate=1.0, threshold=threshold)
    assert torch.equal(found, drop_by_loop(images, attention, labels, threshold))
    assert torch.equal(images, before)


def test_each_image_is_treated_by_itself_at_the_rate():
    torch.manual_seed(0)
    dropped = attention_drop(torch.ones(4000, 1, 2, 2), torch.ones(4000, 1, 1, 1), torch.ones(4000, 1), rate=0.3)
    shares = dropped.mean((1, 2, 3))
    assert set(shares.tolist()) == {0.0, 1.0}  # wholly or not at all
    assert 1 - shares.mean().item() == pytest.approx(0.3, abs=0.03)
    torch.manual_seed(0)
    again = attention_drop(torch.ones(4000, 1, 2, 2), torch.ones(4000, 1, 1, 1), torch.ones(4000, 1), rate=0.3)
    assert torch.equal(dropped, again)


def test_rate_0_no_label_and_no_attention_hide_nothing():
    images, strong, labels = torch.rand(3, 3, 8, 8), torch.ones(3, 2, 4, 4), torch.ones(3, 2)
    assert torch.equal(attention_drop(images, strong, labels, rate=0.0), images)
    assert torch.equal(attention_drop(images, strong, labels * 0, rate=1.0), images)
    assert torch.equal(attention_drop(images, strong * 0, labels, rate=1.0), images)


def test_gradients_pass_where_nothing_is_hidden():
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    attention = torch.zeros(1, 1, 4, 4)
    attention[..., :2] = 1
    attention_drop(images, attention, torch.ones(1, 1), rate=1.0).sum().backward()
    assert torch.equal(images.grad[0, 0], 1 - attention[0, 0])


def test_the_module_acts_in_training_alone():
    images, attention, labels = torch.rand(2, 3, 8, 8), torch.ones(2, 1, 2, 2), torch.ones(2, 1)
    drop = AttentionDrop(rate=1.0, threshold=0.5)
    assert not drop(images, attention, labels).any()
    assert torch.equal(drop.eval()(images, attention, labels), images)
    assert repr(drop) == "AttentionDrop(rate=1.0, threshold=0.5)"


def test_the_accumulators_latest_attention_is_what_it_takes():
    labels = torch.tensor([[1, 0], [1, 1]])
    accumulator = AttentionAccumulator(labels, (2, 2), gate=None, fusion="latest")
    maps = torch.zeros(2, 2, 2, 2)
    maps[0, 0, 0, 0] = maps[1, 1, 1, 1] = 1
    accumulator.update([0, 1], maps)
    images = torch.ones(2, 3, 2, 2)
    found = attention_drop(images, accumulator[[0, 1]], labels, rate=1.0)
    assert torch.equal(found[:, 0], torch.tensor([[[0.0, 1], [1, 1]], [[1, 1], [1, 0]]]))


def test_nothing_waits_for_the_device():
    with FakeTensorMode():
        images = torch.empty(2, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
        attention, labels = torch.empty(2, 5, 4, 4, device="cuda"), torch.empty(2, 5, device="cuda")
        out = attention_drop(images, attention, labels)
        assert (out.device.type, out.dtype, out.shape) == ("cuda", torch.bfloat16, images.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.ones(3, 8, 8)}, "expected images"),
        ({"attention": torch.ones(1, 2, 4, 4)}, "expected images"),
        ({"labels": torch.ones(2, 3)}, r"labels \(B, C\), got .*\(2, 3\)"),
        ({"rate": 1.5}, "expected rate"),
        ({"threshold": -0.1}, "threshold in"),
    ],
)
def test_bad_input_is_told(change, message):
    given = {"images": torch.ones(2, 3, 8, 8), "attention": torch.ones(2, 2, 4, 4), "labels": torch.ones(2, 2)} | change
    with pytest.raises(ValueError, match=message):
        attention_drop(**given)
    if "rate" in change or "threshold" in change:
        with pytest.raises(ValueError, match=message):
            AttentionDrop(**change)
