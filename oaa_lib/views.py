"""Where in its image a score map looks: crops and flips, into the image's frame and back.

All geometry is numpy on the host, in relative coordinates (``align_corners=False``): pixel i of n covers
[i / n, (i + 1) / n] and is sampled at its centre. Resizing an image therefore leaves its view as it is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from oaa_lib.arguments import number, shown
from oaa_lib.maps.layout import checked_size

Floats: TypeAlias = npt.NDArray[np.float64]
ROUNDING = 1e-9  # a pixel centre on the very edge of a view is inside, mirrored or not
FAR = 1e9  # from the image, in its sides or in pixels: nothing that is meant
LARGEST_FRAME = int(FAR) // 2  # of the side of a frame


class View(NamedTuple):
    """The part of an image that a network is shown: a box, then perhaps a horizontal flip of what is in it.

    The box is relative to the image, x to the right and y down: (0, 0, 1, 1) is the whole image. It may reach outside,
    as after padding. A `View` is a plain tuple of numbers, so data loaders collate it as it is.

    Attributes:
        left: x of the left edge.
        top: y of the upper edge.
        right: x of the right edge, greater than ``left``.
        bottom: y of the lower edge, greater than ``top``.
        flip: whether the content of the box is mirrored left to right.

    Example:
        >>> View().crop(top=0, left=50, height=50, width=50, size=(100, 100)).hflip()
        View(left=0.5, top=0.0, right=1.0, bottom=0.5, flip=True)
    """

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    flip: bool = False

    def crop(self, top: float, left: float, height: float, width: float, *, size: tuple[int, int]) -> "View":
        """The view of a crop of what this view shows.

        The arguments are named as torchvision's crops report them (``RandomResizedCrop.get_params``, ``make_params``).

        Args:
            top: first row of the crop, in pixels of the present frame; below 0 where the frame was padded.
            left: first column, likewise.
            height: rows.
            width: columns.
            size: (H, W) of the present frame, in pixels.

        Raises:
            TypeError: no numbers, or views of a batch as a data loader collates them.
            ValueError: a crop or a frame without pixels, NaN, or what is a billion pixels away.
        """
        _check_one(self)
        rows, columns = checked_size(size, most=LARGEST_FRAME)
        top, left = number("top", top, -FAR, FAR), number("left", left, -FAR, FAR)
        height, width = number("height", height, ROUNDING, FAR), number("width", width, ROUNDING, FAR)
        start, stop = left / columns, (left + width) / columns
        if self.flip:
            start, stop = 1 - stop, 1 - start
        across, down = self.right - self.left, self.bottom - self.top
        return View(
            left=self.left + start * across,
            top=self.top + top / rows * down,
            right=self.left + stop * across,
            bottom=self.top + (top + height) / rows * down,
            flip=self.flip,
        )

    def pad(self, left: float, top: float, right: float, bottom: float, *, size: tuple[int, int]) -> "View":
        """The view after padding by so many pixels of the present frame, whose (H, W) is ``size``; raises as `crop`."""
        rows, columns = checked_size(size, most=LARGEST_FRAME)
        sides = {"left": left, "top": top, "right": right, "bottom": bottom}
        left, top, right, bottom = (number(name, pixels, -FAR, FAR) for name, pixels in sides.items())
        return self.crop(-top, -left, rows + top + bottom, columns + left + right, size=size)

    def hflip(self) -> "View":
        """The view after a horizontal flip.

        Raises:
            TypeError: views of a batch, as a data loader collates them.
        """
        _check_one(self)
        return self._replace(flip=not self.flip)


def _check_one(view: View) -> None:
    if np.ndim(view.flip) or np.ndim(view.left):
        raise TypeError("expected one View, got those of a batch; change each before they are collated")


Views: TypeAlias = Sequence[View] | View | Tensor | npt.NDArray[Any]


def check_views(views: Views, batch: int) -> Floats:
    """(B, 5) float64: left, top, right, bottom, flip of each image.

    Args:
        views: a sequence of B `View` (or 5-tuples), a (B, 5) array or tensor on the host, or one `View` of five (B,)
            tensors, as a data loader collates it.
        batch: B.

    Raises:
        TypeError: one view alone, or what is no view.
        ValueError: another number of views, a box that is empty or not finite, or views on another device.
    """
    given: Any = views
    if isinstance(views, View) and not np.isscalar(views.left):
        columns = [_on_the_host(column) for column in given]
        if any(column.shape != (batch,) for column in columns):
            raise ValueError(f"expected views as one for each of the {batch} images, got {columns[0].shape} of them")
        boxes = np.stack(columns, axis=1)
    elif isinstance(views, (Tensor, np.ndarray)):
        boxes = _on_the_host(views)
    elif isinstance(views, View) or not isinstance(views, Sequence):
        raise TypeError(f"expected one View per image, got {type(views).__name__} alone; pass a list of them")
    else:
        for view in given:
            for value in view if isinstance(view, Sequence) else [view]:
                _check_host(value)
        try:
            boxes = np.array([[float(value) for value in view] for view in given])
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"expected views as View(left, top, right, bottom, flip), got {shown(views)}") from error
    if boxes.shape != (batch, 5):
        raise ValueError(
            f"expected views as (left, top, right, bottom, flip) for each of the {batch} images, got {boxes.shape}"
        )
    wide = (boxes[:, 2:4] - boxes[:, :2] > ROUNDING).all(1)
    right = (np.abs(boxes) <= FAR).all(1) & wide & np.isin(boxes[:, 4], (0, 1))
    if not right.all():
        raise ValueError(
            "expected finite views with left < right, top < bottom and flip 0 or 1, in relative coordinates of "
            f"1e-9 to 1e9, got {tuple(boxes[~right][0].tolist())}"
        )
    return boxes


class Sampling(NamedTuple):
    """Where each of B frames takes its pixels from.

    Attributes:
        x: (B, W) positions in the source, in [0, 1] from its left to its right edge; outside where not ``inside_x``.
        y: (B, H) likewise, from top to bottom.
        inside_x: (B, W) bool, which columns the source covers.
        inside_y: (B, H) bool, which rows.
    """

    x: Floats
    y: Floats
    inside_x: npt.NDArray[np.bool_]
    inside_y: npt.NDArray[np.bool_]

    def covers(self) -> bool:
        """Whether the source covers all of every frame."""
        return bool(self.inside_x.all() and self.inside_y.all())


def flips_only(boxes: Floats) -> bool:
    """Whether all views show whole images, some of them mirrored."""
    return bool((boxes[:, :4] == (0, 0, 1, 1)).all())


def mirror(maps: Tensor, boxes: Floats) -> Tensor:
    """Maps (K, h, w) of whole images, those with ``flip`` mirrored: there and back again."""
    flips = boxes[:, 4] == 1
    if not flips.any():
        return maps
    return maps.flip(-1).where(torch.from_numpy(flips).to(maps.device, non_blocking=True)[:, None, None], maps)


def into_image(boxes: Floats, size: tuple[int, int]) -> Sampling:
    """For each pixel of (H, W) frames of the image: where in the view it is."""
    left, top, right, bottom, flip = (column[:, None] for column in boxes.T)
    x = (_centres(size[1]) - left) / (right - left)
    y = (_centres(size[0]) - top) / (bottom - top)
    return _sampling(np.where(flip, 1 - x, x), y)


def into_view(boxes: Floats, size: tuple[int, int]) -> Sampling:
    """For each pixel of (h, w) frames of the view: where in the image it is."""
    left, top, right, bottom, flip = (column[:, None] for column in boxes.T)
    x = _centres(size[1])
    x = np.where(flip, 1 - x, x)
    return _sampling(left + x * (right - left), top + _centres(size[0]) * (bottom - top))


def sample(maps: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Bilinear values of maps (K, h, w) float32 at K x H x W places, and where (K, H, W) these lie inside; 0 elsewhere.

    Between the outermost pixel centres and the edge the outermost value continues, as in a resize.
    """
    centred = [(2 * places - 1).astype(np.float32) for places in (sampling.x, sampling.y)]
    arrays = (*centred, sampling.inside_x, sampling.inside_y)
    x, y, inside_x, inside_y = (torch.from_numpy(array).to(maps.device, non_blocking=True) for array in arrays)
    inside = inside_y[:, :, None] & inside_x[:, None, :]
    columns, rows = x[:, None, :].expand(inside.shape), y[:, :, None].expand(inside.shape)
    grid = torch.stack([columns, rows], dim=-1)
    values = F.grid_sample(maps[:, None], grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    return values.where(inside, 0), inside


def _centres(pixels: int) -> Floats:
    return (np.arange(pixels) + 0.5) / pixels


def _sampling(x: Floats, y: Floats) -> Sampling:
    inside_x, inside_y = ((places >= -ROUNDING) & (places <= 1 + ROUNDING) for places in (x, y))
    return Sampling(x, y, inside_x, inside_y)


def _check_host(values: Any) -> None:
    if isinstance(values, Tensor) and values.device.type != "cpu":
        raise ValueError(
            f"expected views on the host, got a tensor on {values.device}; reading it would wait for the device"
        )


def _on_the_host(values: Any) -> Floats:
    _check_host(values)
    try:
        return np.asarray(values.tolist() if isinstance(values, Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # words, complex numbers, a sparse tensor
        raise TypeError(f"expected views as View(left, top, right, bottom, flip), got {shown(values)}") from error
