"""Attention maps at image size as the stages hand them on: 8-bit grey images NAME_CLASS.png, class ids from 0."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import VOCFolder
from files import ends_with, read_json, write_image
from images import DRAWN, load, png
from PIL import Image
from torch import Tensor

from oaa_lib import normalize_attention

FAINTEST = 1 / 255  # the least threshold of cues with saliency: what saliency makes background is 0


def map_files(folder: VOCFolder, name: str) -> list[str]:
    """The names of the files of an image's maps, one for each of its classes."""
    return [f"{name}_{c}.png" for c in folder.class_ids(name)]


def write_maps(out: Path, folder: VOCFolder, name: str, attention: Tensor) -> None:
    """Write the maps (K, H, W) in [0, 1] of an image's classes; each file appears whole or not at all."""
    with ends_with(f"--out {out}", "make room, then the same command goes on"):
        for file, values in zip(map_files(folder, name), attention.cpu(), strict=True):
            write_image(out / file, Image.fromarray((values * 255).round().clamp(0, 255).to(torch.uint8).numpy()))


def read_map(path: Path, size: tuple[int, int]) -> Tensor:
    """(H, W) uint8 of an 8-bit grey image in the photograph's size."""
    path = png(path.parent, path.name.removesuffix(".png"))
    if not path.exists():
        raise SystemExit(f"{path} is missing; run export_attention.py for this split first")
    try:
        image = load(path, DRAWN)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read ({error}); remove it and make it again") from error
    mode, pixels = image.mode, torch.from_numpy(np.asarray(image).copy())
    if mode != "L" or tuple(pixels.shape) != size:
        raise SystemExit(
            f"{path}: expected 8-bit grey (mode L) in the photograph's size {size}, got mode {mode} and "
            f"{tuple(pixels.shape[:2])}"
        )
    return pixels


def against_saliency(attention: Tensor, saliency: Tensor) -> Tensor:
    """Attention (K, H, W) uint8 as cues with saliency (H, W) uint8 as the background: float32 in [0, 1].

    Each map is min-maxed over its image, as in the authors' PyTorch program, and 0 where it does not exceed
    1 - saliency, the paper's background cue.
    """
    cues = normalize_attention(attention.float(), method="minmax")
    return cues * (cues > 1 - saliency.float() / 255)


def made_by(maps: Path) -> dict[str, Any]:
    """How a folder of maps was made, as the script that made it has noted; nothing of other folders."""
    records = [maps / name for name in ("source.json", "refinement.json")]
    return {record.stem: read_json(record) for record in records if record.exists()}


def check_maps(folder: VOCFolder, maps: Path, saliency: Path | None = None) -> None:
    """End where the maps were made for another list, which lacks some of the images or gives them other labels."""
    if saliency is not None:
        check_saliency(folder, saliency)
    missing = {
        name: [c for c in folder.class_ids(name) if not png(maps, f"{name}_{c}").exists()] for name in folder.names
    }
    without = [name for name, ids in missing.items() if ids]
    if not without:
        return
    first, source = without[0], maps / "source.json"
    path, shows = maps / f"{first}_{missing[first][0]}.png", folder.classes[missing[first][0]]
    made_for = read_json(source).get("split") if source.exists() else None
    made = f"; the maps there were made for the list {made_for}" if made_for not in (None, folder.split) else ""
    raise SystemExit(
        f"{path} is missing; run export_attention.py for this split first (--split {folder.split}): {len(without)} of "
        f"its {len(folder)} images have no map of one of their classes, first {first} ({shows}){made}"
    )


def check_saliency(folder: VOCFolder, saliency: Path) -> None:
    """End where an image has no saliency map."""
    missing = [name for name in folder.names if not png(saliency, name).exists()]
    if missing:
        raise SystemExit(
            f"--saliency {saliency} lacks {len(missing)} of the {len(folder)} images of {folder.split}, first "
            f"{missing[0]}.png"
        )
