"""Stage 3: proxy segmentation labels from attention maps and a background cue (paper, section 4).

Writes palette label images NAME.png (0 background, class c is c + 1, 255 ignored) to --out, on all cores; images that
are there already are passed over, so it can be stopped and started again. The background cue is an explicit choice:
--background saliency needs 8-bit saliency maps NAME.png (--saliency); threshold is a constant score
(--background-level); power is (1 - max attention) ** alpha (--background-level).
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bound import Bound
from data import VOCFolder, write_label
from files import ends_with, write_text
from images import png
from maps import check_maps, made_by, map_files, read_map
from options import add_options, resolve, training_split
from parallel import on_all_cores
from recipes import Labels

from oaa_lib import pseudo_label_from_cues

RULES = ("foreground_threshold", "conflict_threshold", "uncertain_saliency", "strong_attention", "min_foreground")


def main() -> None:
    """Run the stage."""
    arguments, settings = parse_arguments()
    folder = VOCFolder(arguments.voc_root, training_split(arguments))
    # rescale: labels of earlier versions were of maps that had been min-maxed whatever the setting said
    places = {"maps": arguments.maps, "saliency": arguments.saliency}
    bound = {
        **places,
        **dataclasses.asdict(settings),
        "rescale": settings.stretch,
        "maps_made_by": made_by(arguments.maps),
    }
    out = Bound(arguments.out, bound)
    check_maps(folder, arguments.maps)
    todo = out.todo(folder.names)
    if arguments.saliency is not None and not any(png(arguments.saliency, name).exists() for name in folder.names):
        raise SystemExit(
            f"--saliency {arguments.saliency} has a map of none of the {len(folder)} images of {folder.split}, such as "
            f"{folder.names[0]}.png; are these maps of other images?"
        )
    sizes = {name: size_of(name, folder, arguments.saliency) for name in todo}
    call = partial(make_label, folder=folder, sizes=sizes, settings=settings, out=arguments.out, **places)
    out.make()
    with ends_with(f"--out {arguments.out}", "what is written stays; the same command goes on from there"):
        ignored = dict(zip(todo, on_all_cores(call, todo, "pseudo labels"), strict=True))
    without = [name for name, share in ignored.items() if share is None]
    if without:
        write_text(arguments.out / "without_saliency.txt", "\n".join(without) + "\n")
        print(f"{len(without)} images have no saliency map and got no label: listed in without_saliency.txt")
    shares = [share for share in ignored.values() if share is not None]
    whole = f" ({shares.count(1)} labels as a whole)" if 1 in shares else ""
    told = f", {np.mean(shares):.1%} of the pixels ignored{whole}" if shares else ""
    print(f"done: {len(shares)} labels written, {len(folder) - len(todo)} were there{told} -> {arguments.out}")


def parse_arguments(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, Labels]:
    """Of the command line, or these, and the settings of the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--split", help="list of the images (default: trainaug if there is one, else train)")
    parser.add_argument("--maps", type=Path, required=True, help="folder of NAME_CLASS.png")
    parser.add_argument("--saliency", type=Path, help="folder of 8-bit saliency maps NAME.png")
    parser.add_argument("--out", type=Path, required=True)
    add_options(parser, "labels", without=("scales", "flip_views"))
    arguments = parser.parse_args(words)
    settings: Labels = resolve(arguments, "labels", "")
    if (settings.background == "saliency") != (arguments.saliency is not None):
        parser.error(
            "the background cue is --background saliency with --saliency FOLDER, or --background threshold|power with "
            f"--background-level; got --background {settings.background}"
            + (f" and --saliency {arguments.saliency}" if arguments.saliency else " without --saliency")
        )
    if settings.background == "threshold" and not 0 <= settings.background_level <= 1:
        parser.error(f"--background-level: expected a score in [0, 1], got {settings.background_level}")
    if settings.background == "power" and settings.background_level <= 0:
        parser.error(f"--background-level: expected an exponent above 0, got {settings.background_level}")
    for place in (arguments.maps, arguments.saliency):
        if place is not None and not place.is_dir():
            raise SystemExit(f"{place} is missing: expected the folder of maps (--maps, --saliency)")
    return arguments, settings


def size_of(name: str, folder: VOCFolder, saliency: Path | None) -> tuple[int, int]:
    """(H, W) of an image; saliency of others is refused where its size would not show how the photograph lay."""
    has_saliency = saliency is not None and png(saliency, name).exists()
    return folder.drawn_size(name) if has_saliency else folder.size(name)


def make_label(
    name: str,
    *,
    folder: VOCFolder,
    sizes: dict[str, tuple[int, int]],
    settings: Labels,
    maps: Path,
    saliency: Path | None,
    out: Path,
) -> float | None:
    """Write the label of one image; returns the share of its pixels that is ignored, or None without saliency map."""
    size, salient = sizes[name], None
    if saliency is not None:
        if not png(saliency, name).exists():
            return None  # the release's rule: no saliency map, no label
        salient = read_map(saliency / f"{name}.png", size).float() / 255
    found = [read_map(maps / file, size).float() / 255 for file in map_files(folder, name)]
    attention = torch.stack(found) if found else torch.zeros(0, *size)
    background: Any = None
    if settings.background == "threshold":
        background = settings.background_level
    elif settings.background == "power":
        strongest = attention.amax(0) if len(attention) else torch.zeros(size)
        background = (1 - strongest) ** settings.background_level
    rules = {rule: getattr(settings, rule) for rule in RULES} | {"rescale": settings.stretch}
    label = pseudo_label_from_cues(attention, folder.class_ids(name), salient, background=background, **rules)
    write_label(out / f"{name}.png", label.numpy().astype(np.uint8))
    return (label == 255).float().mean().item()


if __name__ == "__main__":
    main()
