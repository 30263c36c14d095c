"""Joining what several accumulators have seen: two in one process, or one in each of many processes."""

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from oaa_lib.fusion import fusion_name, merge_refusal
from oaa_lib.maps import Change, PairStore, Rows, decode, encode, times_seen

if TYPE_CHECKING:
    from oaa_lib.accumulator import AttentionAccumulator

BUCKET = 1 << 22  # pixels joined at a time, so that joining needs little memory beside the maps: 16 MiB in float32


@torch.no_grad()
def merge(into: "AttentionAccumulator", other: "AttentionAccumulator") -> None:
    """See `AttentionAccumulator.merge`."""
    refusal = merge_refusal(into.fusion)
    if refusal is not None:
        raise ValueError(refusal)
    keep_base(into)
    ours, theirs = into._store, other._store
    into._partial |= other._partial
    for host, size in into._layout.blocks(into.pairs, BUCKET):
        rows = _rows(into, host)
        kept = _read(into, rows, size)
        arrived = {name: values.to(into.device) for name, values in _read(other, _rows(other, host), size).items()}
        ours.write([Change(rows, size, _joined(into, kept, arrived))], {}, {})
    skipped = ours.tensors["skipped"] + theirs.tensors["skipped"].to(into.device)
    ours.write([], {"skipped": skipped}, {"offered": ours.hosts["offered"] + theirs.hosts["offered"]})


def keep_base(accumulator: "AttentionAccumulator") -> None:
    """Before the first change after a `synchronize`, keep what a mean was then: later on it cannot be told apart."""
    if accumulator._synchronized and not accumulator._base and _reduction(accumulator) == "mean":
        tensors = accumulator._store.tensors
        accumulator._base = {name: tensors[name].clone() for name in ("maps", "missed")}


