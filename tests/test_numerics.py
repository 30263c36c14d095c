"""How far results in narrow dtypes may be from those in float64, on every public path; docs/precision.md has the table.

Each test gives the same numbers twice: in a dtype, and in float64. What differs is what was computed, not what went in.
The bounds are derived, in units of u, half an eps: the most by which one rounding changes a number, relative to it.
Sums of n numbers of one sign, which torch adds up in a cascade, get log2 n of them.
"""

import math
from functools import partial

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from oaa_lib import (
    AttentionAccumulator,
    CAMHead,
    CAMOutput,
    ConfusionMatrix,
    ThresholdSweep,
    View,
    attention_drop,
    attention_similarity,
    harmonic_mix,
    hybrid_loss,
    multi_scale_attention,
    multilabel_cross_entropy,
    normalize_attention,
    pixel_adaptive_refinement,
    pseudo_label_from_cues,
    score_gate,
    topk_gate,
    wrap_classifier,
)

NARROW = (torch.float16, torch.bfloat16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", NARROW, ids=["float16", "bfloat16", "float32"])
U32 = 2.0**-24


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """The least number above 0, a denormal."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps_of_all_sizes(dtype: torch.dtype, classes: int = 6, side: int = 7, seed: int = 0) -> Tensor:
    """(9, C, s, s) score maps: from denormals to the largest numbers; constant, empty, negative, one pixel alone."""
    maps = random(9, classes, side, side, seed=seed) * 2 - 1
    largest = torch.finfo(dtype).max
    for row, scale in enumerate((smallest(dtype) * 16, torch.finfo(dtype).smallest_normal, 1e-3, 1.0, 1e4, largest)):
        maps[row] *= scale / maps[row].abs().max()
    maps[6] = largest  # constant
    maps[7, ::2], maps[7, 1::2] = 0, -1
    maps[8] = 0
    maps[8, :, 2, 3] = smallest(dtype)
    return maps.to(dtype)


def normalized(maps: Tensor, method: str = "max") -> Tensor:
    """Eq. 2 in float64."""
    positive = maps.double().relu()
    low = positive.amin((-2, -1), keepdim=True) if method == "minmax" else 0.0
    peak = positive.amax((-2, -1), keepdim=True) - low
    return torch.where(peak > 0, (positive - low) / peak, 0.0)


def assert_within(narrow: Tensor, wide: Tensor, bound: Tensor | float) -> None:
    assert narrow.isfinite().all()
    excess = (narrow.double() - wide).abs() - bound
    assert (excess <= 0).all(), f"{excess.max():.3g} beyond the bound"


# Eq. 1 and 2


@pytest.mark.parametrize(("method", "roundings"), [("max", 1), ("minmax", 3)])  # a division; and two subtractions
@dtypes
def test_normalized_attention(dtype, method, roundings):
    maps = maps_of_all_sizes(dtype)
    expected = normalized(maps, method)
    attention = normalize_attention(maps, method=method)
    assert_within(attention, expected, 1.01 * roundings * unit(dtype) * expected + smallest(dtype))
    assert attention.min() >= 0
    assert attention.max() <= 1


@dtypes
def test_normalized_attention_of_shifted_maps(dtype):
    """Little contrast on a high floor: what is subtracted is exact to a rounding, so the small rest is as well."""
    maps = (1000 + random(4, 5, 7, 7)).to(dtype)
    expected = normalized(maps, "minmax")
    assert_within(normalize_attention(maps, method="minmax"), expected, 3.03 * unit(dtype) * expected)


@dtypes
def test_the_head(dtype):
    """Its error as it goes from layer to layer: what a layer is given wrong, its sums (in float32), one rounding."""
    torch.manual_seed(0)
    head = CAMHead(4, 6, hidden_channels=5, num_convs=2)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    head, features = head.to(dtype), (random(2, 4, 6, 7) * 4 - 2).to(dtype)
    out = head(features)
    values, error = features.double(), torch.zeros_like(features, dtype=torch.float64)
    for layer in [layer for layer in head.modules() if isinstance(layer, nn.Conv2d)]:
        weight, bias, padding = layer.weight.double(), layer.bias.double(), layer.padding
        total = F.conv2d(values.abs() + error, weight.abs(), bias.abs(), padding=padding)  # of what is added up
        error = F.conv2d(error, weight.abs(), padding=padding) + total * (weight[0].numel() * U32 + 2 * unit(dtype))
        values = F.conv2d(values, weight, bias, padding=padding)
        score_maps, values = values, values.relu()
    assert_within(out.score_maps, score_maps, error)
    average = out.score_maps.double().mean((-2, -1))
    size = out.score_maps.double().abs().mean((-2, -1))
    assert_within(out.logits, average, unit(dtype) * average.abs() + (math.log2(42) + 2) * U32 * size)


@pytest.mark.parametrize("value", [65504.0, -65504.0, 2.0**-24])
def test_the_average_of_the_largest_and_the_least_of_float16(value):
    head = CAMHead(1, 1, num_convs=0).half()
    with torch.no_grad():
        head.class_aware.weight.fill_(1)
    out = head(torch.full((1, 1, 41, 41), value, dtype=torch.float16))
    assert (out.logits.item(), out.score_maps.unique().item()) == (value, value)


@pytest.mark.parametrize("gate", [score_gate, topk_gate])
@dtypes
def test_gates_compare_and_compute_nothing(dtype, gate):
    logits = torch.cat([(random(64, 5) * 2 - 1) * scale for scale in (smallest(dtype) * 8, 1, 1e4)]).to(dtype)
    labels = random(192, 5, seed=1) < 0.5
    assert torch.equal(gate(logits, labels), gate(logits.double(), labels))


@dtypes
def test_a_wrapped_classifier(dtype):
    """The average of its score maps is its logits; each is a sum of 8 products, and one of 30 pixels."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(*layers).to(dtype).eval()
    images = (random(2, 3, 5, 6) * 4 - 2).to(dtype)
    out = wrap_classifier(model)(images)
    assert torch.equal(out.logits, model(images))
    features, linear = model[:2](images).double(), layers[-1]
    size = F.linear(features.mean((-2, -1)), linear.weight.double().abs(), linear.bias.double().abs())
    roundings = 4 * unit(dtype) + 2 * (8 + math.log2(30)) * U32
    assert_within(out.logits, out.score_maps.double().mean((-2, -1)), roundings * size)


# Eq. 3 to 5 and 10: what is stored, attention being computed in float32 (one rounding) and fused in float32


def own_average(cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
    return (cumulative + attention) / 2


STEPS = 12
FUSIONS = {  # in float64, and by how many u32, and roundings of the storage, it may differ after T maps
    "max": ("max", lambda m, a, t: torch.maximum(m, a), 1, 1),
    "latest": ("latest", lambda m, a, t: a, 1, 1),
    # A step: three roundings of what is added, A - M over t, and one of the sum; errors are averaged like the maps.
    "mean": ("mean", lambda m, a, t: m + (a - m) / (t + 1), STEPS / 2 + 5, 0),
    # A step has 4 roundings at most; errors fade as the maps do.
    "ema": ("ema", lambda m, a, t: 0.9 * m + 0.1 * a, 5 / 0.1, 0),
    "noisy-or": ("noisy-or", lambda m, a, t: 1 - (1 - m) * (1 - a), 5 * STEPS, 0),
    "user's": (own_average, lambda m, a, t: (m + a) / 2, 4, 2),  # it halves what was wrong before
}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.float32], ids=str)
@dtypes
def test_cumulative_attention(dtype, storage, fusion):
    fusion, fuse, roundings, storing = FUSIONS[fusion]
    accumulator = AttentionAccumulator(torch.ones(9, 6), (7, 7), fusion=fusion, gate=None, dtype=storage)
    expected = None
    for step in range(STEPS):
        score_maps = maps_of_all_sizes(dtype, seed=step)
        accumulator.update(range(9), score_maps)
        attention = normalized(score_maps)
        expected = attention if expected is None else fuse(expected, attention, step)
    step = {torch.uint8: 0.5 / 255, torch.float16: unit(torch.float16), torch.float32: 0}[accumulator.dtype]
    assert accumulator.skipped == 0
    assert_within(accumulator[range(9)], expected, roundings * 1.01 * U32 + storing * step)


