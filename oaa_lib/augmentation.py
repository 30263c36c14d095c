"""Which part of its image each augmented sample shows: torchvision's v2 transforms carry a `View` along.

No geometry is computed twice and no random number is drawn for it: the view goes through the user's own pipeline beside
the image, as masks and boxes do. Needs torchvision, when a transform is used.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, IterableDataset

from oaa_lib.arguments import shown
from oaa_lib.torchvision_views import Size, check_steps, frame_type, is_moved, torchvision, watched
from oaa_lib.views import View

CHANNELS = (1, 3, 4)  # of what is usually an image, to tell (C, H, W) from (H, W, C)


def transform_with_view(transform: Callable[..., Any], image: Any, *others: Any) -> tuple[Any, ...]:
    """Apply a torchvision v2 transform and report which part of the image its result shows.

    Crops, resizes, paddings and horizontal flips are followed exactly, in any order and nesting; colours, noise,
    erasing, types change nothing. The view and the pixels agree, or the transform is refused. Only what a function of
    your own does to the image, in ``v2.Lambda`` or beside it, is not seen unless it changes the size: let it change
    values alone.

    Args:
        transform: a transform of ``torchvision.transforms.v2``, or any callable that takes and returns
            ``image, *others, view`` and works on each by ``torchvision.transforms.v2.functional``. Padding comes
            before crops: a view knows it by its lying outside of the image.
        image: a PIL image, a tensor (..., H, W), a ``tv_tensors.Image`` or an array (H, W, C); not modified.
            torchvision moves no array, so ``v2.ToImage`` has to come before what moves it. A plain tensor beside
            another image or video is not moved either; make it a ``tv_tensors.Image``.
        others: what goes through the transform together with it, by torchvision's rules: ``tv_tensors`` for masks and
            boxes; PIL images are treated as images; plain tensors stay as they are, as do numbers and strings.

    Returns:
        ``(view, image, *others)``. The image is the one that ``transform(image, *others)`` makes from the same seed.

    Raises:
        ImportError: without torchvision.
        TypeError: ``image`` is no image, or one that torchvision does not move; the transform cannot be called, is
            ``nn.Sequential`` or one of torchvision's first version, or it loses the view, as ``v2.Lambda`` does unless
            it is given ``tv_tensors.Image``.
        ValueError: the transform does what a box and a flip cannot describe (rotation, padding after a crop, ...),
            perhaps unseen (``v2.RandAugment``, ``v2.CutMix`` and the like), or it changes the image's size without
            torchvision's functionals; a tensor (H, W, C) or an array (C, H, W).

    Example:
        >>> import torch
        >>> from torchvision.transforms import v2
        >>> transform = v2.Compose([v2.CenterCrop(50), v2.RandomHorizontalFlip(p=1), v2.Resize(32)])
        >>> view, image = transform_with_view(transform, torch.rand(3, 100, 200))
        >>> view
        View(left=0.375, top=0.25, right=0.625, bottom=0.75, flip=True)
        >>> image.shape
        torch.Size([3, 32, 32])
    """
    frames = frame_type()
    check_steps(transform)
    _check_layout(image)
    frame = frames.of(View(), _size(image))
    image, *moved, frame = watched(transform, _stepped)(image, *others, frame)
    view, _ = frame.read()
    return view, image, *moved


def _stepped(step: Callable[..., Any], sample: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a step makes of (image, *others, frame), once the frame is seen to report what happened to the image."""
    image, *others, frame = sample
    before = frame.read()
    outputs = step(*sample)
    if not isinstance(outputs, (tuple, list)) or len(outputs) != len(sample):
        found = f"{len(outputs)} outputs" if isinstance(outputs, (tuple, list)) else type(outputs).__name__
        raise TypeError(
            f"expected the transform to return as many values as it got, {len(sample)} with the view, got {found}"
        )
    if not isinstance(outputs[-1], frame_type()):
        raise TypeError(
            f"expected the transform to hand the view on, got {type(outputs[-1]).__name__} in its place; a function of "
            "the image alone goes into v2.Lambda(function, tv_tensors.Image), after v2.ToImage()"
        )
    view, size = outputs[-1].read()
    if (view, size) != before and not is_moved(image, others):
        raise TypeError(
            f"expected an image that {type(step).__name__} moves, got {type(image).__name__}, which torchvision leaves "
            "as it is there (arrays, and plain tensors beside an image); put v2.ToImage() first, or make the image a "
            "tv_tensors.Image"
        )
    if _size(outputs[0]) != size:
        raise ValueError(
            f"expected the transformed image in the size {size} that its crops and resizes report, got "
            f"{_size(outputs[0])}; do all geometry by torchvision.transforms.v2, for the whole sample"
        )
    return tuple(outputs)


