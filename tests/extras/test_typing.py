"""The types that a user's program sees, as an installed package has them."""

import ast
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import typed_user

import oaa_lib

PROGRAM = Path(typed_user.__file__)
WRONG = """import torch
from oaa_lib import AttentionAccumulator, ConfusionMatrix, Fusion, View, hybrid_loss
hybrid_loss(torch.zeros(1), torch.zeros(1), normalization="batch")
View("left")
AttentionAccumulator([[1]], (1, 1), gate=3)
AttentionAccumulator([[1]], (1, 1)).update([0])
AttentionAccumulator([[1]], (1, 1), fusion=lambda cumulative, attention: attention)
ConfusionMatrix(3).mean_iou().shape
"""


def test_the_typed_program_runs(capsys):
    typed_user.main()
    assert f"oaa_lib {oaa_lib.__version__}" in capsys.readouterr().out


def test_the_typed_program_uses_every_public_name():
    used = {node.id for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Name)}
    assert set(oaa_lib.__all__) - used == set()


@pytest.mark.slow
def test_mypy_accepts_a_right_program_and_sees_each_wrong_line(tmp_path):
    """In an environment of its own, where the package is installed and found by its py.typed."""
    venv.create(tmp_path / "env")
    site = next((tmp_path / "env").rglob("site-packages"))
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"])  # torch and numpy
    shutil.copytree(Path(oaa_lib.__file__).parent, site / "oaa_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROGRAM, tmp_path / "right.py")
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-incremental",
        "--python-executable",
        tmp_path / "env/bin/python",
    ]
    result = subprocess.run(
        [*command, "right.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    errors = {
        line.split(":")[0] + ":" + line.split(":")[1] for line in result.stdout.splitlines() if ": error:" in line
    }
    assert errors == {f"wrong.py:{number}" for number in range(3, 9)}, result.stdout + result.stderr
