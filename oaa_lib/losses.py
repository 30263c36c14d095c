"""Losses of the integral attention model: hybrid loss (Eq. 7-9) and multi-label cross entropy (Eq. 6)."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oaa_lib.arguments import floats, number, one_of


def hybrid_loss(
    score_maps: Tensor,
    soft_labels: Tensor,
    *,
    normalization: Literal["class", "pooled"] = "class",
    threshold: float = 0.0,
) -> Tensor:
    r"""Hybrid loss of the integral attention model: promote attended pixels, constrain the others.

    With p the soft labels, q the sigmoid of the score maps, N+ the pixels of a class with p > ``threshold`` and N- the
    others,

    .. math::
        L = \sum_c \Big(-\tfrac{1}{|N_+^c|} \sum_{j \in N_+^c} p_j^c \log q_j^c
            -\tfrac{1}{|N_-^c|} \sum_{j \in N_-^c} \log(1 - q_j^c)\Big)

    averaged over the batch. An empty N+ or N- adds nothing. Autograd differentiates it, twice if needed; the
    transforms of ``torch.func`` (``grad``, ``vmap``) do not see through it.

    Args:
        score_maps: (B, C, h, w) floating point, raw scores. Computed in float32 if they are narrower.
        soft_labels: (B, C, h, w) floating point in [0, 1], 0 for classes the image does not show. They get no gradient.
        normalization: ``"class"`` divides by the sizes of N+ and N- of each class of each sample (the paper);
            ``"pooled"`` by those of all classes of a sample together (the authors' releases).
        threshold: soft labels up to this count as N-: 0 in the paper, 0.001 in the release. Coarse maps with hardly any
            soft label at exactly 0 often need a higher one.

    Returns:
        Scalar, float32 or wider: the mean over the B samples of the sum over the C classes.

    Raises:
        TypeError: an input is not a floating point tensor, or the threshold is no number.
        ValueError: shapes or devices differ, the batch is empty, an unknown normalization, a threshold outside [0, 1),
            or, on the CPU, soft labels that are NaN or outside [0, 1].

    Example:
        >>> import torch
        >>> hybrid_loss(torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]]]))
        tensor(1.2130)

    Source: paper, section 3.3, Eq. 7-9.
    """
    threshold = _checked(score_maps, soft_labels, threshold)
    one_of("normalization", normalization, "class", "pooled")
    axes = (-2, -1) if normalization == "class" else (-3, -2, -1)
    scores, p = _widen(score_maps, soft_labels.detach())
    return cast(Tensor, _WeightedLogLoss.apply(scores, _weights(p, axes, threshold))) / len(p)  # Eq. 9, batch mean


def _weights(p: Tensor, axes: tuple[int, ...], threshold: float) -> Tensor:
    """What each pixel weighs: below 0 on N+, which should score high, above 0 on N-, which should score low."""
    attended = torch.gt(p, threshold, out=torch.empty_like(p))  # 1 on N+, 0 on N-: floats are faster than booleans
    positives = attended.sum(axes, keepdim=True)  # |N+|
    negatives = p.numel() // positives.numel() - positives  # |N-|
    enhance = p / -positives.clamp(min=1)  # Eq. 7: p / |N+| for each -log q; an empty set has no pixel that it weighs
    constrain = 1 / negatives.clamp(min=1)  # Eq. 8: 1 / |N-| for each -log(1 - q)
    return torch.lerp(constrain, enhance, attended, out=enhance)  # takes the one or the other


class _WeightedLogLoss(torch.autograd.Function):
    """The sum of |w| log(1 + exp(sign(w) s)) over scores s with weights w, and its gradient w sigmoid(sign(w) s).

    Of the weights' size it takes one buffer more.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(scores, weights)
        z = weights.sign().mul_(scores)
        return torch.logaddexp(z, z.new_zeros(()), out=z).mul_(weights).abs_().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scores, weights = ctx.saved_tensors
        q = weights.sign().mul_(scores).sigmoid_()
        # In place, unless a second derivative will need q as it is.
        return (q * weights * grad if torch.is_grad_enabled() else q.mul_(weights).mul_(grad)), None


