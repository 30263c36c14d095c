"""Trunks: what the attention networks of networks.py and the segmentation networks of deeplab.py are built on."""

from collections import OrderedDict
from typing import Any

from torch import nn


def vgg16_trunk(*pools: tuple[int, int, int]) -> nn.Sequential:
    """The convolutions of VGG-16, conv5_x dilated by 2; the parameters' names are torchvision's ``vgg16().features``.

    Args:
        pools: kernel, stride and padding of the max pool after each stage; four, or five with pool5.
    """
    layers: list[nn.Module] = []
    channels = 3
    for stage, (width, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        dilation = 2 if stage == 4 else 1
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
            channels = width
        layers += [nn.MaxPool2d(*pool) for pool in pools[stage : stage + 1]]
    return nn.Sequential(*layers)


def resnet_trunk(depth: int) -> nn.Sequential:
    """The ResNet of torchvision up to layer4 at stride 8, under its names: layer3 dilated by 2, layer4 by 4.

    Batch norm is frozen as in Caffe programs: besides its statistics, its scales and shifts are not trained either.
    """
    from torchvision.models import resnet50, resnet101

    model = {50: resnet50, 101: resnet101}[depth](replace_stride_with_dilation=[False, True, True])
    for stage, dilation in ((model.layer3, 2), (model.layer4, 4)):
        for block in stage:  # torchvision leaves the first block of a stage at the dilation before it; DeepLab does not
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False)
    kept = [(name, layer) for name, layer in model.named_children() if name not in ("avgpool", "fc")]
    return nn.Sequential(OrderedDict(kept))


def efficientnet_lite_trunk(version: str = "lite0", stride: int = 16, stages: int = 7, frozen: int = 5) -> Any:
    """EfficientNet-Lite of timm with dilated last stages; small enough to train on a CPU in minutes.

    Its ImageNet weights come as packages.

    Args:
        version: lite0, lite1 or lite2.
        stride: pixels between cells, 8 or 16.
        stages: of its seven, how many are kept; with fewer the last convolution, which follows them, is left out, too.
        frozen: how many of these stay as pretrained, with the stem: five are 1 + 2 + 2 + 3 + 3 blocks of Lite0. 0: all
            layers learn.
    """
    import timm

    trunk = timm.create_model(f"tf_efficientnet_{version}", num_classes=0, global_pool="", output_stride=stride)
    if stages < len(trunk.blocks):
        trunk.blocks, trunk.conv_head, trunk.bn2 = trunk.blocks[:stages], nn.Identity(), nn.Identity()
        trunk.num_features = trunk.blocks[-1][-1].bn3.num_features
    if frozen:
        for layer in (trunk.conv_stem, trunk.bn1, *trunk.blocks[:frozen]):
            layer.requires_grad_(False)
    return trunk