@dtypes
def test_merged_means(dtype):
    """Two sums of T maps each and the mean of both: as one after the other, and three roundings more."""
    both = [AttentionAccumulator(torch.ones(9, 6), (7, 7), fusion="mean", gate=None) for _ in range(2)]
    seen = []
    for step in range(STEPS):
        score_maps = maps_of_all_sizes(dtype, seed=step)
        both[step % 3 == 0].update(range(9), score_maps)
        seen.append(normalized(score_maps))
    merged = both[0].merge(both[1])
    assert_within(merged[range(9)], torch.stack(seen).mean(0), (STEPS / 2 + 8) * U32)


@dtypes
def test_what_is_stored_is_read_as_it_is(dtype):
    """8 bits are k / 255 to a rounding; float16 and float32 come back to the bit."""
    attention = (torch.arange(256, dtype=torch.float64) / 255).reshape(1, 1, 16, 16)
    for storage in (torch.uint8, torch.float16, torch.float32):
        accumulator = AttentionAccumulator([[1]], (16, 16), gate=None, dtype=storage)
        accumulator.update([0], attention.to(dtype), normalization=None)
        read = accumulator.attention(0)[None]
        given = attention.to(dtype).float().to(storage).float()
        assert torch.equal(read, given) if storage != torch.uint8 else True
        if storage == torch.uint8 and dtype != torch.bfloat16:  # whose steps are as wide near 1 as those of 8 bits
            assert_within(read, attention, U32)


