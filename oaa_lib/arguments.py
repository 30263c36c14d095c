"""Arguments that are not what they should be, in one sentence each: what was expected, and what arrived."""

import math
import operator
from typing import Any

import torch
from torch import Tensor


def kind(value: Any) -> str:
    """What arrived, in a few words: the shape and dtype of a tensor, the type of anything else.

    Example:
        >>> kind([1, 2]), kind(torch.zeros(2, 3))
        ('list', '(2, 3) torch.float32')
    """
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


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
    """A floating point tensor with as many dimensions as ``shape`` names.

    Raises:
        TypeError: no tensor.
        ValueError: another dtype or number of dimensions, or a sparse tensor.

    Example:
        >>> floating("images", torch.zeros(2, 3, 8, 8), "(B, 3, H, W)").shape
        torch.Size([2, 3, 8, 8])
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} as a tensor {shape}, got {kind(value)}")
    if value.ndim != shape.count(",") + 1 or not value.is_floating_point() or value.layout != torch.strided:
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
    elif value.is_floating_point() or value.is_complex():
        found = value.dtype
    else:
        return value
    raise TypeError(f"expected {name} as an integer tensor, got {found}{advice}")


def on_device(device: Any) -> torch.device:
    """The device that is meant.

    Raises:
        TypeError: nothing that names a device.
        ValueError: no device of that name.

    Example:
        >>> on_device("cpu")
        device(type='cpu')
    """
    if not isinstance(device, (str, int, torch.device)) or isinstance(device, bool):
        raise TypeError(f"expected device as a name or torch.device, got {type(device).__name__}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"expected device as the name of one, such as 'cpu', got {device!r} ({reason})") from None
