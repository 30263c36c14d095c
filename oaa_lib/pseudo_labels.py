"""From cues to proxy segmentation labels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oaa_lib.arguments import WHOLE, flag, floats, number, shown, whole_number

LARGEST = 2**24  # labels are put together in float32, which is exact up to here


@torch.no_grad()
def pseudo_label_from_cues(
    attention: Tensor,
    classes: Tensor | Sequence[int],
    saliency: Tensor | None = None,
    *,
    foreground_threshold: float = 0.3,
    conflict_threshold: float = 0.9,
    uncertain_saliency: float = 32 / 255,
    strong_attention: float = 0.8,
    min_foreground: float = 0.01,
    rescale: bool = True,
    background: float | Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Proxy label of one image from its attention maps (object cues) and its saliency map (background cue).

    The rule of the authors' release, which settles what the paper leaves open:

    1. Channels: background = 1 - saliency, and each class's attention, min-max rescaled over the image (``rescale``).
    2. Values below ``foreground_threshold`` become 0, in the background too.
    3. Each pixel takes the channel of its maximum; ties go to the earlier channel, the background first.
    4. Conflict: two or more channels above ``conflict_threshold`` -> ignored.
    5. Uncertain: a background pixel with saliency >= ``uncertain_saliency``, or with any attention above
       ``strong_attention`` -> ignored.
    6. An image with less than ``min_foreground`` of its pixels left in the foreground is ignored whole.

    Args:
        attention: (K, H, W) float in [0, 1], one map for each class of the image, at the label's size; K may be 0.
        classes: (K,) integer, 0-based ids of these classes, no id twice, below 2**24.
        saliency: (H, W) float in [0, 1], or None if there is none; then give ``background``.
        foreground_threshold: see 2.
        conflict_threshold: see 4.
        uncertain_saliency: see 5.
        strong_attention: see 5.
        min_foreground: share of the pixels, see 6.
        rescale: see 1.; False takes the maps as they are, for thresholds that were chosen on maps as they are.
        background: the background channel instead of 1 - saliency, a constant or (H, W) float in [0, 1]. It becomes 0
            below ``foreground_threshold`` like everything else (see 2.): for a low one lower that, too.
        ignore_index: the value of ignored pixels.

    Returns:
        (H, W) int64 on the device of ``attention``: 0 background, c + 1 for class c, ``ignore_index`` ignored.

    Raises:
        TypeError: an input of another kind.
        ValueError: shapes, devices, ids or ranges that do not fit, or neither ``saliency`` nor ``background``.

    Example:
        >>> import torch
        >>> pseudo_label_from_cues(torch.tensor([[[0.0, 0.6, 1.0]]]), [7], torch.tensor([[0.0, 0.5, 1.0]]))
        tensor([[0, 8, 8]])

    Source: paper, section 4; rule and thresholds of the authors' public release.
    """
    _check_map("attention", attention, 3)
    ignore_index = _checked_ignore_index(ignore_index)
    class_ids = _checked_classes(classes, attention, ignore_index)
    if saliency is not None:
        _check_map("saliency", saliency, 2, attention)
    options = {
        "foreground_threshold": foreground_threshold,
        "conflict_threshold": conflict_threshold,
        "uncertain_saliency": uncertain_saliency,
        "strong_attention": strong_attention,
        "min_foreground": min_foreground,
    }
    advice = "; divide 8-bit values by 255, percents by 100"
    options = {name: number(name, share, 0, 1, advice=advice) for name, share in options.items()}
    back = _background_cue(background, saliency, attention)
    objects = _rescaled(attention) if flag("rescale", rescale) else attention
    return _label(objects, class_ids, saliency, back, ignore_index=ignore_index, **options)


def _rescaled(attention: Tensor) -> Tensor:
    """Each map from 0 to 1; one without contrast becomes 0."""
    low, high = attention.amin((1, 2), keepdim=True), attention.amax((1, 2), keepdim=True)
    return (attention - low).div_(torch.where(high > low, high - low, 1))


