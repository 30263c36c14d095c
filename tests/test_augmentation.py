"""The view that comes with a transformed image is where its pixels are from.

Images here show their own coordinates, so a transformed image tells by itself where each of its pixels is from.
"""

import pickle
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

from oaa_lib import torchvision_views
from oaa_lib.augmentation import WithViews, transform_with_view
from oaa_lib.views import View, check_views, into_image, sample

FLIP = v2.RandomHorizontalFlip(p=1)


def pipelines(antialias: bool) -> dict[str, Callable[..., Any]]:
    """Without antialiasing a resized ramp is that ramp exactly, but for its ends; PIL images always have it."""
    sharp = {"antialias": antialias}
    return {
        "identity": v2.Identity(),
        "RandomHorizontalFlip": v2.RandomHorizontalFlip(),
        "RandomResizedCrop": v2.RandomResizedCrop((24, 33), scale=(0.2, 1), **sharp),
        "RandomResizedCrop to a square": v2.RandomResizedCrop(32, scale=(0.2, 1), **sharp),
        "Resize the short side": v2.Resize(29, **sharp),
        "Resize the short side of a list": v2.Resize([41], **sharp),
        "Resize the short side, the long one limited": v2.Resize(50, max_size=53, **sharp),
        "Resize the long side": v2.Resize(None, max_size=37, **sharp),
        "Resize to a size": v2.Resize((33, 71), **sharp),
        "RandomResize": v2.RandomResize(20, 90, **sharp),
        "RandomShortestSize": v2.RandomShortestSize([20, 30, 70], max_size=80, **sharp),
        "ScaleJitter": v2.ScaleJitter((60, 50), scale_range=(0.5, 1.5), **sharp),
        "CenterCrop": v2.CenterCrop((21, 30)),
        "CenterCrop to a square": v2.CenterCrop(28),
        "CenterCrop, odd": v2.CenterCrop((27, 33)),
        "CenterCrop, larger": v2.CenterCrop((80, 91)),
        "CenterCrop, higher": v2.CenterCrop((80, 25)),
        "CenterCrop, wider": v2.CenterCrop((24, 81)),
        "RandomCrop": v2.RandomCrop((31, 25)),
        "RandomCrop, padding": v2.RandomCrop((31, 32), padding=(3, 15, 11, 2)),
        "RandomCrop, padding if needed": v2.RandomCrop((70, 45), pad_if_needed=True),
        "RandomZoomOut": v2.RandomZoomOut(side_range=(1, 2), p=1),
        "Pad": v2.Pad(7),
        "Pad, one number": v2.Pad([5]),
        "Pad, two numbers": v2.Pad((4, 7)),
        "Pad, four numbers": v2.Pad((1, 7, 13, 3)),
        "Pad, reflecting": v2.Pad((4, 7), padding_mode="reflect"),
        "crop, crop": v2.Compose([v2.RandomCrop((32, 31)), v2.CenterCrop((21, 20))]),
        "crop, flip, crop": v2.Compose([v2.RandomCrop((32, 31)), FLIP, v2.RandomCrop(20)]),
        "flip, crop, flip": v2.Compose([FLIP, v2.RandomCrop((32, 31)), FLIP]),
        "flip, pad, crop": v2.Compose([FLIP, v2.Pad((1, 2, 13, 4)), v2.RandomCrop(33)]),
        "resize, flip, crop": v2.Compose([v2.Resize(64, **sharp), FLIP, v2.RandomCrop(50)]),
        "crop, resize, crop": v2.Compose(
            [v2.RandomCrop((32, 31)), v2.Resize(57, **sharp), v2.CenterCrop(48), v2.Resize((31, 47), **sharp)]
        ),
        "nested": v2.Compose(
            [
                v2.RandomApply([v2.RandomResizedCrop(40, scale=(0.2, 1), **sharp), FLIP], p=0.7),
                v2.RandomChoice([v2.CenterCrop(29), FLIP, v2.Resize(36, **sharp)]),
                v2.RandomOrder([v2.RandomCrop(26), v2.RandomHorizontalFlip()]),
            ]
        ),
    }


SHARP, SMOOTH = pipelines(antialias=False), pipelines(antialias=True)
by_name = pytest.mark.parametrize("name", list(SHARP))


def trials(count: int = 10) -> Iterator[tuple[int, int]]:
    """Sizes of images, while torch is seeded for each."""
    for seed in range(count):
        torch.manual_seed(seed)
        height, width = torch.randint(34, 60, (2,)).tolist()
        yield height, width


