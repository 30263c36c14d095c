"""Images that are drawn here, for examples that need no download, and how well attention covers their objects.

Each image shows up to two objects. A small glyph tells an object's class for certain; its body, much larger, hints at
it by a hue that overlaps with its neighbours' hues. Coloured blobs and a patch of noise in the background distract. A
classifier begins with the bodies, finds the glyphs, and in the end looks at little else: its CAM covers a part.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from oaa_lib import ConfusionMatrix, ThresholdSweep, two_fold
from oaa_lib.plotting import Overlay, contact_sheet

Array = npt.NDArray[Any]

CLASSES = ("ring", "cross", "bars", "check", "wedge")  # named after their glyphs; class c has hue c / 5
SIZE = 64  # of an image
HUE_NOISE = 0.05  # standard deviation of a body's hue; neighbouring classes are 0.2 apart
GLYPH_CONTRAST = 0.6  # faint glyphs are found late, so that attention stays on the bodies for a while


def smooth_noise(rng: np.random.Generator, cells: int) -> Array:
    """(SIZE, SIZE) noise in [0, 1]: a random grid of ``cells`` x ``cells``, interpolated."""
    weights = np.maximum(0, 1 - abs(np.linspace(0, cells - 1, SIZE)[:, None] - np.arange(cells)))
    return weights @ rng.random((cells, cells)) @ weights.T


def random_ellipse(rng: np.random.Generator, low: float, high: float) -> tuple[Array, Array]:
    """Inside of an ellipse with a long half-axis of ``low`` to ``high`` pixels, and a point (x, y) towards its tip."""
    long = rng.uniform(low, high)
    short, angle = long * rng.uniform(0.55, 0.8), rng.uniform(0, 2 * np.pi)
    along = np.array([np.cos(angle), np.sin(angle)])
    centre = rng.uniform(0.8 * long, SIZE - 0.8 * long, 2)
    y, x = np.mgrid[:SIZE, :SIZE] - centre[::-1, None, None]
    inside = ((x * along[0] + y * along[1]) / long) ** 2 + ((y * along[0] - x * along[1]) / short) ** 2 < 1
    return inside, np.clip(np.rint(centre + 0.6 * long * along), 5, SIZE - 6).astype(int)


def glyph(kind: int) -> Array:
    """(9, 9) in {0, 1}: the tell-tale part of a class. Mirroring changes none of them into another."""
    y, x = np.mgrid[-4:5, -4:5]
    ring, cross = abs(np.hypot(x, y) - 2.6) < 1, (x == 0) | (y == 0)
    return (ring, cross, y % 3 == 0, (x // 2 + y // 2) % 2 == 0, 2 * abs(x) < y + 4)[kind].astype(float)


def draw_image(rng: np.random.Generator) -> tuple[Array, Array]:
    """One image (SIZE, SIZE, 3) in [0, 1] and its mask (SIZE, SIZE): 0 background, c + 1 class c."""
    hue = (rng.random() + 0.3 * smooth_noise(rng, 4)) % 1
    hsv = np.stack([hue, 0.5 * smooth_noise(rng, 6), smooth_noise(rng, 12)], -1)
    mask = np.zeros((SIZE, SIZE), dtype=np.int64)

    def paint(region: Array, hue: float) -> None:
        texture = np.stack([0.55 + 0.4 * smooth_noise(rng, 24), 0.35 + 0.6 * smooth_noise(rng, 16)], -1)
        hsv[region, 0], hsv[region, 1:] = hue % 1, texture[region]

    for _ in range(3):  # blobs coloured like bodies, of any hue
        paint(random_ellipse(rng, 4, 10)[0], rng.random())
    patches = [(*rng.integers(5, SIZE - 5, 2), rng.integers(0, 2, (9, 9)))]  # as conspicuous as a glyph, but none
    for kind in rng.permutation(len(CLASSES))[: rng.choice(3, p=(0.2, 0.4, 0.4))]:
        body, (x, y) = random_ellipse(rng, 12, 24)
        while (body & (mask > 0)).any():
            body, (x, y) = random_ellipse(rng, 12, 24)
        paint(body, kind / len(CLASSES) + HUE_NOISE * rng.normal())  # the body hints,
        patches.append((x, y, glyph(kind)))  # the glyph tells
        mask[body] = mask[y - 4 : y + 5, x - 4 : x + 5] = kind + 1
    rgb = hsv_to_rgb(hsv)
    for i, (x, y, pattern) in enumerate(patches):
        window = np.s_[y - 4 : y + 5, x - 4 : x + 5]
        if i > 0 or not mask[window].any():  # the noise patch only where no object is
            rgb[window] = 0.5 + GLYPH_CONTRAST * rng.uniform(0.7, 1) * (pattern[..., None] - 0.5)
    return np.clip(rgb + 0.04 * rng.normal(size=rgb.shape), 0, 1), mask


def draw_data(num_images: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, SIZE, SIZE) float in [0, 1], labels (N, C) bool, masks (N, SIZE, SIZE) int64."""
    rng = np.random.default_rng(seed)
    drawn = [draw_image(rng) for _ in tqdm(range(num_images), "drawing images")]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).float().permute(0, 3, 1, 2).contiguous()
    masks = torch.from_numpy(np.stack([mask for _, mask in drawn]))
    return images, torch.stack([(masks == c + 1).any(-1).any(-1) for c in range(len(CLASSES))], 1), masks