def _label(
    objects: Tensor,
    class_ids: Tensor,
    saliency: Tensor | None,
    back: Tensor,
    *,
    foreground_threshold: float,
    conflict_threshold: float,
    uncertain_saliency: float,
    strong_attention: float,
    min_foreground: float,
    ignore_index: int,
) -> Tensor:
    """The rules of `pseudo_label_from_cues`, by their numbers. Masks are 1.0 and 0.0, see `_mask`."""
    channels = [back, *objects]  # 1.
    # 2. What is too weak becomes 0
    kept = (_mask(torch.ge, channel, foreground_threshold).mul_(channel) for channel in channels)
    # 3. The strongest wins; a later channel must be stronger than all before it
    label, strongest = torch.zeros(back.shape, dtype=torch.float32, device=back.device), next(kept)
    for value, channel in zip((class_ids + 1).float(), kept, strict=True):
        label.lerp_(value, _mask(torch.gt, channel, strongest).float())
        torch.maximum(strongest, channel, out=strongest)
    foreground = _mask(torch.gt, label, 0)
    # 4. Conflict
    above = torch.zeros_like(back)
    for channel in channels:
        above += _mask(torch.gt, channel, conflict_threshold)
    conflict = above.ge_(2)
    # 5. Uncertain
    doubtful = torch.zeros_like(back) if saliency is None else _mask(torch.ge, saliency, uncertain_saliency)
    for cue in objects:
        torch.maximum(doubtful, _mask(torch.gt, cue, strong_attention), out=doubtful)
    ignored = torch.maximum(conflict, doubtful.gt_(foreground)).float()
    # 6. Too little foreground
    too_little = foreground.gt_(ignored).sum() < min_foreground * label.numel()
    torch.maximum(ignored, too_little.float(), out=ignored)
    return label.lerp_(label.new_full((), ignore_index), ignored).long()


def _mask(compare: Callable[..., Tensor], values: Tensor, other: Tensor | float) -> Tensor:
    """``compare(values, other)`` as 1.0 and 0.0, which the CPU works on several times faster than on booleans.

    So ``maximum(a, b)`` is "a or b", ``a > b`` "a but not b", and ``lerp(x, y, a)`` "y where a, else x".
    """
    return compare(values, other, out=torch.empty_like(values))


def _background_cue(background: float | Tensor | None, saliency: Tensor | None, attention: Tensor) -> Tensor:
    """The background channel (H, W), checked, in the dtype of the attention."""
    if isinstance(background, Tensor):
        _check_map("background", background, 2, attention)
        return background.to(attention.dtype)
    if background is not None:
        return attention.new_full(attention.shape[1:], number("background", background, 0, 1))
    if saliency is None:
        raise ValueError(
            "expected a saliency map or a background, got neither; pass background=, such as 0.5 or an (H, W) map"
        )
    return (1 - saliency).to(attention.dtype)


def _check_map(name: str, values: Tensor, ndim: int, attention: Tensor | None = None) -> None:
    """Kind, shape and range; and the frame of the attention, if that is given."""
    floats(name, values, " with values in [0, 1]; divide 8-bit maps by 255")
    if values.ndim != ndim or 0 in values.shape[-2:]:
        shape = "(K, H, W)" if ndim == 3 else "(H, W)"
        raise ValueError(f"expected {name} of shape {shape}, H and W at least 1, got {tuple(values.shape)}")
    if values.device.type == "cpu" and values.numel():  # elsewhere a look would wait for the device
        low, high = values.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"expected {name} in [0, 1], got [{low.item():.4g}, {high.item():.4g}]; "
                "call normalize_attention first, divide 8-bit maps by 255"
            )
    if attention is not None and (values.shape != attention.shape[1:] or values.device != attention.device):
        raise ValueError(
            f"expected {name} like one attention map, {tuple(attention.shape[1:])} on {attention.device}, got "
            f"{tuple(values.shape)} on {values.device}; resize both to the label's size"
        )


def _checked_ignore_index(ignore_index: int) -> int:
    ignore_index = whole_number("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    if ignore_index == 0 or abs(ignore_index) > LARGEST:
        raise ValueError(f"expected an ignore_index that is not 0 (background) nor beyond 2**24, got {ignore_index}")
    return ignore_index


def _checked_classes(classes: Tensor | Sequence[int], attention: Tensor, ignore_index: int) -> Tensor:
    """(K,) int64 on the device of the attention."""
    try:
        class_ids = torch.as_tensor(classes, device=attention.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # the last two: beyond int64, or on meta
        raise TypeError(f"expected classes as integers, got {shown(classes)}") from error
    if class_ids.layout != torch.strided:
        raise TypeError(f"expected classes as integers, got a tensor of {class_ids.layout}")
    if class_ids.numel() and (class_ids.dtype not in WHOLE or class_ids.dtype == torch.bool):
        raise TypeError(f"expected classes as integers, got {class_ids.dtype}; pass ids, not a 0/1 row")
    if class_ids.shape != attention.shape[:1]:
        raise ValueError(
            f"expected classes as one id for each of the {len(attention)} maps, got shape {tuple(class_ids.shape)}"
        )
    if class_ids.device.type == "cpu":  # elsewhere a look would wait for the device
        ids = class_ids.tolist()
        if len(set(ids)) < len(ids) or any(not 0 <= i < LARGEST or i + 1 == ignore_index for i in ids):
            raise ValueError(
                f"expected classes as different ids >= 0 and below 2**24 whose label is not {ignore_index}, the "
                f"ignore_index, got {ids}"
            )
    return class_ids.long()