def coordinates(size: tuple[int, int]) -> Tensor:
    """(3, H, W): x and y of each pixel's centre, in pixels, and 1 where there is image, as against padding."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    return torch.stack([x, y, torch.ones(size)])


def as_pil(size: tuple[int, int]) -> PIL.Image.Image:
    """The same in 8 bits: four steps for a pixel."""
    return v2.functional.to_pil_image(((coordinates(size) - 0.5) * 4).to(torch.uint8))


def from_pil(image: PIL.Image.Image) -> Tensor:
    values = v2.functional.pil_to_tensor(image).float() / 4
    return torch.stack([values[0] + 0.5, values[1] + 0.5, values[2] / values[2].max()])


def assert_pixels_are_where_the_view_says(view: View, image: Tensor, size: tuple[int, int], tolerance: float) -> int:
    """Within so many pixels of the image as it was. Padding and ends of ramps are not judged; returns how many are."""
    height, width = image.shape[1:]
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    x = (view.left + (view.right - view.left) * (1 - x if view.flip else x)) * size[1]
    y = (view.top + (view.bottom - view.top) * y) * size[0]
    x, y = x.expand(height, width), y[:, None].expand(height, width)
    deep_inside = (x > 3) & (x < size[1] - 3) & (y > 3) & (y < size[0] - 3)
    near_padding = nnf.max_pool2d(-image[2:], 7, stride=1, padding=3)[0] > -0.99
    judged = deep_inside & ~near_padding
    judged[:3], judged[-3:], judged[:, :3], judged[:, -3:] = False, False, False, False
    assert ((image[0] - x).abs()[judged] < tolerance).all()
    assert ((image[1] - y).abs()[judged] < tolerance).all()
    return int(judged.sum())


@by_name
def test_pixels_are_where_the_view_says(name):
    judged = []
    for size in trials(30):
        view, image = transform_with_view(SHARP[name], coordinates(size))
        judged.append(assert_pixels_are_where_the_view_says(view, image, size, tolerance=1e-3))
    assert sum(count > 100 for count in judged) > 20


@by_name
def test_so_they_are_in_a_pil_image(name):
    for size in trials():
        view, image = transform_with_view(SMOOTH[name], as_pil(size))
        assert isinstance(image, PIL.Image.Image)
        assert_pixels_are_where_the_view_says(view, from_pil(image), size, tolerance=0.4)  # rounded, antialiased


def test_the_check_sees_half_a_pixel():
    for size in trials():
        view, image = transform_with_view(SHARP["RandomResizedCrop"], coordinates(size))
        right, down = 0.5 / size[1], 0.5 / size[0]
        for wrong in (
            view.hflip(),
            view._replace(left=view.left + right, right=view.right + right),
            view._replace(top=view.top + down, bottom=view.bottom + down),
        ):
            with pytest.raises(AssertionError):
                assert_pixels_are_where_the_view_says(wrong, image, size, tolerance=0.4)


@by_name
def test_the_view_is_the_same_whatever_holds_the_image(name):
    def view(image: object, transform: Callable[..., Any] = SMOOTH[name]) -> View:
        torch.manual_seed(1)
        return transform_with_view(transform, image)[0]

    for size in trials(3):
        expected = view(coordinates(size))
        assert isinstance(expected.flip, bool)
        assert view(tv_tensors.Image(coordinates(size))) == expected
        assert view(as_pil(size)) == expected
        assert view(coordinates(size).expand(2, 3, *size)) == expected
        surrounded = v2.Compose([v2.ToImage(), SMOOTH[name], v2.ToDtype(torch.float32, scale=True)])
        for image in (np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8), as_pil(size)):
            assert view(image, surrounded) == expected


@by_name
def test_the_image_and_the_random_numbers_are_those_of_the_transform_alone(name):
    image = coordinates((50, 40))
    for seed in range(3):
        torch.manual_seed(seed)
        expected, following = SHARP[name](image.clone()), torch.rand(1)
        torch.manual_seed(seed)
        _, transformed = transform_with_view(SHARP[name], image)
        assert torch.equal(transformed, expected)
        assert torch.rand(1) == following
    assert torch.equal(image, coordinates((50, 40)))


def test_known_views():
    image = torch.zeros(3, 100, 200)
    assert transform_with_view(v2.Identity(), image)[0] == View()
    assert transform_with_view(v2.Resize((7, 9)), image)[0] == View()
    assert transform_with_view(FLIP, image)[0] == View(flip=True)
    assert transform_with_view(v2.CenterCrop(50), image)[0] == View(0.375, 0.25, 0.625, 0.75)
    assert transform_with_view(v2.Pad((50, 25)), image)[0] == View(-0.25, -0.25, 1.25, 1.25)


# What is not geometry

HARMLESS = {
    "ColorJitter": v2.ColorJitter(0.5, 0.5, 0.5, 0.5),
    "RandomGrayscale": v2.RandomGrayscale(p=1),
    "RandomPhotometricDistort": v2.RandomPhotometricDistort(p=1),
    "RandomInvert": v2.RandomInvert(p=1),
    "RandomPosterize": v2.Compose([v2.ToDtype(torch.uint8, scale=True), v2.RandomPosterize(2, p=1)]),
    "RandomEqualize": v2.Compose([v2.ToDtype(torch.uint8, scale=True), v2.RandomEqualize(p=1)]),
    "GaussianBlur": v2.GaussianBlur(3),
    "RandomErasing": v2.RandomErasing(p=1),
    "Normalize": v2.Normalize([0.5] * 3, [0.5] * 3),
    "ToDtype": v2.ToDtype(torch.float16),
    "ToDtype by kind": v2.ToDtype({torch.Tensor: torch.float16, "others": None}),
    "ToImage": v2.ToImage(),
    "ToPILImage": v2.ToPILImage(),
    "ToPureTensor": v2.ToPureTensor(),
    "Lambda for images": v2.Compose([v2.ToImage(), v2.Lambda(lambda image: image / 255, tv_tensors.Image)]),
}


@pytest.mark.parametrize("harmless", HARMLESS.values(), ids=list(HARMLESS))
def test_what_is_not_geometry_leaves_the_view(harmless):
    for transform in (harmless, v2.Compose([v2.CenterCrop(20), harmless])):
        view, image = transform_with_view(transform, torch.rand(3, 40, 30))
        assert view == (View() if transform is harmless else View(5 / 30, 0.25, 25 / 30, 0.75))
        assert v2.functional.get_size(image) == ([40, 30] if transform is harmless else [20, 20])


def test_pure_tensors_in_the_middle_do_not_end_the_account():
    transform = v2.Compose([v2.ToImage(), v2.ToPureTensor(), FLIP, v2.CenterCrop(20), v2.ToPureTensor()])
    view, image = transform_with_view(transform, torch.rand(3, 40, 40))
    assert view == View(0.25, 0.25, 0.75, 0.75, flip=True)
    assert type(image) is Tensor


# What a box and a flip cannot describe

REFUSED = {
    "vertical_flip": v2.RandomVerticalFlip(p=1),
    "rotate": v2.RandomRotation(10),
    "affine": v2.RandomAffine(10),
    "perspective": v2.RandomPerspective(p=1),
    "elastic": v2.ElasticTransform(),
    "five_crop": v2.FiveCrop(10),
    "ten_crop": v2.TenCrop(10),
}
SHEARING = {
    "AutoAugment": v2.AutoAugment(),
    "RandAugment": v2.RandAugment(),
    "TrivialAugmentWide": v2.TrivialAugmentWide(),
    "AugMix": v2.AugMix(),
}


@pytest.mark.parametrize("image", [torch.zeros(3, 40, 40), as_pil((40, 40))], ids=["tensor", "PIL"])
@pytest.mark.parametrize(("name", "transform"), REFUSED.items(), ids=list(REFUSED))
def test_other_geometry_is_refused(name, transform, image):
    for wrong in (transform, v2.Compose([v2.CenterCrop(30), transform])):
        with pytest.raises(ValueError, match=f"expected crops.*got {name}:.*leave"):
            transform_with_view(wrong, image)


@pytest.mark.parametrize(("name", "transform"), SHEARING.items(), ids=list(SHEARING))
def test_geometry_behind_the_back_of_the_view_is_refused(name, transform):
    for wrong in (
        transform,
        v2.Compose([v2.Resize(30), v2.RandomApply([transform])]),
        v2.RandomChoice([FLIP, transform]),
    ):
        with pytest.raises(ValueError, match=f"expected.*got {name}.*leave it out"):
            transform_with_view(wrong, torch.zeros(3, 40, 40, dtype=torch.uint8))


def test_torchvision_has_no_geometry_that_is_not_considered():
    """A functional that moves masks or boxes, or makes several images of one, and is in neither table is new."""
    names = set(vars(v2.functional))
    moving = {name for name in names if names & {f"{name}_mask", f"{name}_bounding_boxes"}}
    moving |= {name for name in names if name.endswith("crop")}
    assert moving - {"get_size", "clamp", "sanitize"} == {*torchvision_views.FOLLOWED, *REFUSED}


def test_geometry_that_a_later_torchvision_may_bring_is_refused(monkeypatch):
    def shear(inpt: object) -> object:
        raise AssertionError

    class Shear(v2.Transform):
        def transform(self, inpt: object, params: object) -> object:
            return inpt if type(inpt) is Tensor else self._call_kernel(shear, inpt)

        _transform = transform  # what torchvision called it at first

    shear.__module__ = v2.functional.crop.__module__
    monkeypatch.setattr(v2.functional, "shear", shear, raising=False)
    torchvision_views.frame_type.cache_clear()
    try:
        with pytest.raises(ValueError, match="got shear"):
            transform_with_view(Shear(), torch.zeros(3, 4, 4))
    finally:
        torchvision_views.frame_type.cache_clear()


# Whatever holds the image, and whatever is mixed: the view agrees with the pixels, or there is none


def holders(size: tuple[int, int]) -> dict[str, object]:
    """The coordinates in 8 bits, in everything that may hold an image."""
    array = np.array(as_pil(size))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    return {
        "array": array,
        "array of floats": array.astype(np.float32) / 255,
        "PIL": as_pil(size),
        "tensor": tensor,
        "tensor of floats": tensor / 255,
        "Image": tv_tensors.Image(tensor),
        "batch": tensor.expand(2, 3, *size),
    }


def from_any(image: object) -> Tensor:
    """Coordinates in pixels."""
    if isinstance(image, PIL.Image.Image):
        return from_pil(image)
    values = torch.from_numpy(image.copy()).permute(2, 0, 1) if isinstance(image, np.ndarray) else image
    values = values.as_subclass(Tensor).reshape(-1, *values.shape[-3:])[0]
    values = values.float() / 4 if values.dtype == torch.uint8 else values * 255 / 4
    return torch.stack([values[0] + 0.5, values[1] + 0.5, values[2] / values[2].max().clamp(min=1e-6)])


GEOMETRY = [
    FLIP,
    FLIP,
    v2.RandomHorizontalFlip(),
    v2.RandomResizedCrop((30, 33), scale=(0.4, 1)),
    v2.CenterCrop((29, 31)),
    v2.RandomCrop(28),
    v2.Resize((41, 37)),
    v2.Pad((3, 5)),
    v2.RandomZoomOut(side_range=(1, 1.5), p=0.5),
]
CONVERSIONS = [
    v2.ToImage(),
    v2.ToImage(),
    v2.ToPILImage(),
    v2.PILToTensor(),
    v2.ToPureTensor(),
    v2.Identity(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Lambda(np.array, PIL.Image.Image),
    v2.Lambda(lambda image: image.permute(1, 2, 0).numpy(), tv_tensors.Image),
    v2.Normalize([0.0] * 3, [1.0] * 3),
]


def mixed(random: np.random.Generator) -> Callable[..., Any]:
    """A pipeline of geometry and conversions, some of them nested."""

    def some(count: int) -> list[Callable[..., Any]]:
        pools = [GEOMETRY if random.random() < 0.5 else CONVERSIONS for _ in range(count)]
        return [pool[random.integers(len(pool))] for pool in pools]

    nested = {
        "apply": lambda: v2.RandomApply(some(2), p=0.8),
        "choice": lambda: v2.RandomChoice(some(2)),
        "order": lambda: v2.RandomOrder(some(2)),
        "compose": lambda: v2.Compose(some(2)),
    }
    steps = some(4)
    if random.random() < 0.6:
        steps[random.integers(4)] = nested[random.choice(list(nested))]()
    return v2.Compose(steps)


@pytest.mark.parametrize("holder", holders((4, 4)))
def test_the_view_agrees_with_the_pixels_or_the_transform_is_refused(holder):
    random, judged = np.random.default_rng(0), []
    for size in trials(150):
        transform, image = mixed(random), holders(size)[holder]
        try:
            view, shown = transform_with_view(transform, image)
        except (TypeError, ValueError, RuntimeError):  # ours, or torchvision's for what it cannot convert
            continue
        judged.append(assert_pixels_are_where_the_view_says(view, from_any(shown), size, tolerance=0.45))
    assert sum(count > 50 for count in judged) > 15


def test_an_array_is_converted_before_it_is_moved():
    array, to_tensor = np.array(as_pil((20, 30))), [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    for moving in (FLIP, v2.Resize(10), v2.Pad(3), v2.RandomChoice([FLIP]), v2.RandomApply([FLIP], p=1)):
        with pytest.raises(TypeError, match=r"expected an image that \w+ moves, got ndarray.*v2\.ToImage\(\) first"):
            transform_with_view(v2.Compose([moving, *to_tensor]), array)
        with pytest.raises(TypeError, match="got ndarray"):
            transform_with_view(v2.Compose([v2.ToPILImage(), v2.Lambda(np.array, PIL.Image.Image), moving]), array)
        in_order = v2.RandomOrder([v2.ToPILImage(), v2.Lambda(np.array, PIL.Image.Image), moving])
        for nested in (v2.RandomApply(in_order.transforms, p=1), v2.RandomChoice([v2.Compose(in_order.transforms)])):
            with pytest.raises(TypeError, match="got ndarray"):
                transform_with_view(nested, array)
        transform_with_view(v2.Compose([*to_tensor, moving]), array)
    view, image = transform_with_view(v2.Compose([v2.RandomApply([FLIP], p=0), *to_tensor]), array)
    assert view == View()  # nothing was to be moved
    assert image.shape == (3, 20, 30)
    hidden = v2.Compose([FLIP, *to_tensor])
    with pytest.raises(TypeError, match="got ndarray"):
        transform_with_view(lambda *sample: hidden(*sample), array)


@pytest.mark.parametrize("other", [tv_tensors.Image(torch.zeros(3, 20, 30)), as_pil((20, 30))], ids=["Image", "PIL"])
def test_a_plain_tensor_beside_an_image_is_not_moved(other):
    image = coordinates((20, 30))
    with pytest.raises(TypeError, match=r"got Tensor, which torchvision leaves.*make the image a tv_tensors\.Image"):
        transform_with_view(FLIP, image, other)
    with pytest.raises(TypeError, match="got Tensor"):  # a PIL image that has become one on the way
        transform_with_view(
            v2.Compose([v2.PILToTensor(), FLIP]), as_pil((20, 30)), tv_tensors.Image(torch.zeros(3, 20, 30))
        )
    view, moved, _ = transform_with_view(FLIP, tv_tensors.Image(image), other)
    assert view.flip
    assert torch.equal(moved, image.flip(-1))
    if isinstance(other, tv_tensors.Image):
        with pytest.raises(TypeError, match="got Tensor"):
            WithViews([(image, other)], FLIP)[0]


def test_a_tensor_that_torchvision_does_not_know_is_not_moved():
    class Depth(tv_tensors.TVTensor):
        pass

    with pytest.raises(TypeError, match="got Depth"):
        transform_with_view(FLIP, torch.zeros(3, 20, 30).as_subclass(Depth))
    assert transform_with_view(v2.Identity(), torch.zeros(3, 20, 30).as_subclass(Depth))[0] == View()


def test_channels_stand_where_the_kind_of_image_has_them():
    with pytest.raises(ValueError, match=r"tensor \(\.\.\., H, W\), got \(20, 30, 3\); permute\(2, 0, 1\)"):
        transform_with_view(FLIP, torch.zeros(20, 30, 3))
    with pytest.raises(ValueError, match=r"array \(H, W, C\), got \(3, 20, 30\); transpose\(1, 2, 0\)"):
        transform_with_view(v2.ToImage(), np.zeros((3, 20, 30)))
    for shape in ((3, 20, 3), (12, 20, 30), (1, 4, 4), (20, 3, 3)):
        transform_with_view(FLIP, torch.zeros(shape))
        transform_with_view(v2.ToImage(), np.zeros(shape[1:] + shape[:1]))


@pytest.mark.parametrize(
    "padding",
    [
        v2.Pad(2),
        v2.Pad((0, 0, 1, 0)),
        v2.Pad((0, 1, 0, 0), padding_mode="reflect"),
        v2.CenterCrop((20, 30)),
        v2.RandomCrop((8, 30), pad_if_needed=True),
        v2.RandomZoomOut(side_range=(1.5, 2), p=1),
        lambda *sample: tuple(v2.functional.crop(item, -1, 0, 10, 10) for item in sample),
    ],
)
def test_padding_in_a_place_where_the_image_goes_on_is_refused(padding):
    """The view would take it for what the crop has cut off."""
    with pytest.raises(ValueError, match=r"expected padding before crops.*pad first"):
        transform_with_view(v2.Compose([v2.CenterCrop((10, 12)), padding]), coordinates((20, 30)))
    transform_with_view(v2.Compose([padding, v2.CenterCrop((6, 9))]), coordinates((20, 30)))


def test_padding_after_a_crop_that_has_cut_off_nothing_there_is_padding():
    upper_left = v2.Compose([v2.Lambda(lambda item: v2.functional.crop(item, 0, 0, 10, 12))])
    image = coordinates((20, 30))
    view, _ = transform_with_view(v2.Compose([upper_left, v2.Pad((3, 2, 0, 0))]), image)
    assert view == pytest.approx(View(-3 / 30, -2 / 20, 12 / 30, 10 / 20))
    with pytest.raises(ValueError, match="pad first"):
        transform_with_view(v2.Compose([upper_left, FLIP, v2.Pad((3, 0, 0, 0))]), image)
    transform_with_view(v2.Compose([upper_left, FLIP, v2.Pad((0, 0, 3, 0))]), image)


# Transforms and images that will not do


class Hiding(torch.nn.Module):
    """A module of the user's own, in which another works."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *sample: object) -> object:
        return self.inner(*sample)