class WithViews(Dataset[tuple[Any, ...]]):
    """A data set whose samples name their index and the view that a random transform took of the image.

    ``wrapped[i]`` is ``(i, view, image, *rest)``. Data loaders collate the views as they are, and
    ``accumulator.update(indices, score_maps, logits, views=views)`` takes them so. It works with any sampler and number
    of workers. An index is a row of ``dataset``: for a part of it, take ``Subset(WithViews(dataset), part)``, so that
    the indices remain those of the whole.

    Args:
        dataset: samples by number, with a length. A sample is an image, or a tuple or list (image, target, ...).
        transform: a torchvision v2 transform, see `transform_with_view`. It gets the image and, of the rest, what is or
            holds a ``tv_tensor`` (masks, boxes); labels and everything else come back untouched, masks in arrays or
            plain tensors too. None: no transform, the view is the whole image, and torchvision is not needed.

    Raises:
        TypeError: ``dataset`` has no length or no samples by number, ``transform`` cannot be called; when sampled, a
            PIL image in the rest, which would no longer fit the image; and what `transform_with_view` raises.
        IndexError: when sampled, a number outside of the data set.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from torchvision.transforms import v2
        >>> dataset = [(torch.rand(3, 40, 40), torch.tensor([1, 0])), (torch.rand(3, 30, 60), torch.tensor([0, 1]))]
        >>> loader = DataLoader(WithViews(dataset, v2.RandomResizedCrop(32)), batch_size=2)
        >>> indices, views, images, labels = next(iter(loader))
        >>> indices
        tensor([0, 1])
        >>> views.flip
        tensor([False, False])
    """

    def __init__(self, dataset: Dataset[Any] | Sequence[Any], transform: Callable[..., Any] | None = None) -> None:
        by_number = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
        if not hasattr(dataset, "__len__") or not by_number:
            raise TypeError(
                f"expected a data set with a length and samples by number, got {type(dataset).__name__} as dataset"
            )
        if transform is not None and not callable(transform):
            raise TypeError(f"expected transform as something to call, or None, got {type(transform).__name__}")
        self.dataset: Any = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        try:
            index = range(len(self))[operator.index(index)]  # from the front, as a plain number
        except TypeError:
            raise TypeError(f"expected index as an integer, got {type(index).__name__}") from None
        except IndexError:  # the end of an iteration, too
            raise IndexError(f"expected index in 0..{len(self) - 1}, got {shown(index)}") from None
        sample = self.dataset[index]
        image, *rest = sample if isinstance(sample, (tuple, list)) else (sample,)
        if self.transform is None:
            return index, View(), image, *rest
        joint = [position for position, item in enumerate(rest) if _goes_through(item)]
        view, image, *moved = transform_with_view(self.transform, image, *(rest[position] for position in joint))
        for position, item in zip(joint, moved, strict=True):
            rest[position] = item
        return index, view, image, *rest


def _goes_through(item: Any) -> bool:
    """Whether one of the rest of a sample has to go through the transform together with the image."""
    import PIL.Image  # torchvision brings it

    leaves = tree_leaves(item)
    if any(isinstance(leaf, PIL.Image.Image) for leaf in leaves):
        raise TypeError(
            "expected masks and further images as tv_tensors.Mask and tv_tensors.Image, so that they stay in step with "
            "the image, got a PIL image; see torchvision.datasets.wrap_dataset_for_transforms_v2"
        )
    return any(isinstance(leaf, torchvision().tv_tensors.TVTensor) for leaf in leaves)


def _size(image: Any) -> Size:
    """(H, W)."""
    import PIL.Image

    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        height, width = image.shape[:2]
    elif isinstance(image, PIL.Image.Image):
        width, height = image.size
    elif isinstance(image, Tensor) and image.ndim >= 2 and image.layout == torch.strided:
        height, width = image.shape[-2:]
    else:
        found = f"{type(image).__name__} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise TypeError(f"expected an image as PIL, tensor (..., H, W) or array (H, W, C), got {found}")
    return height, width


def _check_layout(image: Any) -> None:
    """Refuse a tensor or an array whose channels stand where torchvision looks for rows or columns."""
    if not isinstance(image, (Tensor, np.ndarray)) or image.ndim != 3:
        return
    channels_first = image.shape[0] in CHANNELS and image.shape[2] not in CHANNELS
    channels_last = image.shape[2] in CHANNELS and image.shape[0] not in CHANNELS
    if isinstance(image, Tensor) and channels_last and image.shape[1] not in CHANNELS:
        raise ValueError(f"expected an image tensor (..., H, W), got {tuple(image.shape)}; permute(2, 0, 1) it")
    if isinstance(image, np.ndarray) and channels_first and image.shape[1] not in CHANNELS:
        raise ValueError(f"expected an image array (H, W, C), got {image.shape}; transpose(1, 2, 0) it")
