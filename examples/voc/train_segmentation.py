"""Stage 4: train DeepLab-LargeFOV on proxy labels (paper, section 4).

--labels is a folder of label images NAME.png: those of make_pseudo_labels.py, or true masks, for an upper bound. Images
without a label are left out and counted. Writes to --out: checkpoint.pt, log.csv, settings.json. Run it again with the
same --out to go on after the last checkpoint. With several GPUs:

    torchrun --nproc-per-node 4 examples/voc/train_segmentation.py --voc-root ... --labels ... --out ...
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data import VOCFolder, read_label
from deeplab import SEGMENTATION_NETWORKS, build_segmentation_network
from images import png
from optimization import set_rate
from options import add_options, add_training_arguments, resolve, training_split
from PIL import Image
from processes import Process, join
from recipes import Segmentation
from samples import Sample, to_tensor
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import Dataset
from training import Run

from oaa_lib import View

IGNORE = 255


class SegmentationImages(Dataset[Sample]):
    """Random scales, crops and mirror images of photographs together with their label images.

    Args:
        folder: the photographs.
        labels: folder of label images.
        network: for whose normalisation.
        settings: of the recipe.
    """

    def __init__(self, folder: VOCFolder, labels: Path, network: Any, settings: Segmentation) -> None:
        self.folder, self.labels, self.settings = folder, labels, settings
        self.mean, self.std = network.mean, network.std
        self.of_others = not (labels / "settings.json").exists()  # which make_pseudo_labels.py writes

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Sample:
        name = self.folder.names[index]
        photograph, label = self.folder.photograph(name), read_label(png(self.labels, name))
        if self.of_others:
            self.folder.drawn_size(name)  # ends where the photograph and the label may lie differently
        if tuple(label.shape) != (photograph.height, photograph.width):
            raise SystemExit(
                f"{name}: expected a label image of the photograph's size {(photograph.height, photograph.width)}, got "
                f"{tuple(label.shape)}"
            )
        if ((label >= len(self.folder.classes) + 1) & (label != IGNORE)).any():
            raise SystemExit(f"{name}: the label image has values above {len(self.folder.classes)} other than {IGNORE}")
        scale = self.settings.scales[int(torch.randint(len(self.settings.scales), ()))]
        height, width = (max(round(side * scale), 1) for side in label.shape)
        image = to_tensor(photograph.resize((width, height), Image.Resampling.BILINEAR), self.mean, self.std)
        label = F.interpolate(label[None, None].float(), (height, width), mode="nearest-exact")[0, 0].long()
        if torch.rand(()) < self.settings.flip:
            image, label = image.flip(-1), label.flip(-1)
        return Sample(name, View(), *random_crop(image, label, self.settings.crop))


def random_crop(image: Tensor, label: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """A square of both; what a smaller image does not fill is its mean colour and ignored."""
    height, width = label.shape
    missing = (0, max(side - width, 0), 0, max(side - height, 0))
    image, label = F.pad(image, missing), F.pad(label, missing, value=IGNORE)
    top, left = (int(torch.randint(length - side + 1, ())) for length in label.shape)
    return image[:, top : top + side, left : left + side], label[top : top + side, left : left + side]


def segmentation_loss(scores: Tensor, labels: Tensor, *, align_corners: bool) -> Tensor:
    """Cross entropy at the labels' resolution: the mean over an image's valid pixels, then over the images.

    An image without valid pixels counts 0. So a batch of B is B accumulated steps of one image, as Caffe does it.

    Args:
        scores: (B, C + 1, h, w) float.
        labels: (B, H, W) int64, 255 ignored.
        align_corners: of the bilinear resize, whether cells are centred on the corner pixels.
    """
    full = F.interpolate(scores.float(), labels.shape[1:], mode="bilinear", align_corners=align_corners)
    each = F.cross_entropy(full, labels, ignore_index=IGNORE, reduction="none").sum((1, 2))
    return (each / (labels != IGNORE).sum((1, 2)).clamp(min=1)).mean()


def main() -> None:
    """Parse the arguments, join the other processes, train."""
    arguments = parse_arguments()
    with join(arguments.device) as process:
        train(arguments, process)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line, or these."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, SEGMENTATION_NETWORKS)
    parser.add_argument("--labels", type=Path, required=True, help="folder of label images NAME.png")
    add_options(parser, "segmentation")
    return parser.parse_args(words)


def train(arguments: argparse.Namespace, process: Process) -> None:
    """Run the stage."""
    settings: Segmentation = resolve(arguments, "segmentation", arguments.backbone)
    check_crop(arguments.backbone, settings.crop)
    kind = SEGMENTATION_NETWORKS[arguments.backbone]
    folder = VOCFolder(arguments.voc_root, training_split(arguments))
    labelled = [name for name in folder.names if png(arguments.labels, name).exists()]
    if not labelled:
        raise SystemExit(f"{arguments.labels} has no label image of any of the {len(folder)} images (--labels)")
    if all((read_label(png(arguments.labels, name)) == IGNORE).all() for name in labelled):  # it stops at the first
        raise SystemExit(
            f"{arguments.labels}: every pixel of every label is ignored, so nothing can be learnt (--labels)"
        )
    if process.is_first and len(labelled) < len(folder):
        print(f"{len(folder) - len(labelled)} of {len(folder)} images have no label and are left out")
    chosen = max(round(settings.proportion * len(labelled)), 1)  # Table 3: drawn at random, by the seed
    folder.names = sorted(random.Random(f"proportion/{arguments.seed}").sample(labelled, chosen))
    run = Run(arguments, settings, folder, process)
    images = SegmentationImages(folder, arguments.labels, kind, settings)
    network, optimizer = run.start(build_segmentation_network, len(folder.classes) + 1)
    learn(run, images, network, optimizer, align_corners=kind.geometry.centred)
    if process.is_first:
        print(f"done: {settings.iterations} iterations on {len(folder)} images -> {run.path}")


def check_crop(backbone: str, crop: int) -> None:
    """End where the network would not map a crop to whole cells."""
    fitting = SEGMENTATION_NETWORKS[backbone].geometry.side(crop)
    if fitting != crop:
        raise SystemExit(f"--crop: {backbone} takes whole cells, such as {fitting}, got {crop}")


def learn(run: Run, images: Dataset[Sample], network: Any, optimizer: Optimizer, *, align_corners: bool) -> None:
    """Train the network on the labels, without waiting for the device."""
    for step, (part,) in run.steps(images):  # crops have one shape
        set_rate(optimizer, run.settings, step)
        with run.autocast():
            scores = network(part.images)
        run.backward(segmentation_loss(scores, part.targets, align_corners=align_corners), part)
        run.step(optimizer, share_ignored=(part.targets == IGNORE).float().mean())


if __name__ == "__main__":
    main()
