"""wrap_classifier: real models of three libraries with random weights, exact where it says so, and no trace left."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from oaa_lib import AttentionAccumulator, CAMHead, CAMOutput, hybrid_loss, wrap_classifier


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

    def __init__(self, prefix, fold):
        super().__init__()
        self.norm, self.head, self.prefix, self.fold = nn.LayerNorm(48), nn.Linear(48, 5), prefix, fold

    def forward(self, images):
        if self.fold:
            patches = F.unfold(images, 4, stride=4).transpose(1, 2)
        else:
            patches = images.flatten(1).unflatten(1, (-1, 48))
        tokens = self.norm(torch.cat([patches[:, : self.prefix].cumsum(1), patches], 1))
        return self.head(tokens[:, 0])


def test_tokens_that_form_no_rectangle_are_told():
    torch.manual_seed(0)
    for prefix in (1, 3):
        model = wrap_classifier(Tokens(prefix, fold=True))
        assert model(torch.randn(2, 3, 32, 32)).score_maps.shape == (2, 5, 8, 8)
        assert model(torch.randn(2, 3, 32, 48)).score_maps.shape == (2, 5, 8, 12)
        with pytest.raises(ValueError, match=f"tokens that form a rectangle, got {64 + prefix}"):
            wrap_classifier(Tokens(prefix, fold=False))(torch.randn(2, 3, 32, 32))


def pooled(pool, head=None, channels=8, body=None):
    """A small classifier: a convolution, a pool as a function, a head."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body or nn.Sequential(nn.Conv2d(3, channels, 3, stride=2), nn.ReLU())
            self.head = head or nn.Linear(channels, 5)
            self.pool = pool

        def forward(self, images):
            return self.head(self.pool(self.body(images)))

    torch.manual_seed(0)
    return Pooled().eval()


def gap(out):
    """How far the average of a map is from its logit, relative to the greatest logit."""
    logits, score_maps = out.logits.double(), out.score_maps.double()
    return ((score_maps.mean((-2, -1)) - logits).abs().amax() / logits.abs().amax()).item()


def test_layers_may_be_named_and_repr_shows_the_choice():
    model, images = small_resnet().eval(), torch.randn(2, 3, 64, 96)
    found = wrap_classifier(model)
    assert "found by the first call" in repr(found)
    expected = found(images)
    assert "features='layer4', head='fc'" in repr(found)
    for names in ({"features": "layer4"}, {"head": "fc"}, {"features": "layer4", "head": "fc"}):
        assert torch.equal(wrap_classifier(model, **names)(images).score_maps, expected.score_maps)
    with pytest.raises(ValueError, match=r"explains the logits with features='layer4.0'.*features='layer4'.*'fc'"):
        wrap_classifier(model, features="layer4.0")(images)
    with pytest.raises(
        ValueError, match=r"expected head to be the name of a module.*got 'classifier'.*'avgpool', 'fc'"
    ):
        wrap_classifier(model, head="classifier")
    two = pooled(lambda maps: maps.mean((-2, -1)), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)))
    assert wrap_classifier(two, features="body", head="head")(images).score_maps.shape == (2, 5, 31, 47)
    with pytest.raises(ValueError, match=r"found none with head='body.0'"):
        wrap_classifier(two, head="body.0")(images)


