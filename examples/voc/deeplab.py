"""The segmentation networks: DeepLab-LargeFOV on the backbones of networks.py."""

from networks import EfficientNetLite0, Geometry, Network, ResNet50
from torch import Tensor, nn
from trunks import efficientnet_lite_trunk, resnet_trunk, vgg16_trunk
from weights import load_backbone


class SegmentationNetwork(Network):
    """Backbone, a head with a large field of view (fc6 and fc7), and the scores.

    Args:
        backbone: a trunk.
        channels: of its features.
        hidden: channels of fc6 and fc7.
        dilation: of fc6; 12 at stride 8, so that its 3x3 inputs lie 96 pixels apart.
        num_classes: C + 1, background first.
    """

    def __init__(self, backbone: nn.Module, channels: int, hidden: int, dilation: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=dilation, dilation=dilation),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
        )
        self.score = nn.Conv2d(hidden, num_classes, 1)
        for layer in (self.head[0], self.head[3], self.score):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images to scores (B, C + 1, h, w), one for each cell of the geometry."""
        return self.score(self.head(self.backbone(images)))

    def parts(self) -> dict[str, nn.Module]:
        """The modules that learn at their own rates; together they hold every parameter."""
        return {"backbone": self.backbone, "head": self.head, "score": self.score}


class VGG16LargeFOV(SegmentationNetwork):
    """The paper's: all pools are padded 3x3, the last two with stride 1, and an average pool follows conv5."""

    geometry = Geometry(stride=8, centred=True)

    def __init__(self, num_classes: int) -> None:
        trunk = vgg16_trunk((3, 2, 1), (3, 2, 1), (3, 2, 1), (3, 1, 1), (3, 1, 1))
        trunk.append(nn.AvgPool2d(3, stride=1, padding=1))
        super().__init__(trunk, 512, 1024, 12, num_classes)

    def load_fully_connected(self, classification: dict[str, Tensor]) -> None:
        """Start fc6 and fc7 from ImageNet's, thinned out as in DeepLab; hence they learn at the backbone's rate.

        Every fourth channel is kept, and every third of fc6's 7x7 inputs: these are 32 pixels apart, and 3 x 32 pixels
        are the dilation of 12 at stride 8.
        """
        try:
            fc6, bias6, fc7, bias7 = (
                classification[f"classifier.{name}"] for name in ("0.weight", "0.bias", "3.weight", "3.bias")
            )
        except KeyError as error:
            raise ValueError(f"the weights lack {error}, which fc6 and fc7 start from") from error
        fc6 = fc6.unflatten(1, (512, 7, 7))[::4, :, ::3, ::3]
        fc7 = fc7[::4, ::4, None, None]
        self.head.load_state_dict({"0.weight": fc6, "0.bias": bias6[::4], "3.weight": fc7, "3.bias": bias7[::4]})


class ResNet50LargeFOV(SegmentationNetwork):
    """On ResNet-50, layer3 and layer4 dilated."""

    geometry = ResNet50.geometry
    depth = 50

    def __init__(self, num_classes: int) -> None:
        super().__init__(resnet_trunk(self.depth), 2048, 1024, 12, num_classes)


class ResNet101LargeFOV(ResNet50LargeFOV):
    """On ResNet-101, likewise."""

    depth = 101


class EfficientNetLite0LargeFOV(SegmentationNetwork):
    """On EfficientNet-Lite0, for a CPU: a smaller head; dilation 6 at stride 16 has the same field."""

    geometry, mean, std = EfficientNetLite0.geometry, EfficientNetLite0.mean, EfficientNetLite0.std

    def __init__(self, num_classes: int) -> None:
        trunk = efficientnet_lite_trunk()
        super().__init__(trunk, trunk.num_features, 256, 6, num_classes)
        for layer in (self.head[0], self.head[3]):  # N(0, 0.01) costs a short run its first epochs, see networks.py
            layer.reset_parameters()


SEGMENTATION_NETWORKS: dict[str, type[VGG16LargeFOV] | type[ResNet50LargeFOV] | type[EfficientNetLite0LargeFOV]] = {
    "vgg16": VGG16LargeFOV,
    "resnet50": ResNet50LargeFOV,
    "resnet101": ResNet101LargeFOV,
    "efficientnet_lite0": EfficientNetLite0LargeFOV,
}


def build_segmentation_network(backbone: str, num_classes: int, weights: str = "default") -> SegmentationNetwork:
    """A segmentation network ready to train.

    Args:
        backbone: a name of `SEGMENTATION_NETWORKS`.
        num_classes: C + 1, with background.
        weights: ``"default"`` (ImageNet, from a package or torchvision), ``"none"``, or a file of the same form.
    """
    network = SEGMENTATION_NETWORKS[backbone](num_classes)
    if weights != "none":
        classification = load_backbone(backbone, network.backbone, weights)
        if isinstance(network, VGG16LargeFOV):
            network.load_fully_connected(classification)
    return network