@dtypes
def test_the_gate_of_pooled_maps(dtype):
    """Without logits the gate gets the average in float32 or wider, so that maps of narrow dtypes tie no more often."""
    score_maps = torch.ones(1, 2, 41, 41, dtype=dtype)
    score_maps[0, 0, 0, 0] += 2 * unit(dtype)
    accumulator = AttentionAccumulator([[1, 0]], (41, 41)).update([0], score_maps)
    assert accumulator.accepted == 1 or dtype == torch.float32  # where the average is less than a rounding above 1


# Frames: a place in n pixels is computed to 3 n u, and a bilinear value is three blends


def frame_bound(size: tuple[int, int]) -> float:
    return (3 * sum(size) + 8) * U32


@pytest.mark.parametrize(("size", "map_size"), [((5, 6), (11, 4)), ((41, 41), (28, 28)), ((1, 3), (7, 7))])
@dtypes
def test_resized_maps(dtype, size, map_size):
    score_maps = (random(1, 2, *size) * 1e4).to(dtype)
    accumulator = AttentionAccumulator([[1, 1]], map_size, gate=None, dtype=torch.float32).update([0], score_maps)
    attention = normalized(score_maps)
    expected = torch.tensor(
        [reference.resize(values.tolist(), map_size) for values in attention[0]], dtype=torch.float64
    )
    assert_within(accumulator.attention(0), expected, 2 * U32 + frame_bound(size))
    again = accumulator.soft_labels([0], size=size)[0]
    expected = torch.tensor(
        [reference.resize(values.tolist(), size) for values in accumulator.attention(0)], dtype=torch.float64
    )
    assert_within(again, expected, frame_bound(map_size))


@pytest.mark.parametrize("view", [View(0.1, 0.2, 0.9, 0.7), View(-0.25, 0, 1.5, 1, True), View(0.4, 0.4, 0.45, 0.42)])
@dtypes
def test_maps_of_views(dtype, view):
    size, map_size = (9, 12), (40, 30)
    score_maps = (random(1, 2, *size) * 1e4).to(dtype)
    accumulator = AttentionAccumulator([[1, 1]], map_size, gate=None, dtype=torch.float32)
    accumulator.update([0], score_maps, views=[view])
    for attention, kept in zip(normalized(score_maps)[0], accumulator.attention(0), strict=True):
        shown = reference.show(attention.tolist(), tuple(view), map_size)
        expected = torch.tensor([[value or 0.0 for value in row] for row in shown], dtype=torch.float64)
        assert_within(kept, expected, 2 * U32 + frame_bound(size))


# Losses


