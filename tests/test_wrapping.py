"""wrap_classifier: real models of three libraries with random weights, exact where it says so, and no trace left."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from oaa_lib import AttentionAccumulator, CAMHead, hybrid_loss, wrap_classifier


def randomize(model: nn.Module) -> nn.Module:
    """Some models start with a head of zeros, or norms that are the identity."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or not parameter.any():
            shift = 1 if "weight" in name or "gamma" in name or "scale" in name else 0
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + shift
    return model.eval()


def torchvision_model(name, **options):
    torch.manual_seed(0)
    return randomize(torchvision.models.get_model(name, weights=None, num_classes=7, **options))


def timm_model(name, **options):
    torch.manual_seed(0)
    return randomize(timm.create_model(name, num_classes=7, **options))


EXACT = {  # global average pool and one linear layer
    "torchvision resnet18": (lambda: torchvision_model("resnet18"), (64, 96), (2, 3)),
    "torchvision efficientnet_b0": (lambda: torchvision_model("efficientnet_b0"), (64, 96), (2, 3)),
    "torchvision convnext_tiny": (lambda: torchvision_model("convnext_tiny"), (64, 96), (2, 3)),
    "torchvision mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), (64, 96), (2, 3)),
    "torchvision densenet121": (lambda: torchvision_model("densenet121"), (64, 96), (2, 3)),
    "torchvision regnet_y_400mf": (lambda: torchvision_model("regnet_y_400mf"), (64, 96), (2, 3)),
    "torchvision squeezenet1_1": (lambda: torchvision_model("squeezenet1_1"), (64, 96), (3, 5)),
    "torchvision swin_t": (lambda: torchvision_model("swin_t"), (64, 96), (2, 3)),
    "timm resnet18": (lambda: timm_model("resnet18"), (64, 96), (2, 3)),
    "timm efficientnet_lite0": (lambda: timm_model("efficientnet_lite0"), (64, 96), (2, 3)),
    "timm convnext_atto": (lambda: timm_model("convnext_atto"), (64, 96), (2, 3)),
    "timm densenet121": (lambda: timm_model("densenet121"), (64, 96), (2, 3)),
    "timm swin_tiny": (lambda: timm_model("swin_tiny_patch4_window7_224", img_size=(64, 96)), (64, 96), (2, 3)),
    "timm vit, averaged": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=(64, 96), global_pool="avg", class_token=False),
        (64, 96),
        (4, 6),
    ),
}
CLASS_TOKEN = {
    "torchvision vit_b_32": (lambda: torchvision_model("vit_b_32", image_size=96), (96, 96), (3, 3)),
    "timm vit_tiny": (lambda: timm_model("vit_tiny_patch16_224", img_size=(64, 96)), (64, 96), (4, 6)),
    "timm dinov2 with registers": (
        lambda: timm_model("vit_small_patch14_reg4_dinov2", img_size=(56, 84)),
        (56, 84),
        (4, 6),
    ),
    "timm deit_tiny": (lambda: timm_model("deit_tiny_patch16_224", img_size=(64, 96)), (64, 96), (4, 6)),
}


def hugging_face(name):
    """Small models of the library's own classes; the name's first part tells which."""
    import transformers

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


