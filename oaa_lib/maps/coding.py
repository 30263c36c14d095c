"""How attention in [0, 1] is stored: in steps of 1/255, or as 16 or 32 bit floats; 64 bits if a fusion needs them."""

import torch
from torch import Tensor

ROUNDING = 1e-4
DTYPES = (torch.uint8, torch.float16, torch.float32)
NEEDED = (*DTYPES, torch.float64)  # of a fusion's storage_dtype


def encode(attention: Tensor, dtype: torch.dtype, *, in_place: bool = False) -> Tensor:
    """Float maps in [0, 1] to storage; 8 bits are rounded to the nearest step of 1/255. In place it needs no copy."""
    if dtype != torch.uint8:
        return attention.to(dtype)
    return (attention.mul_(255) if in_place else attention * 255).round_().to(dtype)


def decode(stored: Tensor) -> Tensor:
    """Stored maps to float32 in [0, 1]; float64 stays what it is."""
    if stored.dtype != torch.uint8:
        return stored if stored.dtype == torch.float64 else stored.float()
    return (stored if torch.get_default_dtype() == torch.float32 else stored.float()) / 255


def outside(maps: Tensor, what: str, advice: str) -> Tensor:
    """(K,) bool: maps (K, ..., H, W) that leave [0, 1] by more than a rounding. On the host one is an error.

    NaN is outside.
    """
    wrong = ~((maps >= -ROUNDING) & (maps <= 1 + ROUNDING)).flatten(1).all(1)
    if maps.device.type == "cpu" and wrong.any():  # elsewhere a look would wait for the device
        found = maps[wrong]
        raise ValueError(f"expected {what} in [0, 1], got [{found.min():.4g}, {found.max():.4g}]; {advice}")
    return wrong
