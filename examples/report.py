"""One HTML file that shows a run: its scores, its curves, and attention accumulating, epoch by epoch, on photographs.

    python examples/report.py --voc-root VOCdevkit/VOC2012 --run runs/voc/seed0 --out report.html

The run is what voc/reproduce.py leaves for one seed. Its first stage is needed; of the others, what is there is shown,
and the page says what is missing. The page holds all its pictures: it opens without a server and fetches nothing.
"""

import argparse
import base64
import csv
import html
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from oaa_lib import AttentionAccumulator, ConfusionMatrix
from oaa_lib.pictures import COLOURS
from oaa_lib.plotting import voc_palette

sys.path.append(str(Path(__file__).resolve().parent / "voc"))

from data import VOCFolder, read_label
from evaluate_cues import read_map
from figures import at_size
from files import ends_with, read_json, whole_file
from networks import BACKBONES
from parallel import on_all_cores
from tables import TABLES
from texts import read_lines
from training import finished

TEMPLATE = Path(__file__).resolve().with_suffix(".html")
SIDE = 320  # pixels of a photograph's longer side in the page
SHOWN = ("cam", "max", "hybrid")  # whose maps of single images are looked at
LABELS = ("hybrid", "max", "mean", "cam_flip", "cam")  # whose pseudo labels, the first that are there


@dataclass(frozen=True)
class Method:
    """A way to attention, and what the run has of it.

    Attributes:
        title: as printed.
        maps: the folder of its maps, or None.
        scores: of these as cues, or None.
    """

    title: str
    maps: Path | None
    scores: dict[str, Any] | None

    def threshold(self, row: int) -> float | None:
        """At which the map of an image is cut: that of the half which its row in the scored list belongs to."""
        levels = (self.scores or {}).get("thresholds")
        return levels[row % len(levels)] if levels else None

    def has_maps(self, name: str, class_ids: Sequence[int]) -> bool:
        """Whether there are those of an image; of images that were not scored there may be none."""
        return self.maps is not None and all((self.maps / f"{name}_{c}.png").exists() for c in class_ids)

    def read(self, name: str, class_id: int, size: tuple[int, int]) -> Tensor:
        """(H, W) uint8, the map of one class of an image; ask `has_maps` first."""
        assert self.maps is not None
        return read_map(self.maps / f"{name}_{class_id}.png", size)


@dataclass(frozen=True)
class Watched:
    """The maps that stage 1 has kept of some images.

    Attributes:
        epochs: at the end of which they were taken, as printed.
        cumulative: (T, K, h, w) uint8 of each image.
        latest: the same of the latest map that has passed the gate; may be empty.
    """

    epochs: list[str]
    cumulative: dict[str, Tensor]
    latest: dict[str, Tensor]


