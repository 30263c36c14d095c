"""Folders of runs: what is gone on with; and a sentence for each that holds something else."""

import dataclasses
import itertools
import json
import os
from argparse import Namespace

import pytest
import torch
from bound import Bound
from files import read_json
from processes import Process
from recipes import SMALL
from torch import nn
from training import Run, finished, load_checkpoint

SETTINGS = {"recipe": {"iterations": 5}, "arguments": {"backbone": "vgg16"}, "data": {"classes": ["cat"]}}
STATE = {"step": 5, "network": {}}


def write(folder, settings=SETTINGS, state=STATE):
    (folder / "settings.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    torch.save(state, folder / "checkpoint.pt")


def test_a_run_that_is_whole_is_read(tmp_path):
    write(tmp_path)
    assert finished(tmp_path) == (SETTINGS, STATE)


BAD_SETTINGS = {
    "nothing": ("{}", "expected recipe.iterations, arguments.backbone, data.classes in it"),
    "null": (SETTINGS | {"recipe": None}, "expected recipe.iterations in it"),
    "no backbone": (SETTINGS | {"arguments": {}}, "expected arguments.backbone in it"),
    "words for numbers": (SETTINGS | {"recipe": {"iterations": "5"}}, "expected a number as recipe.iterations"),
    "true for a number": (SETTINGS | {"recipe": {"iterations": True}}, "expected a number as recipe.iterations"),
    "brackets without end": ("[" * 100000, "settings.json cannot be read"),
    "a list": ("[]", "is not one of ours"),
    "more to come": (SETTINGS | {"recipe": {"iterations": 6}}, "has stopped after iteration 5 of 6"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=list(BAD_SETTINGS))
def test_settings_of_something_else(tmp_path, settings, message):
    write(tmp_path, settings)
    with pytest.raises(SystemExit, match=message):
        finished(tmp_path)


@pytest.mark.parametrize("state", [{}, [1], {"step": "5", "network": {}}, {"step": 5}, {"step": 5, "network": [1]}])
def test_checkpoints_of_something_else(tmp_path, state):
    write(tmp_path, state=state)
    for read in (finished, load_checkpoint):
        with pytest.raises(SystemExit, match=r"checkpoint\.pt is not one of a training stage"):
            read(tmp_path)


def test_fifos_do_not_wait(tmp_path):
    write(tmp_path)
    for name in ("settings.json", "checkpoint.pt"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    for read, path in ((load_checkpoint, tmp_path), (read_json, tmp_path / "settings.json")):
        with pytest.raises(SystemExit, match=r"regular file|no checkpoint"):
            read(path)


class Tiny(nn.Module):
    """Two parts that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    def parts(self):
        return dict(self.named_children())


class Data(list):
    split, classes = "train", ("cat", "dog")


HERE = Process(torch.device("cpu"), 0, 1)


def arguments(folder):
    return Namespace(out=folder, seed=0, backbone="tiny", weights="none", log_every=1, checkpoint_every=1)


def start(folder, device):
    run = Run(arguments(folder), SMALL.attention, Data("abcd"), Process(torch.device(device), 0, 1))
    return run, *run.start(lambda *_: Tiny(), 2)


@pytest.mark.filterwarnings("ignore:.*is a no-op:UserWarning")
def test_what_a_training_goes_on_with_is_on_its_device(tmp_path):
    """The state of the optimiser too, which follows the parameters that it is loaded for; "meta" stands for a GPU."""
    run, network, optimizer = start(tmp_path, "cpu")
    network.head(network.backbone(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    run._save(1)
    run, network, optimizer = start(tmp_path, "meta")
    assert run.first == 1
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert len(kept) == 2 * 4  # AdamW's two moments of four parameters
    assert {value.device.type for value in [*kept, *network.parameters()]} == {"meta"}


def test_a_start_that_failed_does_not_bind_a_folder_and_results_do(tmp_path):
    Bound(tmp_path, {"weights": "no such file"}).make()
    Bound(tmp_path, {"weights": "default"}).make()
    assert read_json(tmp_path / "settings.json") == {"weights": "default"}
    (tmp_path / "log.csv").touch()
    Bound(tmp_path, {"weights": "default"}).make()
    with pytest.raises(SystemExit, match="made with other settings \\(weights: default there, none asked\\)"):
        Bound(tmp_path, {"weights": "none"})


def test_the_last_pass_begins_as_late_as_it_can_and_shows_every_image(tmp_path):
    """A pass is images k N to (k + 1) N of the stream, in an order of its own."""
    for images, size, iterations in itertools.product(range(1, 9), range(1, 5), range(1, 12)):
        settings = dataclasses.replace(SMALL.attention, batch_size=size, iterations=iterations)
        run = Run(arguments(tmp_path / f"{images} {size} {iterations}"), settings, Data("abcdefgh"[:images]), HERE)
        passes = max(iterations * size // images, 1)
        first, last = (passes - 1) * images, passes * images - 1  # in the stream
        assert list(run.last_pass) == list(range(first // size, last // size + 1))


def test_a_log_of_a_run_without_a_checkpoint_begins_anew(tmp_path):
    (tmp_path / "log.csv").write_text("step,epoch\n1,0.1\n2,0.2\n")
    start(tmp_path, "cpu")
    assert (tmp_path / "log.csv").read_text() == "step,epoch\n"


def test_one_process_saves_after_ten_minutes_too(tmp_path, monkeypatch):
    clock = itertools.count(step=250.0)  # seconds: each look at the clock is 250 later
    monkeypatch.setattr("training.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(Run, "batches", lambda *_: [[] for _ in range(8)])
    given, saved = arguments(tmp_path), []
    given.checkpoint_every = 1000
    run = Run(given, dataclasses.replace(SMALL.attention, iterations=8), Data("abcd"), HERE)
    run.start(lambda *_: Tiny(), 2)
    monkeypatch.setattr(run, "_save", saved.append)
    for _ in run.steps([]):
        pass
    assert saved == [3, 6, 8]
