"""How each project lays attention maps out in files: the writers and readers of `oaa_lib.interop`.

Whatever is in a file of others, a reader returns its maps or raises a `ValueError` that names the file, in bounded time
and memory. Nothing in a file is run, but for pickles, which `oaa_lib.interop.read_maps` asks consent for.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from torch import Tensor

from oaa_lib.growing import resize

ENDINGS = {"oaa": ".png", "irn": ".npy", "psa": ".npy", "safetensors": ".safetensors"}
MOST_CLASSES = 2**24
MOST_PIXELS = 2**26  # of a PNG, whose size on disk says nothing about them
LONGEST_NAME = 255  # bytes of a file's name
MOST_BYTES = 2**28  # of a PNG, whose checksums are read before it is decoded


class ImageMaps(NamedTuple):
    """The maps of one image.

    Attributes:
        classes: (K,) int64, 0-based class ids, ascending.
        attention: (K, h, w) float32 in [0, 1].
    """

    classes: Tensor
    attention: Tensor


def check_name(name: str, layout: str, num_classes: int) -> None:
    """Refuse a name that would lead out of the folder, be hidden in it, or be none of a file."""
    strange = not name or name.startswith(".") or bool(set(name) & set("/\\\0\n\r"))
    try:
        strange |= len(os.fsencode(f"{name}_{num_classes - 1}{ENDINGS[layout]}")) > LONGEST_NAME
    except UnicodeEncodeError:
        strange = True
    if strange:
        raise ValueError(f"expected names that can be those of files, got {name[:60]!r} ({len(name)} characters)")


def class_id(text: str, path: Path) -> int:
    """A class id in decimal digits."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= MOST_CLASSES:
        shown = repr(text) if len(text) < 30 else f"{len(text)} characters"
        raise ValueError(f"{path}: expected a class id from 0 and below {MOST_CLASSES}, got {shown}")
    return int(text)


def by_class(classes: Iterable[int], maps: Iterable[Any], path: Path) -> dict[int, Any]:
    """Each map by its class; two of one class are refused."""
    found: dict[int, Any] = {}
    for c, values in zip(classes, maps, strict=True):
        if not 0 <= c < MOST_CLASSES or c in found:
            shown = c if abs(c) < 2**64 else "a number beyond 64 bits"
            raise ValueError(f"{path}: expected each class once, from 0 and below {MOST_CLASSES}, got {shown}")
        found[c] = values
    return found


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Round the parsing of a file alone, where Pillow, numpy and pickles raise whatever they meet."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}); make it again") from error


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that appears whole or not at all, also where several processes write it.

    Not `oaa_lib.maps.replacing`: to wait for the disk, for each of thousands of files, would take minutes.
    """
    unfinished = path.with_name(f".{os.getpid()}.{secrets.token_hex(8)}.partial")
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


def _read_oaa(paths: dict[int, Path]) -> dict[int, Any]:
    return {c: _read_png(path) for c, path in paths.items()}


def _read_png(path: Path) -> Any:
    from PIL import Image

    with blaming(path):
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"expected up to {MOST_BYTES} bytes, got {path.stat().st_size}")
        with Image.open(path, formats=("PNG",)) as image:  # by its content: other formats start other programs
            image.verify()  # the checksum of each chunk, at which decoding does not look
        with Image.open(path, formats=("PNG",)) as image:
            mode, (width, height) = image.mode, image.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"expected up to {MOST_PIXELS} pixels, got {width} x {height}")
            values = np.asarray(image, dtype=np.float32) / 255 if mode == "L" else None
    if values is None:
        raise ValueError(f"{path}: expected an 8-bit grey PNG, got mode {mode}")
    return values


def _write_pickled(folder: Path, name: str, content: dict[Any, Any]) -> None:
    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.save(file, np.array(content, dtype=object), allow_pickle=True)

    _replace(folder / f"{name}.npy", write)


def _read_pickled(path: Path) -> dict[Any, Any]:
    content: Any = None
    with blaming(path), open(path, "rb") as file:
        header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(file)  # before memory is taken for what it promises
        one_object = dtype.hasobject and shape == ()
        if one_object:
            file.seek(0)
            content = npy.read_array(file, allow_pickle=True).item()  # with consent, see read_maps
    if not isinstance(content, dict):
        found = type(content).__name__ if one_object else f"{dtype} {shape}"
        raise ValueError(f"{path} cannot be read: expected a dictionary, got {found}")
    return content


def _first(content: dict[Any, Any]) -> list[str]:
    """A few keys, to be shown; some are long."""
    return [key[:20] if isinstance(key, str) else type(key).__name__ for key in list(content)[:3]]


def _write_irn(folder: Path, name: str, maps: ImageMaps, resized: bool) -> None:
    height, width = maps.attention.shape[-2:]
    strided = resize(maps.attention, (-(-height // 4), -(-width // 4))) if resized else maps.attention
    content = {"keys": maps.classes, "cam": strided, "high_res": maps.attention.numpy()}  # of these types, as IRN's
    _write_pickled(folder, name, content)


def _read_irn(paths: dict[int, Path]) -> dict[int, Any]:
    content = _read_pickled(path := paths[0])
    if not content:
        return {}
    if "keys" not in content or not {"cam", "high_res"} & content.keys():
        raise ValueError(f"{path}: expected a dictionary with keys, cam, high_res (IRN), got {_first(content)}")
    maps = content["high_res"] if "high_res" in content else content["cam"]
    with blaming(path):
        classes = np.asarray(content["keys"])
        if classes.size and (classes.ndim != 1 or classes.dtype.kind not in "iu" or len(classes) != len(maps)):
            raise ValueError(f"expected class ids and as many maps, got keys {classes.dtype} {classes.shape}")
    return by_class(classes.tolist(), maps if classes.size else [], path)


def _write_psa(folder: Path, name: str, maps: ImageMaps, resized: bool) -> None:
    _write_pickled(folder, name, dict(zip(maps.classes.tolist(), maps.attention.numpy(), strict=True)))


def _read_psa(paths: dict[int, Path]) -> dict[int, Any]:
    content = _read_pickled(path := paths[0])
    if not all(isinstance(c, (int, np.integer)) and not isinstance(c, bool) for c in content):
        raise ValueError(f"{path}: expected a dictionary from class id to map (PSA, SEAM), got {_first(content)}")
    return by_class(map(int, content), content.values(), path)


def _write_safetensors(folder: Path, name: str, maps: ImageMaps, resized: bool) -> None:
    from safetensors.torch import save_file

    tensors = {str(c): values.contiguous() for c, values in zip(maps.classes.tolist(), maps.attention, strict=True)}
    _replace(folder / f"{name}.safetensors", lambda path: save_file(tensors, path))


def _read_safetensors(paths: dict[int, Path]) -> dict[int, Any]:
    from safetensors.torch import load_file

    path = paths[0]
    with blaming(path):
        content = load_file(path)
    return by_class([class_id(key, path) for key in content], content.values(), path)


WRITERS: dict[str, Callable[[Path, str, ImageMaps, bool], None]] = {
    "oaa": _write_oaa,
    "irn": _write_irn,
    "psa": _write_psa,
    "safetensors": _write_safetensors,
}
# From the files of an image: those of its classes, or the one of all of them by a 0.
READERS: dict[str, Callable[[dict[int, Path]], dict[int, Any]]] = {
    "oaa": _read_oaa,
    "irn": _read_irn,
    "psa": _read_psa,
    "safetensors": _read_safetensors,
}
