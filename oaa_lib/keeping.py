"""Keeping cumulative attention: states for checkpoints, and files."""

from collections.abc import Mapping
from typing import Any

import torch

from oaa_lib.arguments import file_path, flag, kind
from oaa_lib.cumulative import CumulativeAttention
from oaa_lib.gating import gate_name
from oaa_lib.maps import state
from oaa_lib.maps.files import FOREIGN, write_file
from oaa_lib.maps.locking import PathLike, in_turn
from oaa_lib.maps.mapped import MappedStore


class KeptAttention(CumulativeAttention):
    """Cumulative attention maps that can be saved and restored. See `AttentionAccumulator`."""

    def state_dict(self) -> dict[str, Any]:
        """All that is kept, as tensors (sharing memory with this object) and plain values; also who owns the maps.

        `torch.distributed.checkpoint` takes it as it is; call `AttentionAccumulator.synchronize` before saving with
        that. Whoever changes the tensors of an accumulator with ``path=`` gives them to `load_state_dict`, or its file
        will not fit its checksums.
        """
        return {**self._store.state(), **state.describe(self._store.layout, self._fusion.name)}

    @torch.no_grad()
    @in_turn
    def load_state_dict(self, state_dict: Mapping[str, Any], *, known_to_all: bool = False) -> None:
        """Continue from a `state_dict` of the same data set; a copy is taken.

        Args:
            state_dict: the state.
            known_to_all: say True where every process of a group loads this same state: what is in it counts once then,
                whoever made it, and only what comes later is new to the others in the next `synchronize`.

        Raises:
            TypeError: no dictionary, or ``known_to_all`` is no bool.
            ValueError: a state with missing or malformed entries, or of another data set, map size, fusion or dtype;
                nothing is changed then.
        """
        flag("known_to_all", known_to_all)
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"expected state_dict as that of an AttentionAccumulator, got {kind(state_dict)}")
        missing = {*self._store.kept, *state.OWNERS} - set(state_dict)
        if missing:
            raise ValueError(f"expected the state_dict of an AttentionAccumulator, got one without {sorted(missing)}")
        try:
            owners = state.read(state_dict)
        except FOREIGN as error:
            raise ValueError(
                f"expected the state_dict of an AttentionAccumulator, got a malformed entry: {error}"
            ) from error
        self._take("the state", state_dict, owners, known_to_all=known_to_all)

    def _take(
        self, what: str, state_dict: Mapping[str, Any], owners: state.Owners, *, known_to_all: bool = False
    ) -> None:
        state.fit(what, state_dict, owners, self._store.layout, self._store.kept, self._fusion.name)
        try:
            state.check_values(state_dict)
        except ValueError as error:
            raise ValueError(f"{what} is damaged: {error}") from error
        if known_to_all:
            state_dict = state.known_to_all(state_dict)
        base = {name: state_dict[f"base_{name}"] for name in state.BASES if f"base_{name}" in state_dict}
        self._store.replace(state_dict, base)

    @in_turn
    def save(self, path: PathLike) -> None:
        """Write everything to one file (the layout of safetensors, no pickle). It appears whole or not at all.

        Args:
            path: where; an existing file is replaced only once the new one is complete.

        Raises:
            ValueError: these maps live in the file at ``path``, where they are kept anyway.
        """
        path = file_path("path", path)
        if isinstance(self._store, MappedStore) and self._store.is_at(path):
            raise ValueError(f"expected another path than {path}: the maps live there, and are kept already")
        arrays = {name: value.cpu().numpy() for name, value in self._store.state().items()}
        layout, fusion = self._store.layout, self._fusion.name
        write_file(path, {**arrays, **state.arrays_of(layout)}, state.plain_of(layout, fusion, gate_name(self.gate)))

    @in_turn
    def verify(self) -> None:
        """Compare what is in the file at ``path=`` with its checksums, as is done when it is opened.

        Maps in memory have none, nor do files that were made before there were any: there is nothing to compare.

        Raises:
            ValueError: the file is damaged; the message says how much of it. Go on from what was saved last.

        Example:
            >>> from oaa_lib import AttentionAccumulator
            >>> AttentionAccumulator([[1]], (1, 1)).verify()
        """
        if isinstance(self._store, MappedStore):
            self._store.verify()
