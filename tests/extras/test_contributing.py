"""The three diffs of CONTRIBUTING.md apply to this tree, are short, and do what the text says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIFFS = re.findall(r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE | re.DOTALL)

CHECKS = """
import sys
from pathlib import Path

import oaa_lib
import torch
from oaa_lib import AttentionAccumulator, CAMOutput
from oaa_lib.fusion import FUSIONS
from oaa_lib.testing import assert_idempotent, check_fusion

here = Path(__file__).parent
assert Path(oaa_lib.__file__).is_relative_to(here)

# the fusion
maps = [torch.rand(2, 5, 5) for _ in range(4)]
check_fusion(FUSIONS["min"], maps)
assert_idempotent(FUSIONS["min"], maps)
accumulator = AttentionAccumulator([[1, 1]], (5, 5), fusion="min", gate=None, dtype=torch.float32)
for attention in maps:
    accumulator.update([0], attention[None], normalization=None)
torch.testing.assert_close(accumulator.attention(0), torch.stack(maps).amin(0))
accumulator.save(here / "min.safetensors")
assert type(AttentionAccumulator.load(here / "min.safetensors").fusion) is type(FUSIONS["min"])

# the gate
accumulator = AttentionAccumulator([[1, 1, 0]], (5, 5), gate="confident")
accumulator.update([0], torch.rand(1, 3, 5, 5), torch.tensor([[0.5, -0.5, 2.0]]))
assert accumulator.counts.tolist() == [[1, 0, 0]]

# the backbone: one step of training
sys.path.insert(0, str(here / "examples" / "voc"))
from networks import build_network

network = build_network("resnet18", 3, weights="none").train()
height, width = network.geometry.side(48), network.geometry.side(64)
images, labels = torch.rand(2, 3, height, width), torch.eye(3)[:2]
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
before = [parameter.clone() for parameter in network.parameters()]
out = network(images)
assert isinstance(out, CAMOutput)
assert out.score_maps.shape == (2, 3, network.geometry.cells(height), network.geometry.cells(width))
torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels).backward()
optimizer.step()
after = list(network.parameters())
assert sum(not torch.equal(a, b) for a, b in zip(before, after)) > len(after) // 2
"""


def apply(diff: str, root: Path) -> None:
    """What ``git apply`` does with a unified diff whose hunks each fit in one place."""
    for file, hunks in re.findall(r"^--- a/.*\n\+\+\+ b/(.*)\n((?:(?!---).*\n)+)", diff, flags=re.MULTILINE):
        for old_count, new_count, body in re.findall(r"@@ -\d+,(\d+) \+\d+,(\d+) @@\n((?:(?!@@).*\n)+)", hunks):
            lines = body.splitlines(keepends=True)
            old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            assert (old.count("\n"), new.count("\n")) == (int(old_count), int(new_count)), f"{file}: header of a hunk"
            text = (root / file).read_text()
            assert text.count(old) == 1, f"{file} has changed: CONTRIBUTING.md expects once\n{old}"
            (root / file).write_text(text.replace(old, new))


def test_the_diffs_of_a_newcomer_apply_and_work(tmp_path):
    for folder in ("oaa_lib", "examples/voc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in DIFFS:
        apply(diff, tmp_path)
    (tmp_path / "checks.py").write_text(CHECKS)
    command = [sys.executable, str(tmp_path / "checks.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_they_are_three_and_each_adds_less_than_ten_lines():
    assert len(DIFFS) == 3
    for diff in DIFFS:
        added = [line for line in diff.splitlines() if re.match(r"\+(?!\+\+ )", line) and line[1:].strip()]
        assert 0 < len(added) < 10
