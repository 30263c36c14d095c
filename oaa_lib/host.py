"""The paper's own case on the host, in numpy: on small maps torch spends more time in calls than in loops."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oaa_lib.maps import Change, Rows
from oaa_lib.pairs import PairSelection

Flags = npt.NDArray[np.bool_]
IN_CACHE = 2**16  # pixels that are worked on at once


def score_gate(logits: npt.NDArray[Any], pairs: PairSelection) -> Flags:
    """What `gating.score_gate` says of (K,) pairs, from finite logits (B, C)."""
    own = logits[pairs.positions, pairs.classes]
    others = logits.copy()
    others[pairs.positions, pairs.classes] = -np.inf
    passed: Flags = own > others.max(1)[pairs.positions]
    return passed


def maximum(
    tensors: dict[str, Tensor], pairs: PairSelection, score_maps: Tensor, passed: Flags, fill_empty: bool
) -> tuple[Change, Flags]:
    """Eq. 2 and 5 for raw score maps of whole images and cumulative maps in 8 bits, both on the host and of one size.

    Args:
        tensors: "maps" (P, H, W) uint8 and "counts" (P,) int32.
        pairs: K different ones.
        score_maps: (B, C, H, W) float32.
        passed: (K,) what the gate says; their scores were finite.
        fill_empty: let pairs that hold nothing accept whatever the gate says.

    Returns:
        What changes, bit for bit as `AttentionAccumulator.update` finds it by way of torch; which (K,) maps were fine.
    """
    scores, stored = score_maps.detach().numpy(), tensors["maps"].numpy()
    counts = tensors["counts"].numpy()[pairs.rows]
    maps = np.empty((len(pairs.rows), *stored.shape[1:]), dtype=np.uint8)
    fine = np.empty(len(maps), dtype=np.bool_)
    zeros = np.zeros(maps[0].size, dtype=np.float32)
    step = max(IN_CACHE // len(zeros), 1)
    for start in range(0, len(maps), step):
        part = slice(start, start + step)
        attention = np.ascontiguousarray(scores[pairs.positions[part], pairs.classes[part]])
        flat = attention.reshape(len(attention), -1)  # the same memory
        lowest, peak = flat.min(1), flat.max(1)
        good = (lowest > -np.inf) & (peak < np.inf)  # False for NaN
        if not good.all():
            attention[~good] = 0
        peak[~(good & (peak > 0))] = 1
        np.maximum(flat, zeros, out=flat)  # numpy is slow with the number 0
        flat /= peak[:, None]  # Eq. 2
        flat *= 255
        fine[part], maps[part] = good, np.rint(attention, out=attention)
        np.maximum(maps[part], stored[pairs.rows[part]], out=maps[part])  # Eq. 5
    accept = fine & (passed | (counts == 0) if fill_empty else passed)
    rows, counts = pairs.rows, counts + np.int32(1)
    if not accept.all():
        rows, maps, counts = rows[accept], maps[accept], counts[accept]
    values = {"maps": torch.from_numpy(maps), "counts": torch.from_numpy(counts)}
    return Change(Rows(rows, torch.from_numpy(rows)), (maps.shape[1], maps.shape[2]), values), fine
