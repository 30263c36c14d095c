"""Attention maps in the files of other projects: written from an accumulator, read lazily, taken into one.

Layouts, one folder each:

================= ======================================================================================================
``"oaa"``         ``{name}_{class}.png``, 8-bit grey, a file for each pair: the releases of OAA
``"irn"``         ``{name}.npy``, a pickled dictionary: ``keys`` (classes), ``cam`` (strided), ``high_res`` (image size)
``"psa"``         ``{name}.npy``, a pickled dictionary from class id to map: PSA, SEAM
``"safetensors"`` ``{name}.safetensors``, a tensor for each class id
================= ======================================================================================================

Names are the accumulator's ``keys``, or the row of ``labels`` without keys; classes count from 0, without background.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from oaa_lib.accumulator import AttentionAccumulator
from oaa_lib.arguments import floating, kind, shown, whole_numbers
from oaa_lib.growing import resize
from oaa_lib.interop_folder import MapFolder, files_of_images
from oaa_lib.interop_layouts import ENDINGS, WRITERS, ImageMaps, check_name
from oaa_lib.maps.coding import outside
from oaa_lib.maps.layout import checked_size

__all__ = ["ImageMaps", "Layout", "Loaded", "MapFolder", "load_into", "read_maps", "write_maps"]
Layout = Literal["oaa", "irn", "psa", "safetensors"]


def write_maps(
    accumulator: AttentionAccumulator,
    folder: str | Path,
    *,
    layout: Layout = "oaa",
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Write the maps of all images that own one, in the files of another project, several at a time.

    Files that are there are replaced, each one whole. Pairs that hold nothing are written as zeros.

    Args:
        accumulator: whose maps.
        folder: made if it is not there.
        layout: see the module.
        sizes: (H, W) of each image by name, that maps are brought to (bilinear); IRN's ``cam`` is a quarter of it.
            None: the size they are stored in.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an unknown layout, a name that cannot be a file's in this folder, or a size that is none; nothing is
            written then.
        KeyError: an image without a size; nothing is written then.
        ImportError: Pillow or safetensors is missing.

    Example:
        >>> import tempfile, torch
        >>> from oaa_lib import AttentionAccumulator
        >>> accumulator = AttentionAccumulator([[1, 0], [1, 1]], (4, 4), gate=None, keys=["dog", "both"])
        >>> _ = accumulator.update(["both"], torch.rand(1, 2, 4, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_maps(accumulator, folder, layout="psa")
        ...     maps = read_maps(folder, layout="psa", allow_pickle=True)
        ...     sorted(maps), maps["both"].classes, maps["both"].attention.shape
        (['both', 'dog'], tensor([0, 1]), torch.Size([2, 4, 4]))
    """
    write, folder = _checked(layout, WRITERS), _checked_folder(folder)
    _check_accumulator(accumulator)
    names = accumulator.pairs.keys or [str(row) for row in range(accumulator.pairs.num_images)]
    rows = [row for row in range(len(names)) if len(accumulator.classes(row))]
    for row in rows:
        check_name(names[row], layout, accumulator.pairs.num_classes)
    sizes = None if sizes is None else _checked_sizes(sizes, [names[row] for row in rows])
    folder.mkdir(parents=True, exist_ok=True)

    def write_one(row: int) -> None:
        attention = accumulator.attention(row).cpu()
        if sizes is not None:
            attention = resize(attention, sizes[names[row]])
        write(folder, names[row], ImageMaps(accumulator.classes(row), attention), sizes is not None)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write_one, rows))


def read_maps(folder: str | Path, *, layout: Layout = "oaa", allow_pickle: bool = False) -> MapFolder:
    """The maps in a folder of another project, by image name; nothing is read before it is asked for.

    Hidden files (``._NAME_0.png``, which macOS leaves) and files whose name has no class are passed over and listed in
    ``passed_over``. Values up to 0.001 outside of [0, 1], as rounding leaves them, are clipped. A dictionary without
    classes is an image without maps. Nothing but PNG is decoded in a ``.png``, and its checksums are verified.

    Args:
        folder: with the files.
        layout: see the module. IRN's ``high_res`` is read where it is, else ``cam``.
        allow_pickle: consent to read pickled dictionaries (``"irn"``, ``"psa"``). **A pickle can run any program on
            your machine when it is read**: only for files that you, or people you trust, have made.

    Raises:
        FileNotFoundError: no such folder, or no file of this layout in it.
        ValueError: an unknown layout, two files for one map, a class id beyond 2**24, pickles without consent; and,
            when a file is read, if it is damaged, no regular file, too large, or holds no attention. Each names the
            file.

    Example:
        See `write_maps`.
    """
    ending, folder = _checked(layout, ENDINGS), _checked_folder(folder)
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() == ending] if folder.is_dir() else []
    if ending == ".npy" and paths and not allow_pickle:
        raise ValueError(
            f"the files of layout {layout!r} are pickles, which can run any program when they are read; pass "
            "allow_pickle=True if you trust who made them"
        )
    return files_of_images(folder, paths, layout)


class Loaded(NamedTuple):
    """What `load_into` has done.

    Attributes:
        maps: how many were fused.
        unlabelled: how many were left out, since the accumulator's labels do not have their class.
        without_classes: how many images had no map at all.
    """

    maps: int
    unlabelled: int
    without_classes: int


