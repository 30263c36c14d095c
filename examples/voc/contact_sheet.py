"""A picture of a run: attention during the training, and what each method makes of it, one image a row."""

import argparse
import textwrap
from pathlib import Path

import numpy as np
from data import VOCFolder, voc_palette
from evaluate_cues import read_map
from networks import BACKBONES
from PIL import Image
from torch.nn import functional as F
from training import finished

PALETTE = np.array(voc_palette(), dtype=np.uint8).reshape(256, 3)
PALETTE[255] = 255  # ignored pixels are white on the sheet


def overlay(photograph: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """A photograph (H, W, 3) uint8 with attention (H, W) in [0, 1] on it, in perceptually even colours."""
    from matplotlib import colormaps

    heat = colormaps["inferno"](attention)[..., :3] * 255
    return (0.35 * photograph + 0.65 * heat).astype(np.uint8)


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=textwrap.dedent(__doc__))
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--run", type=Path, required=True, help="folder of train_attention.py")
    parser.add_argument("--maps", type=Path, nargs="+", required=True, help="train-split map folders, a column each")
    parser.add_argument("--labels", type=Path, help="pseudo label folder, a column")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .jpg")
    arguments = parser.parse_args()

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    settings, state = finished(arguments.run)
    data = VOCFolder(arguments.voc_root, settings["data"]["split"])
    geometry = BACKBONES[settings["arguments"]["backbone"]].geometry
    taken, latest = state["snapshots"]["taken"], state["snapshots"]["latest"]
    names = list(latest)
    moments = sorted({0, len(taken) // 3, len(taken) - 1})
    titles = ["image", *(f"step {taken[m]}" for m in moments), *(folder.parent.name for folder in arguments.maps)]
    titles += (["pseudo label"] if arguments.labels else []) + ["truth"]

    figure, axes = plt.subplots(
        len(names), len(titles), figsize=(1.9 * len(titles), 1.35 * len(names)), squeeze=False, layout="constrained"
    )
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=9)
    for row, name in zip(axes, names, strict=True):
        with Image.open(data.image_path(name)) as image:
            photograph = np.asarray(image.convert("RGB"))
        height, width = photograph.shape[:2]
        class_id = data.class_ids(name)[0]
        pictures = [photograph]
        for moment in moments:
            cells = latest[name][moment][:1, None].float() / 255
            full = F.interpolate(cells, (height, width), mode="bilinear", align_corners=geometry.centred)
            pictures.append(overlay(photograph, full[0, 0].numpy()))
        for folder in arguments.maps:
            pictures.append(overlay(photograph, read_map(folder / f"{name}_{class_id}.png").numpy() / 255))
        if arguments.labels:
            pictures.append(PALETTE[read_map(arguments.labels / f"{name}.png").numpy()])
        pictures.append(PALETTE[data.mask(name).numpy()])
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
        row[0].text(4, 22, data.classes[class_id], color="white", fontsize=8, backgroundcolor=(0, 0, 0, 0.6))
    figure.savefig(arguments.out, dpi=110)
    print(f"done: {len(names)} images -> {arguments.out}")


if __name__ == "__main__":
    main()
