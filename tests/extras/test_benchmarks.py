"""The benchmark runs and writes what it prints; what it measures is no test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import accumulation, data
from benchmarks.__main__ import main
from benchmarks.timing import Device

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_help_names_the_rows():
    assert {"png", "floor", "loss", "synchronize"} <= set(run("--help").replace(",", " ").split())


@pytest.mark.slow
def test_a_quick_look_prints_and_writes_the_rows(tmp_path):
    printed = run("--quick", "--json", str(tmp_path / "table.json"))
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["quick"]
    assert {"cpu", "cores", "threads", "torch", "numpy", "commit"} <= set(written["machine"])
    assert written["machine"]["threads"] == 1
    assert len(written["rows"]) == 18
    for row in written["rows"]:
        assert row["name"] in printed
        assert row["ratio"] > 0
        for measured in (row["ours"], row["baseline"]):
            assert 0 <= measured["lower"] <= measured["median"] <= measured["upper"]
        assert row["verdict"] in ("reached", "missed", "-")


# An accelerator, without one


class Clock:
    """What rows need of `torch.cuda`. The device takes a second for a product of matrices, two for anything else."""

    there = True

    def __init__(self):
        self.now = 0.0
        self.peak = self.allocated = 100
        self.queue = []

    def synchronize(self):
        for work in self.queue:
            if isinstance(work, float):
                self.now += work
            else:
                self.now += 1e-6
                work.at = self.now
        self.queue.clear()

    def Event(self, enable_timing):  # noqa: N802
        clock = self

        class Event:
            def record(self):
                clock.queue.append(self)

            def elapsed_time(self, other):
                return 1000 * (other.at - self.at)

        assert enable_timing
        return Event()

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.peak

    def is_available(self):
        return self.there

    def get_device_name(self):
        return "Imaginary 1"


def test_the_device_is_asked_what_it_took_and_the_host_how_long_it_was_kept():
    clock = Clock()
    with FakeTensorMode():
        launch, work = Device("cuda", clock).launch_and_work(lambda: clock.queue.append(2.0), seconds=0)
    assert work.median == pytest.approx(2, abs=1e-3)
    assert 0 < launch.median < 0.5


def test_on_the_host_both_are_one():
    launch, work = Device().launch_and_work(lambda: torch.ones(3), seconds=0)
    assert launch == work


def test_a_call_is_finished_when_the_device_is_and_the_most_memory_is_beside_what_was_there():
    clock = Clock()
    device = Device("cuda", clock)

    def call():
        clock.queue.append(2.0)
        clock.peak = max(clock.peak, clock.allocated + 7)

    device.finishing(call)()
    assert clock.now == 2
    clock.peak = 1000
    assert device.peak_bytes(call) == 7
    assert str(device) == "Imaginary 1"


def test_the_rows_of_an_update_never_wait_for_the_device(monkeypatch):
    shown = data.labels(300)
    monkeypatch.setattr(accumulation, "labels", lambda images: shown)
    monkeypatch.setattr(accumulation, "IMAGES", len(shown))
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = list(accumulation.launch_and_work(0, Device("cuda", Clock())))
    assert [row.name for row in rows] == [f"update, batch {size}, host against device" for size in (5, 16, 256)]


def call_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    main()


def test_the_row_for_an_accelerator_runs_on_the_host(monkeypatch, capsys, tmp_path):
    path = tmp_path / "table.json"
    call_main(monkeypatch, "--quick", "--device", "cpu", "--rows", "update", "--json", path)
    assert "update, batch 256, host against device" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["machine"]["device"] == "cpu"
    assert [row["ratio"] for row in written["rows"]] == [1, 1, 1]


def test_on_an_accelerator_the_rows_of_the_host_are_left_out_and_named(monkeypatch, capsys, tmp_path):
    clock = Clock()
    monkeypatch.setattr(torch, "get_device_module", lambda name: clock)
    with pytest.raises(SystemExit):
        call_main(monkeypatch, "--device", "cuda", "--rows", "png", "mapped", "--json", tmp_path / "table.json")
    printed = capsys.readouterr()
    assert "Left out on Imaginary 1, since they measure the host: png, mapped." in printed.out
    assert "--rows: none of them is measured on this device" in printed.err
    for options, said in (
        (["--device", "gpu"], "--device gpu: "),
        (["--json", tmp_path], "expected a file, got a folder"),
    ):
        with pytest.raises(SystemExit):
            call_main(monkeypatch, *options)
        assert said in capsys.readouterr().err
    clock.there = False
    with pytest.raises(SystemExit):
        call_main(monkeypatch, "--device", "cuda")
    assert "expected a device that this machine has, got cuda" in capsys.readouterr().err
