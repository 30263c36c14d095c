"""Which part of its image each augmented sample shows: torchvision's v2 transforms carry a `View` along.

No geometry is computed twice and no random number is drawn for it: the view goes through the user's own pipeline beside
the image, as masks and boxes do. Needs torchvision, when a transform is used.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, IterableDataset

from oaa_lib.views import View

Size: TypeAlias = tuple[int, int]


def transform_with_view(transform: Callable[..., Any], image: Any, *others: Any) -> tuple[Any, ...]:
    """Apply a torchvision v2 transform and tell which part of the image its result shows.

    Crops, resizes, paddings and horizontal flips are followed exactly, in any order and nesting; colours, noise,
    erasing, types change nothing. Pad before you crop: a view knows padding by its lying outside of the image, so what
    is padded on after a crop is taken for the part of the image that the crop has cut off.

    Args:
        transform: a transform of ``torchvision.transforms.v2``, or any callable that takes and returns
            ``image, *others, view`` and works on each by ``torchvision.transforms.v2.functional``.
        image: a PIL image, a tensor (..., H, W), a ``tv_tensors.Image`` or an array (H, W, C); not modified.
        others: what goes through the transform together with it, by torchvision's rules: ``tv_tensors`` for masks and
            boxes; PIL images are treated as images; plain tensors stay as they are, as do numbers and strings.

    Returns:
        ``(view, image, *others)``. The image is the one that ``transform(image, *others)`` makes from the same seed.

    Raises:
        ImportError: without torchvision.
        TypeError: ``image`` is no image; the transform is one of torchvision's first version, or it loses the view, as
            ``v2.Lambda`` does unless it is told ``tv_tensors.Image``.
        ValueError: the transform does what a box and a flip cannot describe (rotation, ...), perhaps unseen
            (``v2.RandAugment`` and the like), or it changes the image's size without torchvision's functionals.

    Example:
        >>> from torchvision.transforms import v2
        >>> transform = v2.Compose([v2.CenterCrop(50), v2.RandomHorizontalFlip(p=1), v2.Resize(32)])
        >>> view, image = transform_with_view(transform, torch.rand(3, 100, 200))
        >>> view
        View(left=0.375, top=0.25, right=0.625, bottom=0.75, flip=True)
        >>> image.shape
        torch.Size([3, 32, 32])
    """
    frame_type = _frame_type()
    _check_steps(transform)
    outputs = transform(image, *others, frame_type.of(View(), _size(image)))
    if not isinstance(outputs, (tuple, list)) or len(outputs) != len(others) + 2:
        found = f"{len(outputs)} outputs" if isinstance(outputs, (tuple, list)) else type(outputs).__name__
        raise TypeError(
            f"expected the transform to return as many values as it got, {len(others) + 2} with the view, got {found}"
        )
    image, *moved, frame = outputs
    if not isinstance(frame, frame_type):
        raise TypeError(
            f"expected the transform to hand the view on, got {type(frame).__name__} in its place; a function of the "
            "image alone goes into v2.Lambda(function, tv_tensors.Image), after v2.ToImage()"
        )
    view, size = frame.read()
    if _size(image) != size:
        raise ValueError(
            f"expected the transformed image in the size {size} that its crops and resizes report, got {_size(image)}; "
            "do all geometry by torchvision.transforms.v2, for the whole sample"
        )
    return view, image, *moved


class WithViews(Dataset[tuple[Any, ...]]):
    """A data set whose samples tell their index and the view that a random transform took of the image.

    ``wrapped[i]`` is ``(i, view, image, *rest)``. Data loaders collate the views as they are, and
    ``accumulator.update(indices, score_maps, logits, views=views)`` takes them so. It works with any sampler and number
    of workers. An index is a row of ``dataset``: for a part of it, take ``Subset(WithViews(dataset), part)``, so that
    the indices remain those of the whole.

    Args:
        dataset: samples by number, with a length. A sample is an image, or a tuple or list (image, target, ...).
        transform: a torchvision v2 transform, see `transform_with_view`. It gets the image and, of the rest, what is or
            holds a ``tv_tensor`` (masks, boxes); labels and everything else come back untouched. None: no transform,
            the view is the whole image, and torchvision is not needed.

    Raises:
        TypeError: ``dataset`` has no length or no samples by number; when sampled, a PIL image in the rest, which would
            no longer fit the image; and what `transform_with_view` raises.
        IndexError: when sampled, a number outside of the data set.

    Example:
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
            raise TypeError(f"expected a data set with a length and samples by number, got {type(dataset).__name__}")
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        index = range(len(self))[operator.index(index)]  # from the front, as a plain number; or an IndexError
        sample = self.dataset[index]
        image, *rest = sample if isinstance(sample, (tuple, list)) else (sample,)
        if self.transform is None:
            return index, View(), image, *rest
        joint = [position for position, item in enumerate(rest) if _goes_through(item)]
        view, image, *moved = transform_with_view(self.transform, image, *(rest[position] for position in joint))
        for position, item in zip(joint, moved, strict=True):
            rest[position] = item
        return index, view, image, *rest


# What each geometric functional makes of a view in a frame of (H, W); the other parameters are torchvision's.


def _crop(view: View, frame: Size, top: int, left: int, height: int, width: int) -> tuple[View, Size]:
    return view.crop(top, left, height, width, size=frame), (height, width)


def _resize(
    view: View, frame: Size, size: Any, interpolation: Any = None, max_size: int | None = None, antialias: Any = None
) -> tuple[View, Size]:
    resize = _torchvision().transforms.v2.functional.resize
    return view, _size(resize(_empty(frame), size, max_size=max_size))  # it rounds as it will


