"""The laws of fusion and streams to try them on, so that a fusion of your own is property-tested in three lines.

`check_fusion` asserts what every `Fusion` must satisfy and whatever the fusion claims of itself (``order_free``,
``merge``, ...). Laws that no attribute claims, such as `assert_monotone`, are called by name.

Example:
    >>> import torch
    >>> from hypothesis import given
    >>> from oaa_lib.testing import attention_streams, check_fusion
    >>> def my_fusion(cumulative, attention, count):
    ...     return torch.maximum(0.9 * cumulative, attention)

    >>> @given(attention_streams())
    ... def test_my_fusion(maps):
    ...     check_fusion(my_fusion, maps)
    >>> test_my_fusion()

Needs hypothesis (``pip install hypothesis``), which nothing else in the library does. Everything happens in float32 on
the host; what 8-bit storage adds is a rounding to steps of 1/255 after each map.

Source: paper, section 3.2 (Eq. 3-5 and 10); the laws are this library's.
"""

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from oaa_lib.fusion import Fusion, MergeableFusion, resolve_fusion

try:
    from hypothesis import strategies as st
    from hypothesis.extra.numpy import arrays
except ImportError as error:
    raise ImportError("oaa_lib.testing needs hypothesis; install it with `pip install hypothesis`") from error

TOLERANCE = 1e-5  # many roundings of float32, and far below one step of 8 bits


# Streams


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


def fold(fusion: Fusion, maps: Sequence[Tensor]) -> Tensor:
    """What users see after a stream: the accumulator's M_T, without gate and in float32 storage.

    Args:
        fusion: a `Fusion`.
        maps: T maps, each (K, H, W) float32 in [0, 1].

    Returns:
        (K, H, W) float32 in [0, 1].

    Raises:
        AssertionError: the fusion returned something that the accumulator would refuse.
        ValueError: no maps.

    Example:
        >>> from oaa_lib import MeanFusion
        >>> fold(MeanFusion(), [torch.zeros(1, 1, 1), torch.ones(1, 1, 1)])
        tensor([[[0.5000]]])
    """
    return _read(fusion, _fold(fusion, maps))


# The laws: each takes a fusion and a stream of T maps (K, H, W), float32 in [0, 1], raises AssertionError if it is
# broken, and says where and by how much. Equal means equal up to `tolerance`.


