"""Backbones, and the attention networks made of them with the paper's head."""

from typing import NamedTuple

from torch import Tensor, nn
from trunks import efficientnet_lite_trunk, resnet_trunk, vgg16_trunk
from weights import load_backbone, load_release_checkpoint, read_state

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


class Network(nn.Module):
    """What all networks of this folder have; batch norm stays frozen, as the batches are small.

    Attributes:
        geometry: see `Geometry`.
        mean: of each input channel, RGB in [0, 1].
        std: likewise.
    """

    geometry: Geometry
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    backbone: nn.Module
    head: nn.Module

    def train(self, mode: bool = True) -> "Network":
        """Training mode for all but batch norm, whose statistics stay ImageNet's."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        return self

    def parts(self) -> dict[str, nn.Module]:
        """The modules that learn at their own rates; together they hold every parameter."""
        return {"backbone": self.backbone, "head": self.head}


class AttentionNetwork(Network):
    """Backbone and `CAMHead`, whose layers are the new ones: no pretrained file holds them."""

    head: CAMHead

    def forward(self, images: Tensor) -> CAMOutput:
        """(B, 3, H, W) normalised images to logits (B, C) and score maps (B, C, h, w)."""
        return self.head(self.backbone(images))


class VGG16(AttentionNetwork):
    """The paper's network: VGG-16 without pool5 and fully connected layers, stride 8, 3 x (3x3, 512), 1x1.

    pool4 is 3x3 with stride 1 and conv5_x is dilated by 2 (recipes: classification network).
    """

    geometry = Geometry(stride=8, centred=False)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = vgg16_trunk((2, 2, 0), (2, 2, 0), (2, 2, 0), (3, 1, 1))
        self.head = CAMHead(512, num_classes)


class ResNet50(AttentionNetwork):
    """ResNet-50 at stride 8 with the paper's head; the authors released no ResNet classifier."""

    geometry = Geometry(stride=8, centred=True)
    depth = 50

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = resnet_trunk(self.depth)
        self.head = CAMHead(2048, num_classes)


class ResNet101(ResNet50):
    """ResNet-101, likewise."""

    depth = 101


class EfficientNetLite0(AttentionNetwork):
    """EfficientNet-Lite0 with a smaller head; made to train on a CPU in minutes."""

    geometry = Geometry(stride=16, centred=True)
    mean = std = (0.5, 0.5, 0.5)
    version, stages, frozen = "lite0", 7, 5  # stages: see `efficientnet_lite_trunk`

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = efficientnet_lite_trunk(self.version, self.geometry.stride, self.stages, self.frozen)
        self.head = CAMHead(self.backbone.num_features, num_classes, hidden_channels=160)
        for layer in self.head.modules():  # N(0, 0.01), made for SGD at lr x 10, costs a short run its first epochs
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()


class EfficientNetLite0Stride8(EfficientNetLite0):
    """With cells of half the side."""

    geometry = Geometry(stride=8, centred=True)


class EfficientNetLite0Short(EfficientNetLite0):
    """Cut after the fifth of seven stages, so that each cell sees less of the image; the last two of these learn."""

    stages, frozen = 5, 3


class EfficientNetLite0Whole(EfficientNetLite0):
    """All layers learn."""

    frozen = 0


class EfficientNetLite1(EfficientNetLite0):
    """EfficientNet-Lite1, deeper."""

    version = "lite1"


class EfficientNetLite2(EfficientNetLite0):
    """EfficientNet-Lite2, deeper and wider."""

    version = "lite2"


BACKBONES: dict[str, type[VGG16] | type[ResNet50] | type[EfficientNetLite0]] = {
    "vgg16": VGG16,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "efficientnet_lite0": EfficientNetLite0,
    # The variants of the study "when it pays"
    "efficientnet_lite0_stride8": EfficientNetLite0Stride8,
    "efficientnet_lite0_short": EfficientNetLite0Short,
    "efficientnet_lite0_whole": EfficientNetLite0Whole,
    "efficientnet_lite1": EfficientNetLite1,
    "efficientnet_lite2": EfficientNetLite2,
}


def build_network(backbone: str, num_classes: int, weights: str = "default") -> AttentionNetwork:
    """An attention network ready to train.

    Args:
        backbone: a name of `BACKBONES`.
        num_classes: C, without background.
        weights: ``"default"`` (ImageNet, from a package or torchvision), ``"none"``, or a file: of the form of the
            default, or a checkpoint of the authors' classifier (`load_release_checkpoint`), for ``vgg16``.
    """
    network = BACKBONES[backbone](num_classes)
    if weights not in ("none", "default") and any(name.startswith("extra_convs.") for name in read_state(weights)):
        load_release_checkpoint(network, weights)
    elif weights != "none":
        load_backbone(backbone, network.backbone, weights)
    return network
