"""One step of accumulation (paper, section 3.2): what a batch offers, and what becomes of the maps (Eq. 1-5 and 10).

A batch of score maps becomes an `Offer` of attention to its pairs and is put into the frames of the images; `grow`
fuses it with what the pairs keep. Nothing here waits for a device or writes: `change_of` returns what is to be.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from oaa_lib.arguments import shown
from oaa_lib.cam import global_average_pool, normalize_with_extremes
from oaa_lib.gating import Gate, judge
from oaa_lib.maps.coding import DTYPES, NEEDED, decode, encode, outside
from oaa_lib.maps.kept import Kept
from oaa_lib.maps.pairs import IntArray, PairSelection
from oaa_lib.maps.store import Change, Store, times_seen, to_device
from oaa_lib.strategies import Fusion
from oaa_lib.views import Floats, flips_only, into_image, mirror, sample

Normalization: TypeAlias = Literal["max", "minmax"] | None


def what_is_kept(fusion: Fusion, dtype: torch.dtype) -> dict[str, Kept]:
    """All that an accumulator keeps: shapes, reset, state, merging and reduction follow from this.

    Raises:
        TypeError: maps cannot be stored in that dtype.
    """
    needed = dtype if fusion.storage_dtype is None else fusion.storage_dtype
    for name, value, known in (
        ("dtype", dtype, NEEDED if dtype is fusion.storage_dtype else DTYPES),  # `load` names what was kept
        ("the fusion's storage_dtype", needed, NEEDED),
    ):
        if not isinstance(value, torch.dtype) or value not in known:
            raise TypeError(f"expected {name} one of {', '.join(map(str, known))}, got {shown(value)}")
    kept = {
        "maps": Kept(needed, "pixel", fusion),
        "counts": Kept(torch.int32, "pair", "sum"),  # maps accepted by each pair
        "synchronized": Kept(torch.int32, "pair", None),  # of these, the ones that all processes know of
        "skipped": Kept(torch.int64, "class", "sum"),
        "offered": Kept(torch.int64, "class", "sum", on_host=True),
        "totals_then": Kept(torch.int64, "class twice", None, on_host=True),  # these two as of the last synchronize
    }
    if not fusion.zero_is_neutral:
        kept["missed"] = Kept(torch.int32, "pixel", "sum")  # accepted maps that did not show the pixel
    return kept


class Offer(NamedTuple):
    """What a batch offers to K maps.

    Attributes:
        attention: (K, H, W) float32 in [0, 1] where it is not faulty; 0 where it is not seen.
        faulty: (K,) bool, not finite, or out of range.
        passed: (K,) bool, what the gate says; None: everything passes.
        seen: (K, H, W) bool, the pixels that the views show; None: all.
    """

    attention: Tensor
    faulty: Tensor
    passed: Tensor | None
    seen: Tensor | None = None

    def at(self, chosen: Tensor | IntArray | slice) -> "Offer":
        """The offer to some of the maps."""
        if isinstance(chosen, slice):  # all of them
            return self
        return self._each(lambda values: values[chosen])

    def to(self, device: torch.device) -> "Offer":
        """The same on another device."""
        if device == self.attention.device:
            return self
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Offer":
        passed, seen = (None if values is None else change(values) for values in (self.passed, self.seen))
        return Offer(change(self.attention), change(self.faulty), passed, seen)


def make_offer(
    pairs: PairSelection, score_maps: Tensor, logits: Tensor | None, gate: Gate | None, normalization: Normalization
) -> Offer:
    """The attention of a batch's pairs, which of it is faulty, and which the gate lets pass.

    Args:
        pairs: K pairs of the batch.
        score_maps: (B, C, h, w) floating point.
        logits: (B, C) floating point, or None.
        gate: the gate, or None.
        normalization: as in `AttentionAccumulator.update`.
    """
    cells, relevant, targets = _cells(pairs, score_maps)
    maps = score_maps.flatten(0, 1).index_select(0, cells)  # a copy
    maps = maps if maps.element_size() > 4 else maps.float()  # float64 has maps beyond float32
    if logits is None and gate is not None:
        logits = global_average_pool(score_maps if score_maps.element_size() > 2 else score_maps.float())  # Eq. 1
    attention, low, high = normalize_with_extremes(maps, normalization, in_place=True)  # Eq. 2
    extremes = [low.flatten(1), high.flatten(1)]
    evidence = torch.cat(extremes if logits is None else [*extremes, logits.take(relevant)], dim=1)
    faulty = (evidence - evidence).any(1)  # x - x is 0 for finite x, else NaN, which counts as true
    if normalization is None:
        finite = attention.masked_fill(faulty[:, None, None], 0)
        faulty = faulty | outside(finite, "attention", "call normalize_attention first or leave normalization='max'")
        attention = attention.clamp(0, 1)
    attention = attention.float()
    if gate is None or logits is None:
        return Offer(attention, faulty, None)
    return Offer(attention, faulty, judge(gate, logits, targets).take(cells))


def _cells(pairs: PairSelection, score_maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each of K pairs is in a flattened (B, C), all logits (K, C) that it depends on there, and labels (B, C).

    A pair depends on its own logit and on those of the non-targets. In the cells of other targets stands its own.
    """
    (batch, num_classes), device = score_maps.shape[:2], score_maps.device
    starts = pairs.positions * num_classes
    cells = starts + pairs.classes
    targets = np.zeros(batch * num_classes, dtype=np.bool_)
    targets[cells] = True
    labels = targets.reshape(batch, num_classes)
    rows = starts[:, None] + np.arange(num_classes)
    relevant = np.where(labels[pairs.positions], cells[:, None], rows)
    return to_device(device, cells), to_device(device, relevant), to_device(device, labels)