class FinishedRun:
    """The folder of a run, read.

    Args:
        path: the folder.
        voc_root: of the data set that it was made from.
    """

    def __init__(self, path: Path, voc_root: Path) -> None:
        if not (path / "attention").is_dir():
            raise SystemExit(f"{path} is no run: expected a folder attention in it, of train_attention.py (--run)")
        self.path = path
        self.settings, state = finished(path / "attention")
        if "snapshots" not in state:
            raise SystemExit(f"{path}/attention was not made by train_attention.py (--run)")
        self.data = VOCFolder(voc_root, self.settings["data"]["split"])
        if self.data.classes != self.settings["data"]["classes"]:
            raise SystemExit(f"{path} was trained on other classes than those of {voc_root} (--voc-root)")
        self.align = BACKBONES[self.settings["arguments"]["backbone"]].geometry.centred
        self.watched = self._watched(state["snapshots"])
        self.final = self._final()
        self.methods = {row.method: self._method(row.method, row.title) for row in TABLES[2]}
        # the list that was scored: the row of an image in it decides which half it belongs to
        splits = [m.scores["split"] for name, m in self.methods.items() if name in SHOWN and m.scores]
        self.scored = VOCFolder(voc_root, splits[0]) if splits else self.data
        self.rows = {name: row for row, name in enumerate(self.scored.names)}
        labels = [path / "labels" / method for method in LABELS]
        self.labels = next((folder for folder in labels if folder.is_dir()), None)

    @property
    def best(self) -> str:
        """The method that is compared with the CAM: OAA+ if it has scores, else OAA."""
        return "hybrid" if self.methods["hybrid"].scores else "max"

    def _watched(self, snapshots: dict[str, Any]) -> Watched:
        steps, logged = snapshots["taken"], self.log("attention")
        length = logged["step"][0] / logged["epoch"][0] if logged.get("epoch") else 1
        cumulative = {name: torch.stack(maps) for name, maps in snapshots["cumulative"].items() if maps}
        latest = {name: torch.stack(maps) for name, maps in snapshots["latest"].items() if maps}
        known = set(self.data.names)
        for name, maps in cumulative.items():
            if name not in known or len(self.data.class_ids(name)) != maps.shape[1]:
                raise SystemExit(
                    f"{self.path} was trained on other images or labels: {name} is not the same (--voc-root)"
                )
        return Watched([f"{step / length:.1f}".removesuffix(".0") for step in steps], cumulative, latest)

    def _final(self) -> AttentionAccumulator | None:
        path = self.path / "attention" / "max.safetensors"
        if not path.exists():
            return None
        with ends_with(f"{path}", "run train_attention.py again, which writes it anew", ValueError):
            return AttentionAccumulator.load(path)

    def _method(self, name: str, title: str) -> Method:
        folder = self.path / "maps" / name
        scores = read_json(folder / "scores.json") if (folder / "scores.json").exists() else None
        return Method(title, folder if folder.is_dir() else None, scores)

    def log(self, stage: str) -> dict[str, list[float]]:
        """The columns of a stage's log.csv; empty without one."""
        path = self.path / stage / "log.csv"
        rows = list(csv.DictReader(read_lines(path))) if path.exists() else []
        with ends_with(f"{path}", "it is no log of a training stage", ValueError, TypeError):
            return {key: [float(row[key]) for row in rows] for key in (rows[0] if rows else {})}

    def val(self) -> dict[str, dict[str, Any]]:
        """Scores on val of the segmentation networks, by title."""
        rows = {row.title: f"{row.method}_100" for row in TABLES[2]}
        rows |= {
            f"OAA+ labels of {row.title}": f"{row.method}_{row.proportion:.0%}".rstrip("%") for row in TABLES[3][:-1]
        }
        paths = {title: self.path / "val" / name / "scores.json" for title, name in rows.items()}
        return {title: read_json(path) for title, path in paths.items() if path.exists()}

    def missing(self) -> list[str]:
        """What the page cannot show, in sentences."""
        told = []
        if not self.watched.cumulative:
            told.append("Stage 1 has kept no maps of single epochs (--snapshots): there is nothing to play.")
        if self.final is None:
            told.append("There is no attention/max.safetensors: what accumulated is shown of watched images only.")
        if not self.log("attention"):
            told.append("There is no attention/log.csv: no curves of stage 1.")
        for name in SHOWN:
            method = self.methods[name]
            if method.maps is None:
                told.append(f"{method.title}: there are no maps (maps/{name}).")
            elif method.scores is None:
                told.append(f"{method.title}: maps/{name} has no scores.json, so there is no threshold and no IoU.")
        if self.labels is None:
            told.append("There are no pseudo labels (labels/).")
        if not self.val():
            told.append("No segmentation network has been scored (val/).")
        return told


# What to show


@dataclass
class Pair:
    """An image and one of its classes.

    Attributes:
        name: of the image.
        place: of the class among the image's classes.
        kinds: why it is shown: "watched", "gain", "failure".
        iou: of the class in this image, by method.
        gain: of accumulation over the CAM, in IoU; None where that is not known.
    """

    name: str
    place: int
    kinds: list[str]
    iou: dict[str, float | None]
    gain: float | None = None


def class_ious(
    attention: Tensor, class_ids: Sequence[int], truth: Tensor, threshold: float, num_classes: int
) -> list[float | None]:
    """IoU of each of an image's classes: a pixel takes the class of its strongest map, as in the scores of all images.

    Args:
        attention: (K, H, W) uint8.
        class_ids: K.
        truth: (H, W) integer.
        threshold: below which a pixel is background.
        num_classes: of the data set.
    """
    strength, which = attention.max(0)
    shown = torch.where(strength >= 255 * threshold - 1e-6, torch.tensor(class_ids)[which] + 1, 0)
    iou = ConfusionMatrix(num_classes + 1).update(shown, truth).iou().tolist()
    return [None if math.isnan(iou[c + 1]) else iou[c + 1] for c in class_ids]


def image_ious(
    name: str, *, data: VOCFolder, methods: dict[str, Method], rows: dict[str, int]
) -> dict[str, list[float | None]]:
    """Those of one image with each method that has a threshold and maps of it."""
    class_ids, truth, ious = data.class_ids(name), data.mask(name), {}
    for key, method in methods.items():
        level = method.threshold(rows.get(name, 0))
        if level is not None and method.has_maps(name, class_ids):
            maps = [method.read(name, c, (truth.shape[0], truth.shape[1])) for c in class_ids]
            ious[key] = class_ious(torch.stack(maps), class_ids, truth, level, len(data.classes))
    return ious


