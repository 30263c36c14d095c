"""What the training stages share: arguments, processes, and the folder of a run with its log and checkpoint."""

import argparse
import csv
import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from data import VOCFolder
from files import ends_with, read_json, write_text
from lists import read_text
from networks import BACKBONES
from processes import Process
from samples import Sample
from stopping import stop_signal
from stream import make_loader
from torch.utils.data import Dataset
from tqdm import tqdm

OTHER_RUN = "it is of other images, labels or settings; choose another --out or remove the folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the training stages beside those of the recipe."""
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of this stage's results; resumed if it exists")
    parser.add_argument("--split", help="list of the training images (default: trainaug if there is one, else train)")
    parser.add_argument("--backbone", choices=BACKBONES, default="vgg16", help="default: vgg16, the paper's")
    parser.add_argument(
        "--weights", default="default", help="'default' (ImageNet), 'none', or a file (default: default)"
    )
    parser.add_argument(
        "--amp", action="store_true", help="forward pass in bfloat16: other rounding, faster where the hardware has it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new layers, the order, and what is drawn")
    parser.add_argument("--log-every", type=int, help="iterations (default: once in a pass over the images)")
    parser.add_argument("--checkpoint-every", type=int, default=1000, help="iterations (default: 1000)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every stage that reads the data set."""
    parser.add_argument("--voc-root", type=Path, required=True, help="folder with JPEGImages, ImageSets, ...")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, if any"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that load images (default: 2)")


def add_part_argument(parser: argparse.ArgumentParser) -> None:
    """``--part I/N`` of the stages that several processes can share without knowing of each other."""

    def part(text: str) -> tuple[int, int]:
        number, _, parts = text.partition("/")
        if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
            raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, such as 0/4, got {text}")
        return int(number), int(parts)

    parser.add_argument(
        "--part", type=part, default="0/1", help="I/N: this process's share of the images (default: 0/1)"
    )


def training_split(arguments: argparse.Namespace) -> str:
    """The list of the 10,582 images where ``prepare.py`` has written one, else VOC's own training list."""
    lists = arguments.voc_root / "ImageSets" / "Segmentation"
    has_augmented = any((lists / f"trainaug{end}.txt").exists() for end in ("", "_cls"))
    return arguments.split or ("trainaug" if has_augmented else "train")


