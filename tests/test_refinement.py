import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fake_cuda import cuda_bfloat16_autocast
from torch._subclasses.fake_tensor import FakeTensorMode

from oaa_lib import pixel_adaptive_refinement


def naive(image, attention, iterations, dilations):
    """The definition, pixel by pixel, in Python's own numbers."""
    channels, height, width = image.shape
    steps = [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    picture, maps = image.double().tolist(), attention.double().tolist()

    def at(plane, y, x):
        return plane[min(max(y, 0), height - 1)][min(max(x, 0), width - 1)]

    def weights(y, x):
        energies = [0.0] * len(steps)
        for plane in picture:
            around = [at(plane, y + dy, x + dx) for dy, dx in steps]
            everything = [*around, plane[y][x]]
            mean = sum(everything) / len(everything)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in everything) / len(everything))
            for place, value in enumerate(around):
                energies[place] -= abs(value - plane[y][x]) / (0.1 * deviation + 1e-8) / channels
        greatest = max(energies)
        powers = [math.exp(energy - greatest) for energy in energies]
        return [power / sum(powers) for power in powers]

    table = [[weights(y, x) for x in range(width)] for y in range(height)]
    for _ in range(iterations):
        maps = [
            [
                [
                    sum(w * at(plane, y + dy, x + dx) for w, (dy, dx) in zip(table[y][x], steps, strict=True))
                    for x in range(width)
                ]
                for y in range(height)
            ]
            for plane in maps
        ]
    return torch.tensor(maps)


@pytest.mark.parametrize(("iterations", "dilations"), [(1, (1,)), (3, (1, 2)), (2, (2, 3)), (0, (1,))])
def test_equals_the_naive_loop(iterations, dilations):
    generator = torch.Generator().manual_seed(0)
    images, maps = torch.rand(2, 3, 5, 7, generator=generator), torch.rand(2, 2, 5, 7, generator=generator)
    refined = pixel_adaptive_refinement(images, maps, iterations=iterations, dilations=dilations)
    for image, attention, result in zip(images, maps, refined, strict=True):
        expected = naive(image, attention, iterations, dilations)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0, check_dtype=False)


def draw(seed, kind="random"):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 3, 8, 9, generator=generator)
    return (images * 4).floor() / 4 if kind == "flat" else images, torch.rand(1, 2, 8, 9, generator=generator)


cases = given(st.integers(0, 2**31), st.sampled_from(["random", "flat"]))
REFINE = {"iterations": 3, "dilations": (1, 3)}


@cases
def test_values_stay_within_those_of_their_map(seed, kind):
    images, maps = draw(seed, kind)
    refined = pixel_adaptive_refinement(images, maps, **REFINE)
    assert (refined.amax((-2, -1)) <= maps.amax((-2, -1)) + 1e-6).all()
    assert (refined.amin((-2, -1)) >= maps.amin((-2, -1)) - 1e-6).all()


@cases
def test_a_constant_map_stays(seed, kind):
    images, _ = draw(seed, kind)
    maps = torch.full((1, 1, 8, 9), 0.3)
    torch.testing.assert_close(pixel_adaptive_refinement(images, maps, **REFINE), maps)


@cases
def test_mirrored_pictures_give_mirrored_maps(seed, kind):
    images, maps = draw(seed, kind)
    mirrored = pixel_adaptive_refinement(images.flip(-1), maps.flip(-1), **REFINE).flip(-1)
    torch.testing.assert_close(mirrored, pixel_adaptive_refinement(images, maps, **REFINE), atol=1e-5, rtol=1e-5)


@cases
def test_brightness_and_contrast_do_not_matter(seed, kind):
    images, maps = draw(seed, kind)
    scale, offset = torch.tensor([255.0, 4.0, 0.25])[:, None, None], torch.tensor([0.0, -2.0, 0.5])[:, None, None]
    other = pixel_adaptive_refinement(images * scale + offset, maps, **REFINE)
    torch.testing.assert_close(other, pixel_adaptive_refinement(images, maps, **REFINE), atol=1e-4, rtol=0)


