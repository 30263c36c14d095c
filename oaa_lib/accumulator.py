"""The cumulative attention maps of a data set, and the online update that grows them (paper, section 3.2)."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from oaa_lib.cam import normalize_attention
from oaa_lib.fusion import FUSIONS, Fusion, MaxFusion, MeanFusion, MergeableFusion
from oaa_lib.gating import GATES, Gate
from oaa_lib.pairs import PairSelection, PairTable
from oaa_lib.storage import decode, encode, read_archive, write_archive

Indices: TypeAlias = Iterable[int | str] | Tensor | npt.NDArray[Any]
BUILT_IN = (MaxFusion, MeanFusion)
MERGE_ROWS = 4096  # maps joined at a time, so that merging needs little memory beside the maps


class AttentionAccumulator:
    """Keeps one cumulative attention map for every (image, target class) pair of a data set, and fuses online.

    A map is stored for labelled pairs only. An image without label owns none, and `update` passes it over: negatives
    may be in the batch.

    Args:
        labels: (N, C) bool or 0/1: row i is the classes that image i shows, without background.
        map_size: (H, W) of every stored map.
        fusion: ``"max"`` (Eq. 5), ``"mean"`` (Eq. 10), or a `Fusion`.
        gate: ``"score"`` (paper: a target must outscore all non-targets), ``"topk"`` (release: among the K best), None
            (everything passes), or a `Gate`.
        dtype: storage, ``torch.uint8`` (steps of 1/255), ``torch.float16`` or ``torch.float32``. A fusion that needs
            more keeps what it needs: the mean is always float32.
        device: where the maps live; the score maps may come from another device.
        keys: N different names, so that images can be given by name instead of by row.

    Attributes:
        pairs: the pairs, see `PairTable`.
        map_size: (H, W).
        fusion: the fusion.
        gate: the gate, or None.

    Raises:
        TypeError: labels, dtype, fusion or gate of another kind.
        ValueError: labels that are not (N, C) of 0 and 1, all 0, a bad ``map_size``, keys that do not fit.

    Example:
        >>> import torch
        >>> accumulator = AttentionAccumulator(torch.tensor([[1, 0], [1, 1]]), map_size=(2, 2))
        >>> score_maps = torch.tensor([[[[1.0, 2.0], [0.0, -1.0]], [[0.0, 0.0], [0.0, 0.1]]]])
        >>> _ = accumulator.update([1], score_maps)
        >>> accumulator.attention(1)[0]
        tensor([[0.5020, 1.0000],
                [0.0000, 0.0000]])

    Source: paper, section 3.2, Eq. 3-5 and 10.
    """

    def __init__(
        self,
        labels: Tensor | npt.ArrayLike,
        map_size: tuple[int, int],
        *,
        fusion: str | Fusion = "max",
        gate: str | Gate | None = "score",
        dtype: torch.dtype = torch.uint8,
        device: torch.device | str = "cpu",
        keys: Sequence[str] | None = None,
    ) -> None:
        self._set_up(PairTable.from_labels(labels, keys), map_size, fusion, gate, dtype, device)

    def _set_up(
        self,
        pairs: PairTable,
        map_size: Sequence[int],
        fusion: str | Fusion,
        gate: str | Gate | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if (
            isinstance(map_size, str)
            or not isinstance(map_size, Sequence)
            or not all(isinstance(side, (int, np.integer)) for side in map_size)
        ):
            raise TypeError(f"expected map_size as two integers (H, W), got {map_size!r}")
        if len(map_size) != 2 or min(map_size) < 1:
            raise ValueError(f"expected map_size (H, W) of at least (1, 1), got {tuple(map_size)}")
        if dtype not in (torch.uint8, torch.float16, torch.float32):
            raise TypeError(f"expected dtype torch.uint8, torch.float16 or torch.float32, got {dtype}")
        self.pairs = pairs
        self.map_size = (int(map_size[0]), int(map_size[1]))
        self.fusion: Fusion = _resolve("fusion", fusion, FUSIONS)
        self.gate: Gate | None = None if gate is None else _resolve("gate", gate, GATES)
        dtype = getattr(self.fusion, "storage_dtype", dtype)
        self._maps = torch.zeros((pairs.num_pairs, *self.map_size), dtype=dtype, device=device)
        self._counts = torch.zeros(pairs.num_pairs, dtype=torch.int32, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._offered = 0

    # What is kept

    @property
    def device(self) -> torch.device:
        """Where the maps live."""
        return self._maps.device

    @property
    def dtype(self) -> torch.dtype:
        """How the maps are stored."""
        return self._maps.dtype

    @property
    def accumulated(self) -> Tensor:
        """(N, C) bool on `device`: pairs that hold something."""
        return self.counts > 0

    @property
    def counts(self) -> Tensor:
        """(N, C) int32 on `device`: how many maps each pair has accepted; 0 for classes the image does not show."""
        dense = self._counts.new_zeros(self.pairs.num_images, self.pairs.num_classes)
        images, classes = self._indices(self.pairs.images(), self.pairs.classes.astype(np.int64), device=self.device)
        return dense.index_put_((images, classes), self._counts)

    @property
    def skipped(self) -> int:
        """How many maps were refused because they or their gating scores were not finite. Waits for the device."""
        return int(self._skipped)

    @property
    def offered(self) -> int:
        """How many maps `update` has been offered; ``accepted / offered`` is the pass rate of the gate."""
        return self._offered

    @property
    def accepted(self) -> int:
        """How many maps were fused. Waits for the device."""
        return int(self._counts.sum())

    def __len__(self) -> int:
        return self.pairs.num_images

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.pairs.num_images} images, {self.pairs.num_classes} classes, "
            f"{self.pairs.num_pairs} pairs, map_size={self.map_size}, fusion={_name(self.fusion, FUSIONS)!r}, "
            f"gate={_name(self.gate, GATES)!r}, dtype={self.dtype}, device={self.device})"
        )

    def __getitem__(self, indices: Indices) -> Tensor:
        """Soft labels of a batch: (B, C, H, W) float32 in [0, 1] on `device`; 0 for classes an image does not show.

        Example:
            >>> AttentionAccumulator([[1, 0], [1, 1]], (7, 7))[[1, 0, 1]].shape
            torch.Size([3, 2, 7, 7])
        """
        images = self.pairs.positions(indices)
        rows, positions, classes = self._indices(*self.pairs.select(images), device=self.device)
        dense = torch.zeros(len(images), self.pairs.num_classes, *self.map_size, device=self.device)
        return dense.index_put_((positions, classes), decode(self._maps[rows]))

    def classes(self, index: int | str) -> Tensor:
        """(K,) int64 on the host: the classes of one image, in the order of `attention`."""
        return torch.from_numpy(self.pairs.select(self.pairs.positions([index])).classes)

    def attention(self, index: int | str) -> Tensor:
        """(K, H, W) float32 in [0, 1] on `device`: the cumulative attention of one image's classes."""
        rows = self.pairs.select(self.pairs.positions([index])).rows
        return decode(self._maps[self._indices(rows, device=self.device)[0]])

    # Growing it

    @torch.no_grad()
    def update(
        self,
        indices: Indices,
        score_maps: Tensor,
        logits: Tensor | None = None,
        *,
        normalization: Literal["max", "minmax"] | None = "max",
        fill_empty: bool = False,
    ) -> Self:
        """Fuse the attention of a batch into the maps of its images (Eq. 3 and 4).

        For each image's target classes: normalise (Eq. 2), ask the gate, resize to ``map_size`` (bilinear,
        ``align_corners=False``), fuse. Images may come in any order and repeat; a repeated one counts each time, in
        order. A pair is skipped, and counted in `skipped`, if its map, its logit or a non-target logit of its image is
        NaN or infinite. Nothing is written if an error is raised. On an accelerator nothing waits for the device.

        Args:
            indices: (B,) rows of ``labels``, or names if ``keys`` were given; on the host.
            score_maps: (B, C, h, w) floating point, raw scores, all classes, in the image's own frame (undo flips
                first).
            logits: (B, C) floating point, class scores for the gate, in any monotone form. None: the average of
                ``score_maps``.
            normalization: as `normalize_attention`; None if ``score_maps`` is attention in [0, 1] already.
            fill_empty: let pairs that hold nothing accept this map whatever the gate says (the release's last epoch).

        Returns:
            self.

        Raises:
            TypeError: not floating point, or a gate that does not return booleans.
            ValueError: shapes, class count or devices that do not fit, an empty batch; attention outside [0, 1] with
                ``normalization=None`` (on an accelerator such maps are skipped and counted instead).
            IndexError, KeyError: an index or name the data set does not have.

        Example:
            >>> import torch
            >>> accumulator = AttentionAccumulator(torch.eye(3), (28, 28), keys=["cat", "dog", "bird"])
            >>> accumulator.update(["bird", "cat"], torch.rand(2, 3, 28, 28), torch.rand(2, 3)).offered
            2

        Source: paper, section 3.2.
        """
        images = self.pairs.positions(indices)
        self._check_batch(len(images), score_maps, logits)
        pairs = self.pairs.select(images)
        if not len(pairs.rows):
            return self
        places = self._indices(pairs.positions, pairs.classes, device=score_maps.device)
        attention, usable = self._normalize(score_maps[places], normalization)
        if logits is None and self.gate is not None:
            logits = score_maps.float().mean((-2, -1))  # Eq. 1
        passed = torch.ones_like(usable)
        if logits is not None:
            labels = torch.zeros_like(logits, dtype=torch.bool).index_put_(places, passed)
            finite = logits.isfinite()
            usable = usable & finite[places] & (finite | labels).all(1)[places[0]]
            if self.gate is not None:
                passed = self._ask_gate(logits, labels)[places]
        attention = attention.where(usable[:, None, None], 0)  # NaN ends here; an unusable map is never written

        offer = (attention.to(self.device), usable.to(self.device), passed.to(self.device))
        rounds = _rounds(pairs, images)
        rows = pairs.rows if len(rounds) == 1 else np.unique(pairs.rows)
        (stored,) = self._indices(rows, device=self.device)
        maps, counts = self._maps[stored], self._counts[stored]
        if len(rounds) == 1:
            maps, counts, unusable = self._fuse(maps, counts, offer, fill_empty)
        else:  # an image occurs more than once: its maps are fused one after the other
            unusable = torch.zeros_like(self._skipped)
            for chosen in rounds:
                at, turn = self._indices(np.searchsorted(rows, pairs.rows[chosen]), chosen, device=self.device)
                part = (offer[0][turn], offer[1][turn], offer[2][turn])
                maps[at], counts[at], more = self._fuse(maps[at], counts[at], part, fill_empty)
                unusable = unusable + more
        self._maps[stored], self._counts[stored] = maps, counts  # nothing is written before all has gone well
        self._skipped += unusable
        self._offered += len(pairs.rows)
        return self

    def _normalize(self, maps: Tensor, normalization: Literal["max", "minmax"] | None) -> tuple[Tensor, Tensor]:
        """Raw maps (K, h, w) to attention (K, H, W) in the size of the stored maps, and which (K,) of it is usable."""
        maps = maps.float()
        usable = maps.isfinite().flatten(1).all(1)
        if normalization is None:
            finite = maps.where(usable[:, None, None], 0)
            usable &= _in_range(finite, "attention", "call normalize_attention first or leave normalization='max'")
            attention = maps.clamp(0, 1)
        else:
            attention = normalize_attention(maps, method=normalization)  # Eq. 2
        if attention.shape[1:] != self.map_size:
            attention = F.interpolate(attention[None], self.map_size, mode="bilinear", align_corners=False)[0]
            attention = attention.clamp(max=1)  # the weights of a resize may add up to a rounding more than 1
        return attention, usable

    def _fuse(
        self, maps: Tensor, counts: Tensor, offer: tuple[Tensor, Tensor, Tensor], fill_empty: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stored maps (K, H, W) and counts (K,) after one more offer to each, and how many offers were unusable.

        An offer is attention (K, H, W), whether it is usable (K,) and whether the gate lets it pass (K,).
        """
        attention, usable, passed = offer
        times = counts[:, None, None]
        fused = self._ask_fusion(decode(maps), attention, times.clamp(min=1))
        fused = torch.where(times == 0, attention, fused)  # M_1 = A_1, then Eq. 4
        if type(self.fusion) not in BUILT_IN:
            usable = usable & _in_range(fused, "the fusion's result", "mend the fusion")
            fused = fused.clamp(0, 1)
        accept = usable & (passed | (counts == 0) if fill_empty else passed)
        maps = torch.where(accept[:, None, None], encode(fused, self.dtype), maps)
        return maps, counts + accept, (~usable).sum()

    def _ask_fusion(self, cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
        if type(self.fusion) in BUILT_IN:
            return self.fusion(cumulative, attention, count)
        fused: object = self.fusion(cumulative.clone(), attention.clone(), count)  # copies: it may work in place
        if not isinstance(fused, Tensor):
            raise TypeError(f"expected the fusion to return a tensor, got {type(fused).__name__}")
        if fused.shape != attention.shape:
            raise ValueError(f"expected the fusion to return shape {tuple(attention.shape)}, got {tuple(fused.shape)}")
        return fused.float()

    def _ask_gate(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert self.gate is not None
        passed = self.gate(logits.nan_to_num(float("-inf")), labels)
        if not isinstance(passed, Tensor) or passed.dtype != torch.bool or passed.shape != labels.shape:
            found = (passed.dtype, tuple(passed.shape)) if isinstance(passed, Tensor) else type(passed).__name__
            raise TypeError(f"expected the gate to return bool of shape {tuple(labels.shape)}, got {found}")
        return passed

    def _check_batch(self, batch: int, score_maps: Tensor, logits: Tensor | None) -> None:
        expected = (batch, self.pairs.num_classes)
        for name, values, ndim in (("score_maps", score_maps, 4), ("logits", logits, 2)):
            if values is None and name == "logits":
                continue
            if not isinstance(values, Tensor) or not values.is_floating_point():
                found = values.dtype if isinstance(values, Tensor) else type(values).__name__
                raise TypeError(f"expected {name} as a floating point tensor, got {found}")
            if values.ndim != ndim or values.shape[:2] != expected or 0 in values.shape:
                shape = f"({batch}, {expected[1]}, h, w)" if ndim == 4 else f"{expected}"
                raise ValueError(
                    f"expected {name} of shape {shape}: {batch} indices, {expected[1]} classes, got "
                    f"{tuple(values.shape)}; pass all classes of the batch, without a background channel"
                )
        if logits is not None and logits.device != score_maps.device:
            raise ValueError(
                f"expected score_maps and logits on one device, got {score_maps.device} and {logits.device}"
            )

    def _indices(self, *arrays: Any, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)

    # Joining and keeping it

    @torch.no_grad()
    def merge(self, other: "AttentionAccumulator") -> Self:
        """Take in what another accumulator of the same data set has seen, as if this one had seen both streams.

        Args:
            other: same labels, keys, map size and fusion, on any device; it stays as it is.

        Returns:
            self.

        Raises:
            TypeError: ``other`` is no accumulator.
            ValueError: another data set, map size or fusion, or a fusion without ``merge``.

        Example:
            >>> first, second = AttentionAccumulator([[1]], (1, 1)), AttentionAccumulator([[1]], (1, 1))
            >>> first.merge(second).accepted
            0
        """
        if not isinstance(other, AttentionAccumulator):
            raise TypeError(f"expected an AttentionAccumulator, got {type(other).__name__}")
        self._check_same(other.pairs, other.map_size, _name(other.fusion, FUSIONS))
        if not isinstance(self.fusion, MergeableFusion):
            raise ValueError(
                f"fusion {_name(self.fusion, FUSIONS)!r} cannot merge two streams: what it keeps does not tell the "
                "result of having seen both; give it a merge method if it does"
            )
        for start in range(0, self.pairs.num_pairs, MERGE_ROWS):
            rows = slice(start, start + MERGE_ROWS)
            ours, theirs = self._maps[rows], other._maps[rows].to(self.device)
            our_count, their_count = (
                c[:, None, None] for c in (self._counts[rows], other._counts[rows].to(self.device))
            )
            first, second = decode(ours), decode(theirs)
            merged = self.fusion.merge(first, second, our_count.clamp(min=1), their_count.clamp(min=1))
            merged = torch.where(our_count == 0, second, torch.where(their_count == 0, first, merged))
            self._maps[rows] = encode(merged, self.dtype)
            self._counts[rows] += their_count[:, 0, 0]
        self._skipped += other._skipped.to(self.device)
        self._offered += other._offered
        return self

    def reset(self) -> Self:
        """Forget all maps and counts; the pairs stay."""
        for values in (self._maps, self._counts, self._skipped):
            values.zero_()
        self._offered = 0
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that is kept, as tensors (sharing memory with this object) and plain values; also who owns the maps."""
        return {
            "maps": self._maps,
            "counts": self._counts,
            "skipped": self._skipped,
            "offered": self._offered,
            "offsets": torch.from_numpy(self.pairs.offsets),
            "classes": torch.from_numpy(self.pairs.classes),
            "num_classes": self.pairs.num_classes,
            "keys": self.pairs.keys,
            "map_size": list(self.map_size),
            "fusion": _name(self.fusion, FUSIONS),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same data set; a copy is taken.

        Raises:
            ValueError: a state with missing or malformed entries, or of another data set, map size, fusion or dtype;
                nothing is changed then.
        """
        ours = self.state_dict()
        missing = set(ours) - set(state)
        if missing:
            raise ValueError(f"expected the state_dict of an AttentionAccumulator, got one without {sorted(missing)}")
        try:
            pairs = PairTable(
                np.asarray(state["offsets"]), np.asarray(state["classes"]), state["num_classes"], state["keys"]
            )
            map_size, offered = tuple(state["map_size"]), int(state["offered"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected the state_dict of an AttentionAccumulator, got a malformed entry: {error}"
            ) from error
        self._check_same(pairs, map_size, state["fusion"])
        for name in ("maps", "counts", "skipped"):
            theirs = torch.as_tensor(state[name])
            if theirs.dtype != ours[name].dtype or theirs.shape != ours[name].shape:
                raise ValueError(
                    f"expected {name} of shape {tuple(ours[name].shape)} and {ours[name].dtype}, got "
                    f"{tuple(theirs.shape)} and {theirs.dtype}; build the accumulator with the dtype of the state"
                )
        for name in ("maps", "counts", "skipped"):
            ours[name].copy_(torch.as_tensor(state[name]))
        self._offered = offered

    def _check_same(self, pairs: PairTable, map_size: Any, fusion: str | None) -> None:
        difference = self.pairs.difference(pairs)
        if difference is None and map_size != self.map_size:
            difference = f"expected map_size {self.map_size}, got {map_size}"
        if difference is None and fusion != _name(self.fusion, FUSIONS):
            difference = f"expected fusion {_name(self.fusion, FUSIONS)!r}, got {fusion!r}"
        if difference is not None:
            raise ValueError(f"the state belongs to another data set or setting: {difference}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file (numpy's ``.npz``, no pickle). The file appears whole or not at all.

        Args:
            path: where; an existing file is replaced only once the new one is complete.
        """
        state = {**self.state_dict(), "gate": _name(self.gate, GATES)}
        arrays = {name: value.cpu().numpy() for name, value in state.items() if isinstance(value, Tensor)}
        write_archive(path, arrays, {name: value for name, value in state.items() if name not in arrays})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        fusion: Fusion | None = None,
        gate: str | Gate | None = "saved",
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read a file written by `save`; it runs nothing from the file.

        Args:
            path: the file.
            fusion: the `Fusion` it was made with, if that was your own.
            gate: ``"saved"`` takes the one it was made with; give your own again if it was your own.
            device: where the maps shall live.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no accumulator file, a truncated one, or one that needs ``fusion`` or ``gate``.
        """
        name = os.fspath(path)
        arrays, plain = read_archive(path)
        if gate == "saved":
            gate = plain["gate"]
            if gate is not None and gate not in GATES:
                raise ValueError(f"{name} was made with your own gate {gate!r}; pass it again as gate=")
        if fusion is None and plain["fusion"] not in FUSIONS:
            raise ValueError(f"{name} was made with your own fusion {plain['fusion']!r}; pass it again as fusion=")
        state = {**plain, **{key: torch.from_numpy(array) for key, array in arrays.items()}}
        pairs = PairTable(arrays["offsets"], arrays["classes"], plain["num_classes"], plain["keys"])
        accumulator = cls.__new__(cls)
        accumulator._set_up(pairs, plain["map_size"], fusion or plain["fusion"], gate, state["maps"].dtype, device)
        accumulator.load_state_dict(state)
        return accumulator


def _resolve(what: str, value: Any, known: dict[str, Any]) -> Any:
    if isinstance(value, str):
        if value not in known:
            raise ValueError(f"expected {what} to be one of {sorted(known)} or a callable, got {value!r}")
        return known[value]
    if isinstance(value, type):
        raise TypeError(
            f"expected {what} to be one of {sorted(known)} or a callable, got the class {value.__name__}; "
            "pass an instance of it"
        )
    if not callable(value):
        raise TypeError(f"expected {what} to be one of {sorted(known)} or a callable, got {type(value).__name__}")
    return value


def _name(value: Any, known: dict[str, Any]) -> str | None:
    """The name a fusion or gate is saved under: the built-in one, or "own:" and that of your function or class."""
    if value is None:
        return None
    for name, built_in in known.items():
        if value is built_in or (type(value) in BUILT_IN and type(value) is type(built_in)):
            return name
    return f"own:{getattr(value, '__qualname__', type(value).__qualname__)}"


def _in_range(maps: Tensor, what: str, advice: str) -> Tensor:
    """(K,) bool: maps (K, H, W) within [0, 1], give or take a rounding. On the host one that is not is an error."""
    within = ((maps >= -1e-4) & (maps <= 1 + 1e-4)).flatten(1).all(1)
    if maps.device.type == "cpu" and not within.all():
        wrong = maps[~within]
        raise ValueError(f"expected {what} in [0, 1], got [{wrong.min():.4g}, {wrong.max():.4g}]; {advice}")
    return within


def _rounds(pairs: PairSelection, images: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Split a batch's pairs so that no pair occurs twice in a round; one round unless an image is repeated."""
    if len(np.unique(images)) == len(images):
        return [np.arange(len(pairs.rows))]
    order = np.argsort(images, kind="stable")
    first = np.searchsorted(images[order], images[order])  # where each image's run starts
    occurrence = np.empty(len(images), dtype=np.int64)
    occurrence[order] = np.arange(len(images)) - first
    return [np.flatnonzero(occurrence[pairs.positions] == turn) for turn in range(int(occurrence.max()) + 1)]
