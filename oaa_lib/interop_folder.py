"""A folder of maps in files of others: which files are whose, and what is in them once it is asked for."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oaa_lib.interop_layouts import ENDINGS, READERS, ImageMaps, blaming, class_id

ROUNDING = 1e-3  # so far outside of [0, 1] values are taken for 0 or 1: a step of half precision at 1


class MapFolder(Mapping[str, ImageMaps]):
    """What `read_maps` returns: `ImageMaps` by image name; a file is read when it is asked for.

    Its repr shows how many images there are, and how many files were passed over.

    Attributes:
        passed_over: files with the layout's ending that are no maps: hidden ones, and those whose name has no class.
    """

    def __init__(
        self,
        files: dict[str, dict[int, Path]],
        read: Callable[[dict[int, Path]], dict[int, Any]],
        passed_over: tuple[Path, ...] = (),
    ) -> None:
        self._files, self._read, self.passed_over = files, read, passed_over

    def __getitem__(self, name: str) -> ImageMaps:
        if name not in self._files:
            raise KeyError(f"no maps of {name!r}; there are those of {len(self)} images, such as {next(iter(self))!r}")
        paths = self._files[name]
        for path in paths.values():
            _check_regular(path)
        first = next(iter(paths.values()))
        maps = {c: _as_map(values, paths.get(c, first)) for c, values in sorted(self._read(paths).items())}
        if not maps:
            return ImageMaps(torch.zeros(0, dtype=torch.int64, device="cpu"), torch.zeros(0, 1, 1, device="cpu"))
        if len(shapes := {tuple(m.shape) for m in maps.values()}) > 1:
            raise ValueError(f"{first}: expected maps (h, w) of one size, got {sorted(shapes)[:3]}")
        attention = torch.stack(list(maps.values()))
        if not ((attention >= -ROUNDING) & (attention <= 1 + ROUNDING)).all():
            raise ValueError(
                f"{first}: expected attention in [0, 1], got {attention.min():g} to {attention.max():g}; is it "
                "another layout, or not normalised?"
            )
        return ImageMaps(torch.tensor(list(maps), device="cpu"), attention.clamp_(0, 1))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"MapFolder({len(self)} images, {len(self.passed_over)} files passed over)"


def files_of_images(folder: Path, paths: Sequence[Path], layout: str) -> MapFolder:
    """The files of each image among those of a layout's ending; what is no map is passed over.

    Raises:
        FileNotFoundError: none is left.
        ValueError: two files of one map, or a class id beyond all.
    """
    files: dict[str, dict[int, Path]] = {}
    passed_over = []
    for path in paths:
        match = re.fullmatch("(.+)_([0-9]+)" if layout == "oaa" else "(.+)", path.stem, re.DOTALL)
        if path.name.startswith(".") or match is None:
            passed_over.append(path)
            continue
        maps = files.setdefault(match[1], {})
        c = class_id(match[2], path) if layout == "oaa" else 0
        if c in maps:
            raise ValueError(f"{path} and {maps[c].name} are two files of one map; remove one of them")
        maps[c] = path
    if not files:
        name = f"NAME_CLASS{ENDINGS[layout]}" if layout == "oaa" else f"NAME{ENDINGS[layout]}"
        others = f" but {len(passed_over)} others, such as {passed_over[0].name}" if passed_over else ""
        raise FileNotFoundError(f"expected files {name} of layout {layout!r} in {folder}, found none{others}")
    return MapFolder(files, READERS[layout], tuple(passed_over))


def _check_regular(path: Path) -> None:
    """Refuse what would be waited for, or read without end."""
    if not path.is_file():
        raise ValueError(f"{path} cannot be read: it is no file, but a folder, a pipe or a link to nothing; remove it")


def _as_map(values: Any, path: Path) -> Tensor:
    """A map (h, w) of any number type as float32."""
    with blaming(path):
        if isinstance(values, Tensor):
            plain = not values.is_complex() and values.layout == torch.strided and not values.is_meta
            found = values.detach().cpu().float() if plain else None
        else:
            array = np.asarray(values)
            plain = array.dtype.kind in "biuf"
            found = torch.from_numpy(np.array(array, dtype=np.float32)) if plain else None
        if found is None or found.ndim != 2 or not found.numel():
            kind = f"{values.dtype} {tuple(values.shape)}" if hasattr(values, "shape") else type(values).__name__
            raise ValueError(f"expected a map (h, w) of numbers, got {kind}")
    return found
