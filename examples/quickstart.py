"""Online attention accumulation from end to end, on images drawn here: no download, no file, two minutes on one core.

Each image shows up to two objects. A small glyph tells an object's class for certain; its body, much larger, hints at
it by a hue that overlaps with its neighbours' hues. Coloured blobs and a patch of noise in the background distract. A
classifier begins with the bodies, finds the glyphs, and in the end looks at little else: its CAM covers a part. OAA
keeps what it looked at on the way. The masks are for scoring; no training sees them.

    python examples/quickstart.py                           # everything goes to out/quickstart
    python examples/quickstart.py --images 40 --epochs 1    # seconds: does it run?

Reads like the paper: images, network (section 3.1), classifier with OAA (3.2), integral attention model (3.3), pseudo
labels (4), the rows of Table 2. What differs from the paper:

1. Drawn images and a small network trained from scratch by Adam, instead of PASCAL VOC and VGG-16 from ImageNet.
2. Rows are scored as cues: each pixel takes the class of its strongest attention, or background below a constant. That
   constant is chosen for each row on one half of the images; the row is reported on the other half.
3. A fifth of the images show no object, so that background is no evidence of anything; class scores start negative.
4. Soft labels up to 0.5, instead of exact zeros, are the constraint region N-, in the MCE row as well.
5. Random horizontal flips, undone before a map is accumulated.

Two runs with the same seed give the same numbers on the same machine.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import hsv_to_rgb
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import oaa_lib

Array = npt.NDArray[Any]
Loss = Callable[..., Tensor]
Columns = dict[str, tuple[Tensor, float]]  # title: maps, threshold
Row = dict[str, float]  # see score()

CLASSES = ("ring", "cross", "bars", "check", "wedge")  # named after their glyphs; class c has hue c / 5
SIZE = 64  # of an image; score maps are a quarter of it
HUE_NOISE = 0.05  # standard deviation of a body's hue; neighbouring classes are 0.2 apart
GLYPH_CONTRAST = 0.6  # faint glyphs are found late, so that attention stays on the bodies for a while
BATCH_SIZE = 16
LEARNING_RATE = 3e-3
# A soft label is the probability that a place belongs to the class (section 3.3): up to 0.5 it more likely does not.
# Both integral losses get this threshold, the same soft labels and the same training.
CONSTRAINT = 0.5
THRESHOLDS = torch.arange(1, 100) / 100  # candidates for the constant background
PALETTE = np.zeros((256, 3), dtype=np.uint8)  # as VOC: black background, whitish ignored; classes in their own hue
PALETTE[1 : len(CLASSES) + 1] = [255 * hsv_to_rgb((c / len(CLASSES), 0.85, 0.95)) for c in range(len(CLASSES))]
PALETTE[255] = (224, 224, 192)


# Images: everything random comes from one numpy generator.


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


# Network (section 3.1): classifier and integral attention model are two of the same kind.


class Network(nn.Module):
    """A small backbone at stride 4, and the library's head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.head = oaa_lib.CAMHead(64, len(CLASSES), hidden_channels=64, num_convs=1)
        # A place is no class until it shows evidence: no attention on the background while nothing is learnt yet.
        nn.init.constant_(self.head.class_aware.bias, -2)

    def forward(self, images: Tensor) -> oaa_lib.CAMOutput:
        """Images (B, 3, H, W) -> logits (B, C), score maps (B, C, H / 4, W / 4)."""
        return self.head(self.backbone(images))


@torch.no_grad()
def attention_of(model: Network, images: Tensor, device: torch.device) -> Tensor:
    """Attention (N, C, h, w) on the host, from a single view of each image."""
    model.eval()
    score_maps = torch.cat([model(batch.to(device)).score_maps.cpu() for batch in images.split(100)])
    return oaa_lib.normalize_attention(score_maps)  # Eq. 2


def mirror(maps: Tensor, flipped: Tensor) -> Tensor:
    """Maps (B, C, H, W), those with ``flipped`` mirrored; its own inverse."""
    return torch.where(flipped.to(maps.device)[:, None, None, None], maps.flip(-1), maps)


