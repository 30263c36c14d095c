"""What can be said of the site without building it."""

import json
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]


def check_links(site):
    command = [sys.executable, str(DOCS / "check_links.py"), str(site)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_links_that_lead_somewhere_pass(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a picture.png").touch()
    (tmp_path / "index.html").write_text(
        '<h1 id="top"></h1><a href="#top"></a><a href="sub/b.html#x"></a><img src="a%20picture.png">'
        '<a href="https://elsewhere.example/nothing"></a>'
    )
    (tmp_path / "sub" / "b.html").write_text('<p id="x"><a href="../index.html"></a>')
    result = check_links(tmp_path)
    assert result.returncode == 0, result.stdout
    assert "2 pages, 5 links, 0 broken" in result.stdout


def test_a_missing_page_anchor_or_picture_is_found(tmp_path):
    (tmp_path / "index.html").write_text('<a href="gone.html"></a><a href="#nowhere"></a><img src="gone.png">')
    result = check_links(tmp_path)
    assert result.returncode == 1
    assert {"index.html: gone.html", "index.html: #nowhere", "index.html: gone.png"} <= set(result.stdout.splitlines())


def test_no_source_line_of_the_documents_is_longer_than_120_characters():
    """Rows of tables, lines that are one picture or link, and lines of diffs cannot be broken."""
    unbreakable = re.compile(r" *\||!?\[.*\)$|\+")
    root, long = DOCS.parent, []
    beside = [*root.glob("*.md"), root / "examples" / "README.md", root / "tests" / "golden" / "README.md"]
    for path in (*PAGES, DOCS / "tutorial.ipynb", *beside):
        cells = json.loads(path.read_text())["cells"] if path.suffix == ".ipynb" else [{"source": path.read_text()}]
        lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
        long += [f"{path.name}: {line}" for line in lines if len(line) > 120 and not unbreakable.match(line)]
    assert long == []


def test_the_tutorial_is_kept_without_outputs():
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


def test_python_on_the_pages_is_executed():
    """A block marked as plain python would be shown and never run."""
    assert not [path.name for path in PAGES if "```python" in path.read_text()]


def test_scripts_that_the_pages_name_are_there():
    text = "\n".join(path.read_text() for path in (*PAGES, DOCS / "tutorial.ipynb"))
    scripts = set(re.findall(r"\bexamples/[\w/]+\.py\b", text))
    assert scripts
    assert [script for script in sorted(scripts) if not (DOCS.parent / script).exists()] == []
