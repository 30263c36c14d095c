"""Classifiers of transformers get score maps that average to their logits."""

import pytest
import torch
import transformers
from test_wrapping import randomize

from oaa_lib import wrap_classifier


def hugging_face(name):
    """Small models of the library's own classes; the name's first part tells which."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = {
        "ViT": small | {"image_size": 64, "patch_size": 16},
        "Swin": {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        "Dinov2": small | {"image_size": 56, "patch_size": 14},
        "Dinov2WithRegisters": small | {"image_size": 56, "patch_size": 14},
        "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        "ConvNext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    }[name]
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(num_labels=7, **config)
    return randomize(getattr(transformers, f"{name}ForImageClassification")(settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "cells"),
    [
        ("Swin", (64, 64), (8, 8)),
        ("Dinov2", (56, 84), (4, 6)),  # reads the class token and the average
        ("Dinov2WithRegisters", (56, 84), (4, 6)),
        ("ResNet", (64, 96), (8, 12)),
        ("ConvNext", (64, 96), (8, 12)),
        ("ViT", (64, 64), (4, 4)),
    ],
)
def test_models_of_hugging_face(name, size, cells):
    model = hugging_face(name)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    wrapped = wrap_classifier(model)
    with torch.no_grad():
        first, again, own = wrapped(images), wrapped(images), model(images).logits
        assert first.score_maps.shape == (2, 7, *cells)
        assert torch.equal(first.logits, own)
        assert torch.equal(first.score_maps, again.score_maps)
        if name == "ViT":  # reads the class token
            tokens = model.vit(images).last_hidden_state[:, 1:]
            torch.testing.assert_close(first.score_maps.flatten(2).transpose(1, 2), model.classifier(tokens))
        else:
            torch.testing.assert_close(first.score_maps.mean((-2, -1)), own, rtol=1e-5, atol=1e-5)
