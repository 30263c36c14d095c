"""What a saved accumulator was made with: read from its file, and completed by the user where it was the user's own."""

from collections.abc import Callable
from typing import Any, NamedTuple

from oaa_lib.fusion import Fuse, adapt, fusion_name, resolve_fusion
from oaa_lib.gating import Gate, resolve_gate
from oaa_lib.growing import what_is_kept
from oaa_lib.maps import mapped_file, state
from oaa_lib.maps.files import blaming
from oaa_lib.maps.state import Owners


class Saved(NamedTuple):
    """A saved accumulator whose parts all fit.

    Attributes:
        name: the file.
        state: its entries.
        owners: whose maps it holds.
        fusion: the fusion that they were made with.
        gate: the gate, or None.
    """

    name: str
    state: dict[str, Any]
    owners: Owners
    fusion: Fuse
    gate: Gate | None


def read_saved(name: str, fusion: str | Fuse | None, gate: str | Gate | None) -> Saved:
    """A file that `AttentionAccumulator.save` wrote, or a copy of a mapped one; arguments and errors as its `load`."""
    found = mapped_file.read(name)
    with blaming(name):
        owners = state.read(found)
    made: Fuse = _made_with(name, "fusion", owners.fusion, resolve_fusion) if fusion is None else resolve_fusion(fusion)
    if isinstance(gate, str) and gate == "saved":
        gate = _made_with(name, "gate", found["gate"], resolve_gate)
    kept = what_is_kept(adapt(made), found["maps"].dtype)
    state.fit(name, found, owners, owners.layout, kept, fusion_name(made))  # or a file could claim more than it holds
    return Saved(name, found, owners, made, resolve_gate(gate))


def _made_with(name: str, part: str, saved: Any, resolve: Callable[[Any], Any]) -> Any:
    """The fusion or the gate that a file names."""
    if isinstance(saved, str) and saved.startswith("own:"):
        raise ValueError(f"{name} was made with your own {part} {saved!r}; pass it again as {part}=")
    try:
        return None if saved is None else resolve(saved)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} was made with another {part}: {error}") from error