def check_fusion(fusion: Fusion | str, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """All that a fusion must satisfy, and all that it claims of itself.

    Every fusion: `assert_bounded`, `assert_starts_with_first`, `assert_pure`. With ``order_free``, ``zero_is_neutral``,
    ``reduction`` or ``merge``: the law that goes with it.

    Args:
        fusion: as the accumulator takes it.
        maps: a stream, best drawn from `attention_streams`: T maps, each (K, H, W) float32 in [0, 1].
        tolerance: the largest difference that counts as rounding.

    Raises:
        AssertionError: a law is broken; the message names it, the place and the numbers.
        TypeError, ValueError: ``fusion`` is none, or ``reduction`` is unknown.

    Example:
        >>> from oaa_lib import MaxFusion
        >>> check_fusion(MaxFusion(), [torch.rand(2, 7, 7) for _ in range(3)])
    """
    fusion = resolve_fusion(fusion)
    assert_bounded(fusion, maps)
    assert_starts_with_first(fusion, maps, tolerance=tolerance)
    assert_pure(fusion, maps, tolerance=tolerance)
    if getattr(fusion, "order_free", False):
        assert_order_free(fusion, maps, tolerance=tolerance)
    if getattr(fusion, "zero_is_neutral", False):
        assert_zero_is_neutral(fusion, maps, tolerance=tolerance)
    if getattr(fusion, "reduction", None) is not None:
        assert_reduction(fusion, maps, tolerance=tolerance)
    if isinstance(fusion, MergeableFusion):
        assert_mergeable(fusion, maps, tolerance=tolerance)


def assert_bounded(fusion: Fusion, maps: Sequence[Tensor]) -> None:
    """Whatever the fusion returns is finite, in [0, 1] (give or take 1e-4) and of the shape it was given."""
    for states in _history(fusion, maps):
        _read(fusion, states)


def assert_starts_with_first(fusion: Fusion, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """M_1 = A_1. The accumulator sees to it, so only the ``read`` of a fusion with several states can break it."""
    for attention in maps:
        _assert_equal("M_1 = A_1", fold(fusion, [attention]), attention, [attention], tolerance)


def assert_pure(fusion: Fusion, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """Equal arguments give equal results, and no pair of a batch changes another, also if their counts differ."""
    whole = fold(fusion, maps)
    _assert_equal("the same again gives the same", fold(fusion, maps), whole, maps, tolerance)
    pairs = _pairs(maps)
    alone = torch.cat([fold(fusion, own) for own in pairs])
    _assert_equal("a batch is its pairs one by one", whole, alone, maps, tolerance)
    counts = 1 + torch.arange(len(pairs)) % len(maps)  # now every pair has seen another number of maps
    states = [_fold(fusion, own[:count]) for own, count in zip(pairs, counts.tolist(), strict=True)]
    whole = _fuse(fusion, torch.cat(states), maps[-1], counts[:, None, None])
    alone = torch.cat([_fuse(fusion, states[k], own[-1], counts[k, None, None, None]) for k, own in enumerate(pairs)])
    _assert_equal("a batch of different counts is its pairs one by one", whole, alone, maps, tolerance)


def assert_pixelwise(fusion: Fusion, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """No pixel changes another, also if their counts differ. Views (crops) make sense for such a fusion only."""
    height, width = maps[0].shape[1:]
    whole, alone = fold(fusion, maps), torch.empty_like(maps[0])
    for y, x in product(range(height), range(width)):
        here = (slice(None), slice(y, y + 1), slice(x, x + 1))
        alone[here] = fold(fusion, [attention[here] for attention in maps])
    _assert_equal("a map is its pixels one by one", whole, alone, maps, tolerance)

    def mosaic(parts: list[Tensor]) -> Tensor:
        """Each pixel from another part, in turn."""
        turn = torch.arange(height * width).view(height, width) % len(parts)
        return torch.stack([part.where(turn == n, 0) for n, part in enumerate(parts)]).sum(0)

    history, last, counts = _history(fusion, maps), maps[-1], range(1, len(maps) + 1)
    per_pixel = mosaic([torch.full(last.shape, count) for count in counts])
    whole = _fuse(fusion, mosaic(history), last, per_pixel)
    alone = mosaic([_fuse(fusion, states, last, count) for states, count in zip(history, counts, strict=True)])
    _assert_equal("a map of different counts is its pixels one by one", whole, alone, maps, tolerance)
    if isinstance(fusion, MergeableFusion):
        whole = _merge(fusion, mosaic(history), last_states := _first(fusion, last), per_pixel, 1)
        alone = mosaic([_merge(fusion, history[count - 1], last_states, count, 1) for count in counts])
        _assert_equal("merging is merging the pixels one by one", whole, alone, maps, tolerance)


def assert_in_hull(fusion: Fusion, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """No pixel is ever lower than its lowest attention so far, nor higher than its highest."""
    for count, states in enumerate(_history(fusion, maps), start=1):
        seen, found = torch.stack(list(maps[:count])), _read(fusion, states)
        nearest = torch.minimum(torch.maximum(found, seen.amin(0)), seen.amax(0))
        _assert_equal("the result stays in the hull of the maps", found, nearest, maps[:count], tolerance)


def assert_monotone(fusion: Fusion, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """No pixel ever falls: M_t >= M_{t-1}."""
    reads = [_read(fusion, states) for states in _history(fusion, maps)]
    for count, (before, after) in enumerate(pairwise(reads), start=2):
        _assert_equal("no pixel falls", after, torch.maximum(before, after), maps[:count], tolerance)


def assert_idempotent(fusion: Fusion, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """A map that was seen already changes nothing."""
    once = fold(fusion, maps)
    for attention in maps:
        again = [*maps, attention]
        _assert_equal("a map seen again changes nothing", fold(fusion, again), once, again, tolerance)


def assert_order_free(fusion: Fusion, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """The order of the maps makes no difference."""
    first, *others = maps
    # Swapping the first two and moving the first one to the end lead, step by step, to any order.
    for reordered in ([*others[:1], first, *others[1:]], [*others, first]):
        _assert_equal("order makes no difference", fold(fusion, reordered), fold(fusion, maps), maps, tolerance)


def assert_zero_is_neutral(fusion: Fusion, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """F(0, A, any count) = A: a pixel at 0 is the same as one never seen."""
    for count, attention in enumerate(maps, start=1):
        fresh = _first(fusion, attention)
        fused = _fuse(fusion, torch.zeros_like(fresh), attention, count)
        _assert_equal(f"F(0, A, {count}) = A", fused, fresh, [attention], tolerance)


def assert_mergeable(fusion: Fusion, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """Merging the cumulative maps of two streams gives that of both, wherever they are cut, in any order of merging.

    Raises:
        AssertionError: the law is broken, or there is no ``merge``.
    """
    if not isinstance(fusion, MergeableFusion):
        raise AssertionError(f"expected a fusion with a merge method, got {fusion!r}")
    whole, length = fold(fusion, maps), len(maps)
    pairs = _pairs(maps)
    for shift in range(length - 1):  # every pair is cut elsewhere
        cuts = [1 + (shift + k) % (length - 1) for k in range(len(pairs))]
        first = torch.cat([_fold(fusion, own[:cut]) for own, cut in zip(pairs, cuts, strict=True)])
        second = torch.cat([_fold(fusion, own[cut:]) for own, cut in zip(pairs, cuts, strict=True)])
        counts = torch.tensor(cuts)[:, None, None]
        merged = _read(fusion, _merge(fusion, first, second, counts, length - counts))
        _assert_equal(f"merging streams cut after {cuts} maps", merged, whole, maps, tolerance)

    from_left, from_right = _first(fusion, maps[0]), _first(fusion, maps[-1])
    for count in range(1, length):  # every map a stream of its own
        going_on = _fuse(fusion, from_left, maps[count], count)
        from_left = _merge(fusion, from_left, _first(fusion, maps[count]), count, 1)
        from_right = _merge(fusion, _first(fusion, maps[-1 - count]), from_right, 1, count)
        seen = maps[: count + 1]
        _assert_equal("fusing after merging", _read(fusion, going_on), fold(fusion, seen), seen, tolerance)
    _assert_equal("merging one by one from the first", _read(fusion, from_left), whole, maps, tolerance)
    _assert_equal("merging one by one from the last", _read(fusion, from_right), whole, maps, tolerance)


def assert_reduction(fusion: Fusion, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """The fusion's ``reduction`` of two streams' maps, ``"max"`` or ``"mean"`` (by counts), gives that of both.

    Raises:
        AssertionError: the law is broken.
        ValueError: another ``reduction``, or none.
    """
    reduction = getattr(fusion, "reduction", None)
    if reduction not in ("max", "mean"):
        raise ValueError(f"expected the fusion's reduction to be 'max' or 'mean', got {reduction!r}")
    for cut in range(1, len(maps)):
        first, second = _fold(fusion, maps[:cut]), _fold(fusion, maps[cut:])
        mean = (cut * first + (len(maps) - cut) * second) / len(maps)
        reduced = _read(fusion, torch.maximum(first, second) if reduction == "max" else mean)
        _assert_equal(f"reduction {reduction!r}, cut after {cut}", reduced, fold(fusion, maps), maps, tolerance)


# As the accumulator does it. `states` is (K, H, W), or (K, S, H, W) for a fusion with several; counts are one number,
# (K, 1, 1), or (K, H, W) where they differ from pixel to pixel.


def _first(fusion: Fusion, attention: Tensor) -> Tensor:
    if (number := getattr(fusion, "num_states", 1)) > 1:
        return attention[:, None].repeat(1, number, 1, 1)
    return attention.clone()


def _fuse(fusion: Fusion, states: Tensor, attention: Tensor, count: int | Tensor) -> Tensor:
    attention = attention[:, None] if states.ndim == 4 else attention
    fused: object = fusion(states.clone(), attention.clone(), _count(count, states))  # copies: it may work in place
    return _usable(fused, states, "the fusion")


def _history(fusion: Fusion, maps: Sequence[Tensor]) -> list[Tensor]:
    """The states after each map."""
    if not len(maps):
        raise ValueError("expected at least one map, got none")
    history = [_first(fusion, maps[0])]
    for count in range(1, len(maps)):
        history.append(_fuse(fusion, history[-1], maps[count], count))
    return history


def _pairs(maps: Sequence[Tensor]) -> list[list[Tensor]]:
    """Every pair's own stream."""
    return [[attention[k : k + 1] for attention in maps] for k in range(len(maps[0]))]


def _fold(fusion: Fusion, maps: Sequence[Tensor]) -> Tensor:
    return _history(fusion, maps)[-1]


def _read(fusion: Fusion, states: Tensor) -> Tensor:
    if states.ndim == 3:
        return states
    read: object = fusion.read(states.clone())  # type: ignore[attr-defined]  # resolve_fusion has seen to it
    return _usable(read, states[:, 0], "the fusion's read")


def _merge(
    fusion: MergeableFusion, first: Tensor, second: Tensor, first_count: int | Tensor, second_count: int | Tensor
) -> Tensor:
    counts = _count(first_count, first), _count(second_count, second)
    merged: object = fusion.merge(first.clone(), second.clone(), *counts)
    return _usable(merged, first, "the fusion's merge")


def _count(count: int | Tensor, states: Tensor) -> Tensor:
    if isinstance(count, int):
        count = torch.full((len(states), 1, 1), count)
    return (count[:, None] if states.ndim == 4 else count).int()


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


def _assert_equal(law: str, found: Tensor, expected: Tensor, maps: Sequence[Tensor], tolerance: float) -> None:
    difference = (found - expected).abs()
    if difference.max() > tolerance:
        place = [int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape)]
        pixel = (place[0], *place[-2:])
        raise AssertionError(
            f"{law}: expected {expected[tuple(place)]:.7g}, got {found[tuple(place)]:.7g} (tolerance {tolerance:g}) at "
            f"(pair, row, column) {pixel}, where the maps are {[round(float(a[pixel]), 7) for a in maps]}"
        )
