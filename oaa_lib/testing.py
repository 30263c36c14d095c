"""The laws of fusion and streams to try them on, so that a fusion of your own is property-tested in three lines.

`check_fusion` asserts what every `Fusion` must satisfy and whatever the fusion claims about itself (``order_free``,
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

from oaa_lib.fusion import resolve_fusion
from oaa_lib.streams import Fuse, fused, history, merged
from oaa_lib.streams import attention_maps as attention_maps
from oaa_lib.streams import attention_streams as attention_streams

TOLERANCE = 1e-5  # many roundings of float32, and far below one step of 8 bits


def fold(fusion: Fuse, maps: Sequence[Tensor]) -> Tensor:
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
    return history(fusion, maps)[-1]


# The laws: each takes a fusion and a stream of T maps (K, H, W), float32 in [0, 1], raises AssertionError if it is
# broken, and says where and by how much. Equal means equal up to `tolerance`.


def check_fusion(fusion: Fuse | str, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """All that a fusion must satisfy, and all that it claims about itself.

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
    if getattr(fusion, "merge", None) is not None:
        assert_mergeable(fusion, maps, tolerance=tolerance)


def assert_bounded(fusion: Fuse, maps: Sequence[Tensor]) -> None:
    """Whatever the fusion returns is finite, in [0, 1] (give or take 1e-4) and of the shape it was given."""
    history(fusion, maps)  # which looks at each


