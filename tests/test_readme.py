"""The README's Python runs as printed, and what it quotes is there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_readme_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[block], f"README.md, block {block + 1}", "exec"), {"__name__": "readme"})


def test_the_training_loop_is_shown_and_short():
    loop = next(block for block in BLOCKS if ".update(" in block)
    assert len([line for line in loop.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 15


def test_stage_1_is_quoted_as_it_stands_in_the_one_file():
    (quoted,) = re.findall(r"^```py\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    source = (Path(__file__).parents[1] / "examples" / "oaa_in_one_file.py").read_text()
    begin, end = source.index("# Sections 3.1 and 3.2"), source.index("# Section 3.3")
    assert quoted.strip() == source[begin:end].strip()


def test_the_two_commands_are_those_of_the_makefile():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)
    assert {"make demo", "make test"} <= set(re.findall(r"^make \w+", README, flags=re.MULTILINE))
