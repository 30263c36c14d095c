"""Attention maps at image size as the stages hand them on: 8-bit grey images NAME_CLASS.png, class ids from 0."""

from pathlib import Path

import torch
from data import VOCFolder
from files import ends_with, write_image
from PIL import Image
from torch import Tensor


def map_files(folder: VOCFolder, name: str) -> list[str]:
    """The names of the files of an image's maps, one for each of its classes."""
    return [f"{name}_{c}.png" for c in folder.class_ids(name)]


def write_maps(out: Path, folder: VOCFolder, name: str, attention: Tensor) -> None:
    """Write the maps (K, H, W) in [0, 1] of an image's classes; each file appears whole or not at all."""
    with ends_with(f"--out {out}", "make room, then the same command goes on"):
        for file, values in zip(map_files(folder, name), attention.cpu(), strict=True):
            write_image(out / file, Image.fromarray((values * 255).round().clamp(0, 255).to(torch.uint8).numpy()))
