"""Files are looked at before anything is written, all of them, and what is wrong is listed at once."""

import os
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from images import DRAWN, Look, load, look, photograph, turned
from texts import listing
from tqdm import tqdm


def stop_if(problems: Sequence[str], what: str) -> None:
    """End with all problems in one message, if there are any."""
    if problems:
        raise SystemExit(f"{what} ({len(problems)}; no list was changed):{listing(problems)}")


def attempt(problems: list[str], function: Callable[..., Any], path: Path, *arguments: Any) -> Any:
    """``function(path, ...)``, or None with what is wrong with the file added to the problems."""
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise ValueError("it is no regular file")
        return function(path, *arguments)
    except FileNotFoundError:
        problems.append(f"{path} is missing")
    except Exception as error:  # Pillow, scipy and the XML parser raise all kinds at a broken file
        problems.append(f"{path}: {error}")
    return None


def in_parallel(work: Callable[[Any], Any], jobs: Sequence[Any], description: str) -> list[Any]:
    """``work`` of every job, in order, on all cores; threads, since Pillow and numpy work outside Python's lock."""
    with ThreadPool(os.cpu_count()) as pool:
        return list(tqdm(pool.imap(work, jobs), total=len(jobs), desc=description))


def filled(path: Path) -> bool:
    """Whether ``path`` is a file or a folder, and not empty; hidden files do not count."""
    if path.is_dir():
        return any(not entry.name.startswith(".") for entry in path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def decoded(path: Path) -> Look:
    """Size and orientation of a photograph that was decoded whole."""
    photograph(path)
    return look(path)


def label_ids(path: Path, seen: Look | None, num_classes: int) -> list[int]:
    """0-based classes in a label image (indexed PNG, or SBD's .mat), which is checked on the way."""
    if path.suffix == ".mat":
        from scipy.io import loadmat

        label = loadmat(path)["GTcls"][0, 0]["Segmentation"]
    else:
        image = load(path, DRAWN)
        if image.mode not in ("P", "L"):
            raise ValueError(f"mode {image.mode}; expected class indices (prepare.py masks converts VOC's colours)")
        label = np.asarray(image)
    if seen is not None:
        turned(label, seen)  # raises where it does not fit
    values = np.flatnonzero(np.bincount(label.ravel(), minlength=256)).tolist()
    wrong = [value for value in values if num_classes < value != 255]
    if wrong:
        raise ValueError(f"values {wrong[:5]}; expected 0..{num_classes} and 255 (are these grey levels of colours?)")
    return [value - 1 for value in values if 0 < value < 255]
