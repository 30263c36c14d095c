"""The cumulative attention maps of a data set, and the online update that grows them (paper, section 3.2)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from oaa_lib.arguments import check_batch, file_path, flag, kind, on_device
from oaa_lib.cumulative import Indices
from oaa_lib.fusion import Fuse, adapt, resolve_fusion
from oaa_lib.gating import Gate, gate_name, resolve_gate
from oaa_lib.growing import Normalization, change_of, into_frame, make_offer, what_is_kept
from oaa_lib.keeping import KeptAttention
from oaa_lib.loading import read_saved
from oaa_lib.maps import mapped, merging, processes, state
from oaa_lib.maps.layout import MapLayout
from oaa_lib.maps.locking import PathLike, in_turn
from oaa_lib.maps.pairs import PairTable
from oaa_lib.maps.store import Change, Store
from oaa_lib.views import Views, check_views


class AttentionAccumulator(KeptAttention):
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
        path: a file in which everything is kept, mapped into memory. What has been accumulated survives the process,
            however it ends. Its room on the disk is taken at once.
        resume: go on with the file at ``path`` if there is one. Without it an existing file is an error.

    Raises:
        TypeError: labels, map_size, dtype, fusion or gate of another kind.
        ValueError: labels that are not (N, C) of 0 and 1, all 0, a bad ``map_size``, keys that do not fit; a file at
            ``path`` that is damaged or belongs to other labels, keys, map size, dtype or fusion (it stays as it is).
        FileExistsError: there is a file at ``path``, and no ``resume``.
        BlockingIOError, OSError: another accumulator, of this or another process, is at work on the file; there is no
            room for it.

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
        labels: Tensor | npt.ArrayLike | PairTable,
        map_size: tuple[int, int] | Tensor | npt.ArrayLike,
        *,
        fusion: str | Fuse = "max",
        gate: str | Gate | None = "score",
        dtype: torch.dtype = torch.uint8,
        device: torch.device | str = "cpu",
        keys: Sequence[str] | None = None,
        path: PathLike | None = None,
        resume: bool = False,
    ) -> None:
        if flag("resume", resume) and path is None:
            raise ValueError("expected a path together with resume=True, got none")
        device = on_device(device, mapped=path is not None)
        if isinstance(labels, PairTable) and keys is not None:
            raise ValueError("expected no keys together with a PairTable, which has its own, got some")
        pairs = labels if isinstance(labels, PairTable) else PairTable.from_labels(labels, keys)
        self._fusion = adapt(resolve_fusion(fusion))
        self._gate = resolve_gate(gate)
        layout = MapLayout(pairs, map_size)
        kept = what_is_kept(self._fusion, dtype)
        if path is None:
            self._store = Store(layout, kept, device)
        else:
            names = self._fusion.name, gate_name(self.gate)
            self._store = mapped.MappedStore(file_path("path", path), layout, kept, *names, resume=resume)

    @torch.no_grad()
    @in_turn
    def update(
        self,
        indices: Indices,
        score_maps: Tensor,
        logits: Tensor | None = None,
        views: Views | None = None,
        *,
        normalization: Normalization = "max",
        fill_empty: bool = False,
    ) -> Self:
        """Fuse the attention of a batch into the maps of its images (Eq. 3 and 4), and return self.

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
                Of several processes, each knows only what it has seen itself: call `synchronize` before that epoch.

        Raises:
            TypeError: not floating point, or a gate that does not return booleans.
            ValueError: shapes, class count, views or devices that do not fit, an empty batch; attention outside [0, 1]
                with ``normalization=None`` (on an accelerator such maps are skipped and counted instead).
            IndexError, KeyError: an index or name the data set does not have.

        Example:
            >>> accumulator = AttentionAccumulator(torch.eye(3), (28, 28), keys=["cat", "dog", "bird"])
            >>> accumulator.update(["bird", "cat"], torch.rand(2, 3, 28, 28), torch.rand(2, 3)).offered
            2

        Source: paper, section 3.2.
        """
        store, table = self._store, self.pairs
        images = table.positions(indices)
        check_batch((len(images), table.num_classes), score_maps, logits)
        boxes = None if views is None else check_views(views, len(images))
        flag("fill_empty", fill_empty)
        pairs = table.select(images)
        if not len(pairs.rows):
            return self
        offer = make_offer(pairs, score_maps, logits, self.gate, normalization)  # Eq. 1, Eq. 2 and the gate
        changes: list[Change] = []
        for size, members in store.layout.group(images[pairs.positions]):
            shown = None if boxes is None else boxes[pairs.positions[members]]
            placed = into_frame(offer.at(members), shown, size).to(store.device)
            change, faulty = change_of(store, pairs.rows[members], size, placed, self._fusion, fill_empty=fill_empty)
            changes += [change, Change(store.rows(pairs.classes[members]), size, {}, {"skipped": faulty})]
        counted = np.bincount(pairs.classes, minlength=table.num_classes)
        store.write(changes, {"offered": store.numbers["offered"] + counted})
        return self

    @in_turn
    def reset(self) -> Self:
        """Forget all maps and counts; the pairs stay."""
        self._store.reset()
        return self

    def merge(self, other: "AttentionAccumulator") -> Self:
        """Take in what another accumulator of the same data set has seen, as if this one had seen both; return self.

        Args:
            other: same labels, keys, map size and fusion, on any device; it stays as it is.

        Raises:
            TypeError: ``other`` is no accumulator.
            ValueError: another data set, map size or fusion, or a fusion without ``merge``.

        Example:
            >>> first, second = AttentionAccumulator([[1]], (1, 1)), AttentionAccumulator([[1]], (1, 1))
            >>> first.merge(second).accepted
            0
        """
        if not isinstance(other, AttentionAccumulator):
            raise TypeError(f"expected other as an AttentionAccumulator, got {kind(other)}")
        theirs = state.Owners(other._store.layout, other._fusion.name)
        state.belongs("the state", theirs, self._store.layout, self._fusion.name)
        first, second = sorted((self._store.turn, other._store.turn), key=id)  # in one order whoever merges whom
        with first.lock, second.lock:
            merging.merge(self._store, other._store)
        return self

    @in_turn
    def synchronize(self, group: Any = None) -> Self:
        """Let all processes of a group hold what all of them have seen, as if each had seen it; return self.

        Call it on every process, as often as you like: what has been exchanged once is not counted again. A maximum is
        joined by an all-reduce with MAX, a mean by sums and counts, the latest map is that of the process which has
        accepted most since, other fusions are joined map by map (once only, since what they hold cannot be told apart
        afterwards). It goes in buckets of 16 MiB. A mean keeps a second copy of its maps from then on.

        A state from which a run goes on must be loaded by one process alone; or by all, however many have made it, if
        it was saved after a `synchronize` or is loaded with ``load_state_dict(state, known_to_all=True)``.

        Args:
            group: a ``torch.distributed`` process group, gloo or nccl; None: the default one.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
            ValueError: on all processes, if they hold different data sets or settings, or have not been synchronised
                together before; or a fusion that cannot be merged.
        """
        processes.synchronize(self._store, self._fusion.name, group)
        return self

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        fusion: Fuse | None = None,
        gate: str | Gate | None = "saved",
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read a file written by `save`, or a copy of one at ``path=``, into memory; it runs nothing from the file.

        Args:
            path: the file.
            fusion: the `Fusion` it was made with, if that was your own.
            gate: ``"saved"`` takes the one it was made with; give your own again if it was your own.
            device: where the maps should live.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no accumulator file, a truncated one, or one that needs ``fusion`` or ``gate``.
        """
        device = on_device(device)
        saved = read_saved(file_path("path", path), fusion, gate)
        layout, dtype = saved.owners.layout, saved.state["maps"].dtype
        options = {"fusion": saved.fusion, "gate": saved.gate, "dtype": dtype, "device": device}
        accumulator = cls(layout.pairs, layout.map_size, **options)
        accumulator._take(saved.name, saved.state, saved.owners)
        return accumulator