def into_frame(offer: Offer, boxes: Floats | None, size: tuple[int, int]) -> Offer:
    """The offer of score maps that show ``boxes``, put into the frames of their images, at the size of their maps."""
    if boxes is None:
        return offer if offer.attention.shape[1:] == size else offer._replace(attention=resize(offer.attention, size))
    if flips_only(boxes):
        return offer._replace(attention=resize(mirror(offer.attention, boxes), size))
    sampling = into_image(boxes, size)
    attention, seen = sample(offer.attention, sampling)
    attention = attention.clamp(max=1)  # as in a resize
    return offer._replace(attention=attention, seen=None if sampling.covers() else seen)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (K, h, w) at another size, bilinear."""
    if maps.shape[1:] == size:
        return maps
    maps = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    return maps.clamp(max=1)  # the weights of a resize may add up to a rounding more than 1


class Grown(NamedTuple):
    """What becomes of K pairs: their new values, which of them accepted the map (K,), and which was faulty (K,)."""

    values: dict[str, Tensor]
    accepted: Tensor
    faulty: Tensor


def grow(kept: Mapping[str, Tensor], offer: Offer, fusion: Fusion, *, fill_empty: bool) -> Grown:
    """What K pairs keep after one more offer to each (Eq. 3 and 4).

    Args:
        kept: ``"maps"`` as they are stored, ``"counts"`` where `needed` says so, ``"missed"`` where views were shown.
        offer: to these pairs, in the frames of their images; its attention may be written over.
        fusion: AF(M, A).
        fill_empty: let pairs that hold nothing accept whatever the gate says.
    """
    fused, wrong = fuse(kept, offer.attention, fusion)  # Eq. 4 with 5 or 10
    faulty = offer.faulty if wrong is None else offer.faulty | wrong
    passed, seen, missed = offer.passed, offer.seen, kept.get("missed")
    if fill_empty and passed is not None:
        passed = passed | (kept["counts"] == 0)
    accepted = ~faulty if passed is None else passed > faulty  # passed, and not faulty
    if seen is not None:
        accepted = accepted & seen.flatten(1).any(1)
    shown = accepted.view(-1, 1, 1) if seen is None else accepted.view(-1, 1, 1) & seen
    values = {"maps": torch.where(shown, fused, kept["maps"])}  # a view changes what it shows, and nothing else
    if missed is not None:
        values["missed"] = missed if seen is None else missed + (accepted.view(-1, 1, 1) & ~seen)
    return Grown(values, accepted, faulty)


def fuse(kept: Mapping[str, Tensor], attention: Tensor, fusion: Fusion) -> tuple[Tensor, Tensor | None]:
    """M_t as it is stored, and which (K,) of it is out of range if the fusion is one that must be watched."""
    maps = kept["maps"]
    if fusion.commutes_with_rounding:  # Eq. 5 is MaxFusion.__call__, on bytes
        return fusion(maps, encode(attention, maps.dtype, in_place=True), None), None
    times = times_seen(kept["counts"], kept.get("missed"))
    attention = attention.nan_to_num(0) if fusion.guarded else attention  # a user's fusion never sees NaN
    cumulative = decode(maps)
    attention = attention.to(cumulative.dtype)
    fused = fusion(cumulative, attention, times.clamp(min=1))  # Eq. 10 is MeanFusion.__call__
    if fusion.guarded or not fusion.zero_is_neutral:
        fused = torch.where(times == 0, attention, fused)  # M_1 = A_1
    if not fusion.guarded:
        return encode(fused, maps.dtype), None
    return encode(fused.clamp(0, 1), maps.dtype), outside(fused, "the fusion's result", "fix the fusion")


def needed(store: Store, fusion: Fusion, offer: Offer, *, fill_empty: bool) -> list[str]:
    """What `grow` must know of the pairs."""
    names = ["maps"]
    if fill_empty or not fusion.commutes_with_rounding:
        names.append("counts")
    if "missed" in store.kept and (store.partial or offer.seen is not None):
        names.append("missed")
    return names


def change_of(
    store: Store, rows: IntArray, size: tuple[int, int], offer: Offer, fusion: Fusion, *, fill_empty: bool
) -> tuple[Change, Tensor]:
    """What an offer to K pairs, whose maps have one size, changes; and which (K,) of it was faulty.

    An image that occurs more than once in the batch takes several turns: its maps are fused one after the other.
    """
    repeated = len(set(rows.tolist())) < len(rows)
    unique = np.unique(rows) if repeated else rows
    stored = store.rows(unique)
    kept = store.read(needed(store, fusion, offer, fill_empty=fill_empty), stored, size)
    if not repeated:
        values, accepted, faulty = grow(kept, offer, fusion, fill_empty=fill_empty)
        return Change(stored, size, values, {"counts": accepted}), faulty
    accepted, faulty = torch.zeros_like(stored.tensor, dtype=torch.int32), torch.zeros_like(offer.faulty)
    for turn in turns_without_repeats(rows):
        at, chosen = (to_device(store.device, each) for each in (np.searchsorted(unique, rows[turn]), turn))
        values, now, faulty[chosen] = grow(
            {name: each[at] for name, each in kept.items()}, offer.at(chosen), fusion, fill_empty=fill_empty
        )
        accepted[at] += now
        for name, each in values.items():
            kept[name][at] = each
        if "counts" in kept:
            kept["counts"][at] += now
    kept.pop("counts", None)
    return Change(stored, size, kept, {"counts": accepted}), faulty


def turns_without_repeats(rows: IntArray) -> list[IntArray]:
    """Split the positions of a batch's rows so that no row occurs twice in a turn, first occurrences first."""
    order = np.argsort(rows, kind="stable")
    first = np.searchsorted(rows[order], rows[order])  # where each row's run starts
    occurrence = np.empty(len(rows), dtype=np.int64)
    occurrence[order] = np.arange(len(rows)) - first
    return [np.flatnonzero(occurrence == turn) for turn in range(int(occurrence.max()) + 1)]
