"""Stage 3: proxy segmentation labels from attention maps and a background cue (paper, section 4).

Writes palette label images NAME.png (0 background, class c is c + 1, 255 ignored) to --out, on all cores; images that
are there already are passed over, so it can be stopped and started again. The background cue is an explicit choice:
--background saliency needs 8-bit saliency maps NAME.png (--saliency); threshold is a constant score
(--background-level); power is (1 - max attention) ** alpha (--background-level).
"""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import VOCFolder, write_label
from evaluate_cues import read_map
from files import ends_with, read_json, write_text
from images import png
from options import add_options, resolve, training_split
from parallel import on_all_cores
from recipes import Labels

from oaa_lib import pseudo_label_from_cues


def make_label(
    name: str, *, class_ids: dict[str, list[int]], sizes: dict[str, tuple[int, int]], places: Any, settings: Labels
) -> float | None:
    """Write the label of one image; returns the share of its pixels that is ignored, or None without saliency map."""
    saliency = None
    if settings.background == "saliency":
        if not png(places.saliency, name).exists():
            return None  # the release's rule: no saliency map, no label
        saliency = read_map(places.saliency / f"{name}.png", sizes[name]).float() / 255
    maps = [read_map(places.maps / f"{name}_{c}.png", sizes[name]).float() / 255 for c in class_ids[name]]
    attention = torch.stack(maps) if maps else torch.zeros(0, *sizes[name])
    background: Any = None
    if settings.background == "threshold":
        background = settings.background_level
    elif settings.background == "power":
        strongest = attention.amax(0) if len(attention) else torch.zeros(sizes[name])
        background = (1 - strongest) ** settings.background_level
    rules = ("foreground_threshold", "conflict_threshold", "uncertain_saliency", "strong_attention", "min_foreground")
    label = pseudo_label_from_cues(
        attention, class_ids[name], saliency, background=background, **{rule: getattr(settings, rule) for rule in rules}
    )
    write_label(places.out / f"{name}.png", label.numpy().astype(np.uint8))
    return (label == 255).float().mean().item()


def main() -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--split", help="list of the images (default: trainaug if there is one, else train)")
    parser.add_argument("--maps", type=Path, required=True, help="folder of NAME_CLASS.png")
    parser.add_argument("--saliency", type=Path, help="folder of 8-bit saliency maps NAME.png")
    parser.add_argument("--out", type=Path, required=True)
    add_options(parser, "labels")
    arguments = parser.parse_args()
    settings = resolve(arguments, "labels", "")
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

    folder = VOCFolder(arguments.voc_root, training_split(arguments))
    kept, record = {"maps": str(arguments.maps), **dataclasses.asdict(settings)}, arguments.out / "settings.json"
    if record.exists() and read_json(record) != json.loads(json.dumps(kept)):
        raise SystemExit(f"{arguments.out} was made with other settings; choose another --out or remove the folder")
    todo = [name for name in folder.names if not (arguments.out / f"{name}.png").exists()]

    def has_saliency(name: str) -> bool:
        return arguments.saliency is not None and png(arguments.saliency, name).exists()

    call = partial(
        make_label,
        class_ids={name: folder.class_ids(name) for name in todo},
        sizes={name: folder.drawn_size(name) if has_saliency(name) else folder.size(name) for name in todo},
        places=argparse.Namespace(maps=arguments.maps, saliency=arguments.saliency, out=arguments.out),
        settings=settings,
    )
    with ends_with(f"--out {arguments.out}", "choose a folder that can be written to, or make room"):
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(kept, indent=1))
    with ends_with(f"--out {arguments.out}", "what is written stays; the same command goes on from there"):
        ignored = dict(zip(todo, on_all_cores(call, todo, "pseudo labels"), strict=True))
    without = [name for name, share in ignored.items() if share is None]
    if without:
        write_text(arguments.out / "without_saliency.txt", "\n".join(without) + "\n")
        print(f"{len(without)} images have no saliency map and got no label: listed in without_saliency.txt")
    shares = [share for share in ignored.values() if share is not None]
    told = f", {np.mean(shares):.1%} of the pixels ignored" if shares else ""
    print(f"done: {len(shares)} labels written, {len(folder) - len(todo)} were there{told} -> {arguments.out}")


if __name__ == "__main__":
    main()
