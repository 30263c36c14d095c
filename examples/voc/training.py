"""A training and its folder: how it starts or goes on, its steps, and the one checkpoint that is complete or absent."""

import argparse
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from bound import Bound, source_commit
from data import VOCFolder
from files import alone_in, ends_with, read_json
from log import Log
from networks import Network
from optimization import make_optimizer
from processes import Process, gradients_of_last
from samples import Sample
from stopping import stop_signal
from stream import Part, last_pass, make_loader
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset
from tqdm import tqdm

from oaa_lib import AttentionAccumulator

LONGEST = 600  # seconds of work that a killed process may lose
OTHER_RUN = "it is of other images, labels or settings; choose another --out or remove the folder"


class Run:
    """One training, in a folder with settings, log and checkpoint; the same command goes on after the last checkpoint.

    Args:
        arguments: of the stage; ``arguments.out`` is the folder. A folder made with other settings is refused.
        settings: of the stage's recipe.
        folder: the training images.
        process: this one.
    """

    FREE = ("out", "device", "workers", "voc_root", "log_every", "checkpoint_every")  # may differ on resuming

    def __init__(self, arguments: argparse.Namespace, settings: Any, folder: VOCFolder, process: Process) -> None:
        self.arguments, self.settings, self.process = arguments, settings, process
        self.path: Path = arguments.out
        self.epoch_length = max(round(len(folder) / settings.batch_size), 1)
        self.last_pass = last_pass(settings.iterations, settings.batch_size, len(folder))
        self.log_every = arguments.log_every or self.epoch_length
        if self.log_every < 1 or arguments.checkpoint_every < 1:
            raise SystemExit("--log-every, --checkpoint-every: expected at least 1")
        if process.is_first:
            recipe = dataclasses.asdict(settings)
            kept = {name: value for name, value in vars(arguments).items() if name not in (*recipe, *self.FREE)}
            data = {"split": folder.split, "images": len(folder), "classes": folder.classes}
            bound = {"arguments": kept, "recipe": recipe, "data": data}
            Bound(self.path, bound, noted={"commit": source_commit()}).make()
            alone_in(self.path)
        self.log = Log(self.path / "log.csv", self.epoch_length)
        self.first, self.kept, self.network = 0, {}, None

    def start(self, build: Callable[..., Network], num_classes: int, **kept: Any) -> tuple[Any, Optimizer]:
        """The network and its optimiser, as the last checkpoint left them or as they begin.

        Args:
            build: makes a network of a backbone, a number of classes, and weights.
            num_classes: of its scores.
            kept: what else grows during the training and belongs in the checkpoint, by name.
        """
        torch.manual_seed(self.arguments.seed)
        with ends_with("--weights", "expected 'default', 'none' or a file that fits --backbone", ValueError):
            network = build(self.arguments.backbone, num_classes, self.arguments.weights)
        network = self.process.place(network)
        optimizer = make_optimizer(network, self.settings)
        self.kept = {"network": network, "optimizer": optimizer, **kept}
        if (self.path / "checkpoint.pt").exists():
            self._go_on(load_checkpoint(self.path))
        elif self.process.is_first:
            self.log.shorten(0)  # of a run that was killed before its first checkpoint
        self.network = self.process.share(network).train()
        return self.network, optimizer

    def _go_on(self, saved: dict[str, Any]) -> None:
        with ends_with(f"{self.path}/checkpoint.pt", OTHER_RUN, KeyError, RuntimeError, ValueError):
            for name, thing in self.kept.items():
                several = isinstance(thing, AttentionAccumulator) and self.process.world > 1  # which all load it
                thing.load_state_dict(saved[name], **({"known_to_all": True} if several else {}))
        self.first = saved["step"]
        if self.process.is_first:
            print(f"resumed after iteration {self.first} of {self.settings.iterations}", flush=True)
            self.log.shorten(self.first)

    def steps(self, images: Dataset[Sample]) -> Iterator[tuple[int, list[Part]]]:
        """(step, this process's share of the batch, on the device) until the last iteration, with checkpoints.

        Random numbers of a step (dropout) depend on the seed and the step alone. Ctrl-C, or the kill of a scheduler,
        ends the step, writes a checkpoint and stops; with several processes the last checkpoint is what remains.
        """
        process, last, seed = self.process, self.settings.iterations, self.arguments.seed
        bar = tqdm(self.batches(images), self.path.name, last, initial=self.first, disable=not process.is_first)
        saved = time.monotonic()
        with stop_signal(process.world == 1) as stop:
            for step, batch in enumerate(bar, self.first):
                if isinstance(batch, SystemExit):  # a file that cannot be used; what has been learnt is kept
                    if step > self.first and process.world == 1:
                        self._save(step)
                    raise batch
                torch.manual_seed((seed << 40) + (step << 8) + process.rank)
                self._loss = torch.zeros((), device=process.device)
                yield step, [part.to(process.device) for part in batch]
                done = step + 1
                if self.log.noted and (done % self.log_every == 0 or done == last):
                    bar.set_postfix_str(self._write_log(done))
                late = process.world == 1 and time.monotonic() > saved + LONGEST  # several would not agree on it
                if done % self.arguments.checkpoint_every == 0 or done == last or stop or late:
                    self._save(done)
                    saved = time.monotonic()
                if stop and done < last:
                    raise SystemExit(f"stopped after iteration {done}; the same command goes on from there")

    def batches(self, images: Dataset[Sample]) -> Iterable[list[Part] | SystemExit]:
        """This process's share of each batch, or what is wrong with a file, from the first step to the last."""
        sharing = {"workers": self.arguments.workers, "rank": self.process.rank, "world": self.process.world}
        last, seed = self.settings.iterations, self.arguments.seed
        return make_loader(images, self.settings.batch_size, self.first, last, seed=seed, **sharing)

    def parts(self, batch: list[Part]) -> Iterator[Part]:
        """The parts of a batch, each for its forward and backward pass; those of the last exchange the gradients."""
        for part in batch:
            with gradients_of_last(self.network, part is batch[-1]):
                yield part

    def autocast(self) -> torch.autocast:
        """The context of a forward pass: bfloat16 with --amp, else as is."""
        return torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.arguments.amp)

    def backward(self, loss: Tensor, part: Part, *, mean: bool = True) -> None:
        """Add the gradients of a part of the batch.

        Args:
            loss: a mean over the part's images.
            part: of the batch.
            mean: whether gradients are averaged over the images of the whole batch, or summed.
        """
        images = self.settings.batch_size if mean else 1
        loss = loss * (len(part.names) * (self.process.world / images))  # gradients are averaged over processes
        loss.backward()
        self._loss += loss.detach()

    def step(self, optimizer: Optimizer, **noted: Any) -> None:
        """Apply the gradients, and note the loss and whatever else for the log (`Log.note`)."""
        optimizer.step()
        optimizer.zero_grad()
        self.log.note(loss=self._loss, **noted)

    def _write_log(self, done: int) -> str:
        row = self.log.row(done)
        if self.process.is_first:
            self.log.write(row)
        return " ".join(f"{k} {v:.3g}" for k, v in row.items() if k in ("loss", "gate_pass_rate", "similarity"))

    def _save(self, step: int) -> None:
        """Replace the checkpoint, whole or not at all."""
        for thing in self.kept.values():
            if isinstance(thing, AttentionAccumulator) and self.process.world > 1:
                thing.synchronize()
        if not self.process.is_first:
            return
        partial = self.path / "checkpoint.pt.partial"
        try:
            with open(partial, "wb") as file:
                torch.save({"step": step} | {name: thing.state_dict() for name, thing in self.kept.items()}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(self.path).free / 2**20
            raise SystemExit(
                f"{self.path}: the checkpoint of iteration {step} cannot be written ({error}; {free:.0f} MiB free); "
                "the one before is whole, and the same command goes on from it"
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


def finished(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and checkpoint of a training stage that has run to its end."""
    if not (folder / "settings.json").exists():
        raise SystemExit(f"{folder} is no folder of a training stage: it has no settings.json")
    settings, state = read_json(folder / "settings.json"), load_checkpoint(folder)
    parts = {name: part for name, part in settings.items() if isinstance(part, dict)}
    expected = {"recipe": "iterations", "arguments": "backbone", "data": "classes"}
    absent = [f"{part}.{key}" for part, key in expected.items() if key not in parts.get(part, {})]
    if absent or type(settings["recipe"]["iterations"]) is not int:
        raise SystemExit(
            f"{folder}/settings.json is not one of a training stage: expected "
            f"{', '.join(absent) or 'a number as recipe.iterations'} in it; choose another folder"
        )
    if state["step"] < settings["recipe"]["iterations"]:
        raise SystemExit(f"{folder} has stopped after iteration {state['step']} of {settings['recipe']['iterations']}")
    return settings, state
