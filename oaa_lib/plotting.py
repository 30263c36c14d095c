"""Pictures of attention (extra ``plotting``): each function returns a matplotlib figure that nothing else holds.

``figure.savefig("a.png")`` writes it. A notebook shows it after ``%matplotlib inline``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture: TypeAlias = npt.NDArray[np.uint8]
COLOURS = "inferno"  # perceptually even: equal steps of attention look like equal steps


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
        ValueError: an image that is none, attention outside [0, 1], another number of titles.

    Example:
        >>> import torch
        >>> figure = overlay(torch.rand(3, 48, 64), torch.rand(2, 6, 8), ["cat", "dog"])
        >>> [axis.get_title() for axis in figure.axes]
        ['image', 'cat', 'dog']
    """
    maps = torch.as_tensor(attention)
    maps = maps[None] if maps.ndim == 2 else maps
    names = [f"map {place}" for place in range(len(maps))] if titles is None else list(titles)
    if len(names) != len(maps):
        raise ValueError(f"expected a title for each of the {len(maps)} maps, got {len(names)}")
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

    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"expected rows of one length of at least 1, got lengths {[len(row) for row in rows]}")
    (columns,) = lengths
    for what, given, number in (("titles", titles, columns), ("notes", notes, len(rows))):
        if given is not None and len(given) != number:
            raise ValueError(f"expected {number} {what}, got {len(given)}")
    pictures = [[None if cell is None else _picture(cell) for cell in row] for row in rows]
    shapes = [picture.shape for row in pictures for picture in row if picture is not None]
    aspect = float(np.median([shape[0] / shape[1] for shape in shapes])) if shapes else 1.0
    size = (1.9 * columns, 1.9 * aspect * len(rows) + (0.0 if titles is None else 0.3))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
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
        maps: (T, K, h, w) in [0, 1], as `Snapshots.cumulative` and `Snapshots.latest` return them.
        steps: T of them, `Snapshots.taken`.
        classes: K names.
        columns: at most so many moments, evenly chosen, the first and the last among them; at least 2.
        opacity: of the attention's colours, in [0, 1].

    Returns:
        The figure.

    Raises:
        ValueError: shapes that do not fit, attention outside [0, 1].

    Example:
        >>> import torch
        >>> image, maps = torch.rand(3, 48, 64), torch.rand(9, 2, 6, 8)
        >>> figure = evolution(image, maps, range(0, 90, 10), ["cat", "dog"], columns=3)
        >>> [axis.get_title() for axis in figure.axes[:4]]
        ['image', 'step 0', 'step 40', 'step 80']

    Source: paper, Fig. 1.
    """
    values = torch.as_tensor(maps)
    if values.ndim != 4 or len(values) != len(steps) or not len(steps):
        raise ValueError(f"expected maps (T, K, h, w) and T steps, got {tuple(values.shape)} and {len(steps)}")
    if columns < 2:
        raise ValueError(f"expected columns >= 2, got {columns}")
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


def _picture(cell: Any) -> Picture:
    """(H, W, 3) uint8 of any cell."""
    if isinstance(cell, Overlay):
        return _blend(_photograph(cell.image), torch.as_tensor(cell.attention), cell.opacity)
    values = np.asarray(cell.cpu() if isinstance(cell, Tensor) else cell)
    if values.ndim == 2 and np.issubdtype(values.dtype, np.integer):
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"expected a label image of 0..255, got [{values.min()}, {values.max()}]")
        palette = voc_palette()
        palette[255] = 255
        return np.asarray(palette[values])
    return _photograph(cell)


def _photograph(image: Any) -> Picture:
    values = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    if values.ndim == 3 and values.shape[0] == 3 and values.shape[2] != 3:
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] != 3:
        raise ValueError(f"expected a photograph (3, H, W) or (H, W, 3), got {values.shape}")
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating) or not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"expected a photograph of uint8, or floating point in [0, 1], got {values.dtype} in "
            f"[{values.min():.4g}, {values.max():.4g}]; undo the normalisation first"
        )
    return np.asarray((values * 255).round(), dtype=np.uint8)


def _blend(photograph: Picture, attention: Tensor, opacity: float) -> Picture:
    from matplotlib import colormaps

    if attention.ndim != 2:
        raise ValueError(f"expected attention (h, w), got {tuple(attention.shape)}")
    values = attention.detach().cpu().float()
    if not (values.min() >= -1e-4 and values.max() <= 1 + 1e-4):
        raise ValueError(
            f"expected attention in [0, 1], got [{values.min():.4g}, {values.max():.4g}]; "
            "call normalize_attention first"
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"expected an opacity in [0, 1], got {opacity}")
    size = photograph.shape[:2]
    if values.shape != size:
        values = F.interpolate(values[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    heat = colormaps[COLOURS](values.clamp(0, 1).numpy())[..., :3] * 255
    return np.asarray(((1 - opacity) * photograph + opacity * heat).round(), dtype=np.uint8)
