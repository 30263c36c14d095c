"""Attention of other packages' CAM methods, into `update` in three lines; for a network whose CAM is known."""

import pytest
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, LayerCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from oaa_lib import AttentionAccumulator, normalize_attention, wrap_classifier

LABELS = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
SIZE = (9, 12)


@pytest.fixture
def model() -> nn.Sequential:
    """Feature maps have the image's size, so that nothing is resized; the linear layer makes the CAM exact."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3, bias=False))
    model(torch.rand(8, 3, *SIZE))  # statistics of the batch norm
    return model.eval()


def expected(model: nn.Module, images: Tensor, fusion: str) -> AttentionAccumulator:
    out = wrap_classifier(model)(images)
    accumulator = AttentionAccumulator(LABELS, SIZE, fusion=fusion, dtype=torch.float32)
    attention = normalize_attention(out.score_maps.detach().relu(), method="minmax")  # as both packages do
    return accumulator.update(range(len(images)), attention, out.logits.detach(), normalization=None)


def assert_same(accumulator: AttentionAccumulator, other: AttentionAccumulator) -> None:
    assert 0 < accumulator.accepted < accumulator.offered == int(LABELS.sum())  # the gate has refused some
    assert torch.equal(accumulator.counts, other.counts)
    rows = range(len(LABELS))
    torch.testing.assert_close(accumulator[rows], other[rows], atol=2e-4, rtol=0)


@pytest.mark.parametrize("fusion", ["max", "mean"])
def test_grad_cam_is_the_cam_of_a_pooling_network(model, fusion):
    images, indices = torch.rand(4, 3, *SIZE), torch.arange(4)
    logits = model(images).detach()
    accumulator = AttentionAccumulator(LABELS, SIZE, fusion=fusion, dtype=torch.float32)
    with GradCAM(model, [model[0]]) as cam:
        rows, classes = LABELS[indices].nonzero(as_tuple=True)  # one row for each pair of the batch
        attention = torch.from_numpy(cam(images[rows], [ClassifierOutputTarget(c) for c in classes]))
        maps = torch.zeros(*LABELS[indices].shape, *SIZE).index_put_((rows, classes), attention)
        accumulator.update(indices, maps, logits, normalization=None)
    assert_same(accumulator, expected(model, images, fusion))


@pytest.mark.parametrize("method", [EigenCAM, LayerCAM])
def test_other_methods_of_pytorch_grad_cam_fit_the_same_lines(model, method):
    images, indices = torch.rand(4, 3, *SIZE), torch.arange(4)
    accumulator = AttentionAccumulator(LABELS, SIZE, gate=None, dtype=torch.float32)
    with method(model, [model[0]]) as cam:
        rows, classes = LABELS[indices].nonzero(as_tuple=True)
        attention = torch.from_numpy(cam(images[rows], [ClassifierOutputTarget(c) for c in classes]))
        maps = torch.zeros(*LABELS[indices].shape, *SIZE).index_put_((rows, classes), attention)
        accumulator.update(indices, maps, normalization=None)
    assert accumulator.accepted == int(LABELS.sum())
    assert accumulator.attention(3).amax((-2, -1)).min() > 0.99


@pytest.mark.parametrize("fusion", ["max", "mean"])
def test_torchcam_is_the_cam_of_a_pooling_network(model, fusion):
    methods = pytest.importorskip("torchcam.methods", reason="torchcam needs Python 3.11")
    images, indices = torch.rand(4, 3, *SIZE), torch.arange(4)
    logits = model(images).detach()
    accumulator = AttentionAccumulator(LABELS, SIZE, fusion=fusion, dtype=torch.float32)
    with methods.GradCAM(model, model[0]) as cam:
        rows, classes = LABELS[indices].nonzero(as_tuple=True)
        (attention,) = cam(classes.tolist(), model(images[rows]))
        maps = torch.zeros(*LABELS[indices].shape, *attention.shape[-2:]).index_put_((rows, classes), attention.float())
        accumulator.update(indices, maps, logits, normalization=None)
    assert_same(accumulator, expected(model, images, fusion))
