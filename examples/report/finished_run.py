"""A finished run: what stages, maps, scores and labels its folder holds."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import VOCFolder
from files import ends_with, read_json
from maps import read_map
from networks import BACKBONES
from paper_tables import TABLES
from texts import read_lines
from torch import Tensor
from training import finished

from oaa_lib import AttentionAccumulator

SHOWN = ("cam", "max", "hybrid")  # whose maps of single images are looked at
LABELS = ("hybrid", "max", "mean", "cam_flip", "cam", "cam_ms", "mce")  # whose pseudo labels, the first that are there


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
        sentences = []
        if not self.watched.cumulative:
            sentences.append("Stage 1 has kept no maps of single epochs (--snapshots): there is nothing to play.")
        if self.final is None:
            sentences.append("There is no attention/max.safetensors: what accumulated is shown of watched images only.")
        if not self.log("attention"):
            sentences.append("There is no attention/log.csv: no curves of stage 1.")
        for name in SHOWN:
            method = self.methods[name]
            if method.maps is None:
                sentences.append(f"{method.title}: there are no maps (maps/{name}).")
            elif method.scores is None:
                sentences.append(
                    f"{method.title}: maps/{name} has no scores.json, so there is no threshold and no IoU."
                )
        if self.labels is None:
            sentences.append(
                "There are no pseudo labels (labels/) of maps as they are; those of refined maps are not shown."
            )
        if not self.val():
            sentences.append("No segmentation network of such labels has been scored (val/).")
        return sentences
