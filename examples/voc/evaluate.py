"""Stage 5: segment images with a trained network, and score them (mean IoU of global counts, as VOC does).

Writes palette label images NAME.png to --out, in the form that VOC's server takes (put them in a folder
results/VOC2012/Segmentation/comp6_test_cls); images that are there already are passed over. Without masks (VOC's test
split) it only writes. Class probabilities are averaged over --test-scales, mirror images with --test-flip, and windows
of --window pixels. There is no CRF yet.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from data import VOCFolder, network_size, read_label, to_tensor, write_label
from deeplab import SegmentationNetwork, build_segmentation_network
from PIL import Image
from recipes import Evaluation, add_options, resolve
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from training import add_data_arguments, finished, read_json, write_text

from oaa_lib import ConfusionMatrix


@torch.no_grad()
def probabilities(network: SegmentationNetwork, photograph: Image.Image, settings: Evaluation) -> Tensor:
    """(C + 1, H, W) float32 class probabilities at the photograph's size: the average of all views."""
    size = (photograph.height, photograph.width)
    total = torch.zeros(())
    views = [
        (scale, flip) for scale in settings.test_scales for flip in ([False, True] if settings.test_flip else [False])
    ]
    for scale, flip in views:
        height, width = network_size(size, round(min(size) * scale), network.geometry)
        image = to_tensor(photograph.resize((width, height), Image.Resampling.BILINEAR), network.mean, network.std)
        image = image[None].to(next(network.parameters()).device)
        shown = windowed(network, image.flip(-1) if flip else image, settings)
        shown = shown.flip(-1) if flip else shown
        align = network.geometry.centred
        total = total.to(shown) + F.interpolate(shown, size, mode="bilinear", align_corners=align)[0]
    return total / len(views)


def windowed(network: SegmentationNetwork, image: Tensor, settings: Evaluation) -> Tensor:
    """(1, C + 1, H, W) probabilities of an image (1, 3, H, W), averaged where windows overlap."""
    height, width = image.shape[-2:]
    side = network.geometry.side(settings.window) if settings.window else max(height, width)
    total, count = torch.zeros((), device=image.device), torch.zeros(1, 1, height, width, device=image.device)
    for top in starts(height, side, settings.overlap):
        for left in starts(width, side, settings.overlap):
            part = image[..., top : top + side, left : left + side]
            scores = network(part).float()
            scores = F.interpolate(scores, part.shape[-2:], mode="bilinear", align_corners=network.geometry.centred)
            place = (left, width - left - part.shape[-1], top, height - top - part.shape[-2])
            total = total + F.pad(scores.softmax(1), place)
            count[..., top : top + side, left : left + side] += 1
    return total / count


def starts(length: int, side: int, overlap: float) -> list[int]:
    """Where windows begin: evenly spread, the last one ends at the border, and they overlap by the share or more."""
    if length <= side:
        return [0]
    steps = -(-(length - side) // max(round(side * (1 - overlap)), 1))
    return [round(step * (length - side) / steps) for step in range(steps + 1)]


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, help="folder of train_segmentation.py")
    parser.add_argument("--split", default="val", help="list of the images (default: val)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the label images and scores.json")
    add_options(parser, "evaluation")
    arguments = parser.parse_args()
    run, state = finished(arguments.run)
    backbone, classes = run["arguments"]["backbone"], run["data"]["classes"]
    settings = resolve(arguments, "evaluation", backbone)
    folder = VOCFolder(arguments.voc_root, arguments.split, labelled=False)
    if folder.classes != classes:
        raise SystemExit(f"{arguments.run} was trained on other classes than those of {arguments.voc_root}")
    network = build_segmentation_network(backbone, len(classes) + 1, weights="none")
    network.load_state_dict(state["network"])
    network.to(arguments.device, memory_format=torch.channels_last).eval()

    arguments.out.mkdir(parents=True, exist_ok=True)
    record, kept = arguments.out / "settings.json", json.loads(json.dumps({"run": run, "settings": vars(settings)}))
    if record.exists() and read_json(record) != kept:
        raise SystemExit(f"{arguments.out} was made with other settings; choose another --out or remove the folder")
    write_text(record, json.dumps(kept, indent=1))
    matrix, unmasked = ConfusionMatrix(len(classes) + 1), 0
    for name in tqdm(folder.names, desc=arguments.split):
        path = arguments.out / f"{name}.png"
        if not path.exists():
            best = probabilities(network, folder.photograph(name), settings).argmax(0)
            write_label(path, best.cpu().numpy().astype(np.uint8))
        if folder.has_mask(name):
            matrix.update(read_label(path), folder.mask(name))
        else:
            unmasked += 1
    if unmasked:
        print(f"{unmasked} of {len(folder)} images have no mask and are not scored")
    if unmasked < len(folder):
        ious = dict(zip(["background", *classes], matrix.iou().tolist(), strict=True))
        result = {"split": arguments.split, "images": len(folder) - unmasked, "mean_iou": matrix.mean_iou()}
        write_text(arguments.out / "scores.json", json.dumps(result | {"class_iou": ious}, indent=1))
        for name, iou in ious.items():
            print(f"{name:16} {100 * iou:6.2f}")
        print(f"done: mean IoU {100 * matrix.mean_iou():.2f} on {len(folder) - unmasked} images of {arguments.split}")
    else:
        print(f"done: {len(folder)} label images -> {arguments.out}")


if __name__ == "__main__":
    main()