def multilabel_cross_entropy(score_maps: Tensor, soft_labels: Tensor, *, threshold: float = 0.0) -> Tensor:
    r"""Plain multi-label cross entropy on soft labels, the ablation "MCE" of the paper's Table 2.

    .. math:: L = \sum_c -\tfrac{1}{|N|} \sum_{j \in N} \big(p_j^c \log q_j^c + (1 - p_j^c) \log(1 - q_j^c)\big)

    averaged over the batch, N being all pixels.

    Args:
        score_maps: (B, C, h, w) floating point, raw scores. Computed in float32 if they are narrower.
        soft_labels: (B, C, h, w) floating point in [0, 1], cumulative attention, 0 for classes the image does not show.
        threshold: soft labels up to this are taken as 0.

    Returns:
        Scalar, float32 or wider: the mean over the B samples of the sum over the C classes.

    Raises:
        TypeError: an input is not a floating point tensor, or the threshold is no number.
        ValueError: shapes or devices differ, the batch is empty, a threshold outside [0, 1), or, on the CPU, soft
            labels that are NaN or outside [0, 1].

    Example:
        >>> import torch
        >>> multilabel_cross_entropy(torch.zeros(1, 2, 4, 4), torch.rand(1, 2, 4, 4))
        tensor(1.3863)

    Source: paper, section 3.3, Eq. 6.
    """
    threshold = _checked(score_maps, soft_labels, threshold)
    scores, p = _widen(score_maps, soft_labels)
    if threshold > 0:
        p = p.masked_fill(p <= threshold, 0)
    total = F.binary_cross_entropy_with_logits(scores, p, reduction="sum")
    return total / (len(score_maps) * score_maps[0, 0].numel())  # mean over the batch and over N, sum over classes


class HybridLoss(nn.Module):
    """Module form of `hybrid_loss`; same arguments, same meaning.

    Example:
        >>> import torch
        >>> loss = HybridLoss(threshold=0.001)(torch.zeros(1, 2, 4, 4), torch.rand(1, 2, 4, 4))

    Source: paper, section 3.3, Eq. 7-9.
    """

    def __init__(self, *, normalization: Literal["class", "pooled"] = "class", threshold: float = 0.0) -> None:
        super().__init__()
        one_of("normalization", normalization, "class", "pooled")
        self.normalization: Literal["class", "pooled"] = normalization
        self.threshold = number("threshold", threshold, 0, 1, below=True)

    def forward(self, score_maps: Tensor, soft_labels: Tensor) -> Tensor:
        """See `hybrid_loss`."""
        return hybrid_loss(score_maps, soft_labels, normalization=self.normalization, threshold=self.threshold)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"normalization={self.normalization!r}, threshold={self.threshold}"


class MultiLabelCrossEntropy(nn.Module):
    """Module form of `multilabel_cross_entropy`; same arguments, same meaning.

    Example:
        >>> import torch
        >>> loss = MultiLabelCrossEntropy()(torch.zeros(1, 2, 4, 4), torch.rand(1, 2, 4, 4))

    Source: paper, section 3.3, Eq. 6.
    """

    def __init__(self, *, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = number("threshold", threshold, 0, 1, below=True)

    def forward(self, score_maps: Tensor, soft_labels: Tensor) -> Tensor:
        """See `multilabel_cross_entropy`."""
        return multilabel_cross_entropy(score_maps, soft_labels, threshold=self.threshold)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"threshold={self.threshold}"


def _widen(score_maps: Tensor, soft_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, at least float32: half precision cannot count pixels or sum logarithms."""
    dtype = torch.promote_types(torch.promote_types(score_maps.dtype, soft_labels.dtype), torch.float32)
    return score_maps.to(dtype), soft_labels.to(dtype)


def _checked(score_maps: Tensor, soft_labels: Tensor, threshold: float) -> float:
    """The threshold as a plain number, once everything has been found to be in order."""
    floats("score_maps", score_maps)
    floats("soft_labels", soft_labels)
    if score_maps.ndim != 4 or score_maps.shape != soft_labels.shape or score_maps.numel() == 0:
        raise ValueError(
            "expected score_maps and soft_labels of one shape (B, C, h, w), none of them 0, got "
            f"{tuple(score_maps.shape)} and {tuple(soft_labels.shape)}; resize the soft labels to the score maps"
        )
    if score_maps.device != soft_labels.device:
        raise ValueError(
            f"expected score_maps and soft_labels on one device, got {score_maps.device} and {soft_labels.device}; "
            "move the soft labels with .to(score_maps.device)"
        )
    if type(threshold) is not float or not 0 <= threshold < 1:
        threshold = number("threshold", threshold, 0, 1, below=True)
    if soft_labels.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would make it wait
        low, high = (value.item() for value in soft_labels.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"expected soft labels in [0, 1], got [{low:.4g}, {high:.4g}]; "
                "take them from an AttentionAccumulator or call normalize_attention first"
            )
    return threshold
