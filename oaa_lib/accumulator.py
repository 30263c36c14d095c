"""The cumulative attention maps of a data set, and the online update that grows them (paper, section 3.2)."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from oaa_lib import host, merging
from oaa_lib.fusion import FUSIONS, Fusion, MaxFusion, fusion_name, resolve_fusion
from oaa_lib.gating import Gate, gate_name, resolve_gate, score_gate
from oaa_lib.maps import Change, MapLayout, PairStore, Rows, decode, encode, is_plain, times_seen
from oaa_lib.offers import Offer, in_range, normalize, place, resize
from oaa_lib.owners import Shapes, check_kinds, kinds, read_owners
from oaa_lib.pairs import IntArray, PairSelection, PairTable
from oaa_lib.storage import Arrays, MappedFile, PathLike, naming, read_file, write_file
from oaa_lib.views import Views, check_views, flips_only, into_view, mirror, sample
from oaa_lib.watching import Statistics

Indices: TypeAlias = Iterable[int | str] | Tensor | npt.NDArray[Any]
OUR_FUSIONS = tuple(type(fusion) for fusion in FUSIONS.values())
HOST = ("offered", "totals_then")  # kept by the host, wherever the maps live


class AttentionAccumulator:
    """Keeps one cumulative attention map for every (image, target class) pair of a data set, and fuses online.

    A map is stored for labelled pairs only. An image without label owns none, and `update` passes it over: negatives
    may be in the batch.

    Args:
        labels: (N, C) bool or 0/1: row i is the classes that image i shows, without background.
        map_size: (H, W) of every stored map; or N of them, (N, 2) integers, if every image keeps a size of its own.
        fusion: ``"max"`` (Eq. 5), ``"mean"`` (Eq. 10), another name of `oaa_lib.fusion.FUSIONS`, or a `Fusion`.
        gate: ``"score"`` (paper: a target must outscore all non-targets), ``"topk"`` (release: among the K best), None
            (everything passes), or a `Gate`.
        dtype: storage, ``torch.uint8`` (steps of 1/255), ``torch.float16`` or ``torch.float32``. A fusion that needs
            more keeps what it needs: the mean is always float32, with a count for each pixel.
        device: where the maps live; the score maps may come from another device.
        keys: N different names, so that images can be given by name instead of by row.
        keep_latest: also keep the latest accepted attention of every pair (`latest`) and how similar it is to the one
            before (`similarity`). The price: as much memory again as ``"max"`` in ``dtype`` needs, and a slower
            `update`.
        path: a file in which everything is kept, mapped into memory. What has been accumulated survives the process,
            however it ends. Its room on the disk is taken at once.
        resume: go on with the file at ``path`` if there is one. Without it an existing file is an error.

    Attributes:
        pairs: the pairs, see `PairTable`.
        fusion: the fusion.
        gate: the gate, or None.

    Raises:
        TypeError: labels, map_size, dtype, fusion or gate of another kind.
        ValueError: labels that are not (N, C) of 0 and 1, all 0, a bad ``map_size``, keys that do not fit; a file at
            ``path`` that is damaged or belongs to other labels, keys, map size, dtype or fusion (it stays as it is).
        FileExistsError: there is a file at ``path``, and no ``resume``.
        BlockingIOError: another process is at work on the file.
        OSError: there is no room for the file.

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
        map_size: tuple[int, int] | Tensor | npt.ArrayLike,
        *,
        fusion: str | Fusion = "max",
        gate: str | Gate | None = "score",
        dtype: torch.dtype = torch.uint8,
        device: torch.device | str = "cpu",
        keys: Sequence[str] | None = None,
        keep_latest: bool = False,
        path: PathLike | None = None,
        resume: bool = False,
    ) -> None:
        if resume and path is None:
            raise ValueError("expected a path together with resume=True, got none")
        if path is not None and torch.device(device).type != "cpu":
            raise ValueError(f"expected device='cpu' together with a path, got {device}: the host maps the file")
        self._begin(PairTable.from_labels(labels, keys), map_size, fusion, gate)
        shapes = self._shapes(dtype, keep_latest)
        if path is None:
            self._allocate(shapes, device)
        else:
            self._open(path, shapes, resume)

    def _begin(self, pairs: PairTable, map_size: Any, fusion: str | Fusion, gate: str | Gate | None) -> None:
        self.pairs = pairs
        self.fusion: Fusion = resolve_fusion(fusion)
        self.gate: Gate | None = None if gate is None else resolve_gate(gate)
        self._layout = MapLayout(pairs, map_size, getattr(self.fusion, "num_states", 1))
        self._base: dict[str, Tensor] = {}  # what a mean was at the last synchronize, if an update came after it

    def _shapes(self, dtype: torch.dtype, keep_latest: bool) -> Shapes:
        """All that is kept: the dtype and shape of every tensor."""
        if dtype not in (torch.uint8, torch.float16, torch.float32):
            raise TypeError(f"expected dtype torch.uint8, torch.float16 or torch.float32, got {dtype}")
        num_pairs, num_classes = self.pairs.num_pairs, self.pairs.num_classes
        shapes: Shapes = {
            "maps": (getattr(self.fusion, "storage_dtype", dtype), self._layout.shape("maps")),
            "counts": (torch.int32, (num_pairs,)),  # maps accepted by each pair
            "synchronized": (torch.int32, (num_pairs,)),  # of these, the ones that all processes know of
            "skipped": (torch.int64, (num_classes,)),
            "offered": (torch.int64, (num_classes,)),
            "totals_then": (torch.int64, (2, num_classes)),  # these two as of the last synchronize
        }
        if not getattr(self.fusion, "zero_is_neutral", False):
            shapes["missed"] = (torch.int32, self._layout.shape("missed"))  # accepted maps that did not show the pixel
        if keep_latest:
            shapes["latest"] = (dtype, self._layout.shape("latest"))
            shapes["similarity"] = (torch.float32, (num_pairs,))  # 1 + cosine
        return shapes

    def _allocate(self, shapes: Shapes, device: torch.device | str) -> None:
        tensors = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (dtype, shape) in shapes.items()
            if name not in HOST
        }
        self._use(tensors, {name: np.zeros(shapes[name][1], dtype=np.int64) for name in HOST})

    def _open(self, path: PathLike, shapes: Shapes, resume: bool) -> None:
        name, largest_change = os.fspath(path), self._layout.largest_change(shapes)
        if not (resume and os.path.exists(path)):
            MappedFile.create(path, kinds(shapes), self._owners(), self._settings(), largest_change)
        file = MappedFile(path)
        self._check_same(*read_owners(name, file.arrays, file.plain), belonging=name)
        check_kinds(name, file.arrays, kinds(shapes))
        file.lock(largest_change)
        tensors = {key: torch.from_numpy(file.arrays[key]) for key in shapes if key not in HOST}
        self._use(tensors, {key: file.arrays[key] for key in HOST}, file)
        self._look()

    def _use(self, tensors: dict[str, Tensor], hosts: Arrays, file: MappedFile | None = None) -> None:
        self._store = PairStore(self._layout, tensors, hosts, file)
        self._partial = self._synchronized = False

    def _look(self) -> None:
        """Keep what `update` must know of the tensors' values, so that it need not wait for them."""
        tensors = self._store.tensors
        self._partial = "missed" in tensors and bool(tensors["missed"].any())
        self._synchronized = bool(tensors["synchronized"].any())

    # What is kept

    @property
    def map_size(self) -> tuple[int, int] | IntArray:
        """(H, W) of every map, or (N, 2) int64 if every image has a size of its own."""
        return self._layout.map_size

    @property
    def device(self) -> torch.device:
        """Where the maps live."""
        return self._store.tensors["maps"].device

    @property
    def dtype(self) -> torch.dtype:
        """How the maps are stored."""
        return self._store.tensors["maps"].dtype

    @property
    def keeps_latest(self) -> bool:
        """Whether it was built with ``keep_latest=True``."""
        return "latest" in self._store.tensors

    @property
    def accumulated(self) -> Tensor:
        """(N, C) bool on `device`: pairs that hold something."""
        return self.counts > 0

    @property
    def counts(self) -> Tensor:
        """(N, C) int32 on `device`: how many maps each pair has accepted; 0 for classes the image does not show."""
        return self._per_image(self._store.tensors["counts"])

    @property
    def similarity(self) -> Tensor:
        """(N, C) float32 on `device`, in [0, 1]: cosine similarity of the two latest maps that each pair has accepted.

        Over the pixels that the later one shows; NaN where there are no two. Attention that has settled is near 1.

        Raises:
            ValueError: built without ``keep_latest=True``.
        """
        self._check_latest()
        known = self._per_image(self._store.tensors["similarity"])
        return (known - 1).masked_fill_(known == 0, float("nan"))

    @property
    def skipped(self) -> int:
        """How many maps were refused because they or their gating scores were not finite. Waits for the device."""
        return int(self._store.tensors["skipped"].sum())

    @property
    def offered(self) -> int:
        """How many maps `update` has been offered."""
        return int(self._store.hosts["offered"].sum())

    @property
    def accepted(self) -> int:
        """How many maps were fused. Waits for the device."""
        return int(self._store.tensors["counts"].sum())

    def statistics(self) -> Statistics:
        """What has happened so far, per class, on the host. Waits for the device, once.

        Example:
            >>> import torch
            >>> accumulator = AttentionAccumulator([[1, 0], [1, 1]], (7, 7), gate=None)
            >>> accumulator.update([1], torch.rand(1, 2, 7, 7)).statistics().never_accumulated
            tensor([1, 0])
        """
        counts, skipped = self._store.tensors["counts"], self._store.tensors["skipped"]
        (classes,) = self._to(self.device, self.pairs.classes)
        accepted, empty = (
            torch.zeros_like(skipped).index_add_(0, classes, values.long()) for values in (counts, counts == 0)
        )
        accepted, skipped, empty = torch.stack([accepted, skipped, empty]).cpu()
        pairs = torch.from_numpy(np.bincount(self.pairs.classes, minlength=self.pairs.num_classes))
        return Statistics(torch.from_numpy(self._store.hosts["offered"].copy()), accepted, skipped, pairs, empty)

    def __len__(self) -> int:
        return self.pairs.num_images

    def __repr__(self) -> str:
        size = self.map_size if isinstance(self.map_size, tuple) else "one of every image"
        return (
            f"{type(self).__name__}({self.pairs.num_images} images, {self.pairs.num_classes} classes, "
            f"{self.pairs.num_pairs} pairs, map_size={size}, fusion={fusion_name(self.fusion)!r}, "
            f"gate={gate_name(self.gate)!r}, dtype={self.dtype}, device={self.device})"
        )

    def __getitem__(self, indices: Indices) -> Tensor:
        """Soft labels of a batch of whole images, see `soft_labels`: (B, C, H, W) float32 in [0, 1] on `device`.

        Example:
            >>> AttentionAccumulator([[1, 0], [1, 1]], (7, 7))[[1, 0, 1]].shape
            torch.Size([3, 2, 7, 7])
        """
        return self.soft_labels(indices)

    def soft_labels(
        self, indices: Indices, views: Views | None = None, *, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Cumulative attention of a batch as its views show it, to train the integral model with augmentation.

        Args:
            indices: (B,) rows of ``labels``, or names if ``keys`` were given; on the host.
            views: one `View` for each image, see `update`. None: the whole images.
            size: (h, w) of the result, read bilinearly (``align_corners=False``). None: ``map_size``.

        Returns:
            (B, C, h, w) float32 in [0, 1] on `device`; 0 for classes an image does not show, and outside the image.

        Raises:
            ValueError: images with sizes of their own and no ``size``, views that do not fit the batch.
            IndexError, KeyError: an index or name the data set does not have.

        Example:
            >>> from oaa_lib import View
            >>> accumulator = AttentionAccumulator([[1, 0], [1, 1]], (7, 7))
            >>> accumulator.soft_labels([1], [View(0, 0, 0.5, 0.5)], size=(14, 14)).shape
            torch.Size([1, 2, 14, 14])

        Source: paper, section 3.3.
        """
        return self._dense("maps", indices, views, size)

    def latest(self, indices: Indices, views: Views | None = None, *, size: tuple[int, int] | None = None) -> Tensor:
        """The latest accepted attention of a batch's pairs, in the form of `soft_labels`.

        Pixels that the latest view did not show keep what an earlier one showed there.

        Raises:
            ValueError: built without ``keep_latest=True``; and as `soft_labels`.
        """
        self._check_latest()
        return self._dense("latest", indices, views, size)

    def classes(self, index: int | str) -> Tensor:
        """(K,) int64 on the host: the classes of one image, in the order of `attention`."""
        return torch.from_numpy(self.pairs.select(self.pairs.positions([index])).classes)

    def attention(self, index: int | str) -> Tensor:
        """(K, H, W) float32 in [0, 1] on `device`: the cumulative attention of one image's classes."""
        images = self.pairs.positions([index])
        return self._values("maps", self.pairs.select(images).rows, self._layout.size_of(images))

    @torch.no_grad()
    def _dense(self, name: str, indices: Indices, views: Views | None, size: tuple[int, int] | None) -> Tensor:
        images = self.pairs.positions(indices)
        boxes = None if views is None else check_views(views, len(images))
        size = self._layout.size_of(images) if size is None else _checked_size(size)
        pairs = self.pairs.select(images)
        dense = torch.zeros(len(images), self.pairs.num_classes, *size, device=self.device)
        for stored_size, members in self._layout.group(images[pairs.positions]):
            positions, classes = pairs.positions[members], pairs.classes[members]
            values = self._values(name, pairs.rows[members], stored_size)
            if boxes is None or flips_only(boxes):
                values = resize(values if boxes is None else mirror(values, boxes[positions]), size)
            else:
                values = sample(values, into_view(boxes[positions], size))[0].clamp(max=1)
            dense.index_put_(self._to(self.device, positions, classes), values)
        return dense

    def _values(self, name: str, rows: IntArray, size: tuple[int, int]) -> Tensor:
        """(K, H, W) float32 maps, as the fusion reads them."""
        maps = decode(self._store.read(name, Rows(rows, *self._to(self.device, rows)), size))
        return self.fusion.read(maps) if name == "maps" and self._layout.states > 1 else maps  # type: ignore[attr-defined]

    def _per_image(self, values: Tensor) -> Tensor:
        """(P,) values as (N, C), 0 where there is no pair."""
        dense = values.new_zeros(self.pairs.num_images, self.pairs.num_classes)
        images, classes = self._to(self.device, self.pairs.images(), self.pairs.classes)
        return dense.index_put_((images, classes), values)

    def _check_latest(self) -> None:
        if not self.keeps_latest:
            raise ValueError("expected an accumulator built with keep_latest=True, got one without")

    @staticmethod
    def _to(device: torch.device, *arrays: npt.NDArray[Any]) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)

    # Growing it

    @torch.no_grad()
    def update(
        self,
        indices: Indices,
        score_maps: Tensor,
        logits: Tensor | None = None,
        views: Views | None = None,
        *,
        normalization: Literal["max", "minmax"] | None = "max",
        fill_empty: bool = False,
    ) -> Self:
        """Fuse the attention of a batch into the maps of its images (Eq. 3 and 4).

        For each image's target classes: normalise (Eq. 2), ask the gate, put the map into the image's frame at its
        ``map_size`` (bilinear, ``align_corners=False``), fuse. Images may come in any order and repeat; a repeated one
        counts each time, in order. A pair is skipped, and counted in `skipped`, if its map, its logit or a non-target
        logit of its image is NaN or infinite. Nothing is written if an error is raised. On an accelerator nothing waits
        for the device.

        Args:
            indices: (B,) rows of ``labels``, or names if ``keys`` were given; on the host.
            score_maps: (B, C, h, w) floating point, raw scores, all classes.
            logits: (B, C) floating point, class scores for the gate, in any monotone form. None: the average of
                ``score_maps``.
            views: what the network was shown of each image: a sequence of B `View`, a (B, 5) tensor on the host, or one
                `View` of five (B,) tensors, as a data loader collates it. Pixels of the stored map whose centre a view
                does not show stay as they are, and a mean counts per pixel. None: the whole images, not flipped.
            normalization: as `normalize_attention`, over the whole view; None if ``score_maps`` is attention in [0, 1]
                already.
            fill_empty: let pairs that hold nothing accept this map whatever the gate says (the release's last epoch).

        Returns:
            self.

        Raises:
            TypeError: not floating point, or a gate that does not return booleans.
            ValueError: shapes, class count, views or devices that do not fit, an empty batch; attention outside [0, 1]
                with ``normalization=None`` (on an accelerator such maps are skipped and counted instead).
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
        boxes = None if views is None else check_views(views, len(images))
        pairs = self.pairs.select(images)
        if not len(pairs.rows):
            return self
        repeated = len(set(images.tolist())) < len(images)
        changes, skipped = [], self._store.tensors["skipped"]
        passed_here = None
        if normalization == "max" and boxes is None and not repeated and self._is_plain_maximum(score_maps):
            passed_here = self._judge_here(score_maps if logits is None else logits, pairs)
        if passed_here is not None:
            change, fine_here = host.maximum(self._store.tensors, pairs, score_maps, passed_here, fill_empty)
            changes.append(change)
            if not fine_here.all():
                skipped = skipped + torch.from_numpy(self._per_class(pairs.classes[~fine_here]))
        else:
            (places,) = self._to(score_maps.device, pairs.positions * self.pairs.num_classes + pairs.classes)
            maps = score_maps.flatten(0, 1).index_select(0, places).float()
            if logits is None and self.gate is not None:
                logits = score_maps.float().mean((-2, -1))  # Eq. 1
            trusted, passed = self._judge(logits, pairs, places)
            attention, fine = normalize(maps, normalization)
            if type(self.fusion) not in OUR_FUSIONS:
                attention = attention.where(fine[:, None, None], 0)  # a user's fusion never sees NaN
            whole = Offer(attention, fine & trusted, passed, None)
            for size, members in self._layout.group(images[pairs.positions]):
                chosen_boxes = None if boxes is None else boxes[pairs.positions[members]]
                offer = place(whole.at(members), chosen_boxes, size).to(self.device)
                self._partial |= offer.seen is not None and "missed" in self._store.tensors
                change, fine = self._fuse_rows(pairs.rows[members], size, offer, repeated, fill_empty)
                changes.append(change)
                (classes,) = self._to(self.device, pairs.classes[members])
                skipped = skipped.index_add(0, classes, (~fine).long())
        merging.keep_base(self)
        offered = self._store.hosts["offered"] + self._per_class(pairs.classes)
        self._store.write(changes, {"skipped": skipped}, {"offered": offered})
        return self

    def _judge(self, logits: Tensor | None, pairs: PairSelection, places: Tensor) -> tuple[Tensor, Tensor]:
        """Which (K,) pairs have finite scores, their own and the non-targets', and which the gate lets pass."""
        everyone = torch.ones_like(places, dtype=torch.bool)
        if logits is None:
            return everyone, everyone
        labels = np.zeros(logits.shape, dtype=np.bool_)
        labels[pairs.positions, pairs.classes] = True
        (targets,) = self._to(logits.device, labels)
        finite, trusted = logits.isfinite(), everyone
        if is_plain(finite) and finite.all():  # on the host a look costs less than the work
            logits = logits.clone()  # a gate may work in place
        else:
            trusted = (finite & (finite | targets).all(1, keepdim=True)).flatten().index_select(0, places)
            logits = logits.nan_to_num(-math.inf)
        if self.gate is None:
            return trusted, everyone
        return trusted, self._ask_gate(self.gate, logits, targets).flatten().index_select(0, places)

    def _is_plain_maximum(self, score_maps: Tensor) -> bool:
        """Whether `host.maximum` can do the fusion."""
        kept = self._store.tensors
        return (
            type(self.fusion) is MaxFusion
            and kept["maps"].dtype == torch.uint8
            and score_maps.dtype == torch.float32
            and score_maps.shape[2:] == self._layout.size
            and "latest" not in kept
            and is_plain(score_maps)
            and is_plain(kept["maps"])
        )

    def _judge_here(self, scores: Tensor, pairs: PairSelection) -> npt.NDArray[np.bool_] | None:
        """Which (K,) pairs the paper's gate lets pass, from logits or score maps; None where it takes more to tell."""
        if self.gate is None and scores.ndim == 4:
            return np.ones(len(pairs.rows), dtype=np.bool_)
        if self.gate not in (None, score_gate) or not is_plain(scores):
            return None
        logits = (scores.mean((-2, -1)) if scores.ndim == 4 else scores).detach().float().numpy()  # Eq. 1
        if not np.isfinite(logits).all():
            return None
        return np.ones(len(pairs.rows), dtype=np.bool_) if self.gate is None else host.score_gate(logits, pairs)

    def _per_class(self, classes: IntArray) -> npt.NDArray[np.int64]:
        return np.bincount(classes, minlength=self.pairs.num_classes)

    def _fuse_rows(
        self, rows: IntArray, size: tuple[int, int], offer: Offer, repeated: bool, fill_empty: bool
    ) -> tuple[Change, Tensor]:
        """What the offer of a batch changes, and which (K,) of it was fine."""
        unique = np.unique(rows) if repeated else rows
        stored = Rows(unique, *self._to(self.device, unique))
        needed = ("maps", "counts", *(["missed"] if self._partial else []), "latest", "similarity")
        kept = {name: self._store.read(name, stored, size) for name in needed if name in self._store.tensors}
        if not repeated:
            kept, fine = self._fuse(kept, offer, fill_empty)
            return Change(stored, size, kept), fine
        fine = torch.zeros_like(offer.fine)
        for turn in _turns(rows):  # an image occurs more than once: its maps are fused one after the other
            at, chosen = self._to(self.device, np.searchsorted(unique, rows[turn]), turn)
            now = {name: values[at] for name, values in kept.items()}
            new, fine[chosen] = self._fuse(now, offer.at(chosen), fill_empty)
            for name, values in new.items():
                kept[name][at] = values
        return Change(stored, size, kept), fine

    def _fuse(self, kept: dict[str, Tensor], offer: Offer, fill_empty: bool) -> tuple[dict[str, Tensor], Tensor]:
        """What K pairs keep after one more offer to each, and which (K,) of the offers were fine."""
        attention, fine, passed, seen = offer
        maps, counts = kept["maps"], kept["counts"]
        accept = fine & (passed | (counts == 0) if fill_empty else passed)
        if seen is not None:
            accept = accept & seen.flatten(1).any(1)
        if type(self.fusion) is MaxFusion and maps.dtype == torch.uint8:
            # Eq. 5. Rounding is monotone and 0 is neutral: what is accepted can be rounded and masked first.
            fused = torch.maximum(maps, encode(attention, maps.dtype) * accept[:, None, None])
        else:
            values = self._ask_fusion(decode(maps), attention, times_seen(counts, kept.get("missed")))
            if type(self.fusion) not in OUR_FUSIONS:
                within = in_range(values, "the fusion's result", "mend the fusion")
                fine, accept, values = fine & within, accept & within, values.clamp(0, 1)
            written = accept[:, None, None] if seen is None else accept[:, None, None] & seen
            fused = torch.where(written[:, None] if maps.ndim == 4 else written, encode(values, maps.dtype), maps)
        new = {"maps": fused, "counts": counts + accept}
        if "missed" in kept:
            new["missed"] = kept["missed"] if seen is None else kept["missed"] + (accept[:, None, None] & ~seen)
        if "latest" in kept:
            before = decode(kept["latest"]) if seen is None else decode(kept["latest"]) * seen
            cosine = F.cosine_similarity(before.flatten(1), attention.flatten(1))
            written = accept[:, None, None] if seen is None else accept[:, None, None] & seen
            new["similarity"] = torch.where(accept & (counts > 0), 1 + cosine, kept["similarity"])
            new["latest"] = torch.where(written, encode(attention, kept["latest"].dtype), kept["latest"])
        return new, fine

    def _ask_fusion(self, cumulative: Tensor, attention: Tensor, times: Tensor) -> Tensor:
        """M_t (K, H, W) or (K, S, H, W) float32, from M_{t-1}, A_t (K, H, W) and how often each pixel was seen."""
        if cumulative.ndim == 4:
            attention, times = attention[:, None], times[:, None]
        if type(self.fusion) in OUR_FUSIONS:
            fused = self.fusion(cumulative, attention, times.clamp(min=1))
        else:
            fused = self.fusion(cumulative.clone(), attention.clone(), times.clamp(min=1))  # it may work in place
            found: object = fused
            if not isinstance(found, Tensor):
                raise TypeError(f"expected the fusion to return a tensor, got {type(found).__name__}")
            if fused.shape != cumulative.shape:
                raise ValueError(
                    f"expected the fusion to return shape {tuple(cumulative.shape)}, got {tuple(fused.shape)}"
                )
        return torch.where(times == 0, attention, fused.float())  # M_1 = A_1, then Eq. 4

    @staticmethod
    def _ask_gate(gate: Gate, logits: Tensor, labels: Tensor) -> Tensor:
        passed = gate(logits, labels)
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

    # Joining and keeping it

    def merge(self, other: "AttentionAccumulator") -> Self:
        """Take in what another accumulator of the same data set has seen, as if this one had seen both streams.

        The latest attention of a pair becomes the other's, where it has one.

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
        self._check_same(other.pairs, other._layout, fusion_name(other.fusion))
        merging.merge(self, other)
        return self

    def synchronize(self, group: Any = None) -> Self:
        """Let all processes of a group hold what all of them have seen, as if each had seen every stream.

        Call it on every process, as often as you like: what has been exchanged once is not counted again. A maximum is
        joined by an all-reduce with MAX, a mean by sums and counts, other fusions map by map (these can be synchronised
        once only, since what they hold cannot be told apart afterwards). It goes in buckets of 16 MiB. A mean keeps a
        second copy of its maps from the first update after it on.

        A state from which a run goes on must be loaded by one process alone, or have been saved after a `synchronize`;
        then all processes may load it, on however many processes it was made.

        Args:
            group: a ``torch.distributed`` process group, gloo or nccl; None: the default one.

        Returns:
            self.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
            ValueError: on all processes, if they hold different data sets or settings, or have not been synchronised
                together before; or a fusion that cannot be merged.
        """
        merging.synchronize(self, group)
        return self

    def reset(self) -> Self:
        """Forget all maps and counts; the pairs stay."""
        for values in self._store.tensors.values():
            values.zero_()
        for numbers in self._store.hosts.values():
            numbers[:] = 0
        self._base = {}
        self._partial = self._synchronized = False
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that is kept, as tensors (sharing memory with this object) and plain values; also who owns the maps.

        `torch.distributed.checkpoint` takes it as it is; call `synchronize` before saving with that.
        """
        return {
            **self._store.tensors,
            **{name: torch.from_numpy(values) for name, values in self._store.hosts.items()},
            **{f"base_{name}": values for name, values in self._base.items()},
            "offsets": torch.tensor(self.pairs.offsets),  # copies: some loaders write into what they are given
            "classes": torch.tensor(self.pairs.classes),
            "num_classes": self.pairs.num_classes,
            "keys": self.pairs.keys,
            "map_size": list(self._layout.size) if self._layout.size else torch.tensor(self.map_size),
            "fusion": fusion_name(self.fusion),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same data set; a copy is taken.

        Raises:
            ValueError: a state with missing or malformed entries, or of another data set, map size, fusion, dtype or
                ``keep_latest``; nothing is changed then.
        """
        ours = {name: value for name, value in self.state_dict().items() if not name.startswith("base_")}
        missing = set(ours) - set(state)
        if missing:
            raise ValueError(f"expected the state_dict of an AttentionAccumulator, got one without {sorted(missing)}")
        try:
            pairs = PairTable(
                np.asarray(state["offsets"]), np.asarray(state["classes"]), state["num_classes"], state["keys"]
            )
            layout = MapLayout(pairs, state["map_size"], self._layout.states)
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"expected the state_dict of an AttentionAccumulator, got a malformed entry: {error}"
            ) from error
        self._check_same(pairs, layout, state["fusion"])
        values = {name: ours[name] for name in (*self._store.tensors, *HOST)}
        bases = {name: state[name] for name in ("base_maps", "base_missed") if name in state}
        for name, ours_now in (*values.items(), *((name, values[name.removeprefix("base_")]) for name in bases)):
            theirs = state[name]
            if not isinstance(theirs, Tensor) or theirs.dtype != ours_now.dtype or theirs.shape != ours_now.shape:
                found = f"{tuple(theirs.shape)} and {theirs.dtype}" if isinstance(theirs, Tensor) else repr(theirs)
                raise ValueError(
                    f"expected {name} of shape {tuple(ours_now.shape)} and {ours_now.dtype}, got {found}; build the "
                    "accumulator with the dtype of the state"
                )
        for name, ours_now in values.items():
            ours_now.copy_(state[name])
        self._base = {name.removeprefix("base_"): base.to(self.device, copy=True) for name, base in bases.items()}
        self._look()

    def _check_same(self, pairs: PairTable, layout: MapLayout, fusion: str, belonging: str = "the state") -> None:
        difference = self.pairs.difference(pairs) or self._layout.difference(layout)
        if difference is None and fusion != fusion_name(self.fusion):
            difference = f"expected fusion {fusion_name(self.fusion)!r}, got {fusion!r}"
        if difference is not None:
            raise ValueError(f"{belonging} belongs to another data set or setting: {difference}")

    def save(self, path: PathLike) -> None:
        """Write everything to one file (the layout of safetensors, no pickle). It appears whole or not at all.

        Args:
            path: where; an existing file is replaced only once the new one is complete.

        Raises:
            ValueError: these maps live in the file at ``path``, where they are kept anyway.
        """
        if self._store.file is not None and self._store.file.is_at(path):
            raise ValueError(f"expected another path than {os.fspath(path)}: the maps live there, and are kept already")
        state = self.state_dict()
        arrays = {name: value.cpu().numpy() for name, value in state.items() if isinstance(value, Tensor)}
        write_file(path, {**arrays, **self._owners()}, self._settings())

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        fusion: Fusion | None = None,
        gate: str | Gate | None = "saved",
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read a file written by `save`, or a copy of one at ``path=``, into memory; it runs nothing from the file.

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
        arrays, plain = read_file(path)
        pairs, layout, fusion_was = read_owners(name, arrays, plain)
        gate_was = plain.get("gate")
        if gate == "saved":
            if isinstance(gate_was, str) and gate_was.startswith("own:"):
                raise ValueError(f"{name} was made with your own gate {gate_was!r}; pass it again as gate=")
            with naming(path):
                gate = None if gate_was is None else resolve_gate(gate_was)
        if fusion is None:
            if fusion_was.startswith("own:"):
                raise ValueError(f"{name} was made with your own fusion {fusion_was!r}; pass it again as fusion=")
            with naming(path):
                fusion = resolve_fusion(fusion_was)
        accumulator = cls.__new__(cls)
        accumulator._begin(pairs, layout.map_size, fusion, gate)
        accumulator._check_same(pairs, layout, fusion_was, belonging=name)
        with naming(path):
            dtype = torch.from_numpy(arrays.get("latest", arrays["maps"])).dtype
            shapes = accumulator._shapes(dtype, "latest" in arrays)
        check_kinds(name, arrays, kinds(shapes))
        accumulator._allocate(shapes, device)  # no more than the file holds
        state: dict[str, Any] = {key: torch.from_numpy(array) for key, array in arrays.items()}
        owners = {"num_classes": pairs.num_classes, "keys": pairs.keys, "map_size": layout.map_size}
        with naming(path):
            accumulator.load_state_dict({**state, **owners, "fusion": fusion_was})
        return accumulator

    def _owners(self) -> Arrays:
        """Who owns the maps, as arrays for a file."""
        keys = np.frombuffer(json.dumps(self.pairs.keys).encode(), dtype=np.uint8)
        owners: Arrays = {"offsets": self.pairs.offsets, "classes": self.pairs.classes, "keys": keys}
        return owners if self._layout.sizes is None else {**owners, "map_size": self._layout.sizes}

    def _settings(self) -> dict[str, Any]:
        """What else a file is bound to, as plain values."""
        settings: dict[str, Any] = {"num_classes": self.pairs.num_classes, "fusion": fusion_name(self.fusion)}
        return {**settings, "gate": gate_name(self.gate), "map_size": self._layout.size}


def _checked_size(size: Any) -> tuple[int, int]:
    if (
        isinstance(size, str)
        or not isinstance(size, Sequence)
        or not all(isinstance(n, (int, np.integer)) for n in size)
    ):
        raise TypeError(f"expected size as two integers (h, w), got {size!r}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"expected size (h, w) of at least (1, 1), got {tuple(size)}")
    return int(size[0]), int(size[1])


def _turns(rows: IntArray) -> list[IntArray]:
    """Split the places of a batch's rows so that no row occurs twice in a turn, first occurrences first."""
    order = np.argsort(rows, kind="stable")
    first = np.searchsorted(rows[order], rows[order])  # where each row's run starts
    occurrence = np.empty(len(rows), dtype=np.int64)
    occurrence[order] = np.arange(len(rows)) - first
    return [np.flatnonzero(occurrence == turn) for turn in range(int(occurrence.max()) + 1)]