def assert_starts_with_first(fusion: Fuse, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """M_1 = A_1. The accumulator and `fold` see to it, whatever the fusion would return."""
    for attention in maps:
        _assert_equal("M_1 = A_1", fold(fusion, [attention]), attention, [attention], tolerance)


def assert_pure(fusion: Fuse, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """Equal arguments give equal results, and no pair of a batch changes another, also if their counts differ."""
    whole = fold(fusion, maps)
    _assert_equal("the same again gives the same", fold(fusion, maps), whole, maps, tolerance)
    pairs = _pairs(maps)
    alone = torch.cat([fold(fusion, own) for own in pairs])
    _assert_equal("a batch is its pairs one by one", whole, alone, maps, tolerance)
    counts = 1 + torch.arange(len(pairs), device=whole.device) % len(maps)  # each pair has seen another number of maps
    folded = [fold(fusion, own[:count]) for own, count in zip(pairs, counts.tolist(), strict=True)]
    whole = fused(fusion, torch.cat(folded), maps[-1], counts[:, None, None])
    alone = torch.cat([fused(fusion, folded[k], own[-1], counts[k, None, None, None]) for k, own in enumerate(pairs)])
    _assert_equal("a batch of different counts is its pairs one by one", whole, alone, maps, tolerance)


def assert_pixelwise(fusion: Fuse, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """No pixel changes another, also if their counts differ. Views (crops) make sense for such a fusion only."""
    height, width = maps[0].shape[1:]
    whole, alone = fold(fusion, maps), torch.empty_like(maps[0])
    for y, x in product(range(height), range(width)):
        here = (slice(None), slice(y, y + 1), slice(x, x + 1))
        alone[here] = fold(fusion, [attention[here] for attention in maps])
    _assert_equal("a map is its pixels one by one", whole, alone, maps, tolerance)

    def mosaic(parts: list[Tensor]) -> Tensor:
        """Each pixel from another part, in turn."""
        turn = torch.arange(height * width, device=last.device).view(height, width) % len(parts)
        return torch.stack([part.where(turn == n, 0) for n, part in enumerate(parts)]).sum(0)

    steps, last, counts = history(fusion, maps), maps[-1], range(1, len(maps) + 1)
    per_pixel = mosaic([torch.full(last.shape, count, device=last.device) for count in counts])
    whole = fused(fusion, mosaic(steps), last, per_pixel)
    alone = mosaic([fused(fusion, before, last, count) for before, count in zip(steps, counts, strict=True)])
    _assert_equal("a map of different counts is its pixels one by one", whole, alone, maps, tolerance)
    if getattr(fusion, "merge", None) is not None:
        whole = merged(fusion, mosaic(steps), last, per_pixel, 1)
        alone = mosaic([merged(fusion, before, last, count, 1) for before, count in zip(steps, counts, strict=True)])
        _assert_equal("merging is merging the pixels one by one", whole, alone, maps, tolerance)


def assert_in_hull(fusion: Fuse, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """No pixel is ever lower than its lowest attention so far, nor higher than its highest."""
    for count, found in enumerate(history(fusion, maps), start=1):
        seen = torch.stack(list(maps[:count]))
        nearest = torch.minimum(torch.maximum(found, seen.amin(0)), seen.amax(0))
        _assert_equal("the result stays in the hull of the maps", found, nearest, maps[:count], tolerance)


def assert_monotone(fusion: Fuse, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """No pixel ever falls: M_t >= M_{t-1}."""
    for count, (before, after) in enumerate(pairwise(history(fusion, maps)), start=2):
        _assert_equal("no pixel falls", after, torch.maximum(before, after), maps[:count], tolerance)


def assert_idempotent(fusion: Fuse, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """A map that was seen already changes nothing."""
    once = fold(fusion, maps)
    for attention in maps:
        again = [*maps, attention]
        _assert_equal("a map seen again changes nothing", fold(fusion, again), once, again, tolerance)


def assert_order_free(fusion: Fuse, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """The order of the maps makes no difference."""
    first, *others = maps
    # Swapping the first two and moving the first one to the end lead, step by step, to any order.
    for reordered in ([*others[:1], first, *others[1:]], [*others, first]):
        _assert_equal("order makes no difference", fold(fusion, reordered), fold(fusion, maps), maps, tolerance)


def assert_zero_is_neutral(fusion: Fuse, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """F(0, A, any count) = A: a pixel at 0 is the same as one never seen."""
    for count, attention in enumerate(maps, start=1):
        found = fused(fusion, torch.zeros_like(attention), attention, count)
        _assert_equal(f"F(0, A, {count}) = A", found, attention, [attention], tolerance)


def assert_mergeable(fusion: Fuse, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """Merging the cumulative maps of two streams gives that of both, wherever they are cut, in any order of merging.

    Raises:
        AssertionError: the law is broken, or there is no ``merge``.
    """
    if getattr(fusion, "merge", None) is None:
        raise AssertionError(f"expected a fusion with a merge method, got {fusion!r}")
    whole, length = fold(fusion, maps), len(maps)
    pairs = _pairs(maps)
    for shift in range(length - 1):  # every pair is cut elsewhere
        cuts = [1 + (shift + k) % (length - 1) for k in range(len(pairs))]
        first = torch.cat([fold(fusion, own[:cut]) for own, cut in zip(pairs, cuts, strict=True)])
        second = torch.cat([fold(fusion, own[cut:]) for own, cut in zip(pairs, cuts, strict=True)])
        counts = torch.tensor(cuts, device=maps[0].device)[:, None, None]
        found = merged(fusion, first, second, counts, length - counts)
        _assert_equal(f"merging streams cut after {cuts} maps", found, whole, maps, tolerance)

    from_left, from_right = maps[0], maps[-1]
    for count in range(1, length):  # every map a stream of its own
        from_left = merged(fusion, from_left, maps[count], count, 1)
        from_right = merged(fusion, maps[-1 - count], from_right, 1, count)
    _assert_equal("merging one by one from the first", from_left, whole, maps, tolerance)
    _assert_equal("merging one by one from the last", from_right, whole, maps, tolerance)


def assert_reduction(fusion: Fuse, maps: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> None:
    """The fusion's ``reduction`` of two streams' maps gives that of both.

    It is ``"max"``, ``"mean"`` (by counts) or ``"latest"`` (the map of the later stream).

    Raises:
        AssertionError: the law is broken.
        ValueError: another ``reduction``, or none.
    """
    reduction = getattr(fusion, "reduction", None)
    if reduction not in ("max", "mean", "latest"):
        raise ValueError(f"expected the fusion's reduction to be 'max', 'mean' or 'latest', got {reduction!r}")
    for cut in range(1, len(maps)):
        first, second = fold(fusion, maps[:cut]), fold(fusion, maps[cut:])
        mean = (cut * first + (len(maps) - cut) * second) / len(maps)
        reduced = {"max": torch.maximum(first, second), "mean": mean, "latest": second}[reduction]
        _assert_equal(f"reduction {reduction!r}, cut after {cut}", reduced, fold(fusion, maps), maps, tolerance)


def _pairs(maps: Sequence[Tensor]) -> list[list[Tensor]]:
    """Every pair's own stream."""
    return [[attention[k : k + 1] for attention in maps] for k in range(len(maps[0]))]


def _assert_equal(law: str, found: Tensor, expected: Tensor, maps: Sequence[Tensor], tolerance: float) -> None:
    difference = (found - expected).abs()
    if difference.max() > tolerance:
        place = [int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape)]
        pixel = (place[0], *place[-2:])
        raise AssertionError(
            f"{law}: expected {expected[tuple(place)]:.7g}, got {found[tuple(place)]:.7g} (tolerance {tolerance:g}) at "
            f"(pair, row, column) {pixel}, where the maps are {[round(float(a[pixel]), 7) for a in maps]}"
        )
