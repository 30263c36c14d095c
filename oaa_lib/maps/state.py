"""What the state of an accumulator holds, as a dictionary or in a file, and the one check whether it fits.

A state can claim anything: whatever it says is checked before it is believed.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oaa_lib.arguments import shown
from oaa_lib.maps.coding import NEEDED, ROUNDING
from oaa_lib.maps.files import Arrays, Shapes
from oaa_lib.maps.kept import MOST, Kept
from oaa_lib.maps.layout import MapLayout
from oaa_lib.maps.pairs import PairTable, to_numpy

BASES = ("maps", "missed")  # of which a state holds what they were at the last synchronize
OWNERS = ("offsets", "classes", "num_classes", "keys", "map_size", "fusion")  # beside what a store keeps


class Owners(NamedTuple):
    """Whose maps a state holds.

    Attributes:
        layout: the pairs and the sizes of their maps.
        fusion: the name of the fusion that they were made with.
    """

    layout: MapLayout
    fusion: str


def describe(layout: MapLayout, fusion: str) -> dict[str, Any]:
    """Whose maps a state holds, as its entries; copies, since some loaders write into what they are given."""
    return {
        "offsets": torch.from_numpy(np.array(layout.pairs.offsets)),
        "classes": torch.from_numpy(np.array(layout.pairs.classes)),
        "num_classes": layout.pairs.num_classes,
        "keys": layout.pairs.keys,
        "map_size": list(layout.size) if layout.size else torch.from_numpy(np.array(layout.sizes)),
        "fusion": fusion,
    }


def read(state: Mapping[str, Any]) -> Owners:
    """Whose maps a state holds.

    Raises:
        Exception: what numpy and Python raise for entries of another kind, or ValueError for such as cannot be true.
    """
    offsets, classes, num_classes = to_numpy(state["offsets"]), to_numpy(state["classes"]), state["num_classes"]
    if offsets.dtype.kind != "i" or classes.dtype.kind != "i":
        raise ValueError("its offsets or classes are no integers")
    counts = np.diff(offsets)
    if offsets.ndim != 1 or offsets[0] != 0 or offsets[-1] != len(classes) or (counts < 0).any():
        raise ValueError("its offsets do not fit its classes")
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(f"expected num_classes as an integer of at least 1, got {num_classes!r}")
    cells = np.repeat(np.arange(len(counts)), counts) * num_classes + classes
    if classes.min() < 0 or classes.max() >= num_classes or (np.diff(cells) <= 0).any():
        raise ValueError("its classes are out of range or out of order")
    layout = MapLayout(PairTable(offsets, classes, num_classes, state["keys"]), state["map_size"])
    pixels = np.prod(layout.map_size, axis=-1, dtype=np.float64) * (1 if layout.size else counts)
    if pixels.max() > state["maps"].numel():
        raise ValueError("its maps are smaller than its map size")
    if state["maps"].dtype not in NEEDED:
        raise ValueError(f"its maps are {state['maps'].dtype}")
    return Owners(layout, str(state["fusion"]))


def fit(
    what: str, state: Mapping[str, Any], owners: Owners, layout: MapLayout, kept: Mapping[str, Kept], fusion: str
) -> None:
    """Whether a state can be gone on with: the same owners, the same fusion, everything of the expected kind.

    Args:
        what: the state, for the message.
        state: the entries.
        owners: whose maps it holds, see `read`.
        layout: whose maps are expected.
        kept: what is expected.
        fusion: the name of the expected fusion.

    Raises:
        ValueError: it does not fit.
    """
    belongs(what, owners, layout, fusion)
    wanted = {name: (each.dtype, each.shape(layout)) for name, each in kept.items()}
    given = [f"base_{name}" for name in BASES if f"base_{name}" in state]
    if given and not set(BASES) <= wanted.keys():
        raise ValueError(f"{what} holds {given[0]}, which only a mean has")
    bases = {f"base_{name}": wanted[name] for name in BASES if given}
    for name, (dtype, shape) in {**wanted, **bases}.items():
        found = state.get(name)
        values = found if isinstance(found, Tensor) and found.layout == torch.strided and not found.is_meta else None
        if values is None or (values.dtype, tuple(values.shape)) != (dtype, shape):
            arrived = shown(found) if values is None else f"{tuple(values.shape)} and {values.dtype}"
            raise ValueError(
                f"{what} has another dtype or size: expected {name} of shape {shape} and {dtype}, got {arrived}; build "
                "the accumulator with the dtype of the state"
            )


def check_values(state: Mapping[str, Any]) -> None:
    """Whether the maps of a state that fits are maps, and the counts could be true. Waits for the device.

    Raises:
        ValueError: they are not.
    """
    for name in ("maps", "base_maps"):
        if name in state and state[name].is_floating_point():
            low, high = (float(value) for value in state[name].detach().aminmax())
            if not (low >= -ROUNDING and high <= 1 + ROUNDING):
                raise ValueError(f"expected {name} in [0, 1], got [{low:.4g}, {high:.4g}]")
    for name in ("counts", "synchronized"):
        low, high = (int(value) for value in state[name].aminmax())
        if low < 0 or high > MOST:
            raise ValueError(f"expected {name} in [0, {MOST}], got [{low}, {high}]")


def known_to_all(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state that fits, as if all of it had been synchronised, so that there is nothing older to compare with."""
    kept = {name: value for name, value in state.items() if name not in {f"base_{each}" for each in BASES}}
    totals = torch.stack([state[name].cpu() for name in ("skipped", "offered")])
    return {**kept, "synchronized": state["counts"], "totals_then": totals}


def belongs(what: str, owners: Owners, layout: MapLayout, fusion: str) -> None:
    """Raise a ValueError where the owners or the fusion are others."""
    difference = layout.difference(owners.layout)
    if difference is None and fusion != owners.fusion:
        difference = f"expected fusion {fusion!r}, got {owners.fusion!r}"
    if difference is not None:
        raise ValueError(f"{what} belongs to another data set or setting: {difference}")


# In a file


def expected(layout: MapLayout, kept: Mapping[str, Kept]) -> Shapes:
    """What arrays a file holds, by name."""
    return {n: (np.dtype(str(each.dtype).removeprefix("torch.")), each.shape(layout)) for n, each in kept.items()}


def arrays_of(layout: MapLayout) -> Arrays:
    """Whose maps a file holds, as arrays."""
    keys = np.frombuffer(json.dumps(layout.pairs.keys).encode(), dtype=np.uint8)
    owners: Arrays = {"offsets": layout.pairs.offsets, "classes": layout.pairs.classes, "keys": keys}
    return owners if layout.sizes is None else {**owners, "map_size": layout.sizes}


def plain_of(layout: MapLayout, fusion: str, gate: str | None) -> dict[str, Any]:
    """What else a file says, as plain values."""
    return {"num_classes": layout.pairs.num_classes, "fusion": fusion, "gate": gate, "map_size": layout.size}


def from_file(arrays: Arrays, plain: dict[str, Any]) -> dict[str, Any]:
    """The state that a file holds; raises what Python does where an entry is missing or of another kind."""
    return {
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        "num_classes": plain["num_classes"],
        "keys": json.loads(arrays["keys"].tobytes()),
        "map_size": arrays["map_size"] if plain["map_size"] is None else plain["map_size"],
        "fusion": str(plain["fusion"]),
        "gate": plain.get("gate"),
    }
