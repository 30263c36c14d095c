"""The benchmark runs and writes what it prints; what it measures is no test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
