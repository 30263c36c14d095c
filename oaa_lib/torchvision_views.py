"""How torchvision's v2 transforms move a `View`: a kind of tensor that goes through them and keeps account.

Beneath `oaa_lib.augmentation`. Needs torchvision.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from oaa_lib.views import ROUNDING, View

Size: TypeAlias = tuple[int, int]


# What each geometric functional makes of a view in a frame of (H, W); the other parameters are torchvision's.


def _crop(view: View, frame: Size, top: int, left: int, height: int, width: int) -> tuple[View, Size]:
    shown = view.crop(top, left, height, width, size=frame)
    meets = shown.left < 1 and shown.right > 0 and shown.top < 1 and shown.bottom > 0
    starts = max(shown.left, 0) - view.left, max(shown.top, 0) - view.top
    ends = view.right - min(shown.right, 1), view.bottom - min(shown.bottom, 1)
    if meets and min(*starts, *ends) < -ROUNDING:  # padding, in a place where the image goes on
        raise ValueError(
            "expected padding before crops, got padding around a part of the image: a View knows padding by its lying "
            "outside of the image; pad first"
        )
    return shown, (height, width)


def _resize(
    view: View, frame: Size, size: Any, interpolation: Any = None, max_size: int | None = None, antialias: Any = None
) -> tuple[View, Size]:
    resize = torchvision().transforms.v2.functional.resize
    height, width = resize(_empty(frame), size, max_size=max_size).shape[-2:]  # it rounds as it will
    return view, (height, width)


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
    height, width = torchvision().transforms.v2.functional.center_crop(_empty(frame), output_size).shape[-2:]

    def start(pixels: int, wanted: int) -> int:  # torchvision rounds to even, and pads the odd pixel at the end
        return round((pixels - wanted) / 2) if pixels >= wanted else -((wanted - pixels) // 2)

    return _crop(view, frame, start(frame[0], height), start(frame[1], width), height, width)


def _pad(view: View, frame: Size, padding: Any, fill: Any = None, padding_mode: str = "constant") -> tuple[View, Size]:
    sides = [padding] if isinstance(padding, int) else list(padding)  # all, or x and y, or each
    left, top, right, bottom = sides * (4 // len(sides))
    return _crop(view, frame, -top, -left, frame[0] + top + bottom, frame[1] + left + right)


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
def frame_type() -> Any:
    """A kind of tensor that v2 transforms carry along and that keeps account of what they do."""
    functional = torchvision().transforms.v2.functional
    base: Any = torchvision().tv_tensors.TVTensor

    class Frame(base):
        """A view, and the (H, W) in pixels of what it shows at present, as the seven numbers of a tensor."""

        @classmethod
        def of(cls, view: View, size: Size) -> "Frame":
            return torch.tensor([*view, *size], dtype=torch.float64, device="cpu").as_subclass(cls)

        def read(self) -> tuple[View, Size]:
            left, top, right, bottom, flip, height, width = self.tolist()
            sound = math.isfinite(height + width)  # unless a function of the user's has reached it
            return View(left, top, right, bottom, bool(flip)), (int(height), int(width)) if sound else (0, 0)

        def as_subclass(self, cls: type[Tensor]) -> "Frame":
            return self  # v2.ToPureTensor, wherever it stands, should not end the account

    def step(follow: Callable[..., tuple[View, Size]], frame: Frame, *arguments: Any, **options: Any) -> Frame:
        return Frame.of(*follow(*frame.read(), *arguments, **options))

    # v2 passes a type that it does not know through in silence, so what is not followed has to be refused: all of
    # torchvision's geometry, whatever its version has of it.
    for kernel in {value for value in vars(functional).values() if _module(value) == _module(functional.crop)}:
        follow = FOLLOWED.get(kernel.__name__, functools.partial(_refuse, kernel.__name__))
        functional.register_kernel(kernel, Frame)(functools.partial(step, follow))
    return Frame


def watched(transform: Any, watch: Callable[..., Any]) -> Callable[..., Any]:
    """The same pipeline, but each of its steps is applied by ``watch(step, sample)``; the pipeline is left alone."""
    v2 = torchvision().transforms.v2
    if type(transform) not in (v2.Compose, v2.RandomApply, v2.RandomChoice, v2.RandomOrder):
        return lambda *sample: watch(transform, sample)
    twin = object.__new__(type(transform))  # which draws its random numbers as the other does
    twin.__dict__ = {**vars(transform), "transforms": [watched(each, watch) for each in transform.transforms]}
    return cast(Callable[..., Any], twin)


def is_moved(image: Any, others: Any) -> bool:
    """Whether the geometry of v2 acts on this image of a sample; the rest it passes on in silence."""
    import PIL.Image  # torchvision brings it

    tv_tensors = torchvision().tv_tensors
    images = (tv_tensors.Image, tv_tensors.Video, PIL.Image.Image)
    if isinstance(image, Tensor) and not isinstance(image, tv_tensors.TVTensor):  # only where it is the sole image
        return not any(isinstance(leaf, images) for leaf in tree_leaves(others))
    return isinstance(image, (*images, tv_tensors.Mask))


def check_steps(transform: Any) -> None:
    """Refuse what would change the image without the view's noticing, wherever it stands in the pipeline."""
    v2 = torchvision().transforms.v2
    name = type(transform).__name__
    if not callable(transform):
        raise TypeError(f"expected the transform, and each of its steps, as something to call, got {name}")
    if _module(type(transform)).startswith("torchvision.transforms.") and not isinstance(transform, v2.Transform):
        raise TypeError(f"expected transforms of torchvision.transforms.v2, got {name} of its first version")
    if type(transform) is nn.Sequential:
        raise TypeError(
            "expected the steps of a transform in v2.Compose, got nn.Sequential, which takes the image only"
        )
    for module in transform.modules() if isinstance(transform, nn.Module) else ():
        if isinstance(module, (v2.AutoAugment, v2.RandAugment, v2.TrivialAugmentWide, v2.AugMix)):
            does = "shears and rotates the image alone"
        elif isinstance(module, (v2.CutMix, v2.MixUp, v2.LinearTransformation)):
            does = "mixes pixels of several images or places"
        else:
            continue
        raise ValueError(
            f"expected transforms that report what they do, got {type(module).__name__}, which {does}; leave it out"
        )
    inner = getattr(transform, "transforms", ())
    for each in inner if isinstance(inner, (list, tuple, nn.ModuleList)) else ():
        check_steps(each)


def torchvision() -> Any:
    """The package, with what views need of it."""
    try:
        import torchvision.transforms.v2
        import torchvision.tv_tensors
    except ImportError as error:
        raise ImportError("expected torchvision >= 0.19, which transforms need; pip install torchvision") from error
    return torchvision


def _empty(frame: Size) -> Tensor:
    """An image without channels: torchvision computes what size becomes of it, and nothing else."""
    return torch.empty(0, *frame, device="cpu")


def _module(thing: Any) -> str:
    return str(getattr(thing, "__module__", ""))
