"""Stages 1b and 2b: write attention maps at image size, one 8-bit PNG per image and class.

--source cam, cam_flip, cam_ms: the classifier at the end of its training, in one view, averaged over the mirrored view,
or over four scales and their mirrored views (the inference that the field spends on a CAM, and so a control); --source
max, mean: its cumulative attention (training images only); --source integral: the integral attention model. Writes
NAME_CLASS.png (class ids from 0) to --out; images that are there already are passed over. More views of an image are
averaged with --scales and --flip-views (not for cumulative attention). On several GPUs start one process each, with
--part 0/4, 1/4, ...
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bound import Bound
from data import VOCFolder
from files import ends_with
from maps import map_files, write_maps
from networks import BACKBONES, AttentionNetwork, build_network
from options import add_data_arguments, add_options, add_part_argument, replace_checked, resolve
from PIL import Image
from processes import check_device
from recipes import Labels
from samples import AttentionImages, network_size, to_tensor
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from training import finished

from oaa_lib import AttentionAccumulator, normalize_attention

VIEWS = ("scales", "flip_views", "stretch")  # the settings of stage 3 that are made use of here
MANY_SCALES = (0.5, 1.0, 1.5, 2.0)  # of cam_ms: IRN's and SEAM's


def main() -> None:
    """Run the stage."""
    arguments = parse_arguments()
    check_device(arguments.device)
    run, state = trained(arguments)
    arguments.recipe = arguments.recipe or run["arguments"]["recipe"]
    views: Labels = resolve(arguments, "labels", run["arguments"]["backbone"])
    if arguments.source == "cam_ms":
        views = replace_checked(views, {"scales": arguments.scales or MANY_SCALES, "flip_views": True})
    folder = VOCFolder(arguments.voc_root, arguments.split or run["data"]["split"])
    if folder.classes != run["data"]["classes"]:
        raise SystemExit(f"{arguments.run} was trained on other classes than those of {arguments.voc_root}")
    part, parts = arguments.part
    names = folder.names[part::parts]
    attention_of: Callable[[str], Tensor]
    if arguments.source in ("max", "mean"):
        attention_of = Accumulated(arguments, folder, names, run["arguments"]["backbone"])
    else:
        attention_of = Seen(arguments, folder, views, run, state)

    kept_views = {name: getattr(views, name) for name in VIEWS}
    kept = {"run": run, "source": arguments.source, "split": folder.split, "views": kept_views}
    out = Bound(arguments.out, kept, record="source.json")
    labelled = [name for name in names if folder.class_ids(name)]
    todo = out.todo(labelled, lambda name: map_files(folder, name))
    out.make()
    for name in tqdm(todo, f"{arguments.source}, {folder.split}"):
        attention = attention_of(name)
        if views.stretch:
            attention = normalize_attention(attention, method="minmax")
        if not attention.isfinite().all():
            raise SystemExit(
                f"{name}: the attention is NaN or infinite, so no map is written; has the training diverged, or half "
                "precision overflowed?"
            )
        write_maps(out.path, folder, name, attention)
    if len(labelled) < len(names):
        print(f"{len(names) - len(labelled)} of {len(names)} images show no class and have no maps")
    print(f"done: maps of {len(todo)} images written, {len(labelled) - len(todo)} were there -> {arguments.out}")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line, or these."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, help="folder of a training stage")
    parser.add_argument("--source", choices=("cam", "cam_flip", "cam_ms", "max", "mean", "integral"), required=True)
    parser.add_argument("--split", help="list of the images (default: the one that the run was trained on)")
    parser.add_argument("--out", type=Path, required=True)
    add_part_argument(parser)
    add_options(parser, "labels", only=VIEWS, recipe="that of --run")
    arguments = parser.parse_args(words)
    if arguments.source in ("max", "mean") and (arguments.scales or arguments.flip_views):
        parser.error(f"--source {arguments.source} is cumulative attention, which has no --scales and --flip-views")
    return arguments


def trained(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and checkpoint of the run, if it is one of the stage that has such attention."""
    run, state = finished(arguments.run)
    is_integral = "loss" in run["recipe"]
    if is_integral != (arguments.source == "integral") or "crop" in run["recipe"]:
        stage = "train_integral.py" if arguments.source == "integral" else "train_attention.py"
        raise SystemExit(f"--source {arguments.source} needs a folder of {stage}; {arguments.run} is none (--run)")
    return run, state


class Accumulated:
    """The cumulative attention of training images, at their size."""

    def __init__(self, arguments: argparse.Namespace, folder: VOCFolder, names: list[str], backbone: str) -> None:
        path = arguments.run / f"{arguments.source}.safetensors"
        with ends_with(f"{path}", "run train_attention.py again, which writes it anew", ValueError):
            self.accumulator = AttentionAccumulator.load(path, device=arguments.device)
        self.folder, self.network = folder, BACKBONES[backbone]
        known = set(self.accumulator.pairs.keys)
        strangers = [name for name in names if name not in known]
        if strangers:
            raise SystemExit(
                f"cumulative attention exists for training images only: there is none of {len(strangers)} images of "
                f"{folder.split}, first {strangers[0]}"
            )
        others = [name for name in names if self.accumulator.classes(name).tolist() != folder.class_ids(name)]
        if others:
            raise SystemExit(
                f"{len(others)} images of {folder.split} have other labels than in training, first {others[0]}"
            )

    def __call__(self, name: str) -> Tensor:
        """(K, H, W) in [0, 1] of an image's classes."""
        return resize(self.accumulator.attention(name), self.folder.size(name), self.network)


class Seen:
    """What a trained network sees of an image, on average over views, at the image's size."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        folder: VOCFolder,
        views: Labels,
        run: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        self.network = build_network(run["arguments"]["backbone"], len(folder.classes), weights="none")
        self.network.load_state_dict(state["network"])
        self.network.to(arguments.device).eval()
        self.images = AttentionImages(folder, self.network, short_side=run["recipe"]["short_side"])
        flips = (False, True) if arguments.source == "cam_flip" or views.flip_views else (False,)
        self.views = [(scale, flip) for scale in views.scales for flip in flips]
        self.read_out = run["recipe"].get("read_out", "relu")

    def __call__(self, name: str) -> Tensor:
        """(K, H, W) in [0, 1] of an image's classes."""
        folder, network = self.images.folder, self.network
        size, class_ids = folder.size(name), folder.class_ids(name)
        maps = [
            resize(one_view(network, self.images, name, class_ids, *view, self.read_out), size, network)
            for view in self.views
        ]
        return torch.stack(maps).mean(0)


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


def resize(attention: Tensor, size: tuple[int, int], network: Any) -> Tensor:
    """Maps (K, h, w) at image size."""
    return F.interpolate(attention[None], size, mode="bilinear", align_corners=network.geometry.centred)[0]


if __name__ == "__main__":
    main()