class Run:
    """The folder of a stage: its settings, its log, and one checkpoint that is complete or absent.

    Args:
        arguments: of the stage; ``arguments.out`` is the folder. A folder made with other settings is refused.
        settings: of the stage's recipe.
        folder: the training images.
        process: this one.
    """

    FREE = ("out", "device", "workers", "voc_root", "log_every", "checkpoint_every")  # may differ on resuming

    def __init__(self, arguments: argparse.Namespace, settings: Any, folder: VOCFolder, process: Process) -> None:
        self.path: Path = arguments.out
        self.process, self.iterations = process, settings.iterations
        self.batch_size, self.workers = settings.batch_size, arguments.workers
        self.epoch_length = max(round(len(folder) / settings.batch_size), 1)
        self.log_every = arguments.log_every or self.epoch_length
        self.checkpoint_every = arguments.checkpoint_every
        if self.log_every < 1 or self.checkpoint_every < 1:
            raise SystemExit("--log-every, --checkpoint-every: expected at least 1")
        names = {field.name for field in dataclasses.fields(settings)}
        kept = {k: v for k, v in vars(arguments).items() if k not in names and k not in self.FREE}
        self.settings = {
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in kept.items()},
            "recipe": dataclasses.asdict(settings),
            "data": {"split": folder.split, "images": len(folder), "classes": folder.classes},
        }
        self.settings = json.loads(json.dumps(self.settings))  # as they come back from the file
        if process.is_first:
            self._bind(commit=source_commit())
        self._values: list[dict[str, Any]] = []
        self._started = time.perf_counter()

    def _bind(self, commit: str | None) -> None:
        file = self.path / "settings.json"
        with ends_with(f"--out {self.path}", "choose a folder that can be written to, or make room"):
            self.path.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                return write_text(file, json.dumps(self.settings | {"commit": commit}, indent=1))
        found = read_settings(self.path)
        differing = [
            f"{key}: {old.get(key)} there, {new.get(key)} asked"
            for part in self.settings
            for old, new in [(part_of(found, part), self.settings[part])]
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if differing:
            raise SystemExit(
                f"{self.path} was made with other settings ({'; '.join(differing)}); choose another --out or remove "
                "the folder"
            )

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None."""
        state = load_checkpoint(self.path) if (self.path / "checkpoint.pt").exists() else None
        if state is not None and self.process.is_first:
            print(f"resumed after iteration {state['step']} of {self.iterations}", flush=True)
            self._shorten_log(state["step"])
        return state

    def steps(
        self, first: int, images: Dataset[Sample], state: Callable[[], dict[str, Any]]
    ) -> Iterator[tuple[int, Any]]:
        """(step, batch of the images) until the last iteration, with a progress bar, and checkpoints of ``state()``.

        A batch is a list of `Part`, this process's share. Random numbers of a step (dropout) depend on the seed and the
        step alone. Ctrl-C, or the kill of a scheduler, ends the step, writes a checkpoint and stops; with several
        processes the last checkpoint is what remains.
        """
        seed, process = self.settings["arguments"]["seed"], self.process
        loader = make_loader(
            images,
            self.batch_size,
            first,
            self.iterations,
            seed=seed,
            workers=self.workers,
            rank=process.rank,
            world=process.world,
        )
        bar = tqdm(loader, self.path.name, self.iterations, initial=first, disable=not process.is_first)
        with stop_signal(process.world == 1) as stop:
            for step, batch in enumerate(bar, first):
                if isinstance(batch, SystemExit):  # a file that cannot be used; what has been learnt is kept
                    if step > first and process.world == 1:
                        self._save(step=step, **state())
                    raise batch
                torch.manual_seed((seed << 40) + (step << 8) + process.rank)
                yield step, batch
                done = step + 1
                if self._values and (done % self.log_every == 0 or done == self.iterations):
                    bar.set_postfix_str(self._write_log(done))
                if done % self.checkpoint_every == 0 or done == self.iterations or stop:
                    self._save(step=done, **state())
                if stop and done < self.iterations:
                    raise SystemExit(f"stopped after iteration {done}; the same command goes on from there")

    def log(self, **values: Any) -> None:
        """Note tensors and numbers of one step: their means are written every ``--log-every`` iterations.

        A function is called then, once, for what is dear to compute.
        """
        self._values.append(values)

    def _write_log(self, done: int) -> str:
        row: dict[str, Any] = {"step": done, "epoch": round(done / self.epoch_length, 2)}
        for name, last in self._values[-1].items():
            if callable(last):
                last = last()
                row |= last if isinstance(last, dict) else {name: last}
            else:
                series = [torch.as_tensor(v[name], dtype=torch.float32) for v in self._values if name in v]
                row[name] = torch.stack(series).mean().item()
        row["seconds"] = time.perf_counter() - self._started
        self._started, self._values = time.perf_counter(), []
        if self.process.is_first:
            advice = "the last checkpoint is whole, and the same command goes on from it"
            with ends_with(f"{self.path}/log.csv", advice), open(self.path / "log.csv", "a", newline="") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
        return " ".join(f"{k} {v:.3g}" for k, v in row.items() if k in ("loss", "gate_pass_rate", "similarity"))

    def _shorten_log(self, step: int) -> None:
        """Drop what was logged after the checkpoint: these steps are done again."""
        file = self.path / "log.csv"
        head, *rows = (read_text(file) if file.exists() else "").splitlines(keepends=True) or [""]
        whole = [(row, row.split(",")[0]) for row in rows if row.endswith("\n")]  # of a full disk: half a row
        if head:
            write_text(file, "".join([head, *(row for row, done in whole if done.isdecimal() and int(done) <= step)]))

    def _save(self, **state: Any) -> None:
        """Replace the checkpoint, whole or not at all."""
        if not self.process.is_first:
            return
        partial = self.path / "checkpoint.pt.partial"
        try:
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(self.path).free / 2**20
            raise SystemExit(
                f"{self.path}: the checkpoint of iteration {state['step']} cannot be written ({error}; {free:.0f} MiB "
                "free); the one before is whole, and the same command goes on from it"
            ) from error
        os.replace(partial, self.path / "checkpoint.pt")


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint of a run's folder, on the host."""
    path = folder / "checkpoint.pt"
    if not path.is_file():  # of a FIFO, which would wait for ever, the same can be said
        raise SystemExit(f"{folder} is no folder of a training stage that has got anywhere: it has no checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{path} cannot be read ({error}); remove it to start this stage anew") from error
    if not isinstance(state, dict) or type(state.get("step")) is not int or not isinstance(state.get("network"), dict):
        raise SystemExit(
            f"{path} is not one of a training stage (expected step and network in it); remove it to start this stage "
            "anew"
        )
    return state


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run's folder."""
    path = folder / "settings.json"
    if not path.exists():
        raise SystemExit(f"{folder} is no folder of a training stage: it has no settings.json")
    return read_json(path)


def part_of(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of a run's settings; empty where there is none."""
    part = settings.get(name)
    return part if isinstance(part, dict) else {}


def finished(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and checkpoint of a training stage that has run to its end."""
    settings, state = read_settings(folder), load_checkpoint(folder)
    expected = {"recipe": "iterations", "arguments": "backbone", "data": "classes"}
    absent = [f"{part}.{key}" for part, key in expected.items() if key not in part_of(settings, part)]
    if absent or type(settings["recipe"]["iterations"]) is not int:
        raise SystemExit(
            f"{folder}/settings.json is not one of a training stage: expected "
            f"{', '.join(absent) or 'a number as recipe.iterations'} in it; choose another folder"
        )
    if state["step"] < settings["recipe"]["iterations"]:
        raise SystemExit(f"{folder} has stopped after iteration {state['step']} of {settings['recipe']['iterations']}")
    return settings, state


def source_commit() -> str | None:
    """The commit of this source, marked if the tree has changed since; None outside of a repository."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


class Stopwatch:
    """Adds up the seconds spent within ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
