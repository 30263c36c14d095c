"""What a seed needs for the paper's tables and figures: every stage, run as a script of its own unless it is done."""

import argparse
import hashlib
import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bound import Bound
from data import VOCFolder
from evaluate_cues import evaluate_maps
from files import read_json, write_text
from images import png
from options import training_split
from recipes import Labels
from scores import chosen_classes, names_of
from texts import read_text

HERE = Path(__file__).parent
LOSSES = {  # the paper's cross entropy has no threshold
    "mce": ["--loss", "mce", "--threshold", "0", "--constrain-below", "threshold"],
    "hybrid": [],
}


class Seed:
    """Everything of one seed. Each method but `bind` makes what it needs first, and returns what it makes.

    Args:
        arguments: of this script.
        seed: its number.
    """

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.arguments, self.number = arguments, seed
        self.folder: Path = arguments.out / f"seed{seed}"
        self.background: str = arguments.background
        # Of the folders of all that is made from refined maps.
        self.suffix = f"_{arguments.refine}" if arguments.refine else ""

    def bind(self) -> None:
        """Bind the seed's folder to the training images and their labels, wherever they are; end if it has others."""
        data = VOCFolder(self.arguments.voc_root, self.split, negatives=self.arguments.negatives)
        pairs = "\n".join(f"{name} {data.class_ids(name)}" for name in data.names)
        digest = hashlib.sha256(f"{data.classes}\n{pairs}".encode()).hexdigest()[:16]
        kept = {"split": self.split, "images": len(data), "images_and_labels": digest}
        Bound(self.folder, kept, record="data.json").make()

    def attention(self) -> Path:
        """Stage 1, the classifier and its accumulated attention."""
        options = self._training(self.arguments.attention_backbone) + self._negatives()
        return self._stage("train_attention.py", "attention", [*options, *self.arguments.attention])

    def integral(self, loss: str) -> Path:
        """Stage 2, an integral attention model."""
        maps = self.attention() / "max.safetensors"
        options = self._training(self.arguments.attention_backbone) + self._negatives()
        options += ["--maps", maps, *self.arguments.integral, *LOSSES[loss]]
        return self._stage("train_integral.py", loss, options)

    def exported(self, method: str) -> Path:
        """Attention of the training images at their size."""
        run, source = (self.integral(method), "integral") if method in LOSSES else (self.attention(), method)
        options = ["--run", run, "--source", source, "--split", self.split, *self._recipe(), *self.arguments.export]
        return self._stage("export_attention.py", f"maps/{method}", options, data=True)

    def maps(self, method: str) -> Path:
        """The maps that become labels: attention as it is exported, or refined."""
        exported, refine = self.exported(method), self.arguments.refine
        if not refine:
            return exported
        options = ["--maps", exported, "--split", self.split, "--method", refine]
        if refine == "crf":  # its background: the threshold that is best for the unrefined maps, above 0 as it asks
            options += ["--background-level", self.scores(exported)["thresholds"][1] or 1 / 255]
        else:
            options += ["--device", self.arguments.device]
        return self._stage("refine_cues.py", f"maps/{method}{self.suffix}", options)

    def scores(self, maps: Path, saliency: Path | None = None) -> dict[str, Any]:
        """Scores of a folder of maps on the images of VOC's train split, which have masks of VOC's quality."""
        data = VOCFolder(self.arguments.voc_root, self.arguments.score_split)
        record = maps / ("scores_with_saliency.json" if saliency else "scores.json")
        scored = chosen_classes(self.arguments.score_classes, data.classes)
        asked = {"split": data.split, "score_classes": names_of(scored, data.classes)}
        asked["saliency"] = str(saliency) if saliency else None
        found = read_json(record) if record.exists() else {}
        if any(found.get(key) != value for key, value in asked.items()):
            found = evaluate_maps(data, maps, scored=scored, saliency=saliency)
            write_text(record, json.dumps(found, allow_nan=False))
        return read_json(record)

    def cues(self, method: str) -> dict[str, Any]:
        """Scores of the maps that become labels, with a constant background."""
        return self.scores(self.maps(method))

    def cues_with_saliency(self, method: str) -> dict[str, Any] | None:
        """The same with saliency as the background; None with another cue, or where an image has no saliency map."""
        saliency, scored = self.arguments.saliency, VOCFolder(self.arguments.voc_root, self.arguments.score_split)
        if self.background != "saliency" or not all(png(saliency, name).exists() for name in scored.names):
            return None
        return self.scores(self.maps(method), saliency)

    def level(self, method: str) -> float | None:
        """The constant background: that which is best on the even half of the train split; None with another cue."""
        return self.cues(method)["thresholds"][1] if self.background == "threshold" else None

    def labels(self, method: str) -> Path:
        """Stage 3, proxy labels."""
        options = ["--maps", self.maps(method), "--split", self.split, "--background", self.background, *self._recipe()]
        if self.background == "saliency":
            # The release's threshold and scale in every recipe: those of `small` are made for a constant.
            options += ["--saliency", self.arguments.saliency, "--stretch"]
            options += ["--foreground-threshold", Labels().foreground_threshold]
        elif self.background == "threshold":
            # The level decides, and was chosen on maps as they are.
            # Half a grey level less: as a cue a class begins at the level, in labels above it (ties are background).
            level = max((self.level(method) or 0) - 0.5 / 255, 0)
            options += ["--background-level", level, "--foreground-threshold", 0, "--no-stretch"]
        return self._stage("make_pseudo_labels.py", f"labels/{method}{self.suffix}", [*options, *self.arguments.labels])

    def network(self, method: str, proportion: float = 1.0) -> Path:
        """Stage 4, a segmentation network on a share of the images."""
        options = [*self._training(self.arguments.backbone), "--labels", self.labels(method)]
        options += ["--split", self.split, "--proportion", proportion, *self.arguments.segmentation]
        name = f"{method}{self.suffix}_{proportion:.0%}".rstrip("%")
        return self._stage("train_segmentation.py", f"networks/{name}", options)

    def val(self, method: str, proportion: float = 1.0) -> Path:
        """Stage 5, the network's label images of val, and scores.json."""
        run = self.network(method, proportion)
        options = ["--run", run, *self._recipe(), *self.arguments.evaluation]
        if self.arguments.score_classes is not None:
            options += ["--score-classes", self.arguments.score_classes]
        return self._stage("evaluate.py", f"val/{run.name}", options, data=True)

    @property
    def split(self) -> str:
        """The list of the training images."""
        return training_split(argparse.Namespace(voc_root=self.arguments.voc_root, split=None))

    def _recipe(self) -> list[Any]:
        return ["--recipe", self.arguments.recipe]

    def _training(self, backbone: str) -> list[Any]:
        options = ["--backbone", backbone, "--weights", self.arguments.weights, "--seed", self.number]
        return [*options, *self._recipe(), *(["--amp"] if self.arguments.amp else [])]

    def _negatives(self) -> list[Any]:
        return ["--negatives", self.arguments.negatives] if self.arguments.negatives else []

    def _stage(self, script: str, name: str, options: Sequence[Any], *, data: bool | None = None) -> Path:
        """Run a script into a folder of this seed, unless it ran to its end with these options before."""
        out = self.folder / name
        folders = [folder for path in options if isinstance(path, Path) for folder in (path, path.parent)]
        ours = {folder: made(folder) for folder in folders if folder.is_relative_to(self.folder)}
        sources = {str(folder.relative_to(self.folder)): how for folder, how in ours.items() if how}
        bound = Bound(out, sources, record="made_from.json")  # ends if one of them was made anew in another way since
        options, done = [str(option) for option in options], out / "done.txt"
        told = " ".join([script, *options])
        if done.is_file() and done.read_bytes().split(b"\n")[0] == told.encode():
            return out
        bound.make()
        trains = script.startswith("train_")
        free: list[Any] = ["--voc-root", self.arguments.voc_root, "--out", out]
        if trains or data:
            free += ["--device", self.arguments.device, "--workers", self.arguments.workers]
        launch(script, [*options, *map(str, free)], self.arguments.processes if trains else 1)
        write_text(done, f"{told}\n{secrets.token_hex(8)}")  # another one for results of the same options made anew
        return out


def made(stage: Path) -> dict[str, Any]:
    """How the results in a stage's folder were made, with all that they were made from; nothing of other folders."""
    done, sources = stage / "done.txt", stage / "made_from.json"
    if not done.is_file():
        return {}
    told = dict(zip(("by", "result"), read_text(done).split("\n"), strict=False))
    return told | (read_json(sources) if sources.exists() else {})


def launch(script: str, options: list[str], processes: int) -> None:
    """Run one script; stop everything if it fails."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    print("$", " ".join(["python", *start[1:], f"examples/voc/{script}", *options]), flush=True)
    asked = []

    def stop(number: int, _: Any) -> None:
        """Nothing outlives this script: it waits for the stage, which a terminal's Ctrl-C reaches without its help."""
        asked.append(number)
        if number == signal.SIGTERM:
            stage.terminate()

    with subprocess.Popen([*start, str(HERE / script), *options]) as stage:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        stage.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if stage.returncode or asked:
        raise SystemExit(f"{script} stopped; when the cause is fixed, the same command goes on from there")
