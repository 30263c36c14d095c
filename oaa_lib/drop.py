"""Attention drop: hiding from the classifier what it looks at already."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oaa_lib.arguments import WHOLE, floating, kind, number


def attention_drop(
    images: Tensor, attention: Tensor, labels: Tensor, *, rate: float = 0.5, threshold: float = 0.6
) -> Tensor:
    """Set to 0 the pixels where the latest attention of one of an image's classes is strong, in a share of the images.

    What is hidden cannot be looked at, so the attention has to move on to other parts of the object. Normalised images
    have the mean colour where they are 0.

    Args:
        images: (B, 3, H, W) floating point, normalised.
        attention: (B, C, h, w) in [0, 1], the latest attention that passed the gate: `AttentionAccumulator.soft_labels`
            of one with ``fusion="latest"``, on the images' device and in the frame of the view that is shown. Zeros
            (nothing accepted yet) hide nothing.
        labels: (B, C) bool or 0/1, the classes that are shown.
        rate: the probability, of each image by itself, that it is treated.
        threshold: attention above it (resized to the image, bilinear) is hidden.

    Returns:
        (B, 3, H, W), a new tensor; gradients pass where nothing is hidden. Random numbers come from torch's generator
        of the images' device, and nothing waits for it.

    Raises:
        TypeError: an input that is no tensor, or a rate or threshold that is no number.
        ValueError: shapes, dtypes or devices that do not fit, or a rate or threshold outside [0, 1].

    Example:
        >>> import torch
        >>> images, attention = torch.ones(1, 3, 4, 4), torch.zeros(1, 2, 2, 2)
        >>> attention[0, 1, 0, 0] = 1
        >>> attention_drop(images, attention, torch.tensor([[0, 1]]), rate=1.0)[0, 0]
        tensor([[0., 0., 1., 1.],
                [0., 1., 1., 1.],
                [1., 1., 1., 1.],
                [1., 1., 1., 1.]])

    Source: the attention drop layer of the authors' journal extension, *Online Attention Accumulation for Weakly
    Supervised Semantic Segmentation* (TPAMI 2021).
    """
    rate, threshold = number("rate", rate, 0, 1), number("threshold", threshold, 0, 1)
    floating("images", images, "(B, 3, H, W)")
    floating("attention", attention, "(B, C, h, w)")
    readable = isinstance(labels, Tensor) and labels.layout == torch.strided
    if not readable or not (labels.dtype in WHOLE or labels.is_floating_point()):
        raise TypeError(f"expected labels (B, C) as a tensor of bools or 0/1, got {kind(labels)}")
    if labels.shape != attention.shape[:2] or len(images) != len(attention):
        raise ValueError(
            "expected images (B, 3, H, W), attention (B, C, h, w) and labels (B, C), got "
            f"{tuple(images.shape)}, {tuple(attention.shape)}, {tuple(labels.shape)}"
        )
    if images.device != attention.device or labels.is_meta != attention.is_meta:
        raise ValueError(
            f"expected images, attention and labels on one device, got {images.device}, {attention.device} and "
            f"{labels.device}"
        )
    shown = attention.detach() * labels.to(attention)[..., None, None]
    strong = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool, device=images.device)
    for first in range(0, shown.shape[1], 32):  # many classes at full size would be large
        full = F.interpolate(shown[:, first : first + 32], images.shape[-2:], mode="bilinear", align_corners=False)
        strong |= (full > threshold).any(1)
    treated = torch.rand(len(images), 1, 1, device=images.device) < rate
    return images.masked_fill((treated & strong)[:, None], 0)


class AttentionDrop(nn.Module):
    """`attention_drop` as a module that acts in training mode only, like dropout.

    Args:
        rate: the probability that an image is treated.
        threshold: attention above it is hidden.

    Raises:
        TypeError: no number.
        ValueError: outside [0, 1].

    Example:
        >>> import torch
        >>> drop = AttentionDrop().eval()
        >>> images = torch.rand(2, 3, 8, 8)
        >>> drop(images, torch.ones(2, 4, 2, 2), torch.ones(2, 4)) is images
        True

    Source: as `attention_drop`.
    """

    def __init__(self, rate: float = 0.5, threshold: float = 0.6) -> None:
        super().__init__()
        self.rate, self.threshold = number("rate", rate, 0, 1), number("threshold", threshold, 0, 1)

    def forward(self, images: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        """(B, 3, H, W); see `attention_drop`."""
        if not self.training:
            return images
        return attention_drop(images, attention, labels, rate=self.rate, threshold=self.threshold)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"rate={self.rate}, threshold={self.threshold}"
