"""A store whose values live in a file, mapped into memory, and survive the process."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oaa_lib.maps import files, mapped_file, state
from oaa_lib.maps.files import Arrays, Bytes, array_at, blaming
from oaa_lib.maps.journal import Span, note, seal
from oaa_lib.maps.kept import Kept
from oaa_lib.maps.layout import MapLayout
from oaa_lib.maps.locking import FileLock, PathLike
from oaa_lib.maps.seals import Numbers, Seals, columns
from oaa_lib.maps.store import Change, Rows, Store

JOURNAL_BYTES = 1 << 22
BLOCK = 1 << 20  # pixels that `reset` and `replace` write at a time


class MappedStore(Store):
    """What the pairs keep, in a file.

    What is about to change is written into the file's journal first. The process may be killed at any moment: whoever
    opens the file next repeats what was noted.

    Args:
        path: where.
        layout: who owns the maps, and how large each one is.
        kept: all that is kept, by name.
        fusion: the fusion's name.
        gate: the gate's name.
        resume: go on with the file if there is one.

    Raises:
        FileExistsError: there is a file, and no ``resume``.
        ValueError: another kind of file, a damaged one, or one of other owners or kinds; it stays as it is.
        BlockingIOError: another accumulator, of this process or another one, is at work on the file.
        OSError: the disk is full, the folder is missing.
    """

    def __init__(
        self,
        path: PathLike,
        layout: MapLayout,
        kept: Mapping[str, Kept],
        fusion: str,
        gate: str | None,
        *,
        resume: bool,
    ) -> None:
        pixels = layout.largest_map * sum(each.dtype.itemsize for each in kept.values() if each.per == "pixel")
        self._largest_change = pixels + 32 * layout.pairs.num_classes + 1024  # of one pair, and room for the totals
        if not (resume and os.path.exists(path)):
            room = max(JOURNAL_BYTES, 2 * self._largest_change)
            plain, owners_arrays = state.plain_of(layout, fusion, gate), state.arrays_of(layout)
            mapped_file.create(path, state.expected(layout, kept), plain, owners_arrays, room)
        self._lock = FileLock(path)
        with blaming(path):
            self._entries, plain = files.parse(self._lock.file)
            if not {"journal", "recorded"} <= set(self._entries):
                raise ValueError("it was written by save(); read it with AttentionAccumulator.load")
            self._content = np.frombuffer(self._lock.map(), dtype=np.uint8)
            arrays = {name: array_at(self._content, entry) for name, entry in self._entries.items()}
            self._journal, self._recorded = arrays.pop("journal"), arrays.pop("recorded")
            journal = (self._journal.dtype, self._journal.ndim, self._recorded.dtype, self._recorded.shape)
            if journal != (np.dtype(np.uint8), 1, np.dtype(np.int64), (1,)):
                raise ValueError("its journal is damaged")
            found = state.from_file(arrays, plain)
            owners = state.read(found)
        state.fit(os.fspath(path), found, owners, layout, kept, fusion)
        self._lock.take()
        with torch.inference_mode(False):  # whose tensors could not be changed outside of it
            tensors = {name: torch.from_numpy(arrays[name]) for name, each in kept.items() if not each.on_host}
        self._use(layout, kept, tensors, {name: arrays[name] for name, each in kept.items() if each.on_host})
        self._begin = {name: entry.start for name, entry in self._entries.items()}
        self._recover(path, plain)
        self.look()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"expected an accumulator in memory to pickle or copy, got one whose maps live in {self._lock.path}, "
            "which has one writer; save() it and send AttentionAccumulator.load() of that, or build it over there"
        )

    def _recover(self, path: PathLike, plain: dict[str, Any]) -> None:
        """Repeat what a process that was killed had noted, and see whether all of it is sound."""
        with blaming(path):
            if len(self._journal) < 2 * self._largest_change:
                raise ValueError("its journal is too short")
            if self._recorded[0]:  # first in a copy: a damaged file stays as it is
                self._repeat(np.frombuffer(self._lock.map(copy=True), dtype=np.uint8), plain)
            self._seals = self._repeat(self._content, plain)
        self._recorded[0] = 0

    def _repeat(self, content: Bytes, plain: dict[str, Any]) -> Seals | None:
        """Repeat what was noted in the content of the file, and check all of it."""
        mapped_file.repeat(content, self._entries)
        arrays = {name: array_at(content, entry) for name, entry in self._entries.items()}
        seals = Seals(self.layout, arrays, plain) if "seals" in arrays else None
        if seals is not None:
            seals.check()
        state.check_values({name: torch.from_numpy(arrays[name]) for name in self.tensors})
        return seals

    def verify(self) -> None:
        """Compare everything with its checksums, if the file has any; files made before they were added have none.

        Raises:
            ValueError: the file is damaged.
        """
        self.settle()
        if self._seals is not None:
            with blaming(self._lock.path):
                self._seals.check()

    def is_at(self, path: PathLike) -> bool:
        """Whether a path leads to this file."""
        return self._lock.is_at(path)

    def write(self, changes: Iterable[Change], numbers: Arrays | None = None) -> None:
        """Make changes, as one step if the journal has room for all of them; else whole pairs, and the totals last.

        Raises:
            BlockingIOError: this process was forked from the one that has the file; it stays as it is.
            FileNotFoundError: the file was deleted, moved or replaced.
        """
        self.settle()
        totals, of_pairs = dict(numbers or {}), []
        for change in changes:
            if any(self.kept[name].per == "class" for name in (*change.values, *change.raised)):
                self._count(change, totals)
            else:
                of_pairs.append(self._raised(change))
        self._write_parts(of_pairs, totals)

    def _raised(self, change: Change) -> Change:
        """A change in which all is said by values."""
        now = self.read(list(change.raised), change.rows, change.size)
        raised = {name: now[name] + amounts.to(now[name].dtype) for name, amounts in change.raised.items()}
        return change._replace(values={**change.values, **raised}, raised={})

    def _write_parts(self, changes: Iterable[Change], totals: Arrays) -> None:
        totals = self._sealed(totals)
        spans = [Span(name, np.zeros(1, dtype=np.int64), values[None]) for name, values in totals.items()]
        parts = self._parts(changes, len(self._journal) - sum(span.room for span in spans))
        following: list[Change] | None = next(parts)
        while following is not None:
            part, following = following, next(parts, None)
            last = following is None
            self._lock.check()
            self.settle()
            seals = self._seals_of(part)
            end = note(self._journal, [*self._spans(part, seals), *(spans if last else [])], self._begin)
            recorded = end if self._seals is None else seal(self._journal, end)
            self._make(partial(self._perform, part, totals if last else {}, seals, recorded))

    def _sealed(self, totals: Arrays) -> Arrays:
        """Totals, and the checksum of all of them."""
        if self._seals is None or not totals:
            return totals
        return {**totals, "sealed": np.array([self._seals.owners, self._seals.totals(totals)])}

    def _seals_of(self, changes: Sequence[Change]) -> list[Numbers]:
        """The checksums (K, columns) of the pairs of each change, as they will be."""
        if self._seals is None:
            return []
        return [self._seals.rows(c.rows.numbers, {n: v.numpy() for n, v in c.values.items()}) for c in changes]

    def _count(self, change: Change, totals: Arrays) -> None:
        """Put into ``totals`` what a change makes of the tallies of classes; several may change the same one."""
        for name, values in change.values.items():
            totals[name] = self.tensors[name].index_copy(0, change.rows.tensor, values).numpy()
        for name, amounts in change.raised.items():
            so_far = torch.from_numpy(totals[name]) if name in totals else self.tensors[name]
            totals[name] = so_far.index_add(0, change.rows.tensor, amounts.to(so_far.dtype)).numpy()

    def _perform(self, changes: Sequence[Change], totals: Arrays, seals: Sequence[Numbers], recorded: int) -> None:
        """Make changes that are noted in the journal; ``recorded`` says in how much of it."""
        self._recorded[0] = recorded  # from here on the changes are sure to happen
        self._apply(changes, {name: values for name, values in totals.items() if name in self.numbers}, {})
        for name in totals.keys() & self.tensors.keys():
            self.tensors[name].copy_(torch.from_numpy(totals[name]))
        if self._seals is not None:
            for change, rows in zip(changes, seals, strict=True):
                self._seals.of_pairs[change.rows.numbers] = rows
            self._seals.of_all[:] = totals.get("sealed", self._seals.of_all)
        self._recorded[0] = 0

    def _parts(self, changes: Iterable[Change], capacity: int) -> Iterator[list[Change]]:
        """Changes in parts that fit the journal; what belongs to one pair stays together. At least one part."""
        part: list[Change] = []
        left = capacity
        for rows, size, values, _ in changes:
            row_bytes = sum(value.shape[1:].numel() * value.element_size() + 8 for value in values.values())
            row_bytes += 8 + 8 * columns(self.kept)
            heads, start = 16 * (len(values) + 1), 0
            while start < len(rows.numbers):
                if left < row_bytes + heads:
                    yield part
                    part, left = [], capacity
                chosen = slice(start, start + (left - heads) // row_bytes)
                piece = Rows(rows.numbers[chosen], rows.tensor[chosen])
                part.append(Change(piece, size, {name: value[chosen] for name, value in values.items()}))
                left -= len(piece.numbers) * row_bytes + heads
                start += len(piece.numbers)
        yield part

    def _spans(self, changes: Sequence[Change], seals: Sequence[Numbers]) -> Iterator[Span]:
        for rows, _, values, _ in changes:
            for name, value in values.items():
                tensor = self.tensors[name]
                if self.kept[name].per == "pixel" and self.layout.starts is not None:
                    starts = self.layout.starts[rows.numbers]
                else:
                    starts = rows.numbers * math.prod(tensor.shape[1:])
                yield Span(name, (starts * tensor.element_size()).astype(np.int64), value.numpy())
        for change, sums in zip(changes, seals, strict=False):
            yield Span("seals", (change.rows.numbers * sums.strides[0]).astype(np.int64), sums)

    def reset(self) -> None:
        """Forget everything; steps as in `write`."""
        empty = {name: torch.zeros(k.shape(self.layout), dtype=k.dtype, device="cpu") for name, k in self.kept.items()}
        self.replace(empty, {})

    def replace(self, values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        """Take over copies of another store's values; steps as in `write`."""
        of_pairs = {name: values[name].cpu() for name, each in self.kept.items() if each.per in ("pixel", "pair")}
        totals = {name: values[name].cpu().numpy().copy() for name in self.kept.keys() - of_pairs.keys()}
        self.base, self.partial = {}, "missed" in self.kept  # should it be cut short
        self._write_parts(self._rows_of(of_pairs), totals)
        self._know(base)

    def _rows_of(self, values: Mapping[str, Tensor]) -> Iterator[Change]:
        for rows, size in self.blocks(BLOCK):
            yield Change(rows, size, {n: self._read(v, self.kept[n].per, rows, size) for n, v in values.items()})