def choose(run: FinishedRun, *, most: int, failure: float) -> list[Pair]:
    """The pairs to show: all watched ones, the largest gains, the worst failures.

    Args:
        run: whose.
        most: of each of the latter two.
        failure: IoU below which a pair is one.
    """
    methods = {key: run.methods[key] for key in SHOWN if run.methods[key].scores}
    labelled = {name: run.data for name in run.watched.cumulative}
    if methods:
        labelled |= {name: run.scored for name in run.scored.names if run.scored.class_ids(name)}
    names = [name for name in labelled if run.data.has_mask(name)] if methods else []
    score = partial(image_ious, data=run.data, methods=methods, rows=run.rows)
    known = set(run.data.names)
    names = [name for name in names if name in known]
    ious = dict(zip(names, on_all_cores(score, names, "IoU of each image"), strict=True))
    pairs = [
        Pair(name, place, [], {method: values[place] for method, values in ious.get(name, {}).items()})
        for name in dict.fromkeys([*run.watched.cumulative, *names])
        for place in range(len(run.data.class_ids(name)))
    ]
    for pair in pairs:
        ours, cam = pair.iou.get(run.best), pair.iou.get("cam")
        pair.gain = None if ours is None or cam is None else ours - cam
        if pair.name in run.watched.cumulative:
            pair.kinds.append("watched")
    gains = sorted((p for p in pairs if p.gain is not None and p.gain > 0), key=lambda p: -p.gain)
    failures = sorted((p for p in pairs if is_failure(run, p, failure)), key=lambda p: p.iou[run.best])
    for kind, chosen in (("gain", gains[:most]), ("failure", failures[:most])):
        for pair in chosen:
            pair.kinds.append(kind)
    watched = [pair for pair in pairs if "watched" in pair.kinds]
    return unique([*watched, *gains[:most], *failures[:most]])


def is_failure(run: FinishedRun, pair: Pair, below: float) -> bool:
    """Whether attention has failed on a pair."""
    value = pair.iou.get(run.best)
    return value is not None and value < below


def unique(pairs: Iterable[Pair]) -> list[Pair]:
    """Each once."""
    return list({(pair.name, pair.place): pair for pair in pairs}.values())


# Pictures


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


def told(iou: float | None) -> str:
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
            notes.append(told(iou) if maps[pair.place].any() else "nothing so far")
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
                    "notes": [told(pair.iou.get(key))],
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


# Tables and curves, as HTML


def escape(text: object) -> str:
    """Text as HTML, quotes included."""
    return html.escape(str(text), quote=True)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls within itself where the screen is narrow; the first cell of a row names it."""
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def percent(value: float | None) -> str:
    """A share, to a tenth of a percent."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def summary(run: FinishedRun) -> str:
    """Scores of each method, and of each class."""
    val, rows = run.val(), []
    scores = {method.title: method.scores or {} for method in run.methods.values()}
    for title in dict.fromkeys([*scores, *val]):
        cues, shares = scores.get(title, {}), scores.get(title, {}).get("foreground", {})
        levels = " / ".join(f"{level:.2f}" for level in cues.get("thresholds", [])) or "-"
        values = [cues.get("mean_iou"), shares.get("precision"), shares.get("recall"), cues.get("oracle_mean_iou")]
        if cues or title in val:
            rows.append([title, *map(percent, values), levels, percent(val.get(title, {}).get("mean_iou"))])
    if not rows:
        return "<p>Nothing has been scored in this run.</p>"
    head = ["", "cues, mIoU", "precision", "recall", "best mIoU", "thresholds", "val mIoU"]
    parts = [table("Scores in percent", head, rows)]
    for caption, found in (
        ("IoU of each class in percent: cues", {title: s for title, s in scores.items() if s}),
        ("IoU of each class in percent: segmentation networks on val", val),
    ):
        by_class = {title: score["class_iou"] for title, score in found.items() if "class_iou" in score}
        if by_class:
            names = ["background", *run.data.classes]
            body = [[name, *(percent(values.get(name)) for values in by_class.values())] for name in names]
            inner = table(caption, ["", *by_class], body)
            parts.append(f"<details><summary>{escape(caption)}</summary>{inner}</details>")
    return "".join(parts)


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: in the legend.
        x: where.
        y: what; None and NaN are gaps.
        marks: values of x that are marked with a dot.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    marks: Sequence[float] = ()

    def points(self) -> list[tuple[float, float]]:
        """Those that are numbers."""
        pairs = zip(self.x, self.y, strict=True)
        return [(x, y) for x, y in pairs if x is not None and y is not None and not math.isnan(x + y)]