@torch.no_grad()
def synchronize(accumulator: "AttentionAccumulator", group: Any) -> None:
    """See `AttentionAccumulator.synchronize`."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "expected torch.distributed to be initialised, got no process group; call "
            "torch.distributed.init_process_group first, or leave synchronize out where there is one process"
        )
    exchange = _Exchange(group, accumulator.device)
    _agree(accumulator, exchange)
    tensors, hosts = accumulator._store.tensors, accumulator._store.hosts
    if "latest" in tensors:
        _exchange_latest(accumulator, exchange)
    if _reduction(accumulator) == "max":
        maps = tensors["maps"].view(-1)
        for start in range(0, len(maps), BUCKET):
            exchange.reduce(maps[start : start + BUCKET], dist.ReduceOp.MAX)  # Eq. 5 of all streams
        _exchange_counts(accumulator, exchange)
    elif _reduction(accumulator) == "mean":
        _exchange_means(accumulator, exchange)
    else:
        _exchange_maps(accumulator, exchange)
    new = torch.from_numpy(np.stack([tensors["skipped"].cpu().numpy(), hosts["offered"]]) - hosts["totals_then"])
    exchange.reduce(new, dist.ReduceOp.SUM)
    totals = hosts["totals_then"] + new.numpy()
    skipped = {"skipped": torch.from_numpy(totals[0])}
    accumulator._store.write([], skipped, {"offered": totals[1], "totals_then": totals})
    accumulator._base = {}
    accumulator._look()


class _Exchange:
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


def _agree(accumulator: "AttentionAccumulator", exchange: _Exchange) -> None:
    """All processes go on, or all of them raise."""
    pairs, layout, tensors = accumulator.pairs, accumulator._layout, accumulator._store.tensors
    dtypes = {name: tensor.dtype for name, tensor in sorted(tensors.items())}
    settings = (pairs.num_classes, pairs.keys, layout.size, fusion_name(accumulator.fusion), dtypes)
    fingerprint = hashlib.sha256(repr(settings).encode())
    then = (tensors["synchronized"].cpu().numpy(), accumulator._store.hosts["totals_then"])
    for array in (pairs.offsets, pairs.classes, layout.sizes, *then):
        fingerprint.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    ours = int.from_bytes(fingerprint.digest()[:7], "little")
    refusal = merge_refusal(accumulator.fusion) or _unknown_base(accumulator)
    told = torch.tensor([ours, -ours, refusal is not None])
    exchange.reduce(told, dist.ReduceOp.MAX)
    largest, negative_smallest, refused = told.tolist()
    if largest != -negative_smallest:
        raise ValueError(
            "expected the same labels, keys, map size, fusion, dtype and keep_latest on all processes, and the same "
            "last synchronize, got different ones; build all alike, and go on from one saved state"
        )
    if refused:
        raise ValueError(refusal or "another process of the group cannot synchronize; its own error says why")


def _unknown_base(accumulator: "AttentionAccumulator") -> str | None:
    """Why what came after the last synchronize cannot be told from what came before; None if it can, or need not."""
    if not accumulator._synchronized or _reduction(accumulator) == "max":
        return None
    tensors = accumulator._store.tensors
    if _reduction(accumulator) != "mean":
        name = fusion_name(accumulator.fusion)
        return (
            f"fusion {name!r} can be synchronised once only: what it holds since then cannot be told apart from what "
            "all processes have, and would count twice; synchronize at the end"
        )
    if not accumulator._base and not torch.equal(tensors["counts"], tensors["synchronized"]):
        return (
            "this mean comes from a file whose process ended between two synchronizations: what was new in it would "
            "count twice; go on from a state that was saved after a synchronize"
        )
    return None


def _exchange_counts(accumulator: "AttentionAccumulator", exchange: _Exchange) -> None:
    tensors = accumulator._store.tensors
    new = tensors["counts"] - tensors["synchronized"]
    exchange.reduce(new, dist.ReduceOp.SUM)
    total = tensors["synchronized"] + new
    rows, no_maps = _rows(accumulator, np.arange(len(total))), (0, 0)
    accumulator._store.write([Change(rows, no_maps, {"counts": total, "synchronized": total})], {}, {})


def _exchange_latest(accumulator: "AttentionAccumulator", exchange: _Exchange) -> None:
    """The latest map of a pair becomes that of the process which has accepted most since; the first one in a tie."""
    tensors = accumulator._store.tensors
    claim = (tensors["counts"] - tensors["synchronized"]).long() * exchange.size + exchange.size - 1 - exchange.rank
    best = claim.clone()
    exchange.reduce(best, dist.ReduceOp.MAX)
    ours = claim == best
    similarity = tensors["similarity"] * ours
    exchange.reduce(similarity, dist.ReduceOp.MAX)
    for host, size in accumulator._layout.blocks(accumulator.pairs, BUCKET):
        rows = _rows(accumulator, host)
        maps = accumulator._store.read("latest", rows, size) * ours[rows.device][:, None, None]
        exchange.reduce(maps, dist.ReduceOp.MAX)
        accumulator._store.write([Change(rows, size, {"latest": maps, "similarity": similarity[rows.device]})], {}, {})


def _exchange_means(accumulator: "AttentionAccumulator", exchange: _Exchange) -> None:
    """Sums and counts of what is new in each process, added to what all of them had (Eq. 10 of all streams)."""
    store, base = accumulator._store, accumulator._base
    partial = torch.tensor([accumulator._partial])
    exchange.reduce(partial, dist.ReduceOp.MAX)
    accumulator._partial = bool(partial)
    then = PairStore(accumulator._layout, {**store.tensors, **base}, {})
    for host, size in accumulator._layout.blocks(accumulator.pairs, BUCKET // 8):  # up to 15 values a pixel at a time
        rows = _rows(accumulator, host)
        now = {name: store.read(name, rows, size) for name in ("maps", "counts", "missed", "synchronized")}
        counts, before = now["counts"], now["synchronized"]
        known = (before > 0)[:, None, None]  # else all of it is new, and there may be no base
        maps, missed = (then.read(name, rows, size).where(known, 0) for name in ("maps", "missed"))
        maps, times, times_before = decode(maps), times_seen(counts, now["missed"]), times_seen(before, missed)
        added = decode(now["maps"]) * times - maps * times_before
        exchange.reduce(added, dist.ReduceOp.SUM)
        new = counts - before
        exchange.reduce(new, dist.ReduceOp.SUM)
        unseen = now["missed"] - missed
        if accumulator._partial:
            exchange.reduce(unseen, dist.ReduceOp.SUM)
        new_times = times_seen(new, unseen)
        total = (times_before + new_times).clamp(min=1)
        maps = (maps + (added - maps * new_times) / total).clamp(0, 1)  # so written that nothing new is no change
        change = {
            "maps": encode(maps, accumulator.dtype),
            "counts": before + new,
            "missed": missed + unseen,
            "synchronized": before + new,
        }
        store.write([Change(rows, size, change)], {}, {})


def _exchange_maps(accumulator: "AttentionAccumulator", exchange: _Exchange) -> None:
    """Other fusions: the maps of all processes, merged one after the other in the order of their ranks."""
    store = accumulator._store
    for host, size in accumulator._layout.blocks(accumulator.pairs, BUCKET // exchange.size):
        rows = _rows(accumulator, host)
        names = [name for name in ("maps", "counts", "missed") if name in store.tensors]
        gathered = [exchange.gather(store.read(name, rows, size)) for name in names]
        first, *others = (dict(zip(names, values, strict=True)) for values in zip(*gathered, strict=True))
        for other in others:
            first = _joined(accumulator, first, other)
        store.write([Change(rows, size, {**first, "synchronized": first["counts"]})], {}, {})


def _joined(
    accumulator: "AttentionAccumulator", first: dict[str, Tensor], second: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What pairs keep that have seen both streams."""
    merged = {"counts": first["counts"] + second["counts"]}
    times = [times_seen(kept["counts"], kept.get("missed")) for kept in (first, second)]
    if first["maps"].ndim == 4:
        times = [count[:, None] for count in times]
    ours, theirs = decode(first["maps"]), decode(second["maps"])
    maps = accumulator.fusion.merge(ours, theirs, times[0].clamp(min=1), times[1].clamp(min=1))  # type: ignore[attr-defined]
    maps = torch.where(times[0] == 0, theirs, torch.where(times[1] == 0, ours, maps))
    merged["maps"] = encode(maps, first["maps"].dtype)
    if "missed" in first:
        merged["missed"] = first["missed"] + second["missed"]
    if "latest" in first and "latest" in second:
        has = second["counts"] > 0
        merged["latest"] = torch.where(has[:, None, None], second["latest"], first["latest"])
        merged["similarity"] = torch.where(has, second["similarity"], first["similarity"])
    return merged


def _read(accumulator: "AttentionAccumulator", rows: Rows, size: tuple[int, int]) -> dict[str, Tensor]:
    names = ("maps", "counts", "missed", "latest", "similarity")
    return {name: accumulator._store.read(name, rows, size) for name in names if name in accumulator._store.tensors}


def _rows(accumulator: "AttentionAccumulator", host: Any) -> Rows:
    return Rows(host, torch.from_numpy(host).to(accumulator.device))


def _reduction(accumulator: "AttentionAccumulator") -> str | None:
    return getattr(accumulator.fusion, "reduction", None)
