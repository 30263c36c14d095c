"""Masks painted in VOC's colours."""

import argparse
from pathlib import Path

import numpy as np
from data import write_label
from images import DRAWN, load
from lists import Images

from oaa_lib.plotting import voc_palette
from preparing.checks import attempt, in_parallel, stop_if


def masks(arguments: argparse.Namespace) -> None:
    """Masks painted in VOC's colours (RGB PNG) to indexed label images in another folder; existing ones are kept."""
    files = Images(arguments.masks, endings=(".png",)).paths
    if not files or arguments.masks.resolve() == arguments.out.resolve():
        raise SystemExit(f"--masks {arguments.masks}: expected a folder with *.png, other than --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = np.array([1 << 16, 1 << 8, 1])
    codes = voc_palette().astype(int) @ weights
    order = np.argsort(codes)

    def convert(path: Path) -> None:
        pixels = np.asarray(load(path, DRAWN).convert("RGB")) @ weights
        label = order[np.searchsorted(codes, pixels, sorter=order).clip(max=255)]
        foreign = pixels[codes[label] != pixels]
        if foreign.size:
            raise ValueError(
                f"{foreign.size} pixels have none of VOC's colours, e.g. #{foreign[0]:06x}; was it resized?"
            )
        write_label(arguments.out / path.name, label)

    problems: list[str] = []
    new = [path for path in files if not (arguments.out / path.name).exists()]
    in_parallel(lambda path: attempt(problems, convert, path), new, "masks")
    stop_if(sorted(problems), "masks that cannot be converted; the others are")
    print(f"done: {len(new)} label images written, {len(files) - len(new)} were there -> {arguments.out}")