def start_training(epochs: int, seed: int, device: torch.device) -> tuple[Network, Any, Any, torch.Generator]:
    """A new network, its optimizer, its schedule (a tenth of the rate for the last quarter), the order of batches."""
    torch.manual_seed(seed)
    model = Network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, epochs * 3 // 4)])
    return model, optimizer, schedule, torch.Generator().manual_seed(seed)


def shuffled_batches(images: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One epoch: indices (B,), which of them are flipped (B,), the images (B, 3, H, W) so flipped."""
    for indices in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
        flipped = torch.rand(len(indices), generator=generator) < 0.5
        yield indices, flipped, mirror(images[indices], flipped)


# Classifier with online attention accumulation (section 3.2).


def latest(cumulative: Tensor, attention: Tensor, count: Tensor) -> Tensor:
    """A fusion of our own, which forgets: to see how far attention moved since the epoch before."""
    return attention


def train_classifier(
    images: Tensor, labels: Tensor, masks: Tensor, epochs: int, seed: int, device: torch.device
) -> tuple[Network, dict[str, oaa_lib.AttentionAccumulator], list[dict[str, Any]], dict[int, Tensor]]:
    """Train on image labels and accumulate attention on the way.

    Returns:
        The classifier; accumulators by name; a diary, one entry an epoch; attention at three moments, by epoch.
    """
    model, optimizer, schedule, generator = start_training(epochs, seed, device)
    accumulators = {
        name: oaa_lib.AttentionAccumulator(labels, (SIZE // 4, SIZE // 4), fusion=fusion, gate=gate, device=device)
        for name, fusion, gate in (("mean", "mean", "score"), ("max", "max", "score"), ("latest", latest, None))
    }
    moments = {max(1, round(share * epochs)): torch.empty(0) for share in (0.15, 0.35, 0.6)}
    diary: list[dict[str, Any]] = []
    everything, before, seen = range(len(images)), None, (0, 0)
    bar = tqdm(range(1, epochs + 1), "classifier + OAA", unit="epoch")
    for epoch in bar:
        model.train()
        losses = []
        for indices, flipped, batch in shuffled_batches(images, generator):
            out = model(batch.to(device))
            # Eq. 1: C binary problems.
            loss = F.binary_cross_entropy_with_logits(out.logits, labels[indices].float().to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            score_maps = mirror(out.score_maps, flipped)  # back into the image's own frame
            for accumulator in accumulators.values():
                accumulator.update(indices, score_maps, out.logits)  # Eq. 2, the gate, Eq. 3-5 and 10
        schedule.step()

        # What decides whether accumulation pays: how many maps pass the gate, and whether attention still moves.
        accepted, offered = accumulators["max"].accepted, accumulators["max"].offered
        now, cam = accumulators["latest"][everything].cpu()[labels].flatten(1), attention_of(model, images, device)
        maps = {"CAM": cam, "mean": accumulators["mean"][everything], "max": accumulators["max"][everything]}
        entry = {
            "epoch": epoch,
            "loss": torch.stack(losses).mean().item(),
            "gate_pass_rate": (accepted - seen[0]) / (offered - seen[1]),
            "similarity": None if before is None else F.cosine_similarity(before, now).mean().item(),
            "rows": {name: score(value, labels, masks) for name, value in maps.items()},
        }
        diary.append(entry)
        before, seen = now, (accepted, offered)
        if epoch in moments:
            moments[epoch] = cam
        bar.set_postfix(loss=f"{entry['loss']:.3f}", passed=f"{entry['gate_pass_rate']:.0%}")
    return model, accumulators, diary, moments


# Integral attention model (section 3.3).


def train_integral_model(
    images: Tensor, soft_labels: Tensor, loss_function: Loss, epochs: int, seed: int, device: torch.device
) -> Network:
    """Train a new network on cumulative attention: score maps against soft labels, no pooling."""
    model, optimizer, schedule, generator = start_training(epochs, seed, device)
    for _ in tqdm(range(epochs), f"OAA+, {loss_function.__name__}", unit="epoch"):
        for indices, flipped, batch in shuffled_batches(images, generator):
            target = mirror(soft_labels[indices], flipped).to(device)
            loss = loss_function(model(batch.to(device)).score_maps, target, threshold=CONSTRAINT)  # Eq. 6, or 7-9
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model


# Scores and pseudo labels (section 4).


def score(attention: Tensor, labels: Tensor, masks: Tensor) -> Row:
    """Cue mIoU in percent; the constant background is chosen on the first half of the images, for the second half."""
    cues = F.interpolate(attention.cpu() * labels[:, :, None, None], masks.shape[1:], mode="bilinear")
    value, winner = cues.max(1)
    first, second, num = slice(len(masks) // 2), slice(len(masks) // 2, None), len(CLASSES) + 1
    # A histogram over (truth, winner, value) gives the IoU at all thresholds at once.
    bins = torch.bucketize(value[first], THRESHOLDS)  # value > THRESHOLDS[i] if and only if bin > i
    cells = (masks[first] * num + winner[first] + 1) * (len(THRESHOLDS) + 1) + bins
    pixels = torch.bincount(cells.flatten(), minlength=num * num * (len(THRESHOLDS) + 1)).view(num, num, -1)
    counts = (pixels.sum(-1, keepdim=True) - pixels.cumsum(-1))[..., :-1]  # truth x prediction x threshold
    counts[:, 0] = pixels.sum((1, 2))[:, None] - counts.sum(1)  # what is not above a threshold is background
    hits = counts.diagonal().double()
    threshold = THRESHOLDS[(hits / ((counts.sum(0) + counts.sum(1)).T - hits)).nanmean(1).argmax()].item()
    prediction = torch.where(value > threshold, winner + 1, 0)
    tuned, reported = (
        100 * oaa_lib.ConfusionMatrix(num).update(prediction[half], masks[half]).mean_iou() for half in (first, second)
    )
    return {"tuned": tuned, "reported": reported, "threshold": round(threshold, 2)}


def make_pseudo_labels(attention: Tensor, labels: Tensor, background: float) -> Tensor:
    """Pseudo labels (N, SIZE, SIZE): 0 background, c + 1 class c, 255 ignored, with a constant as background cue.

    The constant is the threshold, so the release's own is off; so is its rule against images with hardly any
    foreground, for some images truly show none.
    """
    options = {"background": background, "foreground_threshold": 0, "min_foreground": 0}
    cues = F.interpolate(attention, (SIZE, SIZE), mode="bilinear")
    images = zip(cues, labels, strict=True)
    return torch.stack([oaa_lib.pseudo_label_from_cues(a[k], k.nonzero()[:, 0], **options) for a, k in images])


# Pictures.


def draw_contact_sheet(
    path: Path, columns: Columns, images: Tensor, labels: Tensor, masks: Tensor, made: Tensor
) -> None:
    """One row for each of the first objects of the reported half: not picked by hand."""
    pairs = [(i, c) for i, c in labels.nonzero().tolist() if i >= len(images) // 2][:9]
    shape, size = (len(pairs), len(columns) + 3), (1.25 * (len(columns) + 3), 1.22 * len(pairs) + 0.8)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for axis, title in zip(axes[0], ("image", *columns, "pseudo label", "truth"), strict=True):
        axis.set_title(title, fontsize=10)
    for row, (i, c) in zip(axes, pairs, strict=True):
        image = images[i].permute(1, 2, 0).numpy()
        for axis, picture in zip(row[[0, -2, -1]], (image, PALETTE[made[i]], PALETTE[masks[i]]), strict=True):
            axis.imshow(picture)
        row[0].set_ylabel(CLASSES[c], color=PALETTE[c + 1] / 255 * 0.8, fontsize=12, fontweight="bold")
        for axis, (maps, threshold) in zip(row[1:-2], columns.values(), strict=True):
            heat = F.interpolate(maps[i : i + 1, c : c + 1], (SIZE, SIZE), mode="bilinear")[0, 0].numpy()
            opaque, colours = 0.4 + 0.5 * heat[..., None], matplotlib.colormaps["inferno"](heat)[..., :3]
            axis.imshow((1 - opaque) * image.mean(-1, keepdims=True) + opaque * colours)
            for outline, colour in ((masks[i] == c + 1, "white"), (heat > threshold, "cyan")):
                if outline.any() and not outline.all():
                    axis.contour(outline, [0.5], colors=colour, linewidths=0.9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle("Attention to the class at the left. White: true outline. Cyan: where it exceeds the threshold.")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curves(path: Path, diary: list[dict[str, Any]], rows: dict[str, Row]) -> None:
    """Cue mIoU over the epochs, and below it what drives it."""
    epochs = [entry["epoch"] for entry in diary]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1), layout="constrained")
    for name, label, colour in (("max", "OAA max", "C3"), ("mean", "OAA mean", "C0"), ("CAM", "CAM, this epoch", "C7")):
        above.plot(epochs, [e["rows"][name]["reported"] for e in diary], ".-", color=colour, label=label)
    for name, style in (("max + hybrid", "--"), ("max + MCE", ":")):
        above.axhline(rows[name]["reported"], color="C2", linestyle=style, label=f"OAA+ after training: {name}")
    above.set(ylabel="cue mIoU (%), reported half", title="What attention covers while the classifier trains")
    below.plot(epochs, [e["gate_pass_rate"] for e in diary], ".-", color="C4", label="maps that pass the gate")
    below.plot(epochs[1:], [e["similarity"] for e in diary[1:]], ".-", color="C1", label="similarity to last epoch's")
    below.set(xlabel="epoch", ylabel="share, cosine", ylim=(0, 1.03))
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


# All stages in order.


def parse_arguments() -> argparse.Namespace:
    """Command line, checked before anything is computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of images, networks, batches (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=24, help="of the classifier; OAA+: 2/3 (default: %(default)s)")
    parser.add_argument("--images", type=int, default=500, help="how many to draw (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    for name, least in (("epochs", 1), ("images", 20), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    try:
        torch.zeros(1, device=args.device).item()  # the meta device can make a tensor, but not read it
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: torch cannot use {args.device!r} here: {str(error).splitlines()[0]}")
    try:
        (args.out / "pseudo_labels").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a folder or a name for a new one, got {str(args.out)!r}: {error.strerror}")
    return args


def main() -> None:
    """Draw, train, accumulate, train on what was accumulated, label, score, show."""
    args = parse_arguments()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA needs it to repeat itself
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(
        1
    )  # tensors this small gain little from more, and the numbers do not depend on how many there are
    matplotlib.use("Agg")
    seed, device, integral_epochs = args.seed, torch.device(args.device), max(1, args.epochs * 2 // 3)

    images, labels, masks = draw_data(args.images, seed)
    model, accumulators, diary, moments = train_classifier(images, labels, masks, args.epochs, seed, device)
    soft_labels = accumulators["max"][range(len(images))].cpu()
    mce = train_integral_model(images, soft_labels, oaa_lib.multilabel_cross_entropy, integral_epochs, seed, device)
    hybrid = train_integral_model(images, soft_labels, oaa_lib.hybrid_loss, integral_epochs, seed, device)

    cam, mirror_cam = attention_of(model, images, device), attention_of(model, images.flip(-1), device).flip(-1)
    attention = {
        "CAM": cam,
        "CAM, flip-averaged": (cam + mirror_cam) / 2,  # the control: part of what accumulation gives is more views
        "mean": accumulators["mean"][range(len(images))].cpu(),
        "max": soft_labels,
        "max + MCE": attention_of(mce, images, device),
        "max + hybrid": attention_of(hybrid, images, device),
    }
    rows = {name: score(maps, labels, masks) for name, maps in attention.items()}
    pseudo_labels = make_pseudo_labels(attention["max + hybrid"], labels, rows["max + hybrid"]["threshold"])
    half, ignored = len(images) // 2, pseudo_labels == 255
    matrix = oaa_lib.ConfusionMatrix(len(CLASSES) + 1)
    matrix.update(pseudo_labels[half:].masked_fill(ignored[half:], 0), masks[half:].masked_fill(ignored[half:], 255))
    cells = soft_labels[labels]
    results = {
        "settings": {
            **vars(args),
            "out": str(args.out),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "tuned_on": half,
        "reported_on": len(images) - half,
        "rows": rows,
        "pseudo_labels": {"mean_iou": 100 * matrix.mean_iou(), "ignored": ignored.float().mean().item()},
        "gate_pass_rate": accumulators["max"].accepted / accumulators["max"].offered,
        "pairs": int(labels.sum()),
        "pairs_never_accumulated": int((labels & ~accumulators["max"].accumulated.cpu()).sum()),
        "constraint_threshold": CONSTRAINT,
        "share_in_n_minus": (cells <= CONSTRAINT).float().mean().item(),
        "share_in_n_minus_of_the_paper": (cells == 0).float().mean().item(),
        "epochs": diary,
    }

    shown = [(f"epoch {epoch}", maps, diary[epoch - 1]["rows"]["CAM"]) for epoch, maps in moments.items()]
    titles = {"CAM": "last: CAM", "mean": "OAA mean", "max": "OAA max", "max + hybrid": "OAA+"}
    shown += [(title, attention[name], rows[name]) for name, title in titles.items()]
    columns = {f"{title}\n{row['reported']:.1f}": (maps, row["threshold"]) for title, maps, row in shown}
    draw_contact_sheet(args.out / "contact_sheet.png", columns, images, labels, masks, pseudo_labels)
    draw_curves(args.out / "cue_miou_over_epochs.png", diary, rows)
    accumulators["max"].save(args.out / "maps.safetensors")
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    for i, label in enumerate(pseudo_labels.numpy().astype(np.uint8)):
        png = Image.fromarray(label, mode="P")
        png.putpalette(PALETTE.tobytes())
        png.save(args.out / "pseudo_labels" / f"{i:04d}.png")
    print_results(results)


def print_results(results: dict[str, Any]) -> None:
    """The rows of Table 2, what explains them, and one line to remember."""
    rows, labels, diary = results["rows"], results["pseudo_labels"], results["epochs"]
    cam, best, plus = (rows[name]["reported"] for name in ("CAM", "max", "max + hybrid"))
    print(f"\nCue mIoU (%), seed {results['settings']['seed']}. The constant background, threshold, is chosen per row")
    print(f"on {results['tuned_on']} images (tuned); the other {results['reported_on']} report it (reported).\n")
    print(f"{'':22}{'threshold':>10}{'tuned':>8}{'reported':>10}{'vs CAM':>8}")
    for name, row in rows.items():
        print(
            f"{name:22}{row['threshold']:10.2f}{row['tuned']:8.1f}{row['reported']:10.1f}{row['reported'] - cam:+8.1f}"
        )
    first, last = (f"{diary[i]['gate_pass_rate']:.1%}" for i in (0, -1))
    similar = [f"{entry['similarity']:.3f}" for entry in diary[1:]] or ["(one epoch)"]
    print(f"""
Pseudo labels (max + hybrid)   mIoU {labels["mean_iou"]:.1f}, {labels["ignored"]:.2%} of the pixels ignored
Maps that passed the gate      {results["gate_pass_rate"]:.1%}; first epoch {first}, last {last}
Pairs that never passed        {results["pairs_never_accumulated"]} of {results["pairs"]}
Similarity to the epoch before {similar[0]} at first, {similar[len(similar) // 2]} half-way, {similar[-1]} at last; \
above 0.95 attention hardly moves
Soft labels in N-              {results["share_in_n_minus"]:.1%} at threshold {CONSTRAINT}; \
{results["share_in_n_minus_of_the_paper"]:.1%} at the paper's 0

max {best:.1f}, CAM {cam:.1f} ({best - cam:+.1f}), OAA+ {plus:.1f}; outputs in {results["settings"]["out"]}""")


if __name__ == "__main__":
    main()
