"""Letting the stores of many processes hold what all of them have seen."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from oaa_lib.maps.coding import decode, encode
from oaa_lib.maps.kept import MOST
from oaa_lib.maps.merging import BUCKET, join, joint
from oaa_lib.maps.state import BASES
from oaa_lib.maps.store import Change, Rows, Store, times_seen


@torch.no_grad()
def synchronize(store: Store, fusion: str, group: Any) -> None:
    """Exchange what is new since the last time; ``fusion`` is its name. See `AttentionAccumulator.synchronize`."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "expected torch.distributed to be initialised, got no process group; call "
            "torch.distributed.init_process_group first, or leave synchronize out where there is one process"
        )
    exchange = Exchange(group, store.device)
    _agree(store, fusion, exchange)
    reduction = joint(store).reduction
    if reduction == "mean":
        _exchange_means(store, exchange)
    elif reduction is None:
        _exchange_maps(store, exchange)
    else:
        _exchange_by_maximum(store, exchange, latest=reduction == "latest")
    then, offered = store.numbers["totals_then"], store.numbers["offered"]
    new = torch.from_numpy(np.stack([store.tensors["skipped"].cpu().numpy(), offered]) - then)
    exchange.reduce(new, dist.ReduceOp.SUM)
    totals = then + new.numpy()
    classes = store.rows(np.arange(totals.shape[1]))
    skipped = torch.from_numpy(totals[0]).to(store.device)
    store.write([Change(classes, (0, 0), {"skipped": skipped})], {"offered": totals[1], "totals_then": totals})
    store.keep_base()


