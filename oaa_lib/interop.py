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

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from oaa_lib.accumulator import AttentionAccumulator

Layout = Literal["oaa", "irn", "psa", "safetensors"]
ENDINGS = {"oaa": ".png", "irn": ".npy", "psa": ".npy", "safetensors": ".safetensors"}


class ImageMaps(NamedTuple):
    """The maps of one image.

    Attributes:
        classes: (K,) int64, 0-based class ids, ascending.
        attention: (K, h, w) float32 in [0, 1].
    """

    classes: Tensor
    attention: Tensor


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
        ValueError: an unknown layout, or a name that cannot be a file's.
        KeyError: an image without a size.
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
    write, folder = _checked(layout, WRITERS), Path(folder)
    names = accumulator.pairs.keys or [str(row) for row in range(accumulator.pairs.num_images)]
    strange = [name for name in names if not name or "/" in name or "\\" in name or name.startswith(".")]
    if strange:
        raise ValueError(f"expected names that can be those of files, got {strange[0]!r}")
    folder.mkdir(parents=True, exist_ok=True)

    def write_one(row: int) -> None:
        classes = accumulator.classes(row)
        if len(classes):
            attention = accumulator.attention(row).cpu()
            if sizes is not None:
                attention = _resize(attention, sizes[names[row]])
            write(folder, names[row], ImageMaps(classes, attention), sizes is not None)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write_one, range(len(names))))


class MapFolder(Mapping[str, ImageMaps]):
    """What `read_maps` returns: `ImageMaps` by image name; a file is read when it is asked for."""

    def __init__(self, files: dict[str, list[Path]], read: Callable[[list[Path]], dict[int, Any]]) -> None:
        self._files, self._read = files, read

    def __getitem__(self, name: str) -> ImageMaps:
        if name not in self._files:
            raise KeyError(f"no maps of {name!r}; there are those of {len(self)} images, such as {next(iter(self))!r}")
        paths = self._files[name]
        maps = {c: torch.as_tensor(np.asarray(values)).float() for c, values in sorted(self._read(paths).items())}
        if not maps:
            return ImageMaps(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, 1))
        if any(c < 0 for c in maps) or any(
            m.ndim != 2 or m.shape != next(iter(maps.values())).shape for m in maps.values()
        ):
            shapes = {c: tuple(m.shape) for c, m in maps.items()}
            raise ValueError(f"{paths[0]}: expected maps (h, w) of one size by class id from 0, got {shapes}")
        attention = torch.stack(list(maps.values()))
        if not ((attention >= 0) & (attention <= 1)).all():
            raise ValueError(
                f"{paths[0]}: expected attention in [0, 1], got {attention.min():g} to {attention.max():g}; is it "
                "another layout, or not normalised?"
            )
        return ImageMaps(torch.tensor(list(maps)), attention)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_maps(folder: str | Path, *, layout: Layout = "oaa", allow_pickle: bool = False) -> MapFolder:
    """The maps in a folder of another project, by image name; nothing is read before it is asked for.

    Args:
        folder: with the files.
        layout: see the module. IRN's ``high_res`` is read where it is, else ``cam``.
        allow_pickle: consent to read pickled dictionaries (``"irn"``, ``"psa"``). **A pickle can run any program on
            your machine when it is read**: only for files that you, or people you trust, have made.

    Raises:
        FileNotFoundError: no such folder, or no file of this layout in it.
        ValueError: an unknown layout, a file whose name tells no class, pickles without consent; and, when a file is
            read, if it is damaged or holds no attention.

    Example:
        See `write_maps`.
    """
    ending, folder = _checked(layout, ENDINGS), Path(folder)
    paths = sorted(folder.glob(f"*{ending}"))
    if not paths:
        raise FileNotFoundError(f"expected {ending} files of layout {layout!r} in {folder}, found none")
    if ending == ".npy" and not allow_pickle:
        raise ValueError(
            f"the files of layout {layout!r} are pickles, which can run any program when they are read; pass "
            "allow_pickle=True if you trust who made them"
        )
    files: dict[str, list[Path]] = {}
    for path in paths:
        match = re.fullmatch(r"(.+)_(\d+)", path.stem) if layout == "oaa" else None
        if layout == "oaa" and match is None:
            raise ValueError(f"expected names like NAME_CLASS.png in {folder}, got {path.name}")
        files.setdefault(match[1] if match else path.stem, []).append(path)
    return MapFolder(files, READERS[layout])