@pytest.mark.parametrize(
    "transform",
    [v2.RandAugment(), v2.CutMix(num_classes=2), v2.MixUp(num_classes=2)],
    ids=["RandAugment", "CutMix", "MixUp"],
)
def test_what_would_not_be_noticed_is_refused_wherever_it_stands(transform):
    name = type(transform).__name__
    for wrong in (transform, Hiding(transform), v2.Compose([v2.RandomApply(torch.nn.ModuleList([Hiding(transform)]))])):
        with pytest.raises(ValueError, match=f"expected transforms that report what they do, got {name}.*leave it out"):
            transform_with_view(wrong, torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (None, "transform.*to call, got NoneType"),
        ("flip", "transform.*to call, got str"),
        (v2.Compose([FLIP, 3]), "transform.*to call, got int"),
        (torch.nn.Sequential(FLIP, FLIP), r"in v2\.Compose, got nn\.Sequential"),
        (v2.Compose([torch.nn.Sequential(FLIP)]), r"in v2\.Compose, got nn\.Sequential"),
    ],
)
def test_what_is_no_transform_is_refused(transform, message):
    with pytest.raises(TypeError, match=f"expected.*{message}"):
        transform_with_view(transform, torch.zeros(3, 8, 8))


def test_a_function_that_reaches_the_view_is_noticed_whatever_it_makes_of_it():
    for function in (Tensor.log_, Tensor.neg_, Tensor.zero_, lambda item: item.copy_(item.flip(-1))):
        with pytest.raises(ValueError, match="expected the transformed image in the size"):
            transform_with_view(v2.Lambda(function), torch.ones(3, 40, 30))


