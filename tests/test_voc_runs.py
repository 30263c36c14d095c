"""Folders of runs that hold something else: a sentence each."""

import json
import os

import pytest
import torch
from files import read_json
from training import finished, load_checkpoint

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
