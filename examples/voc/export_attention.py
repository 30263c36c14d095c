"""Stages 1b and 2b: write attention maps at image size, one 8-bit PNG per image and class.

--source cam, cam_flip, cam_ms: the classifier at the end of its training, in one view, averaged over the mirrored view,
or over four scales and their mirrored views (the inference that the field spends on a CAM, and so a control); --source
max, mean: its cumulative attention (training images only); --source integral: the integral attention model. Writes
NAME_CLASS.png (class ids from 0) to --out; images that are there already are passed over. More views of an image are
averaged with --scales and --flip-views (not for cumulative attention). On several GPUs start one process each, with
--part 0/4, 1/4, ...
"""

import argparse
import json
from pathlib import Path

import torch
from data import AttentionImages, VOCFolder, ends_with, network_size, to_tensor, write_image, write_text
from networks import AttentionNetwork, build_network
from PIL import Image
from recipes import add_options, replace_checked, resolve
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from training import add_data_arguments, add_part_argument, check_device, finished, read_json

from oaa_lib import AttentionAccumulator, normalize_attention

MANY_SCALES = (0.5, 1.0, 1.5, 2.0)  # of cam_ms: IRN's and SEAM's


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, help="folder of a training stage")
    parser.add_argument("--source", choices=("cam", "cam_flip", "cam_ms", "max", "mean", "integral"), required=True)
    parser.add_argument("--split", help="list of the images (default: the one that the run was trained on)")
    parser.add_argument("--out", type=Path, required=True)
    add_part_argument(parser)
    add_options(parser, "labels")
    arguments = parser.parse_args()
    check_device(arguments.device)
    settings, state = finished(arguments.run)
    is_integral = "loss" in settings["recipe"]
    if is_integral != (arguments.source == "integral") or "crop" in settings["recipe"]:
        stage = "train_integral.py" if arguments.source == "integral" else "train_attention.py"
        raise SystemExit(f"--source {arguments.source} needs a folder of {stage}; {arguments.run} is none (--run)")
    views = resolve(arguments, "labels", settings["arguments"]["backbone"])
    if arguments.source == "cam_ms":
        views = replace_checked(views, {"scales": arguments.scales or MANY_SCALES, "flip_views": True})
    split = arguments.split or settings["data"]["split"]
    folder = VOCFolder(arguments.voc_root, split)
    if folder.classes != settings["data"]["classes"]:
        raise SystemExit(f"{arguments.run} was trained on other classes than those of {arguments.voc_root}")
    part, parts = arguments.part
    names = folder.names[part::parts]
    network = build_network(settings["arguments"]["backbone"], len(folder.classes), weights="none")
    network.load_state_dict(state["network"])
    network.to(arguments.device).eval()
    accumulator = None
    if arguments.source in ("max", "mean"):
        path = arguments.run / f"{arguments.source}.safetensors"
        with ends_with(f"{path}", "run train_attention.py again, which writes it anew", ValueError):
            accumulator = AttentionAccumulator.load(path, device=arguments.device)
        strangers = [name for name in names if name not in set(accumulator.pairs.keys)]
        if strangers:
            raise SystemExit(
                f"cumulative attention exists for training images only: there is none of {len(strangers)} images of "
                f"{split}, first {strangers[0]}"
            )
        others = [name for name in names if accumulator.classes(name).tolist() != folder.class_ids(name)]
        if others:
            raise SystemExit(f"{len(others)} images of {split} have other labels than in training, first {others[0]}")
    read_out = settings["recipe"].get("read_out", "relu")
    images = AttentionImages(folder, network, short_side=settings["recipe"]["short_side"])

    made = {"scales": views.scales, "flip_views": views.flip_views, "stretch": views.stretch}
    kept = {"run": settings, "source": arguments.source, "split": split, "views": made}
    kept, record = json.loads(json.dumps(kept)), arguments.out / "source.json"
    found = read_json(record) if record.exists() else {}
    differing = [key for key in found if found[key] != kept.get(key)]
    if differing:
        raise SystemExit(
            f"{arguments.out} has maps of other settings ({', '.join(differing)}); choose another --out or remove "
            "the folder"
        )
    with ends_with(f"--out {arguments.out}", "choose a folder that can be written to, or make room"):
        arguments.out.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            write_text(record, json.dumps(kept))
    written, shown = 0, [name for name in names if folder.class_ids(name)]
    for name in tqdm(shown, desc=f"{arguments.source}, {split}"):
        class_ids = folder.class_ids(name)
        paths = [arguments.out / f"{name}_{c}.png" for c in class_ids]
        if all(path.exists() for path in paths):
            continue
        size = folder.size(name)
        if accumulator is not None:
            attention = resize(accumulator.attention(name), size, network)
        else:
            flips = (False, True) if arguments.source == "cam_flip" or views.flip_views else (False,)
            attention = torch.stack(
                [
                    resize(one_view(network, images, name, class_ids, scale, flip, read_out), size, network)
                    for scale in views.scales
                    for flip in flips
                ]
            ).mean(0)
        if views.stretch:
            attention = normalize_attention(attention, method="minmax")
        if not attention.isfinite().all():
            raise SystemExit(
                f"{name}: the attention is NaN or infinite, so no map is written; has the training diverged, or half "
                "precision overflowed?"
            )
        with ends_with(f"--out {arguments.out}", "make room, then the same command goes on"):
            for path, values in zip(paths, attention.cpu(), strict=True):
                write_image(path, Image.fromarray((values * 255).round().to(torch.uint8).numpy()))
        written += 1
    if len(shown) < len(names):
        print(f"{len(names) - len(shown)} of {len(names)} images show no class and have no maps")
    print(f"done: maps of {written} images written, {len(shown) - written} were there -> {arguments.out}")


@torch.no_grad()
def one_view(
    network: AttentionNetwork,
    images: AttentionImages,
    name: str,
    class_ids: list[int],
    scale: float,
    flip: bool,
    read_out: str,
) -> Tensor:
    """(K, h, w) attention (Eq. 2) of an image at one scale, mirrored and mirrored back or not."""
    height, width = network_size(images.sizes[name], round(min(images.sizes[name]) * scale), network.geometry)
    picture = images.folder.photograph(name).resize((width, height), Image.Resampling.BICUBIC)
    image = to_tensor(picture, network.mean, network.std)[None].to(next(network.parameters()).device)
    maps = network(image.flip(-1) if flip else image).score_maps[0, class_ids].float()
    maps = maps.flip(-1) if flip else maps
    return maps.sigmoid() if read_out == "sigmoid" else normalize_attention(maps)


def resize(attention: Tensor, size: tuple[int, int], network: AttentionNetwork) -> Tensor:
    """Maps (K, h, w) at image size."""
    if not len(attention):
        return attention.new_zeros(0, *size)
    return F.interpolate(attention[None], size, mode="bilinear", align_corners=network.geometry.centred)[0]


if __name__ == "__main__":
    main()
