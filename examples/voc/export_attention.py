"""Stages 1b and 2b: write attention maps at image size, one 8-bit PNG per image and class.

--source cam, cam_flip: the classifier at the end of its training, one view or averaged over the mirrored view;
--source max, mean: its cumulative attention (train split only); --source integral: the integral attention model.
Writes NAME_CLASS.png (class ids from 0) to --out; images that are there already are passed over.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from data import VOCFolder
from networks import AttentionNetwork, build_network
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from training import add_data_arguments

from oaa_lib import AttentionAccumulator, normalize_attention


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, help="folder of a training stage")
    parser.add_argument("--source", choices=("cam", "cam_flip", "max", "mean", "integral"), required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.source in ("max", "mean") and arguments.split != "train":
        raise SystemExit("cumulative attention exists for the train split only")
    if not (arguments.run / "settings.json").exists():
        raise SystemExit(f"{arguments.run} is no folder of a training stage: it has no settings.json")
    settings = json.loads((arguments.run / "settings.json").read_text())

    data = VOCFolder(arguments.voc_root, arguments.split)
    network = build_network(settings["backbone"], len(data.classes), weights="none")
    data.prepare(settings["short_side"], network.geometry, network.mean, network.std)
    accumulator = None
    if arguments.source in ("max", "mean"):
        accumulator = AttentionAccumulator.load(
            arguments.run / f"{arguments.source}.safetensors", device=arguments.device
        )
    else:
        state = torch.load(arguments.run / "checkpoint.pt", map_location="cpu", weights_only=True)
        if state["epoch"] < settings["epochs"]:
            raise SystemExit(f"{arguments.run} has stopped after epoch {state['epoch']} of {settings['epochs']}")
        network.load_state_dict(state["network"])
        network.to(arguments.device).eval()

    arguments.out.mkdir(parents=True, exist_ok=True)
    written = 0
    for name in tqdm(data.names, desc=f"{arguments.source}, {arguments.split}"):
        class_ids = data.class_ids(name)
        paths = [arguments.out / f"{name}_{c}.png" for c in class_ids]
        if all(path.exists() for path in paths):
            continue
        if accumulator is not None:
            attention = data.own_cells(name, accumulator.attention(name))
        else:
            image = data.load(name)[None].to(arguments.device)
            attention = network_attention(network, image, class_ids, flip=arguments.source == "cam_flip")
        with Image.open(data.image_path(name)) as photograph:
            size = photograph.height, photograph.width
        attention = F.interpolate(attention[None], size, mode="bilinear", align_corners=data.geometry.centred)[0]
        for path, values in zip(paths, attention, strict=True):
            write_png(path, values)
        written += 1
    print(f"done: maps of {written} images written, {len(data) - written} were there -> {arguments.out}")


@torch.no_grad()
def network_attention(network: AttentionNetwork, image: Tensor, class_ids: list[int], *, flip: bool) -> Tensor:
    """(K, h, w) attention (Eq. 2) of an image (1, 3, H, W); with ``flip`` the average with that of its mirror image."""
    attention = normalize_attention(network(image).score_maps[0, class_ids])
    if flip:
        mirrored = normalize_attention(network(image.flip(-1)).score_maps[0, class_ids].flip(-1))
        attention = (attention + mirrored) / 2
    return attention


def write_png(path: Path, attention: Tensor) -> None:
    """One map (H, W) in [0, 1] as 8-bit grey; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    Image.fromarray((attention.cpu() * 255).round().to(torch.uint8).numpy().astype(np.uint8)).save(
        partial, format="PNG"
    )
    partial.replace(path)


if __name__ == "__main__":
    main()