LOSSES = {
    "class": partial(hybrid_loss, normalization="class"),
    "pooled": partial(hybrid_loss, normalization="pooled"),
    "plain": multilabel_cross_entropy,
}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
@dtypes
def test_losses_and_their_gradients(dtype, name, scale):
    """Computed in float32. Hybrid: all terms have one sign, and some eight roundings each; so has the gradient.

    The plain one is (1 - p) s - log sigmoid(s), two numbers as large as s: to four roundings of these.
    """
    score_maps = ((random(3, 4, 13, 11) * 2 - 1) * scale).to(dtype)
    soft_labels = random(3, 4, 13, 11, seed=1).to(dtype)
    soft_labels[0, ::2], soft_labels[1, 0], soft_labels[2, 1] = 0, 1, smallest(dtype)
    narrow, wide = score_maps.requires_grad_(), score_maps.detach().double().requires_grad_()
    loss, expected = LOSSES[name](narrow, soft_labels), LOSSES[name](wide, soft_labels.double())
    loss.backward()
    expected.backward()
    bound = (8 + math.log2(score_maps.numel())) * U32 * expected.detach()
    if name == "plain":
        bound += 4 * U32 * wide.detach().abs().mean() * 4  # of four classes
    assert_within(loss.detach(), expected.detach(), bound)
    gradient = wide.grad.abs()
    computed = 8 * U32 * (gradient if name != "plain" else 1 / (3 * 13 * 11))
    assert_within(narrow.grad, wide.grad, computed + unit(dtype) * gradient + smallest(dtype))


@pytest.mark.parametrize("name", ["class", "pooled"])
@dtypes
def test_the_hybrid_loss_of_a_good_prediction_is_right_as_well(dtype, name):
    """A loss of 1e-13 is one, not 0: nothing is subtracted from anything as large as the scores."""
    soft_labels = (random(2, 3, 8, 8) < 0.5).to(dtype)
    score_maps = (soft_labels * 2 - 1) * 30
    loss, expected = LOSSES[name](score_maps, soft_labels), LOSSES[name](score_maps.double(), soft_labels.double())
    assert 0 < expected < 1e-11
    assert_within(loss, expected, 16 * U32 * expected)


# Proxy labels and scores: thresholds, so a pixel within some roundings of one may come out otherwise, and no other


@dtypes
def test_proxy_labels(dtype):
    """Rescaling takes three roundings, 1 - saliency one, and so does a threshold that no float is equal to."""
    attention, saliency = random(4, 120, 130).to(dtype), random(120, 130, seed=1).to(dtype)
    attention[1] *= 0.5
    options = {"min_foreground": 0.0}
    label = pseudo_label_from_cues(attention, [3, 0, 7, 9], saliency, **options)
    expected = pseudo_label_from_cues(attention.double(), [3, 0, 7, 9], saliency.double(), **options)
    maps = attention.double()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    channels = torch.cat([1 - saliency.double()[None], (maps - low) / (high - low)])
    first, second = channels.topk(2, dim=0).values
    near = (first - second) <= 8 * unit(dtype)
    for values, threshold in ((channels, 0.3), (channels, 0.9), (channels, 0.8), (saliency.double()[None], 32 / 255)):
        near |= ((values - threshold).abs() <= 4 * unit(dtype)).any(0)
    assert near.double().mean() < 200 * unit(dtype) + 1e-3
    assert torch.equal(label[~near], expected[~near])


@dtypes
def test_the_background_threshold_of_a_sweep(dtype):
    """Values in half precision times 255 are exact in float32, so the counts are; in float32 to a rounding of 255."""
    attention, target = random(3, 200, 210).to(dtype), (random(200, 210, seed=1) * 4).long()
    if dtype == torch.float32:
        steps = attention * 255
        attention[(steps - steps.floor() - 0.5).abs() < 255 * U32 * 2] = 0
    sweeps = [ThresholdSweep(3).update(maps, [0, 1, 2], target) for maps in (attention, attention.double())]
    assert torch.equal(sweeps[0].counts, sweeps[1].counts)


def test_iou_of_more_pixels_than_float32_can_count():
    matrix = ConfusionMatrix(2)
    matrix.counts += torch.tensor([[2**40 + 1, 1], [3, 2**24 + 1]])
    assert_within(
        matrix.iou(),
        torch.tensor([(2**40 + 1) / (2**40 + 5), (2**24 + 1) / (2**24 + 5)], dtype=torch.float64),
        2.0**-53,
    )


# Around it