def tick_step(low: float, high: float) -> float:
    """A round number that fits between two about four times."""
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    return min((factor * unit for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two."""
    step = tick_step(low, high)
    return [round(k * step, 10) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> str:
    """Lines over axes as SVG, coloured by the page's style sheet; "" where there is nothing to draw."""
    curves = [curve for curve in curves if len(curve.points()) > 1]
    if not curves:
        return ""
    points = [point for curve in curves for point in curve.points()]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(0.0, *(y for _, y in points)), max(y for _, y in points)
    right, high = (right if right > left else left + 1), (high if high > low else low + 1)
    step = tick_step(low, high)
    high = step * math.ceil(high / step - 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return 48 + 302 * (x - left) / (right - left), 176 - 166 * (y - low) / (high - low)

    parts = []
    for value in ticks(low, high):
        _, y = place(left, value)
        parts.append(f'<path class="grid" d="M48 {y:.1f}H350"/><text x="43" y="{y + 4:.1f}" class="y">{value:g}</text>')
    for value in ticks(left, right):
        x, _ = place(value, low)
        parts.append(f'<path class="grid" d="M{x:.1f} 176v5"/><text x="{x:.1f}" y="194" class="x">{value:g}</text>')
    for number, curve in enumerate(curves):
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve.points())
        parts.append(f'<polyline class="line k{number}" points="{line}"/>')
        known = dict(curve.points())
        for mark in curve.marks:
            near = min(known, key=lambda x, mark=mark: abs(x - mark))
            x, y = place(near, known[near])
            parts.append(f'<circle class="dot k{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    parts.append(f'<path class="axis" d="M48 10V176H350"/><text x="199" y="213" class="x">{escape(x_label)}</text>')
    parts.append(f'<text x="12" y="93" class="x" transform="rotate(-90 12 93)">{escape(y_label)}</text>')
    said = "; ".join(
        f"{curve.name}: {first[1]:.3g} at {first[0]:.3g}, {last[1]:.3g} at {last[0]:.3g}, "
        f"lowest {min(y for _, y in curve.points()):.3g}, highest {max(y for _, y in curve.points()):.3g}"
        for curve in curves
        for first, last in [(curve.points()[0], curve.points()[-1])]
    )
    entries = "".join(
        f'<li><svg viewBox="0 0 28 8" aria-hidden="true"><path class="line k{number}" d="M0 4H28"/></svg>'
        f"{escape(curve.name)}</li>"
        for number, curve in enumerate(curves)
    )
    legend = f"<ul>{entries}</ul>" if len(curves) > 1 else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 360 220" role="img" aria-label="{escape(f"{title}. {y_label} over {x_label}. {said}")}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )


def curves(run: FinishedRun) -> str:
    """Everything that was logged, and cue quality over the threshold."""
    log, scores = run.log("attention"), {m.title: m.scores for m in run.methods.values() if m.scores}
    stage_2 = {run.methods[name].title: run.log(name) for name in ("hybrid", "mce")}
    networks = {method.title: run.log(f"networks/{name}_100") for name, method in run.methods.items()}

    def logged(column: str, names: dict[str, dict[str, list[float]]]) -> list[Curve]:
        return [Curve(name, log["epoch"], log[column]) for name, log in names.items() if column in log]

    shares = {
        "gate_pass_rate": "maps that pass the gate",
        "similarity": "cosine similarity of a pair's latest two maps",
    }
    charts = [
        chart("Classifier: loss", "epoch", "loss", logged("loss", {"binary cross entropy": log})),
        chart(
            "Does attention still move?",
            *("epoch", "share, similarity"),
            [Curve(name, log["epoch"], log[column]) for column, name in shares.items() if column in log],
        ),
        chart("Pairs that hold nothing", "epoch", "pairs", logged("pairs_empty", {"pairs": log})),
        chart("Integral attention models: loss", "epoch", "loss", logged("loss", stage_2)),
        chart("Segmentation networks: loss", "epoch", "loss", logged("loss", networks)),
    ]
    over, against = [], []
    for title, score in scores.items():
        if "curve" in score:
            levels = [level / (len(score["curve"]) - 1) for level in range(len(score["curve"]))]
            over.append(Curve(title, levels, in_percent(score["curve"]), score.get("thresholds", ())))
        if {"curve_precision", "curve_recall"} <= score.keys():
            recall = [math.nan if value is None else 100 * value for value in score["curve_recall"]]
            against.append(Curve(title, recall, in_percent(score["curve_precision"])))
    charts.append(chart("Cues over the threshold (dots: as chosen)", "threshold", "mIoU in %", over))
    charts.append(chart("Cues: precision over recall", "recall in %", "precision in %", against))
    return "".join(charts) or "<p>This run has no logs and no scores to draw.</p>"


def in_percent(values: Iterable[float | None]) -> list[float | None]:
    """Shares, some of which may be None."""
    return [None if value is None else 100 * value for value in values]


def facts(run: FinishedRun, voc_root: Path) -> str:
    """What the run is."""
    arguments, recipe, data = run.settings["arguments"], run.settings["recipe"], run.settings["data"]
    lists = " and ".join(name for name in (data["split"], arguments.get("negatives")) if name)
    told = {
        "data": f"{voc_root.resolve().name}, {lists}: {data['images']} images, {len(data['classes'])} classes",
        "classifier": f"{arguments['backbone']}, {recipe['iterations']} iterations of {recipe['batch_size']} images",
        "recipe": arguments["recipe"],
        "seed": arguments["seed"],
        "commit": run.settings.get("commit") or "not known",
    }
    if run.final is not None:
        total = run.final.statistics()
        told["pairs"] = (
            f"{run.final.pairs.num_pairs}, of which {int(total.never_accumulated.sum())} hold nothing; "
            f"{run.final.accepted / max(run.final.offered, 1):.0%} of the maps passed the gate"
        )
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in told.items())


def definitions(run: FinishedRun, failure: float, most: int) -> str:
    """How gain and failure are meant."""
    ours = escape(run.methods[run.best].title)
    return f"""<p><b>IoU</b> of a pair, an image and one of its classes: at the threshold of the method's own
scores.json, each half of the images at the one that is best on the other half. A pixel takes the class of its strongest
map, or background below the threshold. <b>Gain</b>: the pair's IoU with {ours} minus that with the CAM, in points.
<b>Failure</b>: its IoU with {ours} is below {100 * failure:g} %. (The paper's figure 4 has &ldquo;failure cases&rdquo;
of its segmentation networks; it does not say what makes one.) Shown are all watched images, and of the scored training
images the {most} largest gains and the {most} worst failures. In labels white is ignored.</p>"""


def make_page(run: FinishedRun, voc_root: Path, *, most: int, failure: float) -> str:
    """The whole file."""
    pairs = choose(run, most=most, failure=failure)
    shown = pictures(run, pairs, failure)
    missing = "".join(f"<li>{escape(sentence)}</li>" for sentence in run.missing())
    parts = {
        "title": escape(f"Attention accumulation: {run.path.resolve().name} on {voc_root.resolve().name}"),
        "facts": facts(run, voc_root),
        "missing": f"<aside><h2>Not in this run</h2><ul>{missing}</ul></aside>" if missing else "",
        "summary": summary(run),
        "curves": curves(run),
        "definitions": definitions(run, failure, most),
        # "<" would let a name end the script element
        "data": json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def main() -> None:
    """Read a run, write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument("--run", type=Path, required=True, help="folder of one seed, with attention/ in it")
    parser.add_argument("--out", type=Path, required=True, help="the page (.html)")
    parser.add_argument("--images", type=int, default=8, help="gains, and failures, beside the watched (default: 8)")
    parser.add_argument("--failure", type=float, default=30, help="IoU in percent below which one is (default: 30)")
    arguments = parser.parse_args()
    if arguments.images < 0:
        parser.error(f"--images: expected at least 0, got {arguments.images}")
    if not 0 <= arguments.failure <= 100:
        parser.error(f"--failure: expected 0 to 100 percent, got {arguments.failure:g}")
    with ends_with(f"--out {arguments.out}", "choose a place that can be written to"):
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.is_dir():
        raise SystemExit(f"--out {arguments.out} is a folder; expected a file such as report.html")
    run = FinishedRun(arguments.run, arguments.voc_root)
    page = make_page(run, arguments.voc_root, most=arguments.images, failure=arguments.failure / 100)
    with ends_with(f"--out {arguments.out}", "make room, or choose another place"), whole_file(arguments.out) as file:
        file.write_text(page, encoding="utf-8")
    print(f"done: {arguments.out}, {len(page) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
