"""Joining what two stores have seen, as if one had seen both streams."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from oaa_lib.maps.store import Change, Joint, Kept, Store, times_seen

BUCKET = 1 << 22  # pixels joined at a time, so that joining needs little memory beside the maps: 16 MiB in float32


@torch.no_grad()
def merge(into: Store, other: Store) -> None:
    """Add the stream of another store of the same owners and kinds, which stays as it is.

    Raises:
        ValueError: the fusion cannot tell what both streams come to.
    """
    if (refusal := joint(into).refusal) is not None:
        raise ValueError(refusal)
    names = ["maps", "counts", *(["missed"] if "missed" in into.kept and (into.partial or other.partial) else [])]
    for rows, size in into.blocks(BUCKET):
        ours = into.read(names, rows, size)
        theirs = {n: v.to(into.device) for n, v in other.read(names, other.rows(rows.numbers), size).items()}
        into.write([Change(rows, size, join(into.kept, ours, theirs))])
    skipped = other.tensors["skipped"].to(into.device)
    classes = into.rows(np.arange(len(skipped)))
    offered = into.numbers["offered"] + other.numbers["offered"]
    into.write([Change(classes, (0, 0), {}, {"skipped": skipped})], {"offered": offered})


def joint(store: Store) -> Joint:
    """How the store's maps are joined."""
    how = store.kept["maps"].joined
    assert isinstance(how, Joint)
    return how


def join(kept: Mapping[str, Kept], first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """What pairs keep that have seen both streams."""
    times = [times_seen(each["counts"], each.get("missed")) for each in (first, second)]
    joined = {}
    for name in first:
        how = kept[name].joined
        if isinstance(how, Joint):
            joined[name] = how.join(first[name], second[name], *times)
        else:
            joined[name] = first[name] + second[name]
    return joined
