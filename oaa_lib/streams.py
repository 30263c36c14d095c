"""Streams of attention maps, made up by hypothesis, and what a fusion makes of them. For `oaa_lib.testing`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

try:
    from hypothesis import strategies as st
    from hypothesis.extra.numpy import arrays
except ImportError as error:
    raise ImportError("oaa_lib.testing needs hypothesis; install it with `pip install hypothesis`") from error

Fuse: TypeAlias = Callable[..., Tensor]  # in the form of `Fusion`


def attention_maps(shape: tuple[int, int, int]) -> st.SearchStrategy[Tensor]:
    """Attention maps of one shape (K, H, W), float32 in [0, 1]; all-zero and all-one ones are frequent."""
    constant = st.sampled_from([0.0, 1.0]).map(lambda value: np.full(shape, value, np.float32))
    return (constant | arrays(np.float32, shape, elements=st.floats(0, 1, width=32))).map(torch.from_numpy)


@st.composite
def attention_streams(draw: st.DrawFn, *, max_length: int = 6, max_pairs: int = 3, max_side: int = 4) -> list[Tensor]:
    """What the pairs see in the course of a training: T maps, each (K, H, W) float32 in [0, 1].

    T, K, H and W start at 1. Maps may be constant, and may come again.

    Args:
        draw: given by hypothesis, not by you.
        max_length: the largest T.
        max_pairs: the largest K.
        max_side: the largest H and W.

    Example:
        >>> from hypothesis import given
        >>> @given(attention_streams(max_length=2))
        ... def test_lengths(maps):
        ...     assert 1 <= len(maps) <= 2
        >>> test_lengths()
    """
    side = st.integers(1, max_side)
    shape = draw(st.tuples(st.integers(1, max_pairs), side, side))
    maps = [draw(attention_maps(shape))]
    for _ in range(draw(st.integers(0, max_length - 1))):
        again = draw(st.none() | st.integers(0, len(maps) - 1))
        maps.append(draw(attention_maps(shape)) if again is None else maps[again].clone())
    return maps


def history(fusion: Fuse, maps: Sequence[Tensor]) -> list[Tensor]:
    """The cumulative map after each map, as the accumulator has it: M_1 = A_1, then the fusion."""
    if not len(maps):
        raise ValueError("expected at least one map, got none")
    cumulative = [maps[0].clone()]
    for count in range(1, len(maps)):
        cumulative.append(fused(fusion, cumulative[-1], maps[count], count))
    return cumulative


def fused(fusion: Fuse, cumulative: Tensor, attention: Tensor, count: int | Tensor) -> Tensor:
    """One step; counts are one number, (K, 1, 1) or (K, H, W). The fusion gets copies: it may work in place."""
    return _usable(fusion(cumulative.clone(), attention.clone(), _per_pair(count, attention)), cumulative, "the fusion")


def merged(fusion: Fuse, first: Tensor, second: Tensor, *counts: int | Tensor) -> Tensor:
    """What the fusion's ``merge`` makes of two cumulative maps that have seen so many maps each."""
    merge: Any = getattr(fusion, "merge", None)
    found = merge(first.clone(), second.clone(), *(_per_pair(count, first) for count in counts))
    return _usable(found, first, "the fusion's merge")


def _per_pair(count: int | Tensor, maps: Tensor) -> Tensor:
    return (torch.full((len(maps), 1, 1), count, device=maps.device) if isinstance(count, int) else count).int()


def _usable(result: object, like: Tensor, what: str) -> Tensor:
    """What the fusion returned, as the accumulator takes it; what it refuses is an AssertionError."""
    if not isinstance(result, Tensor):
        raise AssertionError(f"expected {what} to return a tensor, got {type(result).__name__}")
    if result.shape != like.shape:
        raise AssertionError(f"expected {what} to return shape {tuple(like.shape)}, got {tuple(result.shape)}")
    result = result.float()
    wrong = ~((result >= -1e-4) & (result <= 1 + 1e-4))  # NaN is wrong, too
    if wrong.any():
        raise AssertionError(f"expected {what} to return maps in [0, 1], got {result[wrong].tolist()[:5]}")
    return result.clamp(0, 1)
