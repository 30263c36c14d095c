"""Online attention accumulation from end to end, on images drawn here: nothing to download, two minutes on one core.

The classifier begins with the large bodies of the objects and ends with the small glyphs that tell their classes for
certain (drawn_images.py), so its CAM covers a part. OAA keeps what it looked at on the way. The masks only score.

    python examples/quickstart.py                           # everything goes to out/quickstart
    python examples/quickstart.py --images 40 --epochs 1    # seconds: does it run?

Two runs with one seed give the same numbers on one machine. What differs from the paper:
1. Drawn images and a small network trained from scratch by Adam, instead of PASCAL VOC and VGG-16 from ImageNet.
2. Rows are scored as cues: each pixel takes the class of its strongest attention, or background below a constant. That
   constant is chosen for each row on one half of the images; the row is reported on the other half.
3. A fifth of the images show no object, so that background is no evidence of anything; class scores start negative.
4. Soft labels up to 0.5, instead of exact zeros, are the constraint region N-, in the MCE row as well.
5. Random horizontal flips, undone before a map is accumulated.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from drawn_images import CLASSES, SIZE, draw_contact_sheet, draw_data, draw_image, score  # noqa: F401
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import oaa_lib
from oaa_lib import AttentionAccumulator, View
from oaa_lib.plotting import voc_palette

BATCH_SIZE, LEARNING_RATE = 16, 3e-3
# A soft label is the probability that a place belongs to the class (section 3.3): up to 0.5 it more likely does not.
CONSTRAINT = 0.5  # for both integral losses


class Network(nn.Module):
    """A small backbone at stride 4 and the library's head (3.1): of the classifier, and of the integral model."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.head = oaa_lib.CAMHead(64, len(CLASSES), hidden_channels=64, num_convs=1)
        nn.init.constant_(self.head.class_aware.bias, -2)  # a place is no class until it shows evidence

    def forward(self, images: Tensor) -> oaa_lib.CAMOutput:
        """Images (B, 3, H, W) -> logits (B, C), score maps (B, C, H / 4, W / 4)."""
        return self.head(self.backbone(images))


@torch.no_grad()
def attention_of(model: Network, images: Tensor, device: torch.device) -> Tensor:
    """Attention (N, C, h, w) on the host, from a single view of each image."""
    model.eval()
    score_maps = torch.cat([model(batch.to(device)).score_maps.cpu() for batch in images.split(100)])
    return oaa_lib.normalize_attention(score_maps)  # Eq. 2


def start_training(epochs: int, seed: int, device: torch.device) -> tuple[Network, Any, Any, torch.Generator]:
    """A new network, its optimizer, its schedule (a tenth of the rate for the last quarter), the order of batches."""
    torch.manual_seed(seed)
    model = Network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, epochs * 3 // 4)])
    return model, optimizer, schedule, torch.Generator().manual_seed(seed)


def shuffled_batches(images: Tensor, order: torch.Generator) -> Iterator[tuple[Tensor, list[View], Tensor]]:
    """One epoch: indices (B,), the view of each image that is shown (half are mirrored), these views (B, 3, H, W)."""
    for indices in torch.randperm(len(images), generator=order).split(BATCH_SIZE):
        flipped = torch.rand(len(indices), generator=order) < 0.5
        batch = images[indices].flip(-1).where(flipped[:, None, None, None], images[indices])
        yield indices, [View(flip=flip) for flip in flipped.tolist()], batch