def test_attention_stops_at_an_edge_and_fills_what_it_surrounds():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 4:12, 4:12] = 1  # an object
    attention = torch.zeros(1, 1, 16, 16)
    attention[..., 2:10, 2:10] = 1  # seen too far up and left
    refined = pixel_adaptive_refinement(image, attention, iterations=20, dilations=(1, 2))[0, 0]
    inside = refined[4:12, 4:12]
    outside = refined.clone()
    outside[4:12, 4:12] = 0
    assert inside.min() > 0.4
    assert outside.max() < 0.4


def test_maps_are_resized_and_arguments_left_alone():
    images, maps = torch.rand(1, 3, 32, 48), torch.rand(1, 2, 4, 6)
    before = images.clone(), maps.clone()
    assert pixel_adaptive_refinement(images, maps).shape == (1, 2, 32, 48)
    expected = torch.nn.functional.interpolate(maps, (32, 48), mode="bilinear")
    assert torch.equal(pixel_adaptive_refinement(images, maps, iterations=0), expected)
    assert torch.equal(images, before[0])
    assert torch.equal(maps, before[1])
    assert pixel_adaptive_refinement(images, maps[:, :0]).shape == (1, 0, 32, 48)


@pytest.mark.parametrize("size", [(8, 30), (30, 8), (9, 9), (25, 25), (24, 90), (2, 2)], ids=str)
def test_an_image_smaller_than_the_largest_dilation_uses_those_that_fit(size):
    images, maps = torch.rand(1, 3, *size), torch.rand(1, 2, *size)
    fitting = tuple(d for d in (1, 2, 4, 8, 12, 24) if d < min(size))
    expected = pixel_adaptive_refinement(images, maps, iterations=2, dilations=fitting)
    assert torch.equal(pixel_adaptive_refinement(images, maps, iterations=2), expected)
    assert not torch.equal(expected, maps)


def test_where_none_fits_maps_are_only_resized():
    images, maps = torch.rand(2, 3, 1, 40), torch.rand(2, 1, 3, 5)
    expected = torch.nn.functional.interpolate(maps, (1, 40), mode="bilinear")
    refined = pixel_adaptive_refinement(images, maps)
    assert torch.equal(refined, expected)
    assert refined.data_ptr() != maps.data_ptr()


def test_nan_stays_in_sight():
    images, maps = torch.rand(1, 3, 9, 9), torch.full((1, 1, 9, 9), 0.5)
    maps[..., 4, 4] = torch.nan
    assert pixel_adaptive_refinement(images, maps, iterations=1, dilations=(1,)).isnan().sum() == 8


def test_on_a_gpu_it_never_waits_and_autocast_changes_nothing():
    with FakeTensorMode(), cuda_bfloat16_autocast():
        images = torch.empty(2, 3, 64, 48, device="cuda", dtype=torch.float16)
        refined = pixel_adaptive_refinement(images, torch.empty(2, 3, 8, 6, device="cuda"))
    assert (refined.device.type, refined.dtype, refined.shape) == ("cuda", torch.float32, (2, 3, 64, 48))


@pytest.mark.parametrize(
    ("images", "attention", "options", "message"),
    [
        (torch.zeros(1, 3, 8, 8), torch.zeros(2, 1, 8, 8), {}, r"\(1, 3, 8, 8\) torch.float32 and \(2, 1, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8), {}, "torch.uint8"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), {"dilations": ()}, "dilations of 1 to 7"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), {"dilations": (1, 0)}, "dilations >= 1, got 0"),
        (torch.zeros(1, 3, 8, 0), torch.zeros(1, 1, 8, 8), {}, r"images.*got \(1, 3, 8, 0\)"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 0, 8), {}, r"attention.*got \(1, 1, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), {"dilations": (1,), "iterations": -1}, "iterations >= 0"),
    ],
)
def test_bad_input_is_refused(images, attention, options, message):
    with pytest.raises(ValueError, match=message):
        pixel_adaptive_refinement(images, attention, **options)
