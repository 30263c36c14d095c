"""The pictures of a page: photographs, attention epoch by epoch, labels, each in an address that holds it."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from choose import Pair, class_ious, is_failure
from data import read_label
from figures import at_size
from finished_run import FinishedRun
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from oaa_lib.pictures import COLOURS
from oaa_lib.plotting import voc_palette

SIDE = 320  # pixels of a photograph's longer side in the page


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """An image as an address that holds it."""
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def film(maps: Tensor) -> dict[str, Any]:
    """Maps (T, h, w) uint8 of one pair, one below the other in one picture; the page brings them to size."""
    frames, height, width = maps.shape
    picture = Image.fromarray(maps.reshape(frames * height, width).numpy())
    return {"src": data_uri(picture, "PNG", optimize=True), "frames": frames}


def label_picture(label: Tensor, size: tuple[int, int]) -> str:
    """A label image in VOC's colours; background is clear, ignored pixels are a thin white."""
    picture = Image.fromarray(label.numpy().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    palette = voc_palette()
    palette[255] = 255
    picture.putpalette(palette.tobytes())
    clear = bytes([0, *[255] * 254, 128])
    return data_uri(picture, "PNG", transparency=clear, optimize=True)


def colours() -> str:
    """256 colours, those of the library's pictures, as hexadecimal digits."""
    from matplotlib import colormaps

    return bytes(colormaps[COLOURS](np.arange(256), bytes=True)[:, :3]).hex()


def iou_in_words(iou: float | None) -> str:
    """An IoU in words."""
    return "" if iou is None else f"IoU {100 * iou:.0f} %"


def panels(run: FinishedRun, pair: Pair, photograph: Image.Image, size: tuple[int, int]) -> list[dict[str, Any]]:
    """What is shown of a pair, side by side; ``size`` is that in the page."""
    name, class_ids = pair.name, run.data.class_ids(pair.name)
    truth = run.data.mask(name) if run.data.has_mask(name) else None
    level = run.methods["max"].threshold(run.rows.get(name, 0))
    shown: list[dict[str, Any]] = []
    if name in run.watched.latest:
        maps = run.watched.latest[name][:, pair.place]
        notes = ["" if m.any() else "none so far" for m in maps]
        shown.append({"title": "Latest attention", "notes": notes, "align": run.align, **film(maps)})
    kept = run.watched.cumulative.get(name)
    if kept is None and run.final is not None and name in set(run.final.pairs.keys):
        kept = (run.final.attention(name)[None] * 255).round().to(torch.uint8)
    if kept is not None:
        notes = []
        for maps in kept:
            iou = None
            if truth is not None and level is not None:
                resized = torch.stack([at_size(m, np.asarray(photograph), run.align) for m in maps])
                iou = class_ious(
                    (255 * resized).round().to(torch.uint8), class_ids, truth, level, len(run.data.classes)
                )[pair.place]
            notes.append(iou_in_words(iou) if maps[pair.place].any() else "nothing so far")
        shown.append(
            {"title": "Accumulated", "notes": notes, "align": run.align, "threshold": level} | film(kept[:, pair.place])
        )
    for key, title in (("cam", "CAM"), ("hybrid", "OAA+")):
        method = run.methods[key]
        if method.has_maps(name, class_ids):
            pixels = method.read(name, class_ids[pair.place], run.data.size(name))
            picture = Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BILINEAR)
            shown.append(
                {
                    "title": title,
                    "notes": [iou_in_words(pair.iou.get(key))],
                    "threshold": method.threshold(run.rows.get(name, 0)),
                    "src": data_uri(picture, "PNG", optimize=True),
                    "frames": 1,
                }
            )
    if run.labels is not None and (run.labels / f"{name}.png").exists():
        label = read_label(run.labels / f"{name}.png")
        shown.append({"title": "Pseudo label", "notes": [""], "label": label_picture(label, size)})
    if truth is not None:
        shown.append({"title": "Truth", "notes": [""], "label": label_picture(truth, size)})
    return shown


def pictures(run: FinishedRun, pairs: Sequence[Pair], failure: float) -> dict[str, Any]:
    """All that the page's script needs."""
    photographs: dict[str, Any] = {}
    cards, palette = [], voc_palette()
    for pair in tqdm(pairs, desc="pictures", leave=False):
        photograph = run.data.photograph(pair.name)
        small = photograph.copy()
        small.thumbnail((SIDE, SIDE))
        if pair.name not in photographs:
            photographs[pair.name] = {
                "src": data_uri(small, "JPEG", quality=80, optimize=True),
                "width": small.width,
                "height": small.height,
                "classes": [
                    {"name": run.data.classes[c], "colour": "#" + bytes(palette[c + 1]).hex()}
                    for c in run.data.class_ids(pair.name)
                ],
            }
        cards.append(
            {
                "name": pair.name,
                "class": run.data.classes[run.data.class_ids(pair.name)[pair.place]],
                "kinds": pair.kinds,
                "gain": None if pair.gain is None else round(100 * pair.gain, 1),
                "iou": None if pair.iou.get(run.best) is None else round(100 * pair.iou[run.best], 1),
                "failure": is_failure(run, pair, failure),
                "panels": panels(run, pair, photograph, small.size),
            }
        )
    return {"colours": colours(), "epochs": run.watched.epochs, "photographs": photographs, "pairs": cards}