class Exchange:
    """The collectives of one group, for tensors that live on any device."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))  # by kind of device
        if backends.get(device.type, "gloo") != "gloo":
            self.device = device
        else:  # gloo cannot do all of it on an accelerator
            self.device = torch.device("cpu" if "cpu" in backends else next(iter(backends)))

    def reduce(self, values: Tensor, how: Any) -> None:
        """All-reduce in place."""
        there = values.to(self.device)
        dist.all_reduce(there, how, group=self.group)
        if there is not values:
            values.copy_(there)

    def gather(self, values: Tensor) -> list[Tensor]:
        """What every process has, in the order of their ranks."""
        there = values.to(self.device)
        parts = [torch.empty_like(there) for _ in range(self.size)]
        dist.all_gather(parts, there, group=self.group)
        return [part.to(values.device) for part in parts]


def _agree(store: Store, fusion: str, exchange: Exchange) -> None:
    """All processes go on, or all of them raise."""
    pairs, layout = store.layout.pairs, store.layout
    dtypes = {name: tensor.dtype for name, tensor in sorted(store.tensors.items())}
    fingerprint = hashlib.sha256(repr((pairs.num_classes, pairs.keys, layout.size, fusion, dtypes)).encode())
    then = (store.tensors["synchronized"].cpu().numpy(), store.numbers["totals_then"])
    for array in (pairs.offsets, pairs.classes, layout.sizes, *then):
        fingerprint.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    ours = int.from_bytes(fingerprint.digest()[:7], "little")
    refusal = joint(store).refusal or _unknown_base(store, fusion)
    known = store.tensors["synchronized"]
    newest = int((store.tensors["counts"] - known).max())
    votes = torch.tensor([ours, -ours, refusal is not None, newest], device="cpu")
    exchange.reduce(votes, dist.ReduceOp.MAX)
    largest, negative_smallest, refused, newest = votes.tolist()
    if largest != -negative_smallest:
        raise ValueError(
            "expected the same labels, keys, map size, fusion and dtype on all processes, and the same last "
            "synchronize, got different ones; build all alike, and go on from one saved state"
        )
    if refused:
        raise ValueError(refusal or "another process of the group cannot synchronize; its own error says why")
    if int(known.max()) + newest * exchange.size > MOST:
        raise ValueError(
            f"expected pairs that have accepted at most {MOST} maps in all processes, got more; reset them"
        )


def _unknown_base(store: Store, fusion: str) -> str | None:
    """Why what came after the last synchronize cannot be told from what came before; None if it can, or need not."""
    reduction = joint(store).reduction
    if reduction in ("max", "latest") or not store.tensors["synchronized"].any():
        return None
    if reduction is None:
        return (
            f"fusion {fusion!r} can be synchronised once only: what it holds since then cannot be told apart from what "
            "all processes have, and would count twice; synchronize at the end"
        )
    if not store.base and not torch.equal(store.tensors["counts"], store.tensors["synchronized"]):
        return (
            "this mean comes from a file whose process ended between two synchronizations, or a synchronize of it was "
            "cut short: what was new in it would count twice; go on from a state that was saved after a synchronize"
        )
    return None


def _exchange_by_maximum(store: Store, exchange: Exchange, *, latest: bool) -> None:
    """Eq. 5 of all streams; or, the others being 0, the latest map of whoever has accepted most (in a tie: first)."""
    new = store.tensors["counts"] - store.tensors["synchronized"]
    claim = new.long() * exchange.size + exchange.size - 1 - exchange.rank
    best = claim.clone()
    exchange.reduce(best, dist.ReduceOp.MAX)
    exchange.reduce(new, dist.ReduceOp.SUM)
    total = store.tensors["synchronized"] + new
    if latest:
        _agree_on_partial(store, exchange)
    names = ["maps", *(["counts", "missed"] if latest and store.partial else [])]
    for rows, size in store.blocks(BUCKET // 2):
        now, counts = store.read(names, rows, size), total[rows.tensor]
        ours = (claim == best)[rows.tensor].view(-1, 1, 1)
        if latest:
            now["maps"] = now["maps"] * ours
        if "missed" in now:  # a pixel that this map has never shown is known by none
            seen = (ours & (times_seen(now["counts"], now["missed"]) > 0)).byte()
            exchange.reduce(seen, dist.ReduceOp.MAX)
            now["missed"] = torch.where(seen > 0, 0, counts.view(-1, 1, 1))
        exchange.reduce(now["maps"], dist.ReduceOp.MAX)
        store.write([Change(rows, size, {**now, "counts": counts, "synchronized": counts})])


def _agree_on_partial(store: Store, exchange: Exchange) -> None:
    """Whether any process has accepted a map that did not show all of its image."""
    partial = torch.tensor([store.partial], device="cpu")
    exchange.reduce(partial, dist.ReduceOp.MAX)
    store.partial = bool(partial)


def _exchange_means(store: Store, exchange: Exchange) -> None:
    """Sums and counts of what is new in each process, added to what all of them had (Eq. 10 of all streams)."""
    _agree_on_partial(store, exchange)
    base = store.base
    for rows, size in store.blocks(BUCKET // 8):  # up to 15 values a pixel at a time
        values = _mean_of_all(store, base, rows, size, exchange)
        store.base = {}  # which would not fit what is written from here on, should the rest not come
        store.write([Change(rows, size, values)])


def _mean_of_all(
    store: Store, base: Mapping[str, Tensor], rows: Rows, size: tuple[int, int], exchange: Exchange
) -> dict[str, Tensor]:
    now = store.read(["maps", "counts", "missed", "synchronized"], rows, size)
    then = store.read(BASES, rows, size, base=base) if base else {name: now[name] for name in BASES}
    counts, before = now["counts"], now["synchronized"]
    known = (before > 0)[:, None, None]  # else all of it is new, and there may be no base
    maps, missed = (then[name].where(known, 0) for name in BASES)
    maps, times, times_before = decode(maps), times_seen(counts, now["missed"]), times_seen(before, missed)
    added = decode(now["maps"]) * times - maps * times_before
    exchange.reduce(added, dist.ReduceOp.SUM)
    new = counts - before
    exchange.reduce(new, dist.ReduceOp.SUM)
    unseen = now["missed"] - missed
    if store.partial:
        exchange.reduce(unseen, dist.ReduceOp.SUM)
    new_times = times_seen(new, unseen)
    total = (times_before + new_times).clamp(min=1)
    maps = (maps + (added - maps * new_times) / total).clamp(0, 1)  # in a form in which nothing new is no change
    return {
        "maps": encode(maps, now["maps"].dtype),
        "counts": before + new,
        "synchronized": before + new,
        **({"missed": missed + unseen} if store.partial else {}),
    }


def _exchange_maps(store: Store, exchange: Exchange) -> None:
    """Other fusions: the maps of all processes, merged one after the other in the order of their ranks."""
    names = [name for name in ("maps", "counts", "missed") if name in store.kept]
    for rows, size in store.blocks(BUCKET // (2 * exchange.size)):
        gathered = [exchange.gather(values) for values in store.read(names, rows, size).values()]
        first, *others = (dict(zip(names, values, strict=True)) for values in zip(*gathered, strict=True))
        for other in others:
            first = join(store.kept, first, other)
        store.write([Change(rows, size, {**first, "synchronized": first["counts"]})])
