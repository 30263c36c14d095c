"""Stage 4: train DeepLab-LargeFOV on proxy labels (paper, section 4).

--labels is a folder of label images NAME.png: those of make_pseudo_labels.py, or true masks, for an upper bound. Images
without a label are left out and counted. Writes to --out: checkpoint.pt, log.csv, settings.json. Run it again with the
same --out to go on after the last checkpoint. With several GPUs:

    torchrun --nproc-per-node 4 examples/voc/train_segmentation.py --voc-root ... --labels ... --out ...
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from data import VOCFolder, read_label
from deeplab import SegmentationNetwork, build_segmentation_network
from files import ends_with
from images import png
from optimization import make_optimizer, set_rate
from PIL import Image
from processes import Process, autocast, join, state_of
from recipes import Segmentation, add_options, resolve
from samples import Sample, to_tensor
from stream import Part
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from training import OTHER_RUN, Run, add_arguments, training_split

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

    def __init__(self, folder: VOCFolder, labels: Path, network: SegmentationNetwork, settings: Segmentation) -> None:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--labels", type=Path, required=True, help="folder of label images NAME.png")
    add_options(parser, "segmentation")
    arguments = parser.parse_args()
    with join(arguments.device) as process:
        train(arguments, process)


def train(arguments: argparse.Namespace, process: Process) -> None:
    """Run the stage."""
    settings = resolve(arguments, "segmentation", arguments.backbone)
    folder = VOCFolder(arguments.voc_root, training_split(arguments))
    labelled = [name for name in folder.names if png(arguments.labels, name).exists()]
    if not labelled:
        raise SystemExit(f"{arguments.labels} has no label image of any of the {len(folder)} images (--labels)")
    if process.is_first and len(labelled) < len(folder):
        print(f"{len(folder) - len(labelled)} of {len(folder)} images have no label and are left out")
    chosen = max(round(settings.proportion * len(labelled)), 1)  # Table 3: drawn at random, by the seed
    folder.names = sorted(random.Random(f"proportion/{arguments.seed}").sample(labelled, chosen))
    torch.manual_seed(arguments.seed)
    with ends_with("--weights", "expected 'default', 'none' or a file that fits --backbone", ValueError):
        network = build_segmentation_network(arguments.backbone, len(folder.classes) + 1, arguments.weights)
    geometry = network.geometry
    fitting = geometry.side(settings.crop)
    if fitting != settings.crop:
        raise SystemExit(f"--crop: {arguments.backbone} takes whole cells, such as {fitting}, got {settings.crop}")
    run = Run(arguments, settings, folder, process)
    images = SegmentationImages(folder, arguments.labels, network, settings)
    optimizer = make_optimizer(network, settings)

    first, saved = 0, run.load()
    if saved is not None:
        first = saved["step"]
        with ends_with(f"{run.path}/checkpoint.pt", OTHER_RUN, KeyError, RuntimeError, ValueError):
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
    network: Any = process.wrap(network).train()

    def state() -> dict[str, Any]:
        return {"network": state_of(network), "optimizer": optimizer.state_dict()}

    for step, (part,) in run.steps(first, images, state):
        options = {"amp": arguments.amp, "align_corners": geometry.centred}
        loss = train_step(step, part, network, optimizer, settings, process, **options)
        run.log(loss=loss, share_ignored=(part.targets == IGNORE).float().mean())
    if process.is_first:
        print(f"done: {settings.iterations} iterations on {len(folder)} images -> {run.path}")


def train_step(
    step: int,
    part: Part,
    network: Any,
    optimizer: torch.optim.Optimizer,
    settings: Segmentation,
    process: Process,
    *,
    amp: bool,
    align_corners: bool,
) -> Tensor:
    """Learn from a batch, without waiting for the device; returns the loss.

    Args:
        step: of the optimiser, from 0.
        part: this process's share of the batch.
        network: in training mode.
        optimizer: of `make_optimizer`.
        settings: of the recipe.
        process: this one.
        amp: whether the forward pass is in bfloat16.
        align_corners: see `segmentation_loss`.
    """
    set_rate(optimizer, settings, step)
    labels = part.targets.to(process.device, non_blocking=True)
    with autocast(process, amp):
        scores = network(part.images.to(process.device, non_blocking=True))
    loss = segmentation_loss(scores, labels, align_corners=align_corners)
    loss = loss * (len(labels) * process.world / settings.batch_size)  # gradients are averaged over processes
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


if __name__ == "__main__":
    main()