def load_into(accumulator: AttentionAccumulator, maps: Mapping[str, ImageMaps]) -> Loaded:
    """Fuse maps into an accumulator, past its gate; so published maps train an integral attention model.

    Maps of another size are brought to the accumulator's (bilinear). Classes that its labels do not have are left out.

    Args:
        accumulator: with ``keys``, or whose rows are named "0", "1", ...
        maps: as `read_maps` gives them; several are read at a time.

    Returns:
        How many maps were fused, and what was left out.

    Raises:
        TypeError: an argument of another kind.
        KeyError: an image that the accumulator does not know; nothing is fused then.
        ValueError: a file that cannot be read, a class beyond the accumulator's labels, or maps that are no attention,
            such as NaN. Images before it are fused: correct it and load into an accumulator that is empty, or has
            ``fusion="max"``.

    Example:
        >>> import torch
        >>> from oaa_lib import AttentionAccumulator
        >>> accumulator = AttentionAccumulator([[0, 1]], (2, 2))
        >>> load_into(accumulator, {"0": ImageMaps(torch.tensor([1]), torch.ones(1, 2, 2))})
        Loaded(maps=1, unlabelled=0, without_classes=0)
        >>> accumulator.accumulated
        tensor([[False,  True]])
    """
    _check_accumulator(accumulator)
    if not isinstance(maps, Mapping):
        raise TypeError(f"expected maps as a mapping from image name to ImageMaps, got {kind(maps)}")
    names = accumulator.pairs.keys or [str(row) for row in range(accumulator.pairs.num_images)]
    rows = {name: row for row, name in enumerate(names)}
    strangers = [name for name in maps if name not in rows]
    if strangers:
        raise KeyError(f"{len(strangers)} of {len(maps)} images are not the accumulator's, first {strangers[0]!r}")
    fused = unlabelled = without_classes = 0
    shows = torch.zeros(1, accumulator.pairs.num_classes, dtype=torch.bool, device=accumulator.device)
    gate, accumulator.gate = accumulator.gate, lambda _, labels: labels & shows  # others are as they were
    try:
        for name, found in _read_ahead(maps):
            classes, attention = _checked_maps(name, found, accumulator.pairs.num_classes)
            if not len(classes):
                without_classes += 1
                continue
            labelled = torch.isin(classes, accumulator.classes(rows[name]))
            fused, unlabelled = fused + int(labelled.sum()), unlabelled + int((~labelled).sum())
            dense = attention.new_zeros(1, accumulator.pairs.num_classes, *attention.shape[-2:], dtype=torch.float32)
            dense[0, classes] = attention.float()
            shows.zero_()[0, classes.to(shows.device)] = True
            accumulator.update([rows[name]], dense.to(accumulator.device), normalization=None)
    finally:
        accumulator.gate = gate
    return Loaded(fused, unlabelled, without_classes)


def _read_ahead(maps: Mapping[str, ImageMaps]) -> Iterator[tuple[str, Any]]:
    """All of them, read by several threads, 64 in memory at a time."""
    names = list(maps)
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(names), 64):
            some = names[first : first + 64]
            yield from zip(some, pool.map(maps.__getitem__, some), strict=True)


def _checked_maps(name: str, found: Any, num_classes: int) -> ImageMaps:
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(f"expected maps of {name!r} as ImageMaps(classes, attention), got {kind(found)}")
    classes = whole_numbers(f"classes of {name!r}", found[0]).cpu()
    attention = floating(f"attention of {name!r}", found[1], "(K, h, w)").detach().cpu()
    ids = classes.flatten().tolist()
    if classes.shape != attention.shape[:1] or classes.dtype == torch.bool or len(set(ids)) < len(ids):
        raise ValueError(
            f"{name}: expected classes (K,), none of them twice, and attention (K, h, w), got {ids[:9]} and "
            f"{tuple(attention.shape)}"
        )
    if ids and not 0 <= min(ids) <= max(ids) < num_classes:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(
            f"{name}: expected classes below {num_classes}, got {wrong}; does the other project count the background?"
        )
    outside(attention, f"attention of {name!r}", "is it another layout, or not normalised?")  # on the host an error
    return ImageMaps(classes.long(), attention)


def _check_accumulator(accumulator: Any) -> None:
    if not isinstance(accumulator, AttentionAccumulator):
        raise TypeError(f"expected accumulator as an AttentionAccumulator, got {kind(accumulator)}")


def _checked_folder(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or "\0" in os.fspath(folder):
        raise TypeError(f"expected folder as a path, got {shown(folder)}")
    return Path(folder)


def _checked_sizes(sizes: Any, names: list[str]) -> dict[str, tuple[int, int]]:
    if not isinstance(sizes, Mapping):
        raise TypeError(f"expected sizes as a mapping from image name to (H, W), got {kind(sizes)}")
    checked = {}
    for name in names:
        if name not in sizes:
            raise KeyError(f"expected sizes of all {len(names)} images, got none of {name!r}")
        checked[name] = checked_size(sizes[name], f"sizes of {name!r}")
    return checked


def _checked(layout: str, known: Mapping[str, Any]) -> Any:
    if not isinstance(layout, str) or layout not in known:
        raise ValueError(f"expected layout {', '.join(map(repr, known))}, got {shown(layout)}")
    return known[layout]