def score(attention: Tensor, labels: Tensor, masks: Tensor) -> dict[str, float]:
    """Cue mIoU in percent; the constant background is chosen on the first half of the images, for the second half."""
    cues = F.interpolate(attention.cpu() * labels[:, :, None, None], masks.shape[1:], mode="bilinear")
    value, winner = cues.max(1)
    halves, num = (slice(len(masks) // 2), slice(len(masks) // 2, None)), len(CLASSES)
    sweeps = [ThresholdSweep(num) for _ in halves]
    for sweep, half in zip(sweeps, halves, strict=True):  # all images of a half at once, as a single tall one
        sweep.update(cues[half].transpose(0, 1).flatten(1, 2), range(num), masks[half].flatten(0, 1))
    both, (_, threshold) = two_fold(*sweeps)  # the second half is scored at the first half's best threshold
    label = torch.where(value > threshold, winner + 1, 0)
    tuned, reported = (ConfusionMatrix(num + 1).update(label[h], masks[h]).mean_iou() * 100 for h in halves)
    return {"tuned": tuned, "reported": reported, "threshold": threshold, "two_fold": 100 * both.mean_iou()}


def draw_contact_sheet(
    shown: dict[str, tuple[Tensor, dict[str, float]]], images: Tensor, labels: Tensor, masks: Tensor, made: Tensor
) -> Figure:
    """Maps and their scores by title, in rows for the first objects of the reported half: not picked by hand."""
    pairs = [(i, c) for i, c in labels.nonzero().tolist() if i >= len(images) // 2][:9]
    overlays = [[Overlay(images[i], maps[i, c]) for maps, _ in shown.values()] for i, c in pairs]
    rows = [[images[i], *cells, made[i], masks[i]] for (i, _), cells in zip(pairs, overlays, strict=True)]
    titles = [f"{title}\n{row['reported']:.1f}" for title, (_, row) in shown.items()]
    figure = contact_sheet(rows, ["image", *titles, "pseudo label", "truth"], [CLASSES[c] for _, c in pairs])
    for (i, c), axes in zip(pairs, np.reshape(figure.axes, (len(pairs), -1)), strict=True):
        for axis, (maps, row) in zip(axes[1:-2], shown.values(), strict=True):
            heat = F.interpolate(maps[i : i + 1, c : c + 1], (SIZE, SIZE), mode="bilinear")[0, 0]
            for outline, colour in ((masks[i] == c + 1, "white"), (heat > row["threshold"], "cyan")):
                if outline.any() and not outline.all():
                    axis.contour(outline, [0.5], colors=colour, linewidths=0.9)
    figure.suptitle("Attention to the class at the left. White: true outline. Cyan: where it exceeds the threshold.")
    return figure
