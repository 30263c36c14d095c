"""Image files of others: only the formats that are meant, upright, with a sentence where one cannot be used."""

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ORIENTATION = 0x0112  # EXIF: how the photograph is to be turned; 1 is upright, from 5 on the sides are swapped
Image.init()
# Pillow goes by the content, not by the ending, and hands PostScript to Ghostscript: only these are ever opened.
PHOTOGRAPHS = tuple(
    kind
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "AVIF")
    if kind in Image.OPEN
)
DRAWN = ("PNG",)  # label images, maps, saliency
ENDINGS = tuple(ending for ending, kind in Image.registered_extensions().items() if kind in PHOTOGRAPHS)


class Look(NamedTuple):
    """What a photograph's header says.

    Attributes:
        size: (H, W), upright: as it is shown.
        stored: (H, W) of the pixels in the file, before the EXIF entry turns them.
        orientation: 1 upright, 2 to 8 turned or mirrored when it is shown.
        format: Pillow's name.
    """

    size: tuple[int, int]
    stored: tuple[int, int]
    orientation: int
    format: str

    @property
    def shows_turn(self) -> bool:
        """Whether the size of something drawn on it shows which way the photograph lay then."""
        return self.orientation == 1 or self.size != self.stored


def look(path: Path) -> Look:
    """Size and orientation of a photograph; errors as `load`."""
    with _opened(path, PHOTOGRAPHS) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
        if orientation not in range(2, 9):  # absent, or none that EXIF knows
            orientation = 1
        swapped = orientation >= 5
        kind, size = str(image.format), image.size
        if kind == "TIFF":  # which Pillow turns by itself, and at different moments in its versions
            image.load()
            size = image.size[::-1] if swapped else image.size
    stored = (size[1], size[0])
    return Look(stored[::-1] if swapped else stored, stored, orientation, kind)


def photograph(path: Path) -> Image.Image:
    """A photograph as it is shown: upright, RGB; errors as `load`."""
    image = load(path, PHOTOGRAPHS)
    if image.mode.startswith(("I", "F")):  # 16 bits and more would be cut to white
        raise ValueError(f"mode {image.mode}; expected 8 bits a channel")
    return image.convert("RGB")


def load(path: Path, formats: Sequence[str]) -> Image.Image:
    """An image, decoded whole and turned as its EXIF entry says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, of another format, damaged, or too large to be meant.
    """
    with _opened(path, formats) as image:
        image.verify()  # a PNG's checksums, at which decoding does not look; afterwards it must be opened again
    with _opened(path, formats) as image:
        image.load()
        return ImageOps.exif_transpose(image)


@contextmanager
def _opened(path: Path, formats: Sequence[str]) -> Iterator[Image.Image]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():  # a FIFO would wait for ever
        raise ValueError("it is no regular file")
    try:
        with Image.open(path, formats=formats) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no image in one of the formats {', '.join(formats)}") from error
    except Exception as error:  # Pillow has all kinds for damaged files, and its own for those that are too large
        raise ValueError(str(error) or type(error).__name__) from error


def turned(drawn: np.ndarray, seen: Look) -> np.ndarray:
    """What was drawn on a photograph's pixels as they are stored, turned as the photograph is when it is shown.

    Args:
        drawn: (H, W) uint8 of either orientation.
        seen: the photograph.

    Raises:
        ValueError: it has another size, or one that does not show which way it was drawn.
    """
    if drawn.shape not in (seen.size, seen.stored):
        raise ValueError(f"{drawn.shape[1]} x {drawn.shape[0]} pixels, its image has {seen.size[1]} x {seen.size[0]}")
    if not seen.shows_turn:
        raise ValueError(undecided(seen))
    if drawn.shape == seen.size:
        return drawn
    image = Image.fromarray(drawn)
    image.getexif()[ORIENTATION] = seen.orientation
    return np.asarray(ImageOps.exif_transpose(image))


def undecided(seen: Look) -> str:
    """What is wrong with a photograph that does not show which way something was drawn on it."""
    return (
        f"its photograph has the EXIF orientation {seen.orientation}, which keeps the size, so nothing shows whether "
        "this was drawn on the upright photograph; turn the photograph's pixels and remove the entry"
    )


def png(folder: Path, name: str) -> Path:
    """Where NAME.png is: so, in another Unicode form, or with the ending .PNG; so, if it is nowhere."""
    plain = folder / f"{name}.png"
    forms = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    others = (folder / f"{form}{ending}" for form in forms for ending in (".png", ".PNG"))
    return plain if plain.exists() else next((path for path in others if path.exists()), plain)
