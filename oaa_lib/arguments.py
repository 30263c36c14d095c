"""Arguments that are not what they should be, in one sentence each: what was expected, and what arrived."""

import math
import operator
import os
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
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


def number(name: str, value: Any, least: float, most: float, *, below: bool = False, advice: str = "") -> float:
    """A number in ``least .. most``; ``below`` the greatest if asked.

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
    end = ")" if below else "]"
    if found is None:
        raise TypeError(f"expected {name} as a number in [{least:g}, {most:g}{end}, got {kind(value)}{advice}")
    if not least <= found <= most or (below and found == most):
        raise ValueError(f"expected {name} in [{least:g}, {most:g}{end}, got {found:.9g}{advice}")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False; anything else is a TypeError.

    Example:
        >>> flag("resume", True)
        True
    """
    if type(value).__name__ not in ("bool", "bool_"):  # of Python, of any numpy
        raise TypeError(f"expected {name} as True or False, got {kind(value)}")
    return bool(value)


def one_of(name: str, value: Any, first: str, second: str) -> None:
    """Raise a ValueError unless the value is one of two words.

    Example:
        >>> one_of("method", "max", "max", "minmax")
    """
    if not isinstance(value, str) or value not in (first, second):
        raise ValueError(f"expected {name} {first!r} or {second!r}, got {shown(value)}")


def file_path(name: str, value: Any) -> str:
    """A path that can be that of a file.

    Raises:
        TypeError: no path.
        ValueError: none that a file can have.

    Example:
        >>> file_path("path", "maps")
        'maps'
    """
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(found, str):
        raise TypeError(f"expected {name} as that of a file, got {kind(value)}")
    if not found or "\0" in found:
        raise ValueError(f"expected {name} as that of a file, got {shown(found)}")
    return found


def floats(name: str, value: Any, advice: str = "") -> Tensor:
    """A floating point tensor of any shape, not sparse; anything else is a TypeError.

    Example:
        >>> floats("logits", torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    if not isinstance(value, Tensor):
        found: Any = type(value).__name__
    elif value.dtype not in FLOATS:
        found = value.dtype
    elif value.layout != torch.strided:
        found = value.layout
    else:
        return value
    raise TypeError(f"expected {name} as a floating point tensor, got {found}{advice}")


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
    right = value.ndim == shape.count(",") + 1 and value.dtype in FLOATS and value.layout == torch.strided
    if not right or 0 in value.shape[-2:]:
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        raise ValueError(f"expected {name} {shape} floating point, got {kind(value)}{layout}")
    return value


def whole_numbers(name: str, value: Any, advice: str = "") -> Tensor:
    """A tensor of integers or bools whose values can be read; anything else is a TypeError.

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


def on_device(device: Any, *, mapped: bool = False) -> torch.device:
    """The device that is meant, if it is there; the host where it maps a file.

    Raises:
        TypeError: nothing that names a device.
        ValueError: no device of that name here.

    Example:
        >>> on_device("cpu")
        device(type='cpu')
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"expected device as a name or torch.device, got {type(device).__name__}")
    if mapped and str(device).partition(":")[0] != "cpu":
        raise ValueError(f"expected device='cpu' together with a path, got {device}: the host maps the file")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0][:100]
        raise ValueError(
            f"expected device as that of this machine, such as 'cpu', got {shown(device)} ({reason})"
        ) from None
    if found.type == "meta":
        raise ValueError("expected device as one that keeps values, got 'meta'")
    return found


def check_batch(expected: tuple[int, int], score_maps: Tensor, logits: Tensor | None) -> None:
    """Raise a TypeError or ValueError unless these are score maps and logits of (B, C) = ``expected``."""
    _check_batch_of("score_maps", score_maps, expected, 4)
    if logits is not None:
        _check_batch_of("logits", logits, expected, 2)
    if logits is not None and logits.device != score_maps.device:
        raise ValueError(f"expected score_maps and logits on one device, got {score_maps.device} and {logits.device}")
    if score_maps.is_meta:
        raise ValueError("expected score_maps on a device that keeps values, got one on the meta device")


def _check_batch_of(name: str, values: Tensor, expected: tuple[int, int], ndim: int) -> None:
    shape = floats(name, values).shape
    if len(shape) != ndim or shape[:2] != expected or 0 in shape:
        wanted = f"({expected[0]}, {expected[1]}, h, w)" if ndim == 4 else f"{expected}"
        raise ValueError(
            f"expected {name} of shape {wanted}: {expected[0]} indices, {expected[1]} classes, got "
            f"{tuple(shape)}; pass all classes of the batch, without a background channel"
        )
