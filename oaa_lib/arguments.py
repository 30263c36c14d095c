"""Arguments that are not what they should be, in one sentence each: what was expected, and what arrived."""

import math
import operator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
WHOLE |= {torch.uint16, torch.uint32, torch.uint64}


def kind(value: Any) -> str:
    """What arrived, in a few words: the shape and dtype of a tensor, the type of anything else.

    Example:
        >>> kind([1, 2]), kind(torch.zeros(2, 3))
        ('list', '(2, 3) torch.float32')
    """
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def shown(value: Any) -> str:
    """A value for a message, however long it is.

    Example:
        >>> shown((3, 4)), shown(10**5000)
        ('(3, 4)', 'int')
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of an integer of 5,000 digits, or of a class of the user's own
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(name: str, value: Any, what: str) -> list[Any]:
    """The items of a sequence, or of what is like one.

    Raises:
        TypeError: no sequence, or a string.

    Example:
        >>> listed("scales", (0.5, 1), "numbers")
        [0.5, 1]
    """
    if hasattr(value, "__len__") and not isinstance(value, (str, bytes)):
        with suppress(TypeError):  # a tensor of one number has a length, and no items
            return list(value)
    raise TypeError(f"expected {name} as a sequence of {what}, got {kind(value)}")


def whole_number(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """An integer in ``least .. most``.

    Raises:
        TypeError: no integer; a bool is none.
        ValueError: out of range.

    Example:
        >>> whole_number("num_classes", 20, 1)
        20
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"expected {name} as an integer, got {type(value).__name__}")
    if not least <= found <= most:
        shown = found if abs(found) < 2**64 else f"one of {found.bit_length()} bits"  # not 5,000 digits of it
        raise ValueError(f"expected {name} {f'>= {least}' if found < least else f'<= {most}'}, got {shown}")
    return found


def number(name: str, value: Any, least: float, most: float) -> float:
    """A number in ``least .. most``.

    Raises:
        TypeError: no number; a bool is none.
        ValueError: out of range, or NaN.

    Example:
        >>> number("rate", 0.5, 0, 1)
        0.5
    """
    try:
        found = None if isinstance(value, (bool, str, bytes)) else float(value)
    except OverflowError:  # an integer beyond all floats
        found = math.inf
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None:
        raise TypeError(f"expected {name} as a number in [{least:g}, {most:g}], got {kind(value)}")
    if not least <= found <= most:
        raise ValueError(f"expected {name} in [{least:g}, {most:g}], got {found:.9g}")
    return found


def floating(name: str, value: Any, shape: str) -> Tensor:
    """A floating point tensor with as many dimensions as ``shape`` names, the last two of them not 0.

    Raises:
        TypeError: no tensor.
        ValueError: another dtype or number of dimensions, no pixels, or a sparse tensor.

    Example:
        >>> floating("images", torch.zeros(2, 3, 8, 8), "(B, 3, H, W)").shape
        torch.Size([2, 3, 8, 8])
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} as a tensor {shape}, got {kind(value)}")
    right = value.ndim == shape.count(",") + 1 and value.is_floating_point() and value.layout == torch.strided
    if not right or 0 in value.shape[-2:]:
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        raise ValueError(f"expected {name} {shape} floating point, got {kind(value)}{layout}")
    return value


def whole_numbers(name: str, value: Any, advice: str = "") -> Tensor:
    """A tensor of integers or bools whose values can be read.

    Raises:
        TypeError: anything else.

    Example:
        >>> whole_numbers("target", torch.tensor([0, 1, 255])).tolist()
        [0, 1, 255]
    """
    if not isinstance(value, Tensor):
        found: Any = type(value).__name__
    elif value.is_meta:
        found = "one on the meta device"
    elif value.layout != torch.strided:
        found = value.layout
    elif value.dtype not in WHOLE:
        found = value.dtype
    else:
        return value
    raise TypeError(f"expected {name} as an integer tensor, got {found}{advice}")


def on_device(device: Any) -> torch.device:
    """The device that is meant, if it is there.

    Raises:
        TypeError: nothing that names a device.
        ValueError: no device of that name here.

    Example:
        >>> on_device("cpu")
        device(type='cpu')
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"expected device as a name or torch.device, got {type(device).__name__}")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0][:100]
        raise ValueError(f"expected device as that of this machine, such as 'cpu', got {device!r} ({reason})") from None
    if found.type == "meta":
        raise ValueError("expected device as one that keeps values, got 'meta'")
    return found


def check_batch(expected: tuple[int, int], score_maps: Tensor, logits: Tensor | None) -> None:
    """Raise a TypeError or ValueError unless these are score maps and logits of (B, C) = ``expected``."""
    _check_batch_of("score_maps", score_maps, expected, 4)
    if logits is not None:
        _check_batch_of("logits", logits, expected, 2)
        if logits.device != score_maps.device:
            raise ValueError(
                f"expected score_maps and logits on one device, got {score_maps.device} and {logits.device}"
            )


def _check_batch_of(name: str, values: Tensor, expected: tuple[int, int], ndim: int) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"expected {name} as a floating point tensor, got {found}")
    shape = values.shape
    if len(shape) != ndim or shape[:2] != expected or 0 in shape:
        wanted = f"({expected[0]}, {expected[1]}, h, w)" if ndim == 4 else f"{expected}"
        raise ValueError(
            f"expected {name} of shape {wanted}: {expected[0]} indices, {expected[1]} classes, got "
            f"{tuple(shape)}; pass all classes of the batch, without a background channel"
        )
