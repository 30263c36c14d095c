"""From features to class attention: the class-aware convolution (Eq. 1) and its normalisation (Eq. 2)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from oaa_lib.arguments import floats, one_of, whole_number


class CAMOutput(NamedTuple):
    """What a classifier with class-aware score maps returns.

    Attributes:
        logits: (B, C) float, the global average pool of ``score_maps``; its sigmoid is the probability of Eq. 1.
        score_maps: (B, C, h, w) float, the raw output F of the class-aware convolution.
    """

    logits: Tensor
    score_maps: Tensor


def global_average_pool(score_maps: Tensor) -> Tensor:
    """Logits (..., C) of score maps (..., C, h, w): GAP(F^c) of Eq. 1."""
    return score_maps.mean((-2, -1))


def normalize_attention(score_maps: Tensor, *, method: Literal["max", "minmax"] = "max") -> Tensor:
    r"""Turn score maps into attention in [0, 1], each map by itself.

    .. math:: A^c = \mathrm{ReLU}(F^c) / \max(F^c)

    Args:
        score_maps: (..., h, w) floating point, any range.
        method: ``"max"`` divides by the maximum (Eq. 2). ``"minmax"`` also subtracts the minimum of the rectified map
            first, as the authors' Caffe release does; a map without contrast then becomes zero.

    Returns:
        (..., h, w), dtype and device of the input. A map without a positive score is all zero. A map that holds NaN or
        +infinity comes back with NaN, so that the fault stays visible.

    Raises:
        TypeError: ``score_maps`` is not a floating point tensor.
        ValueError: fewer than two dimensions, an empty map, or an unknown method.

    Example:
        >>> import torch
        >>> normalize_attention(torch.tensor([[-1.0, 1.0], [2.0, 4.0]]))
        tensor([[0.0000, 0.2500],
                [0.5000, 1.0000]])

    Source: paper, section 3.1, Eq. 2.
    """
    floats("score_maps", score_maps, "; convert with .float()")
    if score_maps.ndim < 2 or 0 in score_maps.shape[-2:]:
        raise ValueError(f"expected score_maps of shape (..., h, w) with h, w >= 1, got {tuple(score_maps.shape)}")
    one_of("method", method, "max", "minmax")
    return normalize_with_extremes(score_maps, method)[0]


def normalize_with_extremes(
    score_maps: Tensor, method: Literal["max", "minmax"] | None, *, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention as `normalize_attention` gives it (None: as it is), and the least and greatest score (..., 1, 1)."""
    low, high = score_maps.amin((-2, -1), keepdim=True), score_maps.amax((-2, -1), keepdim=True)
    if method is None:
        return score_maps, low, high
    one_of("normalization", method, "max", "minmax")
    positive, peak = score_maps.relu_() if in_place else score_maps.relu(), high
    if method == "minmax":
        floor = low.relu()
        positive, peak = positive - floor, high - floor
    divisor = torch.threshold(peak, 0, 1)  # 1 where nothing is positive
    return positive / divisor if positive.requires_grad else positive.div_(divisor), low, high  # Eq. 2


class CAMHead(nn.Module):
    """The paper's attention head: 3x3 convolutions with ReLU, then the class-aware 1x1 convolution and its average.

    Put it on the feature map of any backbone. New layers start as in the paper's releases: weights N(0, 0.01), bias 0.

    Args:
        in_channels: channels of the features.
        num_classes: C, without background.
        hidden_channels: channels of the 3x3 convolutions.
        num_convs: how many 3x3 convolutions; 0 gives plain CAM on the features.

    Shape:
        features (B, in_channels, h, w) -> ``CAMOutput(logits (B, C), score_maps (B, C, h, w))``.

    Raises:
        TypeError: sizes that are no integers, or features that are no floating point tensor.
        ValueError: a size below its least value, or features of another shape, dtype or device.

    Example:
        >>> import torch
        >>> out = CAMHead(512, num_classes=20)(torch.rand(2, 512, 28, 28))
        >>> out.logits.shape, out.score_maps.shape
        (torch.Size([2, 20]), torch.Size([2, 20, 28, 28]))

    Source: paper, section 3.1 and Fig. 2.
    """

    def __init__(self, in_channels: int, num_classes: int, *, hidden_channels: int = 512, num_convs: int = 3) -> None:
        super().__init__()
        whole_number("in_channels", in_channels, 1)
        whole_number("num_classes", num_classes, 1)
        whole_number("hidden_channels", hidden_channels, 1)
        whole_number("num_convs", num_convs, 0)
        layers: list[nn.Module] = []
        channels = in_channels
        for _ in range(num_convs):
            layers += [nn.Conv2d(channels, hidden_channels, 3, padding=1), nn.ReLU(inplace=True)]
            channels = hidden_channels
        self.convs = nn.Sequential(*layers)
        self.class_aware = nn.Conv2d(channels, num_classes, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        self.in_channels = in_channels

    def forward(self, features: Tensor) -> CAMOutput:
        """Score maps and their average; see the class for shapes."""
        floats("features", features)
        if features.ndim != 4 or features.shape[1] != self.in_channels or 0 in features.shape[2:]:
            raise ValueError(
                f"expected features of shape (B, {self.in_channels}, h, w), got {tuple(features.shape)}; "
                "pass the backbone's last feature map, before any pooling"
            )
        weights = self.class_aware.weight
        alike = features.dtype == weights.dtype or torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu")
        if features.device != weights.device or not alike:
            raise ValueError(
                f"expected features like the weights, {weights.dtype} on {weights.device}, got {features.dtype} on "
                f"{features.device}"
            )
        score_maps = self.class_aware(self.convs(features))
        return CAMOutput(global_average_pool(score_maps), score_maps)