def _resized_crop(
    view: View,
    frame: Size,
    top: int,
    left: int,
    height: int,
    width: int,
    size: Any,
    interpolation: Any = None,
    antialias: Any = None,
) -> tuple[View, Size]:
    return _resize(*_crop(view, frame, top, left, height, width), size)


def _center_crop(view: View, frame: Size, output_size: Any) -> tuple[View, Size]:
    height, width = _size(_torchvision().transforms.v2.functional.center_crop(_empty(frame), output_size))

    def start(pixels: int, wanted: int) -> int:  # torchvision rounds to even, and pads the odd pixel at the end
        return round((pixels - wanted) / 2) if pixels >= wanted else -((wanted - pixels) // 2)

    return _crop(view, frame, start(frame[0], height), start(frame[1], width), height, width)


def _pad(view: View, frame: Size, padding: Any, fill: Any = None, padding_mode: str = "constant") -> tuple[View, Size]:
    sides = [padding] if isinstance(padding, int) else list(padding)  # all, or x and y, or each
    left, top, right, bottom = sides * (4 // len(sides))
    return view.pad(left, top, right, bottom, size=frame), (frame[0] + top + bottom, frame[1] + left + right)


def _horizontal_flip(view: View, frame: Size) -> tuple[View, Size]:
    return view.hflip(), frame


def _refuse(name: str, *arguments: Any, **options: Any) -> tuple[View, Size]:
    raise ValueError(
        f"expected crops, resizes, paddings and horizontal flips, got {name}: a View is a box and a horizontal flip; "
        "leave that transform out"
    )


FOLLOWED: dict[str, Callable[..., tuple[View, Size]]] = {
    "center_crop": _center_crop,
    "crop": _crop,
    "horizontal_flip": _horizontal_flip,
    "pad": _pad,
    "resize": _resize,
    "resized_crop": _resized_crop,
}


@functools.cache
def _frame_type() -> Any:
    """A kind of tensor that v2 transforms carry along and that keeps account of what they do."""
    torchvision: Any = _torchvision()
    functional = torchvision.transforms.v2.functional
    base: Any = torchvision.tv_tensors.TVTensor

    class Frame(base):  # type: ignore[misc]  # torchvision has no types
        """A view, and the (H, W) in pixels of what it shows at present, as the seven numbers of a tensor."""

        @classmethod
        def of(cls, view: View, size: Size) -> "Frame":
            return torch.tensor([*view, *size], dtype=torch.float64, device="cpu").as_subclass(cls)

        def read(self) -> tuple[View, Size]:
            left, top, right, bottom, flip, height, width = self.tolist()
            return View(left, top, right, bottom, bool(flip)), (int(height), int(width))

        def as_subclass(self, cls: type[Tensor]) -> "Frame":
            return self  # v2.ToPureTensor, wherever it stands, shall not end the account

    def step(follow: Callable[..., tuple[View, Size]], frame: Frame, *arguments: Any, **options: Any) -> Frame:
        return Frame.of(*follow(*frame.read(), *arguments, **options))

    # v2 passes a type that it does not know through in silence, so what is not followed has to be refused: all of
    # torchvision's geometry, whatever its version has of it.
    for kernel in {value for value in vars(functional).values() if _module(value) == _module(functional.crop)}:
        follow = FOLLOWED.get(kernel.__name__, functools.partial(_refuse, kernel.__name__))
        functional.register_kernel(kernel, Frame)(functools.partial(step, follow))
    return Frame


def _check_steps(transform: Any) -> None:
    """Refuse what would change the image without telling the view, wherever it stands in the pipeline."""
    v2 = _torchvision().transforms.v2
    name = type(transform).__name__
    if _module(type(transform)).startswith("torchvision.transforms.") and not isinstance(transform, v2.Transform):
        raise TypeError(f"expected transforms of torchvision.transforms.v2, got {name} of its first version")
    if isinstance(transform, (v2.AutoAugment, v2.RandAugment, v2.TrivialAugmentWide, v2.AugMix)):
        raise ValueError(
            f"expected transforms that tell what they do, got {name}, which shears and rotates the image alone; "
            "leave it out"
        )
    for step in getattr(transform, "transforms", ()):
        _check_steps(step)


def _goes_through(item: Any) -> bool:
    """Whether one of the rest of a sample has to go through the transform together with the image."""
    import PIL.Image  # torchvision brings it

    leaves = tree_leaves(item)
    if any(isinstance(leaf, PIL.Image.Image) for leaf in leaves):
        raise TypeError(
            "expected masks and further images as tv_tensors.Mask and tv_tensors.Image, so that they stay in step with "
            "the image, got a PIL image; see torchvision.datasets.wrap_dataset_for_transforms_v2"
        )
    return any(isinstance(leaf, _torchvision().tv_tensors.TVTensor) for leaf in leaves)


def _size(image: Any) -> Size:
    """(H, W)."""
    import PIL.Image

    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        height, width = image.shape[:2]
    elif isinstance(image, PIL.Image.Image):
        width, height = image.size
    elif isinstance(image, Tensor) and image.ndim >= 2:
        height, width = image.shape[-2:]
    else:
        found = f"{type(image).__name__} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise TypeError(f"expected an image as PIL, tensor (..., H, W) or array (H, W, C), got {found}")
    return height, width


def _empty(frame: Size) -> Tensor:
    """An image without channels: torchvision computes what size becomes of it, and nothing else."""
    return torch.empty(0, *frame, device="cpu")


def _module(thing: Any) -> str:
    return str(getattr(thing, "__module__", ""))


def _torchvision() -> Any:
    try:
        import torchvision.transforms.v2  # type: ignore[import-untyped]
        import torchvision.tv_tensors  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("expected torchvision >= 0.19, which transforms need; pip install torchvision") from error
    return torchvision