def refined(images: np.ndarray, maps: np.ndarray, dilations: tuple[int, ...], iterations: int) -> np.ndarray:
    """`pixel_adaptive_refinement` of one image (3, H, W) in float64."""
    height, width = images.shape[-2:]
    offsets = [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]

    def shifted(values: np.ndarray) -> np.ndarray:
        rows, columns = np.arange(height), np.arange(width)
        near = [values[..., (rows + y).clip(0, height - 1), :] for y, _ in offsets]
        return np.stack([v[..., (columns + x).clip(0, width - 1)] for v, (_, x) in zip(near, offsets, strict=True)])

    around = np.concatenate([images[None], shifted(images)])
    exponents = -(np.abs(around[1:] - images) / (0.1 * around.std(0) + 1e-8)).mean(1)
    weights = np.exp(exponents - exponents.max(0))
    weights /= weights.sum(0)
    for _ in range(iterations):
        maps = (weights[:, None] * shifted(maps)).sum(0)
    return maps


@dtypes
def test_refined_attention(dtype):
    """Computed in float32. What a deviation s is wrong by, relative, is r; weights w exp(-e) are by r |e - mean e|.

    With n numbers in [0, 1] the mean is wrong by n u, and s, where it is not 0 or 1e-8, by (n u / s)^2 + n u. Of steps
    of 1/8 in 17 numbers s is 0.03 or more; e is log n above its least on the average. So an iteration moves weights by
    2 r log n in all, and adds n roundings.
    """
    images = (random(2, 3, 14, 15) * 8).round().div(8).to(dtype)
    maps = random(2, 3, 14, 15, seed=1).to(dtype)
    number, iterations = 17, 5
    expected = [
        refined(image, attention, (1, 3), iterations)
        for image, attention in zip(images.double().numpy(), maps.double().numpy(), strict=True)
    ]
    r = (number * U32 / 0.03) ** 2 + number * U32
    bound = iterations * (2 * r * math.log(number) + number * U32)
    found = pixel_adaptive_refinement(images, maps, dilations=(1, 3), iterations=iterations)
    assert_within(found, torch.from_numpy(np.stack(expected)), bound)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=str)
def test_similarity_of_maps_however_small(dtype):
    """Sums of 49 products of one sign, a product of two roots and a quotient, in float32; the scale does not matter."""
    before, after = (random(4, 7, 7, seed=seed).to(dtype) for seed in (0, 1))
    first, second = before.double().flatten(1), after.double().flatten(1)
    expected = (first * second).sum(1) / (first.square().sum(1) * second.square().sum(1)).sqrt()
    bound = (2 * math.log2(49) + 10) * U32
    assert_within(attention_similarity(before, after), expected, bound)
    scale = torch.finfo(dtype).smallest_normal * 4 / unit(dtype) if dtype != torch.float64 else 1e-300
    assert_within(attention_similarity(before * scale, after * scale), expected, bound + 4 * unit(dtype))
    steps = (before.double() * 64).round()
    denormal = (steps * smallest(dtype)).to(dtype)
    assert_within(attention_similarity(denormal, denormal), torch.ones(4), bound)


@dtypes
def test_what_attention_drop_hides(dtype):
    """Resized in the dtype of the attention, so a pixel within some roundings of the threshold may go either way."""
    attention, images = random(2, 3, 7, 7).to(dtype), torch.ones(2, 3, 60, 64)
    hidden = attention_drop(images, attention, torch.ones(2, 3), rate=1.0)[:, 0] == 0
    full = F.interpolate(attention.double(), (60, 64), mode="bilinear", align_corners=False).amax(1)
    near = (full - 0.6).abs() <= 4 * unit(dtype) + frame_bound((7, 7))
    assert near.double().mean() < 30 * unit(dtype) + 1e-3
    assert torch.equal(hidden[~near], (full > 0.6)[~near])


@dtypes
def test_attention_averaged_over_views(dtype):
    """Views are added up in float32 or wider; what is returned is rounded once."""
    shown = {side: ((random(2, 3, side, side, seed=side) * 2 - 1) * 1e4).to(dtype) for side in (8, 12, 16, 24, 32)}

    def average(maps_dtype: torch.dtype) -> Tensor:
        def model(images: Tensor) -> CAMOutput:
            maps = shown[images.shape[-1]].to(maps_dtype)
            return CAMOutput(maps.mean((-2, -1)), maps)

        return multi_scale_attention(model, torch.zeros(2, 3, 16, 16), scales=(0.5, 0.75, 1.0, 1.5, 2.0))

    found, expected = average(dtype), average(torch.float64)
    assert found.dtype == dtype
    assert_within(found, expected, unit(dtype) * expected + frame_bound((32, 32)) + 12 * U32 + smallest(dtype))