POOLS = {
    "max": lambda maps: maps.amax((-2, -1)),
    "average and max": lambda maps: (maps.mean((-2, -1)) + maps.amax((-2, -1))) / 2,
    "generalised mean": lambda maps: maps.clamp(min=1e-6).pow(3).mean((-2, -1)).pow(1 / 3),
    "log-sum-exp": lambda maps: maps.flatten(2).logsumexp(2),
    "median": lambda maps: maps.flatten(2).median(2).values,
    "sum": lambda maps: maps.sum((-2, -1)),
    "average of the centre": lambda maps: maps[..., 1:-1, 1:-1].mean((-2, -1)),
    "average without the last row": lambda maps: maps[..., :-1, :].mean((-2, -1)),
    "GELU, then average": lambda maps: F.gelu(maps).mean((-2, -1)),
    "softmax-weighted": lambda maps: (maps * maps.flatten(2).softmax(2).view_as(maps)).sum((-2, -1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", POOLS)
def test_another_pool_than_the_average_is_refused_in_every_dtype(name, dtype):
    for seed, positive in ((1, True), (2, False)):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU() if positive else nn.Identity())
        model = pooled(POOLS[name], body=body)
        images = torch.randn(4, 3, 32, 48, dtype=dtype if dtype == torch.float64 else None)
        model = model.to(images.dtype)
        casts = dtype in (torch.bfloat16, torch.float16)
        with (
            torch.no_grad(),
            torch.autocast("cpu", dtype if casts else torch.bfloat16, enabled=casts),
            pytest.raises(ValueError, match="no spatial map explains the logits"),
        ):
            wrap_classifier(model)(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "pool",
    [
        lambda maps: maps.mean((-2, -1)),
        lambda maps: maps.mean(-1).mean(-1),
        lambda maps: F.relu(maps).mean((-2, -1)),
        lambda maps: F.avg_pool2d(maps, maps.shape[-2:]).flatten(1),
        lambda maps: maps.flatten(2).sum(2) / maps[0, 0].numel(),
    ],
)
def test_the_average_is_understood_in_every_dtype(pool, relu, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU() if relu else nn.Identity())
        model, images = pooled(pool, body=body).to(dtype), torch.randn(4, 3, 40, 56, dtype=dtype)
        with torch.no_grad():
            out = wrap_classifier(model)(images)
        assert out.score_maps.shape == (4, 5, 19, 27)
        assert gap(out) < {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.003}[dtype]


class Patches(nn.Module):
    """A transformer's form without attention: patches, tokens before and after them, a norm, a pool, a linear layer."""

    def __init__(self, pool, before=0, after=0, patch=8, width=8, stem=None):
        super().__init__()
        torch.manual_seed(0)
        self.patch = stem or nn.Conv2d(3, width, patch, stride=patch)
        self.before = nn.Parameter(torch.randn(1, before, width))
        self.after = nn.Parameter(torch.randn(1, after, width))
        self.norm, self.head, self.pool = nn.LayerNorm(width), nn.Linear(width, 5), pool

    def forward(self, images):
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.before.expand(len(tokens), -1, -1), tokens], 1)
        tokens = torch.cat([tokens + tokens.mean(1, keepdim=True), self.after.expand(len(tokens), -1, -1)], 1)
        return self.head(self.pool(self.norm(tokens)))


def cells_of(model, images):
    """(B, C, h, w): the linear layer at each patch token of `Patches`, by hand."""
    with torch.no_grad():
        grid = model.patch(images)
        tokens = torch.cat([model.before.expand(len(images), -1, -1), grid.flatten(2).transpose(1, 2)], 1)
        tokens = (tokens + tokens.mean(1, keepdim=True))[:, model.before.shape[1] :]
        return model.head(model.norm(tokens)).transpose(1, 2).reshape(len(images), 5, *grid.shape[-2:])


STEM = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)]


@pytest.mark.parametrize(
    ("model", "class_token"),
    [
        (Patches(lambda tokens: tokens.mean(1)), False),
        (Patches(lambda tokens: tokens[:, 1:].mean(1), before=1), False),
        (Patches(lambda tokens: tokens[:, 5:].mean(1), before=5), False),
        (Patches(lambda tokens: tokens[:, :-3].mean(1), after=3), False),
        (Patches(lambda tokens: tokens[:, 0], before=1), True),
        (Patches(lambda tokens: tokens[:, 0], before=5), True),
        (Patches(lambda tokens: tokens[:, 1], before=2), True),
        (Patches(lambda tokens: tokens[:, -1], before=1, after=2), True),
        (Patches(lambda tokens: tokens[:, 0], before=1, stem=nn.Sequential(*STEM)), True),
        (Patches(lambda tokens: tokens.mean(1), stem=nn.Conv2d(3, 8, 7, 4, 2)), False),
    ],
)
def test_the_grid_of_tokens_is_that_of_the_call(model, class_token):
    network = wrap_classifier(model.eval())
    for sides in ((64, 96), (96, 64), (70, 90), (64, 96), (33, 180), (64, 64), (101, 16)):  # the last: two columns
        images = torch.randn(2, 3, *sides)
        out = network(images)
        torch.testing.assert_close(out.score_maps, cells_of(model, images))
        assert class_token or gap(out) < 1e-5