@pytest.mark.parametrize(
    "transform",
    [
        v1.RandomCrop(8),
        v1.ToTensor(),
        v1.RandAugment(),
        v1.Compose([v2.RandomCrop(8)]),
        v2.Compose([v2.ToImage(), v1.RandomHorizontalFlip()]),
    ],
    ids=["RandomCrop", "ToTensor", "RandAugment", "Compose", "in a Compose of the second"],
)
def test_transforms_of_the_first_version_are_refused(transform):
    with pytest.raises(TypeError, match=r"expected transforms of torchvision\.transforms\.v2, got \w+ of its first"):
        transform_with_view(transform, torch.zeros(3, 40, 40))


@pytest.mark.parametrize("types", [(), (Tensor,)], ids=["any", "tensors"])
def test_a_function_of_everything_loses_the_view(types):
    with pytest.raises(TypeError, match=r"expected.*hand the view on, got Tensor.*v2\.Lambda\(function, tv_tensors"):
        transform_with_view(v2.Lambda(lambda image: image / 255, *types), torch.zeros(3, 40, 40))


def test_a_size_that_the_view_does_not_know_is_refused():
    cut = v2.Lambda(lambda image: image[..., :20, :10], tv_tensors.Image)
    with pytest.raises(ValueError, match=r"expected the transformed image in the size \(40, 30\).*got \(20, 10\)"):
        transform_with_view(cut, tv_tensors.Image(torch.ones(3, 40, 30)))


