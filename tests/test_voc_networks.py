"""The networks of examples/voc: the paper's VGG-16 against the authors' program, and exact geometry."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import BACKBONES, Geometry, build_network

GOLDEN = Path(__file__).parent / "golden" / "vgg16_classifier.npz"


def test_vgg16_returns_the_scores_of_the_release():
    golden = np.load(GOLDEN)
    network = build_network("vgg16", 20, weights="none").double().eval()
    parameters = list(network.parameters())
    assert [str(tuple(p.shape)) for p in parameters] == list(golden["shapes"])
    with torch.no_grad():
        for j, p in enumerate(parameters):
            is_weight = p.ndim > 1
            n, scale = (p[0].numel(), 1.4) if is_weight else (p.numel(), 0.1)
            k = torch.arange(p.numel(), dtype=torch.float64)
            values = torch.sin(0.7 * k * (1 + 0.01 * j) + j + int(golden["seed"])) * (2 / n) ** 0.5 * scale
            p.copy_(values.view_as(p))
        out = network(torch.from_numpy(golden["image"]))
    expected = torch.from_numpy(golden["scores"])
    assert (out.score_maps - expected).abs().max() < 1e-9 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(out.logits, expected.mean((2, 3)))


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_geometry_tells_the_cells_of_the_score_maps(backbone):
    network = build_network(backbone, 3, weights="none").eval()
    height, width = network.geometry.side(97), network.geometry.side(131)
    with torch.no_grad():
        maps = network(torch.zeros(1, 3, height, width)).score_maps
    assert tuple(maps.shape) == (1, 3, network.geometry.cells(height), network.geometry.cells(width))


def test_sides_are_whole_cells_and_nearest():
    assert Geometry(16, centred=True).side(209) == 209
    assert Geometry(16, centred=True).side(314) == 321
    assert Geometry(8, centred=False).side(227) == 224


def test_a_centred_network_sees_mirrored_images_mirrored():
    network = build_network("efficientnet_lite0", 2, weights="none").double().eval()
    with torch.no_grad():
        for p in network.parameters():  # mirror every kernel's average with itself: only geometry can break symmetry
            if p.ndim == 4:
                p.copy_((p + p.flip(-1)) / 2)
        image = torch.rand(1, 3, 49, 65, dtype=torch.float64)
        maps, mirrored = (network(x).score_maps for x in (image, image.flip(-1)))
    torch.testing.assert_close(mirrored.flip(-1), maps)


def test_pretrained_efficientnet_knows_photographs_features():
    network = build_network("efficientnet_lite0", 4)
    fresh = build_network("efficientnet_lite0", 4, weights="none")
    stem, other = network.backbone.conv_stem.weight, fresh.backbone.conv_stem.weight
    assert not torch.equal(stem, other)
    variances = [b for name, b in network.backbone.named_buffers() if name.endswith("running_var")]
    assert not any(torch.equal(v, torch.ones_like(v)) for v in variances)  # every batch norm took its statistics


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no EfficientNet-Lite0"):
        build_network("efficientnet_lite0", 4, weights=str(tmp_path / "other.pth"))


def test_batch_norm_stays_frozen_in_training_mode():
    network = build_network("efficientnet_lite0", 2, weights="none").train()
    before = {name: b.clone() for name, b in network.named_buffers()}
    network(torch.rand(2, 3, 49, 49))
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())


def test_frozen_stages_take_no_gradient():
    network = build_network("efficientnet_lite0", 2, weights="none").train()
    network(torch.rand(2, 3, 49, 49)).logits.sum().backward()
    frozen = {name for name, p in network.named_parameters() if p.grad is None}
    assert all(name.startswith(("backbone.conv_stem", "backbone.bn1", "backbone.blocks.")) for name in frozen)
    assert {int(n.split(".")[2]) for n in frozen if n.startswith("backbone.blocks.")} == {0, 1, 2, 3, 4}