@pytest.mark.parametrize(("before", "after"), [(1, 0), (5, 0), (0, 2), (2, 3)])
def test_tokens_inside_the_average_that_are_no_patches_keep_their_share(before, after):
    model = Patches(lambda tokens: tokens.mean(1), before, after).eval()
    images = torch.randn(2, 3, 64, 96)
    out = wrap_classifier(model)(images)
    assert gap(out) < 1e-5
    expected = cells_of(model, images)  # differences between cells are those of the patches, by their share
    share = 96 / (96 + before + after)
    torch.testing.assert_close(
        out.score_maps - out.score_maps.mean((-2, -1), keepdim=True),
        share * (expected - expected.mean((-2, -1), keepdim=True)),
    )


class Units(nn.Module):
    """Tokens in units of 2 x 2, as Hiera has them: row after row of units, not of the image."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.norm, self.head, self.form = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, 5), form

    def forward(self, images):
        maps = self.patch(images)
        batch, width, rows, columns = maps.shape
        tokens = maps.flatten(2).transpose(1, 2)  # here the order is that of the image
        units = tokens.reshape(batch, rows, columns, width)
        units = units.reshape(batch, rows // 2, 2, columns // 2, 2, width).transpose(2, 3)
        if self.form == "windows":
            tokens = units.reshape(-1, 4, width).reshape(batch, -1, width)
        else:
            tokens = units.reshape(batch, -1, width)
        tokens = self.norm(tokens)
        if self.form == "back again":  # in the order of the image, but what the norm returned is not
            units = tokens.reshape(batch, rows // 2, columns // 2, 2, 2, width).transpose(2, 3)
            tokens = units.reshape(batch, rows, columns, width).flatten(1, 2)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("form", ["units", "windows", "back again"])
def test_tokens_that_are_out_of_order_are_refused(form):
    with pytest.raises(
        ValueError, match=r"tokens of 'norm', \(2, 96, 8\).*that form a rectangle, got 96 .*or in blocks"
    ):
        wrap_classifier(Units(form).eval())(torch.randn(2, 3, 64, 96))


def test_the_class_token_alone_is_no_map():
    class Late(Patches):  # CvT: the class token leaves the others before the norm
        def forward(self, images):
            tokens = self.patch(images).flatten(2).transpose(1, 2)
            token = torch.cat([self.before + tokens.mean(1, keepdim=True), tokens], 1).split([1, tokens.shape[1]], 1)[0]
            return self.head(self.norm(token).mean(1))

    with pytest.raises(ValueError, match="no spatial map explains the logits"):
        wrap_classifier(Late(None, before=1).eval())(torch.randn(2, 3, 64, 96))


def test_the_finest_of_several_maps_is_taken_where_it_explains_the_logits():
    coarse = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = wrap_classifier(pooled(coarse))
    for sides, cells in (
        ((33, 33), (16, 16)),
        ((32, 32), (2, 2)),
        ((33, 65), (16, 32)),
    ):  # 15 x 15 overlaps the pool's cells
        out = network(torch.rand(2, 3, *sides))
        assert out.score_maps.shape[-2:] == cells
        assert gap(out) < 1e-5


def test_maps_of_one_cell_are_maps_but_pooled_vectors_are_not():
    layers = [nn.Sequential(nn.Conv2d(8 if step else 3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()) for step in range(5)]
    body = nn.Sequential(*layers)
    average = pooled(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), body=body)
    network = wrap_classifier(average)
    for side, cells in ((32, (1, 1)), (64, (2, 2)), (32, (1, 1))):
        out = network(torch.rand(2, 3, side, side))
        assert out.score_maps.shape[-2:] == cells
        assert gap(out) < 1e-5
    with pytest.raises(ValueError, match="no spatial map"):
        wrap_classifier(pooled(nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()), body=body))(
            torch.rand(2, 3, 64, 64)
        )


@pytest.mark.parametrize(
    "join",
    [
        lambda one, two: (one + two) / 2,
        lambda one, two: torch.stack([one, two]).mean(0),
        lambda one, two: one + two,
        lambda one, two: 0.5 * one + 0.5 * two,
    ],
)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_two_heads_are_one(join, norms, training):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(
                nn.Sequential(nn.BatchNorm1d(8) if norms else nn.Identity(), nn.Linear(8, 5)) for _ in range(2)
            )

        def forward(self, vector):
            return join(*(head(vector) for head in self.heads))

    network = wrap_classifier(pooled(lambda maps: maps.mean((-2, -1)), Two()).train(training))
    for _ in range(2):
        assert gap(network(torch.randn(4, 3, 32, 48))) < 1e-4
    assert "'head.heads.0.1' and 'head.heads.1.1'" in repr(network)


def test_heads_of_two_tokens_are_one():
    class Distilled(Patches):  # DeiT
        def __init__(self):
            super().__init__(None, before=2)
            self.other = nn.Linear(8, 5)

        def forward(self, images):
            tokens = self.patch(images).flatten(2).transpose(1, 2)
            tokens = self.norm(torch.cat([self.before.expand(len(tokens), -1, -1), tokens], 1))
            return (self.head(tokens[:, 0]) + self.other(tokens[:, 1])) / 2

    model, images = Distilled().eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens = model.norm(model.patch(images).permute(0, 2, 3, 1))
        expected = (model.head(tokens) + model.other(tokens)).permute(0, 3, 1, 2) / 2
    torch.testing.assert_close(wrap_classifier(model)(images).score_maps, expected)


ACTIVATIONS = [nn.ReLU(), nn.Hardswish(inplace=True), nn.GELU(), nn.Tanh(), nn.SiLU(inplace=True), nn.PReLU()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: type(activation).__name__)
@pytest.mark.parametrize("training", [False, True])
def test_hidden_layers_after_the_pool_in_every_form(activation, training):
    for head in (
        [nn.Linear(8, 16), activation, nn.Linear(16, 5)],
        [nn.Conv2d(8, 16, 1), activation, nn.Dropout(0.2), nn.Flatten(), nn.Linear(16, 5)],
        [nn.Dropout(0.2, inplace=True), nn.Conv2d(8, 16, 1), activation, nn.Conv2d(16, 5, 1), nn.Flatten()],
        [nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 16), activation, nn.Dropout(0.5), nn.Linear(16, 5)],
    ):
        keep = not isinstance(head[0], nn.Linear)
        model = pooled(lambda maps, keep=keep: maps.mean((-2, -1), keepdim=keep), nn.Sequential(*head)).train(training)
        images = torch.randn(16, 3, 32, 48)
        with torch.no_grad():
            network = wrap_classifier(model)
            for _ in range(2):
                out = network(images)
            model.eval()
            positions = model.body(images).flatten(2).unbind(2)
            expected = torch.stack([model.head(each[..., None, None] if keep else each) for each in positions], 2)
        torch.testing.assert_close(out.score_maps.flatten(2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_as_a_function(share):
    model = pooled(lambda maps: F.dropout(maps.mean((-2, -1)), share, model.training), nn.Linear(64, 5), channels=64)
    images = torch.randn(4, 3, 32, 48)
    expected = wrap_classifier(model)(images)
    network = wrap_classifier(model.train())
    for _ in range(3):
        out = network(images)
        assert not torch.equal(out.logits, expected.logits)
        torch.testing.assert_close(out.score_maps, expected.score_maps)


def test_a_change_of_the_model_is_noticed():
    model = small_resnet().eval()
    network, images = wrap_classifier(model), torch.randn(4, 3, 64, 96)
    assert gap(network(images)) < 1e-5
    model.fc = nn.Linear(512, 3)
    assert network(images).score_maps.shape == (4, 3, 2, 3)
    model.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, 9)).eval()
    assert gap(network(images)) < 1e-5
    assert network(images).score_maps.shape == (4, 9, 2, 3)
    model.train()
    assert network(images).score_maps.shape == (4, 9, 2, 3)
    model.eval()
    model.avgpool = nn.AdaptiveMaxPool2d(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="no spatial map explains the logits"):
            network(images)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    assert gap(network(images)) < 1e-5


def test_what_changes_behind_the_back_ends_in_an_error_not_in_a_map():
    powers = [1.0]
    model = pooled(lambda maps: maps.pow(powers[0]).mean((-2, -1)))
    network, images = wrap_classifier(model), torch.randn(2, 3, 32, 48)
    network(images)
    powers[0] = 2.0
    with pytest.raises(ValueError, match="as in the call before, but what 'head' reads is not pooled from 'body'"):
        network(images)
    with pytest.raises(ValueError, match="no spatial map explains the logits"):
        network(images)
    powers[0] = 1.0
    assert gap(network(images)) < 1e-5
    model.head.forward = lambda vector: 2 * F.linear(vector, model.head.weight, model.head.bias)
    with pytest.raises(ValueError, match="but 'head' does not return what its weights say"):
        network(images)


@pytest.mark.slow
def test_the_pool_of_a_vision_transformer_may_be_switched():
    model, images = timm_model("test_vit", img_size=(96, 128)), torch.randn(2, 3, 96, 128)
    network = wrap_classifier(model)
    assert gap(network(images)) > 1e-3  # reads its class token
    model.global_pool = "avg"
    assert gap(network(images)) < 1e-5
    model.global_pool = "max"
    with pytest.raises(ValueError, match="no spatial map"):
        network(images)


def test_images_without_contrast_decide_nothing_for_later_ones():
    network = wrap_classifier(pooled(lambda maps: maps.amax((-2, -1))))
    network(torch.zeros(2, 3, 33, 33))  # average and maximum are the same here, and so are the maps
    with pytest.raises(ValueError, match="no spatial map explains the logits"):
        network(torch.randn(2, 3, 33, 33))


def test_infinite_and_missing_numbers_go_through():
    images = torch.randn(3, 3, 32, 48)
    spoilt = images.clone()
    spoilt[1] = torch.nan
    for first in (images, spoilt):
        network = wrap_classifier(small_resnet().eval())
        network(first)
        out = network(spoilt)
        assert out.score_maps[1].isnan().all()
        assert out.score_maps[::2].isfinite().all()
        assert network(torch.full_like(images, torch.inf)).score_maps.isnan().all()
    with pytest.raises(ValueError, match="expected finite logits"):
        wrap_classifier(small_resnet().eval())(torch.full_like(images, torch.nan))


def test_statistics_and_random_numbers_are_those_of_a_step_without_a_wrapper():
    head = [nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 5)]
    head[-1] = nn.utils.parametrizations.spectral_norm(head[-1])  # changes whenever its weight is read
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout2d(0.1))
    models = [pooled(lambda maps: maps.mean((-2, -1)), nn.Sequential(*head), body=body).train()]
    models.append(copy.deepcopy(models[0]))
    calls = [models[0], wrap_classifier(models[1])]
    for images in torch.randn(3, 16, 3, 32, 48):
        states, logits = [], []
        for call in calls:
            torch.manual_seed(5)
            output = call(images)
            logits.append(getattr(output, "logits", output))
            states.append(torch.get_rng_state())
        assert torch.equal(*logits)
        assert torch.equal(*states)
        assert all(torch.equal(value, models[1].state_dict()[key]) for key, value in models[0].state_dict().items())
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in models[1].modules())
        assert all(module.training for module in models[1].modules())


def test_hooks_of_the_user_are_called_once_and_stay():
    model, calls = pooled(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())), []
    for module in (model.body, model.pool, model.head):
        module.register_forward_hook(lambda module, given, made: calls.append(module))
    network = wrap_classifier(model)
    for count in (1, 2):
        network(torch.randn(2, 3, 32, 48))
        assert len(calls) == 3 * count


def test_an_encoder_of_torch_computes_to_the_bit_what_it_does_alone(monkeypatch):
    class Encoder(Patches):
        def __init__(self):
            super().__init__(None, before=1, width=64)
            layer = nn.TransformerEncoderLayer(64, 4, 256, activation="gelu", batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, images):
            tokens = self.patch(images).flatten(2).transpose(1, 2)
            tokens = self.encoder(torch.cat([self.before.expand(len(tokens), -1, -1), tokens], 1))
            return self.head(self.norm(tokens)[:, 0])

    calls, kernel = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *given: calls.append(given) or kernel(*given))
    model, images = Encoder().eval(), torch.randn(2, 3, 64, 96)
    network = wrap_classifier(model)
    with torch.no_grad():
        for _ in range(2):
            network(images)
        assert len(calls) == 4  # its own kernel, in both layers, which a hook would keep from being used
        for _ in range(2):
            out = network(images)
            assert torch.equal(out.logits, model(images))
            assert out.score_maps.shape == (2, 5, 8, 12)
    torch.testing.assert_close(
        network(images).score_maps, out.score_maps
    )  # with gradient: tokens first, then the batch
    assert network.train()(images).score_maps.shape == (2, 5, 8, 12)


def test_threads_do_not_meet():
    model = small_resnet().eval()
    network = wrap_classifier(model)
    images = [torch.randn(1, 3, 64, 32 * (2 + number % 2)) for number in range(8)]
    with torch.no_grad():
        expected = [wrap_classifier(model)(image) for image in images]

        def work(number):
            with torch.no_grad():
                return [network(images[number]) for _ in range(6)]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, range(8)))
    for right, outputs in zip(expected, found, strict=True):
        for out in outputs:
            torch.testing.assert_close(out.logits, right.logits)
            torch.testing.assert_close(out.score_maps, right.score_maps)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
@torch.no_grad()
def test_compiled_parts_run_as_they_are_written():
    expected = None

    class Task(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images)

    def compiled(model):
        return torch.compile(model, backend="eager")

    def in_place(model):
        model.compile(backend="eager")
        return model

    def part(model):
        model.body = compiled(model.body)
        return model

    def function(model):
        model.pool = compiled(model.pool)
        return model

    def method(model):
        model.forward = compiled(model.forward)
        return model

    images = torch.randn(2, 3, 32, 48)
    for change in (
        lambda model: model,
        compiled,
        in_place,
        part,
        function,
        method,
        lambda model: Task(compiled(model)),
    ):
        model = change(pooled(lambda maps: maps.mean((-2, -1))))
        model(images)  # before it is wrapped
        network = wrap_classifier(model)
        for _ in range(2):
            out = network(images)
            expected = out if expected is None else expected
            torch.testing.assert_close(out.score_maps, expected.score_maps)
        assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_wrapper_that_has_been_used_can_be_copied_and_pickled():
    images = torch.randn(2, 3, 64, 96)
    network = wrap_classifier(small_resnet().eval())
    expected = network(images)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert other.model is not network.model
        assert torch.equal(other(images).score_maps, expected.score_maps)
        other.model.fc.weight.data *= 2
        assert not torch.equal(other(images).score_maps, expected.score_maps)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode_and_memory_format(context):
    for model in (pooled(lambda maps: maps.mean((-2, -1))), Patches(lambda tokens: tokens[:, 0], before=1).eval()):
        images = torch.randn(2, 3, 64, 96)
        expected = wrap_classifier(model)(images).score_maps
        with context():
            network = wrap_classifier(model.to(memory_format=torch.channels_last))
            for _ in range(2):
                out = network(images.to(memory_format=torch.channels_last))
                torch.testing.assert_close(out.score_maps, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "cells"),
    [
        ("levit_128s", {"img_size": (96, 128)}, (2, 2)),
        ("mobilenetv3_small_050", {}, (3, 4)),
        ("repvit_m1", {}, (3, 4)),
        ("pvt_v2_b0", {}, (3, 4)),
        ("xcit_nano_12_p16_224", {}, (6, 8)),
        ("pit_ti_224", {"img_size": (96, 128)}, (3, 4)),
    ],
)
def test_families_of_timm(name, options, cells):
    model = timm_model(name, **options)
    out, _ = call_twice(model, (96, 128))
    assert out.score_maps.shape[-2:] == cells


class Changing(nn.Module):
    """A classifier with a layer that may go, and which may return score maps of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.extra: nn.Module | None = nn.Sequential(nn.Identity())
        self.fc = nn.Linear(4, 2)
        self.mode = torch.zeros(())  # neither flag, word nor function: no change of it is seen beforehand

    def forward(self, images: torch.Tensor) -> Any:
        maps = self.features(images)
        pooled = maps.mean((-2, -1))
        logits = self.fc(pooled if self.extra is None else self.extra(pooled))
        return CAMOutput(logits, torch.zeros(len(images), 2, 1, 1)) if self.mode else logits


def test_a_layer_that_was_removed_is_not_looked_for_again():
    model, images = Changing(), torch.rand(2, 3, 8, 8)
    wrapped = wrap_classifier(model)
    before = wrapped(images)
    del model.extra
    model.extra = None
    after = wrapped(images)
    assert torch.equal(before.logits, after.logits)
    torch.testing.assert_close(before.score_maps, after.score_maps)


def test_score_maps_that_a_model_begins_to_return_are_its_own():
    model, images = Changing(), torch.rand(2, 3, 8, 8)
    wrapped = wrap_classifier(model)
    assert wrapped(images).score_maps.shape == (2, 2, 6, 6)
    model.mode += 1
    assert wrapped(images).score_maps.shape == (2, 2, 1, 1)
    model.mode -= 1
    assert wrapped(images).score_maps.shape == (2, 2, 6, 6)