def test_a_function_that_changes_the_view_in_place_is_noticed():
    with pytest.raises(ValueError, match=r"expected the transformed image in the size \(20, 15\).*got \(40, 30\)"):
        transform_with_view(v2.Lambda(lambda image: image.div_(2)), torch.ones(3, 40, 30))


@pytest.mark.parametrize(
    ("transform", "found"),
    [(lambda image, view: image, "Tensor"), (lambda image, view: (image,), "1 outputs"), (lambda *_: None, "NoneType")],
)
def test_a_transform_returns_as_many_values_as_it_got(transform, found):
    with pytest.raises(TypeError, match=f"expected.*as many values as it got, 2.*got {found}"):
        transform_with_view(transform, torch.zeros(3, 40, 40))


def test_a_callable_of_the_users_own_is_a_transform():
    def flip_all(*sample: object) -> tuple[object, ...]:
        return tuple(v2.functional.horizontal_flip(item) for item in sample)

    view, image, mask = transform_with_view(flip_all, torch.eye(4)[None], tv_tensors.Mask(torch.eye(4)))
    assert view == View(flip=True)
    assert torch.equal(image[0], torch.eye(4).flip(1))
    assert torch.equal(mask, torch.eye(4).flip(1))


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("image.jpg", "str"),
        ({"image": 0}, "dict"),
        (None, "NoneType"),
        (torch.zeros(3), r"Tensor \(3,\)"),
        (np.zeros((1, 3, 4, 4)), r"ndarray \(1, 3, 4, 4\)"),
    ],
)
def test_what_is_no_image_is_refused(image, found):
    with pytest.raises(TypeError, match=f"expected an image.*got {found}"):
        transform_with_view(FLIP, image)


