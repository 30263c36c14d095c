"""The paper's own case on the host, in numpy: on small maps torch spends more time in calls than in loops."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oaa_lib.maps import Change, Rows
from oaa_lib.pairs import IntArray

Flags = npt.NDArray[np.bool_]


def maximum(
    tensors: dict[str, Tensor], rows: IntArray, score_maps: Tensor, trusted: Flags, passed: Flags, fill_empty: bool
) -> tuple[Change, Flags]:
    """Eq. 2 and 5 for raw score maps of whole images and cumulative maps in 8 bits, both on the host and of one size.

    Args:
        tensors: "maps" (P, H, W) uint8 and "counts" (P,) int32.
        rows: (K,) different rows of these.
        score_maps: (K, H, W) float32.
        trusted: (K,) whether the scores that the gate has seen were finite.
        passed: (K,) what the gate says.
        fill_empty: let pairs that hold nothing accept whatever the gate says.

    Returns:
        What changes, bit for bit as `AttentionAccumulator.update` finds it by way of torch; which (K,) maps were fine.
    """
    scores = score_maps.numpy()
    flat = scores.reshape(len(scores), -1)
    lowest, peak = flat.min(1), flat.max(1)
    fine = (lowest > -np.inf) & (peak < np.inf) & trusted  # False for NaN
    counts = tensors["counts"].numpy()[rows]
    accept = np.flatnonzero(fine & (passed | (counts == 0) if fill_empty else passed))
    attention = np.maximum(scores[accept], 0)
    attention /= np.where(peak > 0, peak, 1)[accept, None, None]  # Eq. 2
    attention *= 255
    stored = rows[accept]
    maps = np.maximum(tensors["maps"].numpy()[stored], np.rint(attention, out=attention).astype(np.uint8))  # Eq. 5
    values = {"maps": torch.from_numpy(maps), "counts": torch.from_numpy(counts[accept] + np.int32(1))}
    return Change(Rows(stored, torch.from_numpy(stored)), (maps.shape[1], maps.shape[2]), values), fine
