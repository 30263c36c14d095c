"""Whose maps a file holds, and of what kind: read with the suspicion that a file can claim anything."""

import json
from typing import Any, TypeAlias

import numpy as np
import torch

from oaa_lib.maps import MapLayout
from oaa_lib.pairs import PairTable
from oaa_lib.storage import Arrays, naming

Shapes: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of tensors, by name
Kinds: TypeAlias = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]  # the same of arrays


def read_owners(name: str, arrays: Arrays, plain: dict[str, Any]) -> tuple[PairTable, MapLayout, str]:
    """Whose maps a file holds: the pairs, the sizes, the fusion's name. A file can claim anything; it is checked."""
    with naming(name):
        offsets, classes, num_classes = arrays["offsets"].copy(), arrays["classes"].copy(), plain["num_classes"]
        counts = np.diff(offsets)
        if offsets.ndim != 1 or offsets[0] != 0 or offsets[-1] != len(classes) or (counts < 0).any():
            raise ValueError("its offsets do not fit its classes")
        if type(num_classes) is not int or arrays["offered"].shape != (num_classes,):
            raise ValueError(f"expected num_classes = {len(arrays['offered'])}, got {num_classes!r}")
        places = np.repeat(np.arange(len(counts)), counts) * num_classes + classes
        if classes.min() < 0 or classes.max() >= num_classes or (np.diff(places) <= 0).any():
            raise ValueError("its classes are out of range or out of order")
        pairs = PairTable(offsets, classes, num_classes, json.loads(arrays["keys"].tobytes()))
        layout = MapLayout(pairs, arrays["map_size"] if plain["map_size"] is None else plain["map_size"])
        pixels = np.prod(layout.map_size, axis=-1, dtype=np.float64) * (1 if layout.size else counts)
        if pixels.max() > arrays["maps"].size:
            raise ValueError("its maps are smaller than its map size")
        return pairs, layout, str(plain["fusion"])


def kinds(shapes: Shapes) -> Kinds:
    """The numpy form of what tensors a file holds."""
    return {key: (np.dtype(str(dtype).removeprefix("torch.")), shape) for key, (dtype, shape) in shapes.items()}


def check_kinds(name: str, arrays: Arrays, wanted: Kinds) -> None:
    """Whether a file holds what it shall hold."""
    for key in wanted.keys() | (arrays.keys() & {"latest"}):
        found, expected = arrays.get(key), wanted.get(key)
        arrived = None if found is None else (found.dtype, found.shape)
        if arrived != expected:
            raise ValueError(f"{name} has another dtype or keep_latest: expected {key} {expected}, got {arrived}")