def call_twice(model, size):
    """The first call finds the way, the second takes it."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    wrapped = wrap_classifier(model)
    with torch.no_grad():
        first, again, own = wrapped(images), wrapped(images), model(images)
    assert torch.equal(first.logits, own)
    assert torch.equal(again.logits, own)
    assert torch.equal(first.score_maps, again.score_maps)
    return first, images


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_score_maps_average_to_the_logits(name):
    make, size, cells = EXACT[name]
    out, _ = call_twice(make(), size)
    assert out.score_maps.shape == (2, 7, *cells)
    assert out.score_maps.std((-2, -1)).max() > 0
    torch.testing.assert_close(out.score_maps.mean((-2, -1)), out.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASS_TOKEN)
def test_transformers_that_read_the_class_token_give_maps_of_their_patches(name):
    make, size, cells = CLASS_TOKEN[name]
    model = make()
    out, images = call_twice(model, size)
    assert out.score_maps.shape == (2, 7, *cells)
    if hasattr(model, "forward_features"):
        tokens = model.forward_features(images)[:, -cells[0] * cells[1] :]
        expected = F.linear(model.fc_norm(tokens), model.head.weight, model.head.bias)
        expected = expected.transpose(1, 2).unflatten(2, cells)
        torch.testing.assert_close(out.score_maps, expected, rtol=1e-4, atol=1e-4)


def small_resnet(classes=7):
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None, num_classes=classes)


def test_score_maps_are_the_1x1_convolution_of_the_last_features():
    model = small_resnet().eval()
    out, images = call_twice(model, (64, 96))
    with torch.no_grad():
        features = nn.Sequential(*list(model.children())[:-2])(images)
        expected = F.conv2d(features, model.fc.weight[..., None, None], model.fc.bias)
    torch.testing.assert_close(out.score_maps, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_hidden_layers_after_the_pool_see_each_position():
    model = torchvision_model("mobilenet_v3_small")
    out, images = call_twice(model, (64, 96))
    with torch.no_grad():
        features = model.features(images)
    for y in range(features.shape[2]):
        for x in range(features.shape[3]):
            torch.testing.assert_close(out.score_maps[:, :, y, x], model.classifier(features[:, :, y, x]))


def test_the_head_of_the_library_is_taken_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), CAMHead(8, 5, hidden_channels=8))
    images = torch.randn(2, 3, 32, 32)
    expected, found = model(images), wrap_classifier(model)(images)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.score_maps, expected.score_maps)


def test_nothing_is_left_behind():
    model = small_resnet().train()
    model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    keys = list(model.state_dict())
    wrapped = wrap_classifier(model)
    for _ in range(2):
        with torch.no_grad():
            out = wrapped(torch.randn(2, 3, 64, 64))
        assert out.score_maps.grad_fn is None
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
        assert {name: module.training for name, module in model.named_modules()} == modes
    assert list(model.state_dict()) == keys
    with pytest.raises(RuntimeError):
        wrapped(torch.randn(2, 4, 64, 64))  # the model's own error
    assert all(not module._forward_hooks for module in model.modules())


def test_a_training_step_is_the_models_own():
    images, labels = torch.randn(4, 3, 64, 64), torch.eye(7)[:4]
    weights = []
    for wrap in (False, True):
        model = small_resnet().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        call = wrap_classifier(model) if wrap else model
        accumulator = AttentionAccumulator(labels, (2, 2), gate=None)
        for _ in range(3):
            out = call(images)
            logits = out.logits if wrap else out
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits, labels).backward()
            optimizer.step()
            if wrap:
                accumulator.update(range(4), out.score_maps, out.logits)
        weights.append(model.state_dict())
        assert not wrap or accumulator.accumulated.sum() == 4
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_score_maps_can_be_trained():
    wrapped = wrap_classifier(small_resnet().train())
    out = wrapped(torch.randn(2, 3, 64, 64))
    hybrid_loss(out.score_maps, torch.rand(2, 7, 2, 2)).backward()
    assert wrapped.model.fc.weight.grad.abs().sum() > 0
    assert wrapped.model.conv1.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_dropout_before_the_linear_layer_disturbs_the_logits_alone():
    model = torchvision_model("efficientnet_b0").train()
    for module in model.modules():  # stochastic depth would change the features too
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    wrapped, images = wrap_classifier(model), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        first, second = wrapped(images), wrapped(images)
    assert not torch.equal(first.logits, second.logits)
    torch.testing.assert_close(first.score_maps, second.score_maps)


def test_another_image_size_needs_no_new_wrapper():
    wrapped = wrap_classifier(small_resnet().eval())
    for size, cells in (((64, 64), (2, 2)), ((96, 160), (3, 5))):
        assert wrapped(torch.randn(1, 3, *size)).score_maps.shape[-2:] == cells


def test_autocast_reaches_the_score_maps():
    model = small_resnet().eval()
    images = torch.randn(2, 3, 64, 64)
    wrapped = wrap_classifier(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            out = wrapped(images)
            assert out.logits.dtype == out.score_maps.dtype == torch.bfloat16
    with torch.no_grad():
        exact = wrap_classifier(model)(images)
    torch.testing.assert_close(out.score_maps.float(), exact.score_maps, rtol=0.05, atol=0.05)


def test_distributed_data_parallel_inside_or_outside_gives_the_same():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        images, model = torch.randn(2, 3, 64, 64), small_resnet().eval()
        expected = wrap_classifier(model)(images)
        parallel = torch.nn.parallel.DistributedDataParallel
        for wrapped in (wrap_classifier(parallel(model)), parallel(wrap_classifier(model))):
            for _ in range(2):
                model.zero_grad()
                found = wrapped(images)
                (found.logits.sum() + found.score_maps.sum()).backward()
                assert model.conv1.weight.grad.abs().sum() > 0
                torch.testing.assert_close(found.logits, expected.logits)
                torch.testing.assert_close(found.score_maps, expected.score_maps)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_compiled_inside_or_outside_gives_the_same(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    images = torch.randn(2, 3, 32, 32)
    expected = wrap_classifier(model)(images)
    compiled = torch.compile(model, backend="eager")
    for wrapped in (wrap_classifier(compiled), torch.compile(wrap_classifier(model), backend="eager")):
        for _ in range(2):
            found = wrapped(images)
            torch.testing.assert_close(found.logits, expected.logits)
            torch.testing.assert_close(found.score_maps, expected.score_maps)


class Output:
    def __init__(self, logits):
        self.logits = logits


class Returning(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.model, self.shape = small_resnet().eval(), shape

    def forward(self, images):
        return self.shape(self.model(images))


@pytest.mark.parametrize("shape", [Output, lambda logits: (logits, None), lambda logits: logits])
def test_logits_come_in_the_forms_that_libraries_use(shape):
    out = wrap_classifier(Returning(shape))(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(out.score_maps.mean((-2, -1)), out.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(small_resnet().eval(), nn.Sigmoid()), "after a sigmoid; wrap the model without it"),
        (lambda: nn.Sequential(small_resnet().eval(), nn.Softmax(1)), "after a softmax"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 8), nn.Flatten(), nn.Linear(256, 5)),
            r"average of a map with 256 channels.*the last map is that of '0', \(2, 4, 8, 8\). Put a CAMHead",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5)), "there is no map"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten()), "found none"),
        (lambda: nn.Conv2d(3, 4, 3), r"returns logits \(B, C\), got \(2, 4, 62, 62\)"),
    ],
)
def test_what_cannot_be_understood_is_told(model, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        wrap_classifier(model())(torch.randn(2, 3, 64, 64))


def test_no_model_is_told():
    with pytest.raises(TypeError, match="expected a model"):
        wrap_classifier(lambda images: images)


class Tokens(nn.Module):
    """A transformer's form without its layers; the patches are cut without a convolution."""

    def __init__(self, prefix):
        super().__init__()
        self.norm, self.head, self.prefix = nn.LayerNorm(48), nn.Linear(48, 5), prefix

    def forward(self, images):
        patches = F.unfold(images, 4, stride=4).transpose(1, 2)
        tokens = self.norm(torch.cat([patches[:, : self.prefix].cumsum(1), patches], 1))
        return self.head(tokens[:, 0])


def test_tokens_that_form_no_rectangle_are_told():
    torch.manual_seed(0)
    assert wrap_classifier(Tokens(1))(torch.randn(2, 3, 32, 32)).score_maps.shape == (2, 5, 8, 8)
    with pytest.raises(ValueError, match="tokens that form a rectangle, got 67"):
        wrap_classifier(Tokens(3))(torch.randn(2, 3, 32, 32))