# What goes with the image


def test_others_go_through_the_transform_together_with_the_image():
    transform = v2.RandomResizedCrop((20, 30), interpolation=v2.InterpolationMode.NEAREST)
    picture = coordinates((40, 50))
    label = torch.tensor([1, 0])
    boxes = tv_tensors.BoundingBoxes([[0, 0, 50, 40]], format="XYXY", canvas_size=(40, 50))
    view, image, mask, same, number, boxes = transform_with_view(
        transform, picture, tv_tensors.Mask(picture.clone()), label, 7, boxes
    )
    assert isinstance(view, View)
    assert torch.equal(mask, image)
    assert same is label
    assert number == 7
    assert boxes.canvas_size == (20, 30)


# Data sets

Sample = namedtuple("Sample", "image label")


class Pictures(Dataset):
    """Coordinates in images of one size, with a label; at module level, so that workers can have it."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < 6:
            raise AssertionError("the wrapper lets no such number through")
        return coordinates((40, 50)), torch.tensor(index)


CROP = v2.Compose([v2.RandomResizedCrop(32, scale=(0.3, 1), antialias=False), v2.RandomHorizontalFlip()])


def test_a_sample_is_the_index_the_view_the_image_and_the_rest():
    for items in ([(1, 2, "three")], [[1, 2, "three"]]):
        assert WithViews(items)[0] == (0, View(), 1, 2, "three")
    picture = coordinates((40, 50))
    assert WithViews([Sample(picture, 3)])[0] == (0, View(), picture, 3)
    assert WithViews([picture])[0] == (0, View(), picture)
    assert WithViews([{"image": 1}])[0] == (0, View(), {"image": 1})
    index, view, image, label = WithViews([Sample(picture, 3)], FLIP)[0]
    assert (index, view, label) == (0, View(flip=True), 3)
    assert torch.equal(image, picture.flip(2))


def test_the_rest_goes_through_if_it_is_or_holds_a_tv_tensor():
    picture = coordinates((40, 50))
    vector, label, mask = np.array([0, 1, 1]), torch.tensor([1.0, 0.0]), tv_tensors.Mask(picture.clone())
    dataset = [(picture, vector, mask, label, {"masks": mask, "labels": label}, "name")]
    transform = v2.Compose([v2.ToImage(), FLIP])
    _, _, image, same_vector, moved, same_label, target, name = WithViews(dataset, transform)[0]
    assert torch.equal(image, picture.flip(2))
    assert torch.equal(moved, picture.flip(2))
    assert torch.equal(target["masks"], picture.flip(2))
    assert same_vector is vector  # ToImage would make an image of it
    assert same_label is label
    assert target["labels"] is label
    assert name == "name"
    assert torch.equal(mask, picture)


@pytest.mark.parametrize("wrap", [lambda image: image, lambda image: {"mask": image}], ids=["plain", "in a dict"])
def test_a_pil_mask_would_not_stay_in_step(wrap):
    dataset = [(as_pil((40, 50)), wrap(as_pil((40, 50))))]
    with pytest.raises(TypeError, match=r"expected masks.*tv_tensors\.Mask.*got a PIL image; see.*wrap_dataset"):
        WithViews(dataset, FLIP)[0]
    assert len(WithViews(dataset)[0]) == 4


def test_length_and_numbers_are_those_of_the_data_set():
    wrapped = WithViews(Pictures(), CROP)
    assert len(wrapped) == 6
    assert [index for index, *_ in wrapped] == list(range(6))
    for number in (4, -2, np.int64(4), torch.tensor(4)):
        index, _, _, label = wrapped[number]
        assert (index, int(label)) == (4, 4)
        assert type(index) is int
    for outside in (6, -7):
        with pytest.raises(IndexError):
            wrapped[outside]
    with pytest.raises(TypeError, match="expected index as an integer, got str"):
        wrapped["name"]
    with pytest.raises(TypeError, match="expected transform as something to call"):
        WithViews(Pictures(), 3)


class Endless(Dataset):
    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset):
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[int]:
        return iter([1])


@pytest.mark.parametrize(
    "dataset", [Endless(), Stream(), iter([1]), 3, None, {1, 2}], ids=lambda value: type(value).__name__
)
def test_a_data_set_has_a_length_and_samples_by_number(dataset):
    with pytest.raises(TypeError, match="expected a data set with a length and samples by number, got"):
        WithViews(dataset)


def assert_views_of_a_batch_fit(views: View, images: Tensor) -> None:
    assert isinstance(views, View)
    rows = [View(*(column[i].item() for column in views)) for i in range(len(images))]
    assert np.array_equal(check_views(views, len(images)), check_views(rows, len(images)))
    for view, image in zip(rows, images, strict=True):
        assert_pixels_are_where_the_view_says(view, image, (40, 50), tolerance=1e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": True}, {"shuffle": True, "num_workers": 1, "multiprocessing_context": "spawn"}],
    ids=["in order", "shuffled", "in another process"],
)
def test_a_data_loader_collates_the_views(options):
    torch.manual_seed(0)
    transform_with_view(FLIP, coordinates((4, 4)))  # what was used before goes to another process too
    seen = []
    for indices, views, images, labels in DataLoader(WithViews(Pictures(), CROP), batch_size=4, **options):
        assert torch.equal(indices, labels)
        assert_views_of_a_batch_fit(views, images)
        seen += indices.tolist()
    assert sorted(seen) == list(range(6))
    assert (seen != list(range(6))) == ("shuffle" in options)


def test_a_wrapped_data_set_can_be_sent():
    copy = pickle.loads(pickle.dumps(WithViews(Pictures(), v2.Compose([v2.RandomCrop(30), FLIP]))))
    index, view, image, _ = copy[2]
    assert index == 2
    assert_pixels_are_where_the_view_says(view, image, (40, 50), tolerance=1e-3)


def test_each_process_of_a_distributed_sampler_gets_its_own_rows():
    wrapped = WithViews(Pictures(), CROP)
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(wrapped, num_replicas=2, rank=rank, shuffle=True, seed=1)
        for indices, views, images, labels in DataLoader(wrapped, batch_size=2, sampler=sampler):
            assert torch.equal(indices, labels)
            assert_views_of_a_batch_fit(views, images)
            seen += indices.tolist()
    assert sorted(seen) == list(range(6))


def test_a_subset_keeps_the_rows_of_the_whole():
    loader = DataLoader(Subset(WithViews(Pictures(), CROP), [5, 3]), batch_size=2)
    assert next(iter(loader))[0].tolist() == [5, 3]


def test_views_put_the_images_back():
    indices, views, images, _ = next(iter(DataLoader(WithViews(Pictures(), CROP), batch_size=6)))
    sampling = into_image(check_views(views, len(indices)), (40, 50))
    for channel in range(2):
        maps, inside = sample(images[:, channel], sampling)
        judged = nnf.avg_pool2d(inside.float(), 9, stride=1, padding=4) > 0.999  # what the crop's edge has not touched
        assert judged.flatten(1).any(1).all()
        assert ((maps - coordinates((40, 50))[channel]).abs()[judged] < 1e-3).all()


# Without torchvision

WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None
from oaa_lib.augmentation import WithViews, transform_with_view
assert WithViews(["image"])[0][2] == "image"
for use in (lambda: transform_with_view(print, 0), lambda: WithViews([(1, 2)], print)[0]):
    try:
        use()
    except ImportError as error:
        assert "pip install torchvision" in str(error), error
    else:
        raise AssertionError
"""


def test_torchvision_is_needed_for_transforms_only():
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TORCHVISION], check=True)