def load_into(accumulator: AttentionAccumulator, maps: Mapping[str, ImageMaps]) -> None:
    """Fuse maps into an accumulator, past its gate; so published maps train an integral attention model.

    Maps of another size are brought to the accumulator's (bilinear). Classes that its labels do not have are left out.

    Args:
        accumulator: with ``keys``, or whose rows are named "0", "1", ...
        maps: as `read_maps` gives them; several are read at a time.

    Raises:
        KeyError: an image that the accumulator does not know; nothing is fused then.
        ValueError: a class beyond its labels.

    Example:
        >>> import torch
        >>> from oaa_lib import AttentionAccumulator
        >>> accumulator = AttentionAccumulator([[0, 1]], (2, 2))
        >>> load_into(accumulator, {"0": ImageMaps(torch.tensor([1]), torch.ones(1, 2, 2))})
        >>> accumulator.accumulated
        tensor([[False,  True]])
    """
    keys = accumulator.pairs.keys
    rows: dict[str, int] = {name: row for row, name in enumerate(keys or map(str, range(accumulator.pairs.num_images)))}
    strangers = [name for name in maps if name not in rows]
    if strangers:
        raise KeyError(f"{len(strangers)} of {len(maps)} images are not the accumulator's, first {strangers[0]!r}")
    names = list(maps)
    gate, accumulator.gate = accumulator.gate, None
    try:
        with ThreadPoolExecutor() as pool:
            some = (names[first : first + 64] for first in range(0, len(names), 64))  # in memory at a time
            read = (
                (name, found)
                for part in some
                for name, found in zip(part, pool.map(maps.__getitem__, part), strict=True)
            )
            for name, (classes, attention) in read:
                if not len(classes):
                    continue
                if int(classes.max()) >= accumulator.pairs.num_classes:
                    raise ValueError(
                        f"{name}: expected classes below {accumulator.pairs.num_classes}, got {int(classes.max())}; "
                        "does the other project count the background?"
                    )
                dense = torch.zeros(1, accumulator.pairs.num_classes, *attention.shape[-2:])
                dense[0, classes] = attention
                accumulator.update([rows[name]], dense.to(accumulator.device), normalization=None)
    finally:
        accumulator.gate = gate


def _checked(layout: str, known: Mapping[str, Any]) -> Any:
    if layout not in known:
        raise ValueError(f"expected layout {', '.join(map(repr, known))}, got {layout!r}")
    return known[layout]


def _resize(attention: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(attention[None], size, mode="bilinear", align_corners=False)[0]


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_oaa(folder: Path, name: str, maps: ImageMaps, resized: bool) -> None:
    from PIL import Image

    pixels = (maps.attention * 255).round().byte().numpy()
    for c, values in zip(maps.classes.tolist(), pixels, strict=True):
        _replace(folder / f"{name}_{c}.png", partial(Image.fromarray(values).save, format="PNG"))


def _read_oaa(paths: list[Path]) -> dict[int, Any]:
    from PIL import Image

    maps = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode != "L":
                    raise ValueError(f"{path}: expected an 8-bit grey PNG, got mode {image.mode}")
                maps[int(path.stem.rsplit("_", 1)[1])] = np.asarray(image, dtype=np.float32) / 255
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}); make it again") from error
    return maps


def _write_pickled(folder: Path, name: str, content: dict[Any, Any]) -> None:
    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.save(file, np.array(content, dtype=object), allow_pickle=True)

    _replace(folder / f"{name}.npy", write)


def _read_pickled(path: Path) -> dict[Any, Any]:
    try:
        content = np.load(path, allow_pickle=True).item()
    except (OSError, EOFError, ValueError, UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read ({error}); make it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def _write_irn(folder: Path, name: str, maps: ImageMaps, resized: bool) -> None:
    height, width = maps.attention.shape[-2:]
    strided = _resize(maps.attention, (-(-height // 4), -(-width // 4))) if resized else maps.attention
    high_res = maps.attention.numpy()
    _write_pickled(
        folder, name, {"keys": maps.classes, "cam": strided, "high_res": high_res}
    )  # tensors and array, as IRN's


def _read_irn(paths: list[Path]) -> dict[int, Any]:
    content = _read_pickled(paths[0])
    if "keys" not in content or not {"cam", "high_res"} & content.keys():
        raise ValueError(f"{paths[0]}: expected a dictionary with keys, cam, high_res (IRN), got {list(content)}")
    maps = content["high_res"] if "high_res" in content else content["cam"]
    return {int(c): values for c, values in zip(content["keys"], maps, strict=True)}


def _write_psa(folder: Path, name: str, maps: ImageMaps, resized: bool) -> None:
    _write_pickled(folder, name, dict(zip(maps.classes.tolist(), maps.attention.numpy(), strict=True)))


def _read_psa(paths: list[Path]) -> dict[int, Any]:
    content = _read_pickled(paths[0])
    if not all(isinstance(c, (int, np.integer)) for c in content):
        raise ValueError(f"{paths[0]}: expected a dictionary from class id to map (PSA, SEAM), got {list(content)[:3]}")
    return {int(c): values for c, values in content.items()}


def _write_safetensors(folder: Path, name: str, maps: ImageMaps, resized: bool) -> None:
    from safetensors.torch import save_file

    tensors = {str(c): values.contiguous() for c, values in zip(maps.classes.tolist(), maps.attention, strict=True)}
    _replace(folder / f"{name}.safetensors", lambda path: save_file(tensors, path))


def _read_safetensors(paths: list[Path]) -> dict[int, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {int(c): values for c, values in load_file(paths[0]).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{paths[0]} cannot be read ({error}); make it again") from error


WRITERS: dict[str, Callable[[Path, str, ImageMaps, bool], None]] = {
    "oaa": _write_oaa,
    "irn": _write_irn,
    "psa": _write_psa,
    "safetensors": _write_safetensors,
}
READERS: dict[str, Callable[[list[Path]], dict[int, Any]]] = {
    "oaa": _read_oaa,
    "irn": _read_irn,
    "psa": _read_psa,
    "safetensors": _read_safetensors,
}