@dtypes
def test_the_harmonic_mix(dtype):
    """2 m, the sum, the quotient, the difference, the product, the sum: six roundings of what is at most the result."""
    maximum = random(4, 9, 9).to(dtype)
    mean = (maximum.double() * random(4, 9, 9, seed=1)).to(dtype).minimum(maximum)
    mean[0], maximum[1] = 0, 1
    expected = torch.where(mean > 0, 3 / (1 / mean.double() + 2 / maximum.double()), 0)
    assert_within(harmonic_mix(mean, maximum), expected, 8 * unit(dtype) * expected + torch.finfo(dtype).tiny)


def exact_mean(cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
    assert cumulative.dtype == attention.dtype == torch.float64
    return cumulative + (attention - cumulative) / (count + 1)


def merged_mean(first: Tensor, second: Tensor, first_count: Tensor, second_count: Tensor) -> Tensor:
    assert first.dtype == second.dtype == torch.float64
    return first + (second - first) * (second_count.double() / (first_count + second_count))


@pytest.mark.parametrize("views", [None, [View(), View(0, 0, 0.5, 1, True), View()]], ids=["whole", "views"])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_fusion_that_needs_float64_is_fused_merged_kept_and_saved_in_it(where, views, tmp_path):
    """1,000 maps leave it within float64's rounding of the mean; what is read is that in float32."""
    exact_mean.storage_dtype, exact_mean.merge = torch.float64, merged_mean
    options = {"fusion": exact_mean, "gate": None}

    def build(name: str) -> AttentionAccumulator:
        path = tmp_path / name if where == "file" else None
        return AttentionAccumulator(torch.ones(3, 2), (4, 4), path=path, resume=path is not None, **options)

    both, seen = [build("first"), build("second")], []
    for step in range(60):
        seen.append(random(3, 2, 4, 4, seed=step).float())
        both[step % 4 == 0].update([0, 1, 2], seen[-1], views=views, normalization=None)
    merged = both[0].merge(both[1])
    kept = merged.state_dict()["maps"]
    assert merged.dtype == kept.dtype == torch.float64
    expected = torch.stack(seen).double().mean(0)
    at = [0, 2] if views else [0, 1, 2]  # those that are shown whole
    assert_within(kept.view(3, 2, 4, 4)[at], expected[at], 60 * 2.0**-53)
    assert torch.equal(merged[[0, 1, 2]], kept.view(3, 2, 4, 4).float())
    merged.save(tmp_path / "saved")
    for again in (AttentionAccumulator.load(tmp_path / "saved", **options), build("third")):
        again.load_state_dict(merged.state_dict())
        assert torch.equal(again.state_dict()["maps"], kept)
        assert again.counts.max() == 60
    if where == "file":
        del merged, both
        assert torch.equal(build("first").state_dict()["maps"], kept)


@pytest.mark.parametrize("reduction", [None, "mean", "max", "latest"])
def test_maps_in_float64_are_synchronized_in_it(reduction):
    exact_mean.storage_dtype, exact_mean.merge, exact_mean.reduction = torch.float64, merged_mean, reduction
    accumulator = AttentionAccumulator(torch.ones(3, 2), (4, 4), fusion=exact_mean, gate=None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for step in range(7):
            accumulator.update([0, 1, 2], random(3, 2, 4, 4, seed=step))
        before = accumulator.state_dict()["maps"].clone()
        kept = accumulator.synchronize().state_dict()["maps"]
    finally:
        dist.destroy_process_group()
        del exact_mean.reduction
    assert kept.dtype == torch.float64
    assert_within(kept, before, 8 * 2.0**-53)


@pytest.mark.parametrize("scale", [1e-300, 1e-50, 1e50, 1e300])
def test_maps_of_float64_that_float32_cannot_hold_are_normalised_first(scale):
    score_maps = torch.rand(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = (
        AttentionAccumulator([[1]], (4, 4), gate=None, dtype=torch.float32).update([0], maps)
        for maps in (score_maps * scale, score_maps)
    )
    assert found.accepted == 1
    torch.testing.assert_close(found.attention(0), expected.attention(0))
