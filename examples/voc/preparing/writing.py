"""Lists, photographs and masks of a folder in VOC layout, each written whole or not at all."""

import os
import shutil
from pathlib import Path

import numpy as np
from data import write_label
from files import whole_file, write_text
from images import DRAWN, Look, load, look, photograph, turned

from preparing.checks import stop_if

LISTS = Path("ImageSets/Segmentation")


def list_texts(root: Path, split: str, labels: dict[str, list[int]]) -> dict[Path, str]:
    """``SPLIT.txt`` and ``SPLIT_cls.txt``; a line without id is an image that shows none of the classes."""
    names = "".join(f"{name}\n" for name in labels)
    with_ids = "".join(
        f"{name}\t{' '.join(map(str, ids))}\n" if len(name.split()) > 1 else " ".join(map(str, [name, *ids])) + "\n"
        for name, ids in labels.items()
    )
    return {root / LISTS / f"{split}.txt": names, root / LISTS / f"{split}_cls.txt": with_ids}


def refuse_to_change(texts: dict[Path, str], overwrite: bool) -> None:
    """End if a file is there with another text."""
    differing = [
        f"{path}: {len(path.read_bytes().splitlines())} lines, would become {len(text.splitlines())}"
        for path, text in texts.items()
        if path.exists() and path.read_bytes() != text.encode()
    ]
    if not overwrite:
        stop_if(differing, "these files are there and differ; --overwrite replaces them")


def write_texts(texts: dict[Path, str]) -> int:
    """Write the files that are not there as they should be, each whole or not at all; returns how many."""
    changed = {path: text for path, text in texts.items() if not path.exists() or path.read_bytes() != text.encode()}
    for path, text in changed.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return len(changed)


def finish(root: Path, texts: dict[Path, str], name: str, negatives: bool = False) -> None:
    """Write the lists and say what comes next."""
    written = write_texts(texts)
    print(f"done: {written} files written, {len(texts) - written} were there -> {root / LISTS}")
    options = " --negatives background" if negatives else ""
    print(f"next: python examples/voc/train_attention.py --voc-root {root} --out runs/{name}/attention{options}")


def place(source: Path, target: Path) -> None:
    """The photograph as JPEG: linked, or converted where it is of another format or turned by its EXIF entry."""
    seen = look(source)
    if seen.format in ("JPEG", "MPO") and seen.orientation == 1:
        return link(source, target)
    with whole_file(target) as partial:
        photograph(source).save(partial, format="JPEG", quality=95)


def place_mask(source: Path, target: Path, seen: Look) -> None:
    """The label image beside the upright photograph: linked, or turned as the photograph was."""
    label = np.asarray(load(source, DRAWN))
    upright = turned(label, seen)
    if upright is label:
        return link(source, target)
    write_label(target, upright)


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where links cannot be made; the file appears whole or not at all."""
    with whole_file(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), partial)
        except OSError:
            shutil.copyfile(source, partial)
