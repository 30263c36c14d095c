"""Joining what two stores have seen, as if one had seen both streams."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from oaa_lib.maps.kept import MOST, Joint, Kept
from oaa_lib.maps.pairs import IntArray
from oaa_lib.maps.store import Change, Store, times_seen

Group: TypeAlias = Sequence[tuple[IntArray, tuple[int, int]]]
BUCKET = 1 << 22  # pixels joined at a time, so that joining needs little memory beside the maps: 16 MiB in float32


@torch.no_grad()
def merge(into: Store, other: Store) -> None:
    """Add the stream of another store of the same owners and kinds, which stays as it is.

    Up to a bucket of maps it is one step. More are joined bucket by bucket, whole pairs; the totals change with the
    last.

    Raises:
        ValueError: the fusion cannot tell what both streams come to, or its result is no map; or a pair would have
            accepted more than `MOST` maps (on an accelerator its count stays at that). Nothing is changed then.
    """
    if (refusal := joint(into).refusal) is not None:
        raise ValueError(refusal)
    if into.device.type == other.device.type == "cpu" and _most(into, other) > MOST:  # elsewhere a look would wait
        raise ValueError(f"expected pairs that have accepted at most {MOST} maps together, got more; reset one of them")
    names = ["maps", "counts", *(["missed"] if "missed" in into.kept and (into.partial or other.partial) else [])]
    skipped = other.tensors["skipped"].to(into.device, copy=True)  # `other` may be the same
    tallies = Change(into.rows(np.arange(len(skipped))), (0, 0), {}, {"skipped": skipped})
    offered = into.numbers["offered"] + other.numbers["offered"]
    groups = list(into.layout.groups(BUCKET))
    if len(groups) > 1 and joint(into).guarded:
        for group in groups:  # a merge of the user's may fail: then before anything has changed
            _joined(into, other, names, group)
    for group in groups[:-1]:
        into.write(_joined(into, other, names, group))
    into.write([*_joined(into, other, names, groups[-1]), tallies], {"offered": offered})


def _most(into: Store, other: Store) -> int:
    return int((into.tensors["counts"].long() + other.tensors["counts"]).max())


def _joined(into: Store, other: Store, names: list[str], group: Group) -> list[Change]:
    changes = []
    for numbers, size in group:
        rows = into.rows(numbers)
        ours, theirs = into.read(names, rows, size), other.read(names, other.rows(numbers), size)
        there = {name: values.to(into.device) for name, values in theirs.items()}
        changes.append(Change(rows, size, join(into.kept, ours, there)))
    return changes


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
            joined[name] = (first[name].long() + second[name]).clamp(max=MOST).to(first[name].dtype)
    return joined
