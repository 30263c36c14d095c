"""Stage 3: proxy segmentation labels from attention maps and a background cue (paper, section 4).

Writes palette label images NAME.png (0 background, class c is c + 1, 255 ignored) to --out; images that are there
already are passed over. VOC's saliency maps are 8-bit NAME.png; without them name a constant background score.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from data import VOCFolder
from evaluate_cues import read_map
from PIL import Image
from tqdm import tqdm

from oaa_lib import pseudo_label_from_cues


def voc_palette() -> list[int]:
    """VOC's colours, 256 x RGB: bit k of the label goes to bit 7 - k // 3 of channel k % 3."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        value = (np.arange(256) >> bit) & 1
        colours[:, bit % 3] |= (value << (7 - bit // 3)).astype(np.uint8)
    return colours.flatten().tolist()


def write_label(path: Path, label: np.ndarray) -> None:
    """One label image (H, W) with VOC's palette; the file appears whole or not at all."""
    image = Image.fromarray(label.astype(np.uint8), mode="P")
    image.putpalette(voc_palette())
    partial = path.with_suffix(".partial")
    image.save(partial, format="PNG")
    partial.replace(path)


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--split", default="train")
    parser.add_argument("--maps", type=Path, required=True, help="folder of NAME_CLASS.png")
    cue = parser.add_mutually_exclusive_group(required=True)
    cue.add_argument("--saliency", type=Path, help="folder of 8-bit saliency maps NAME.png")
    cue.add_argument("--background", type=float, help="constant background score in [0, 1], e.g. the cues' threshold")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.background is not None and not 0 <= arguments.background <= 1:
        parser.error(f"--background: expected a score in [0, 1], got {arguments.background}")

    data = VOCFolder(arguments.voc_root, arguments.split)
    arguments.out.mkdir(parents=True, exist_ok=True)
    written, without_saliency, ignored = 0, [], []
    for name in tqdm(data.names, desc="pseudo labels"):
        if (arguments.out / f"{name}.png").exists():
            continue
        saliency = None
        if arguments.saliency is not None:
            if not (arguments.saliency / f"{name}.png").exists():
                without_saliency.append(name)  # the release's rule: no saliency map, no label
                continue
            saliency = read_map(arguments.saliency / f"{name}.png").float() / 255
        class_ids = data.class_ids(name)
        maps = [read_map(arguments.maps / f"{name}_{c}.png").float() / 255 for c in class_ids]
        with Image.open(data.image_path(name)) as photograph:
            size = photograph.height, photograph.width
        attention = torch.stack(maps) if maps else torch.zeros(0, *size)
        # A constant background is the threshold itself; the release's 0.3 beside it would zero a lower one.
        floor = 0.3 if arguments.background is None else 0.0
        label = pseudo_label_from_cues(
            attention, class_ids, saliency, background=arguments.background, foreground_threshold=floor
        )
        write_label(arguments.out / f"{name}.png", label.numpy())
        ignored.append((label == 255).float().mean())
        written += 1
    if without_saliency:
        print(f"{len(without_saliency)} images have no saliency map and got no label, first {without_saliency[0]}")
    share = f", {torch.stack(ignored).mean():.1%} of the pixels ignored" if ignored else ""
    print(f"done: {written} labels written, {len(data) - written - len(without_saliency)} were there{share}")


if __name__ == "__main__":
    main()