def train_classifier(images: Tensor, labels: Tensor, masks: Tensor, args: argparse.Namespace) -> tuple[Any, ...]:
    """Train on image labels, accumulating (3.2): classifier, accumulators, a diary, CAMs by epoch."""
    epochs, device = args.epochs, torch.device(args.device)
    model, optimizer, schedule, order = start_training(epochs, args.seed, device)
    options = {"map_size": (SIZE // 4, SIZE // 4), "device": device}
    accumulators = {name: AttentionAccumulator(labels, fusion=name, **options) for name in ("mean", "max")}
    latest = AttentionAccumulator(labels, fusion="latest", gate=None, **options)
    diary, cams, everything, before, seen = [], [], range(len(images)), None, (0, 0)
    for epoch in (bar := tqdm(range(1, epochs + 1), "classifier + OAA", unit="epoch")):
        model.train()
        losses = []
        for indices, views, batch in shuffled_batches(images, order):
            out = model(batch.to(device))
            loss = F.binary_cross_entropy_with_logits(out.logits, labels[indices].float().to(device))  # of Eq. 1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            for accumulator in (*accumulators.values(), latest):
                accumulator.update(indices, out.score_maps, out.logits, views)  # Eq. 2, the gate, Eq. 3-5 and 10
        schedule.step()
        # What decides whether accumulation pays: how many maps pass the gate, and whether attention still moves.
        accepted, offered = accumulators["max"].accepted, accumulators["max"].offered
        now, cam = latest[everything].cpu()[labels], attention_of(model, images, device)
        maps = {"CAM": cam, **{name: accumulator[everything] for name, accumulator in accumulators.items()}}
        similarity = math.nan if before is None else oaa_lib.attention_similarity(before, now).nanmean().item()
        entry = {
            "epoch": epoch,
            "loss": torch.stack(losses).mean().item(),
            "gate_pass_rate": (accepted - seen[0]) / (offered - seen[1]),
            "similarity": None if math.isnan(similarity) else similarity,
            "rows": {name: score(value, labels, masks) for name, value in maps.items()},
        }
        diary.append(entry)
        cams.append(cam)
        before, seen = now, (accepted, offered)
        bar.set_postfix(loss=f"{entry['loss']:.3f}", passed=f"{entry['gate_pass_rate']:.0%}")
    return model, accumulators, diary, cams


def train_integral_model(images: Tensor, oaa: AttentionAccumulator, loss_of: Any, epochs: int, seed: int) -> Network:
    """Train a new network on cumulative attention (3.3): score maps against soft labels, no pooling."""
    model, optimizer, schedule, order = start_training(epochs, seed, oaa.device)
    for _ in tqdm(range(epochs), f"OAA+, {loss_of.__name__}", unit="epoch"):
        for indices, views, batch in shuffled_batches(images, order):
            score_maps, soft_labels = model(batch.to(oaa.device)).score_maps, oaa.soft_labels(indices, views)
            loss = loss_of(score_maps, soft_labels, threshold=CONSTRAINT)  # Eq. 6, or 7-9
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model


def make_pseudo_labels(attention: Tensor, labels: Tensor, background: float) -> Tensor:
    """Pseudo labels (N, SIZE, SIZE) (section 4): 0 background, c + 1 class c, 255 ignored."""
    # The background cue is constant and some images truly show nothing: the release's own thresholds are off.
    options = {"background": background, "foreground_threshold": 0, "min_foreground": 0, "rescale": False}
    images = zip(F.interpolate(attention, (SIZE, SIZE), mode="bilinear"), labels, strict=True)
    return torch.stack([oaa_lib.pseudo_label_from_cues(a[k], k.nonzero()[:, 0], **options) for a, k in images])


def draw_curves(diary: list[dict[str, Any]], rows: dict[str, dict[str, float]]) -> Figure:
    """Cue mIoU over the epochs, and below it what drives it."""
    epochs, figure = range(1, len(diary) + 1), Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, label in (("max", "OAA max"), ("mean", "OAA mean"), ("CAM", "CAM, this epoch")):
        above.plot(epochs, [entry["rows"][name]["reported"] for entry in diary], ".-", label=label)
    for name, style in (("max + hybrid", "--"), ("max + MCE", ":")):
        above.axhline(rows[name]["reported"], color="C3", linestyle=style, label=f"OAA+ after training: {name}")
    above.set(ylabel="cue mIoU (%), reported half", title="What attention covers while the classifier trains")
    below.plot(epochs, [entry["gate_pass_rate"] for entry in diary], "C4.-", label="maps that pass the gate")
    below.plot(epochs[1:], [entry["similarity"] for entry in diary[1:]], "C5.-", label="similarity to last epoch's")
    below.set(xlabel="epoch", ylabel="share, cosine", ylim=(0, 1.03))
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    return figure


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
    if args.seed >= 2**32:
        parser.error(f"--seed: expected at most {2**32 - 1}, got {args.seed}")
    try:
        torch.zeros(1, device=args.device).item()  # the meta device can make a tensor, but not read it
        (args.out / "pseudo_labels").mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: torch cannot use {args.device!r} here: {str(error).splitlines()[0]}")
    except OSError as error:
        parser.error(f"--out: expected a folder or a name for a new one, got {str(args.out)!r}: {error.strerror}")
    return args


def main() -> None:
    """Draw, train, accumulate, train on what was accumulated, label, score, show."""
    args = parse_arguments()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA needs it to repeat itself
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # tensors this small gain little from more; the numbers do not depend on how many
    images, labels, masks = draw_data(args.images, args.seed)
    model, accumulators, diary, cams = train_classifier(images, labels, masks, args)
    oaa, losses = accumulators["max"], (oaa_lib.multilabel_cross_entropy, oaa_lib.hybrid_loss)
    mce, hybrid = (train_integral_model(images, oaa, loss, max(1, args.epochs * 2 // 3), args.seed) for loss in losses)
    cam, mirror_cam = attention_of(model, images, oaa.device), attention_of(model, images.flip(-1), oaa.device).flip(-1)
    attention = {
        "CAM": cam,
        "CAM, flip-averaged": (cam + mirror_cam) / 2,  # the control: part of what accumulation gives is more views
        "mean": accumulators["mean"][range(len(images))].cpu(),
        "max": oaa[range(len(images))].cpu(),
        "max + MCE": attention_of(mce, images, oaa.device),
        "max + hybrid": attention_of(hybrid, images, oaa.device),
    }
    rows = {name: score(maps, labels, masks) for name, maps in attention.items()}
    pseudo_labels = make_pseudo_labels(attention["max + hybrid"], labels, rows["max + hybrid"]["threshold"])
    half, ignored = len(images) // 2, pseudo_labels == 255
    truth, matrix = masks.masked_fill(ignored, 255), oaa_lib.ConfusionMatrix(len(CLASSES) + 1)
    matrix.update(pseudo_labels[half:], truth[half:])
    results = {
        "settings": {**vars(args), "out": str(args.out), "torch": torch.__version__, "threads": 1},
        "tuned_on": half,
        "reported_on": len(images) - half,
        "rows": rows,
        "pseudo_labels": {"mean_iou": 100 * matrix.mean_iou(), "ignored": ignored.float().mean().item()},
        "gate_pass_rate": oaa.accepted / oaa.offered,
        "pairs": int(labels.sum()),
        "pairs_never_accumulated": int(oaa.statistics().never_accumulated.sum()),
        "constraint_threshold": CONSTRAINT,
        "share_in_n_minus": (attention["max"][labels] <= CONSTRAINT).float().mean().item(),
        "share_in_n_minus_of_the_paper": (attention["max"][labels] == 0).float().mean().item(),
        "epochs": diary,
    }
    moments = sorted({max(1, round(share * args.epochs)) for share in (0.15, 0.35, 0.6)})
    shown = {f"epoch {epoch}": (cams[epoch - 1], diary[epoch - 1]["rows"]["CAM"]) for epoch in moments}
    titles = {"CAM": "last: CAM", "mean": "OAA mean", "max": "OAA max", "max + hybrid": "OAA+"}
    shown |= {title: (attention[name], rows[name]) for name, title in titles.items()}
    draw_contact_sheet(shown, images, labels, masks, pseudo_labels).savefig(args.out / "contact_sheet.png", dpi=85)
    draw_curves(diary, rows).savefig(args.out / "cue_miou_over_epochs.png", dpi=130)
    oaa.save(args.out / "maps.safetensors")
    (args.out / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False))
    write_label_images(pseudo_labels, args.out / "pseudo_labels")
    print_results(results)


def write_label_images(labels: Tensor, folder: Path) -> None:
    """NUMBER.png of each image, in place of an earlier run's, which may have drawn more images."""
    files = (folder / f"{i:04d}.png" for i in count())
    for old in takewhile(Path.exists, files):
        old.unlink()
    for i, label in enumerate(labels.byte()):
        png = Image.fromarray(label.numpy(), mode="P")
        png.putpalette(voc_palette().tobytes())
        png.save(folder / f"{i:04d}.png")


def print_results(results: dict[str, Any]) -> None:
    """The rows of Table 2, what explains them, and one line to remember."""
    rows, labels, diary = results["rows"], results["pseudo_labels"], results["epochs"]
    first, last = (diary[i]["gate_pass_rate"] for i in (0, -1))
    cam, best, plus = (rows[name]["reported"] for name in ("CAM", "max", "max + hybrid"))
    print(f"\nCue mIoU (%), seed {results['settings']['seed']}. The constant background, threshold, is chosen per row")
    print(f"on {results['tuned_on']} images (tuned); the other {results['reported_on']} report it (reported).\n")
    print(f"{'':22}{'threshold':>10}{'tuned':>8}{'reported':>10}{'vs CAM':>8}")
    for name, r in rows.items():
        print(f"{name:22}{r['threshold']:10.2f}{r['tuned']:8.1f}{r['reported']:10.1f}{r['reported'] - cam:+8.1f}")
    similarities = [entry["similarity"] for entry in diary]
    similar = ["-" if value is None else f"{value:.3f}" for value in similarities[1:]] or ["(one epoch)"]
    print(f"""
Pseudo labels (max + hybrid)   mIoU {labels["mean_iou"]:.1f}, {labels["ignored"]:.2%} of the pixels ignored
Maps that passed the gate      {results["gate_pass_rate"]:.1%}; first epoch {first:.1%}, last {last:.1%}
Pairs that never passed        {results["pairs_never_accumulated"]} of {results["pairs"]}
Similarity to the epoch before {similar[0]} at first, {similar[len(similar) // 2]} half-way, {similar[-1]} at last; \
above 0.95 attention hardly moves
Soft labels in N-              {results["share_in_n_minus"]:.1%} at threshold {CONSTRAINT}; \
{results["share_in_n_minus_of_the_paper"]:.1%} at the paper's 0

max {best:.1f}, CAM {cam:.1f} ({best - cam:+.1f}), OAA+ {plus:.1f}; outputs in {results["settings"]["out"]}""")


if __name__ == "__main__":
    main()
