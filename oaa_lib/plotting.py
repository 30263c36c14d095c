"""Pictures of attention (extra ``plotting``): each function returns a matplotlib figure that nothing else holds.

``figure.savefig("a.png")`` writes it. A notebook shows it after ``%matplotlib inline``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from oaa_lib.arguments import listed, whole_number
from oaa_lib.pictures import Picture, as_array, blend, numbers, photograph

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Overlay(NamedTuple):
    """A photograph with attention on it: one cell of a `contact_sheet`.

    Attributes:
        image: a photograph, see `overlay`.
        attention: (h, w) in [0, 1].
        opacity: of the colours, in [0, 1].
    """

    image: Any
    attention: Any
    opacity: float = 0.65


def overlay(
    image: Any, attention: Tensor | npt.ArrayLike, titles: Sequence[str] | None = None, *, opacity: float = 0.65
) -> "Figure":
    """A photograph, and beside it each of its attention maps on it.

    Args:
        image: (3, H, W) or (H, W, 3), floating point in [0, 1] or uint8; a tensor, an array or an image of Pillow.
        attention: (h, w) or (K, h, w) in [0, 1], resized to the photograph (bilinear).
        titles: K of them.
        opacity: of the attention's colours, in [0, 1].

    Returns:
        The figure, one row of 1 + K pictures.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an image that is none, attention outside [0, 1], another number of titles.

    Example:
        >>> import torch
        >>> figure = overlay(torch.rand(3, 48, 64), torch.rand(2, 6, 8), ["cat", "dog"])
        >>> [axis.get_title() for axis in figure.axes]
        ['image', 'cat', 'dog']
    """
    maps = numbers("attention", attention)
    maps = maps[None] if maps.ndim == 2 else maps
    if maps.ndim != 3:
        raise ValueError(f"expected attention (h, w) or (K, h, w), got {tuple(maps.shape)}")
    names = [f"map {place}" for place in range(len(maps))] if titles is None else listed("titles", titles, "names")
    if len(names) != len(maps):
        raise ValueError(f"expected a title for each of the {len(maps)} maps, got {len(names)} for this attention")
    return contact_sheet([[image, *(Overlay(image, each, opacity) for each in maps)]], ["image", *names])


def contact_sheet(
    rows: Sequence[Sequence[Any]], titles: Sequence[str] | None = None, notes: Sequence[str] | None = None
) -> "Figure":
    """A table of pictures, such as the paper's figures 4 and 5.

    Args:
        rows: of equal length. A cell is a photograph (see `overlay`), an `Overlay`, a label image (H, W) of integers
            (drawn in VOC's colours, 255 white), or None (left empty).
        titles: one above each column.
        notes: one on each row's first picture.

    Returns:
        The figure.

    Raises:
        TypeError: an argument or a cell of another kind.
        ValueError: no rows, rows of different lengths, titles or notes that do not fit, a cell that is no picture.

    Example:
        >>> import torch
        >>> image, label = torch.rand(3, 48, 64), torch.randint(21, (48, 64))
        >>> row = [image, Overlay(image, torch.rand(6, 8)), label]
        >>> figure = contact_sheet([row], titles=["image", "OAA", "label"], notes=["cat"])
        >>> len(figure.axes)
        3

    Source: paper, Fig. 4 and 5.
    """
    from matplotlib.figure import Figure

    pictures = _pictures(rows)
    columns = len(pictures[0])
    titles, notes = _names("titles", titles, columns), _names("notes", notes, len(pictures))
    shapes = [picture.shape for row in pictures for picture in row if picture is not None]
    aspect = float(np.median([shape[0] / shape[1] for shape in shapes])) if shapes else 1.0
    size = (1.9 * columns, 1.9 * aspect * len(pictures) + (0.0 if titles is None else 0.3))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, line in zip(axes, pictures, strict=True):
        for axis, picture in zip(row, line, strict=True):
            if picture is not None:
                axis.imshow(picture)
    for axis, title in zip(axes[0], titles or [], strict=False):
        axis.set_title(title, fontsize=9)
    for axis, note in zip(axes[:, 0], notes or [], strict=False):
        place = {"transform": axis.transAxes, "va": "top"}
        axis.text(0.02, 0.97, note, color="white", fontsize=8, backgroundcolor=(0, 0, 0, 0.6), **place)
    return figure


def evolution(
    image: Any,
    maps: Tensor | npt.ArrayLike,
    steps: Sequence[int],
    classes: Sequence[str] | None = None,
    *,
    columns: int = 6,
    opacity: float = 0.65,
) -> "Figure":
    """How the attention of an image's classes has moved or grown: one row a class, one column a moment.

    Args:
        image: a photograph, see `overlay`.
        maps: (T, K, h, w) in [0, 1], as `Snapshots.cumulative` returns them: how attention grows, or how it
            moves where the accumulator has ``fusion="latest"``.
        steps: T of them, `Snapshots.taken`.
        classes: K names.
        columns: at most so many moments, evenly chosen, the first and the last among them; at least 2.
        opacity: of the attention's colours, in [0, 1].

    Returns:
        The figure.

    Raises:
        TypeError: an argument of another kind.
        ValueError: shapes that do not fit, attention outside [0, 1].

    Example:
        >>> import torch
        >>> image, maps = torch.rand(3, 48, 64), torch.rand(9, 2, 6, 8)
        >>> figure = evolution(image, maps, range(0, 90, 10), ["cat", "dog"], columns=3)
        >>> [axis.get_title() for axis in figure.axes[:4]]
        ['image', 'step 0', 'step 40', 'step 80']

    Source: paper, Fig. 1.
    """
    values, steps = numbers("maps", maps), listed("steps", steps, "integers")
    if values.ndim != 4 or len(values) != len(steps) or not values.numel():
        raise ValueError(f"expected maps (T, K, h, w) and T steps, got {tuple(values.shape)} and {len(steps)}")
    columns = whole_number("columns", columns, 2)
    classes = _names("classes", classes, values.shape[1])
    moments = np.unique(np.linspace(0, len(steps) - 1, min(columns, len(steps))).round().astype(int)).tolist()
    rows = [
        [image, *(Overlay(image, values[moment, k], opacity) for moment in moments)] for k in range(values.shape[1])
    ]
    return contact_sheet(rows, ["image", *(f"step {steps[moment]}" for moment in moments)], classes)


def voc_palette() -> Picture:
    """(256, 3) uint8, VOC's colours: bit k of the label goes to bit 7 - k // 3 of channel k % 3.

    Example:
        >>> voc_palette()[[0, 1, 2, 255]].tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0], [224, 224, 192]]
    """
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        value = (np.arange(256) >> bit) & 1
        colours[:, bit % 3] |= (value << (7 - bit // 3)).astype(np.uint8)
    return colours


def _names(name: str, given: Any, count: int) -> list[Any] | None:
    names = None if given is None else listed(name, given, "names")
    if names is not None and len(names) != count:
        raise ValueError(f"expected {count} {name}, got {len(names)} for these rows")
    return names


def _pictures(rows: Any) -> list[list[Picture | None]]:
    """Each cell of a table as (H, W, 3) uint8."""
    table = [listed("each of the rows", row, "cells") for row in listed("rows", rows, "rows")]
    lengths = {len(row) for row in table}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"expected rows of one length of at least 1, got lengths {[len(row) for row in table]}")
    pictures: list[list[Picture | None]] = [[None] * len(row) for row in table]
    for i, j in np.ndindex(len(table), *lengths):
        try:
            pictures[i][j] = None if table[i][j] is None else _picture(table[i][j])
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{error} (rows[{i}][{j}])") from None
    return pictures


def _picture(cell: Any) -> Picture:
    """(H, W, 3) uint8 of any cell."""
    if isinstance(cell, Overlay):
        return blend(photograph(cell.image), numbers("attention", cell.attention), cell.opacity)
    values = as_array(cell)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        return photograph(cell)
    if not values.size or values.min() < 0 or values.max() > 255:
        found = f"[{values.min()}, {values.max()}]" if values.size else f"{values.shape}"
        raise ValueError(f"expected a label image of 0..255, got {found}")
    palette = voc_palette()
    palette[255] = 255
    return np.asarray(palette[values])
