"""The site: pages in Markdown, executed while it is built; the reference from docstrings.

    sphinx-build -W --keep-going -n -b html docs docs/_build/html

Nothing is fetched from the network: `inventory.txt` says where the names of Python, numpy and torch are documented.
"""

import importlib.util
import os
import sys
import zlib
from pathlib import Path
from typing import Any

from docutils.nodes import Element, TextElement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import numpy.typing  # noqa: E402

# A class of this name, so that signatures show it instead of the long union it stands for.
numpy.typing.ArrayLike = type("ArrayLike", (), {"__module__": "numpy.typing"})  # type: ignore[misc, assignment]

import oaa_lib  # noqa: E402

# What the cells of the pages find: the library, the examples they import from, the helpers beside this file.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "examples"), str(HERE)]
)
os.environ["MATPLOTLIBRC"] = str(HERE / "matplotlibrc")
os.environ["TQDM_DISABLE"] = os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "oaa_lib"
copyright = "The oaa_lib developers"
version = release = oaa_lib.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
default_role = "py:obj"  # a single backtick in a docstring is a link
show_warning_types = True

# Markdown and its cells
myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # a cache would not see that the library has changed
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True  # what a page writes is gone afterwards
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables too
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> |\\.\\.\\. "
copybutton_prompt_is_regexp = True

# The reference
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# The look
html_theme = "furo"
html_title = "oaa_lib"
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
if mathjax := importlib.util.find_spec("sphinx-mathjax-offline"):
    # Equations are drawn without a network too. (As an extension it would forbid parallel reading.)
    html_static_path.append(str(Path(mathjax.origin or "").parent / "static"))
    mathjax_path = "mathjax/tex-chtml.js"
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}


def write_inventories(folder: Path) -> dict[str, tuple[str, str]]:
    """Make of `inventory.txt` what intersphinx reads: one objects.inv for each site."""
    sites: dict[str, list[str]] = {}
    base = ""
    for line in (HERE / "inventory.txt").read_text().splitlines():
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if len(words) == 1:
            base = words[0]
            continue
        name, role, page = words
        sites.setdefault(base, []).append(f"{name} py:{role} 1 {page} -\n")
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for number, (base, entries) in enumerate(sites.items()):
        head = f"# Sphinx inventory version 2\n# Project: {base}\n# Version: stable\n# zlib compressed\n"
        path = folder / f"{number}.inv"
        path.write_bytes(head.encode() + zlib.compress("".join(entries).encode()))
        mapping[f"site{number}"] = (base, str(path))
    return mapping


intersphinx_mapping = write_inventories(HERE / "_build" / "inventories")
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(lightning|hypothesis|st)\..*|LightningModule",
    ),  # whose documentation the inventory leaves out
]


def find_by_its_end(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: TextElement
) -> Element | None:
    """Resolve a name that is the end of one documented name: `CAMHead`, oaa_lib.accumulator.AttentionAccumulator."""
    if node.get("refdomain") != "py":
        return None
    domain: Any = env.get_domain("py")
    end = node["reftarget"].removeprefix("oaa_lib.")
    found = [
        name
        for name, entry in domain.objects.items()
        if ("." + name).endswith("." + end) and not entry.aliased
    ]
    if len(found) != 1:
        return None
    resolved: Element | None = domain.resolve_xref(
        env, node["refdoc"], app.builder, "obj", found[0], node, content
    )
    return resolved


def keep_shapes(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Stop napoleon from taking "(N, C) bool: which" of a property for a type that it should link."""
    if what in ("property", "attribute") and lines:
        lines[0] = lines[0].replace(": ", " -- ", 1)


def link_to_our_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """Files that the repository links to and that are pages here."""
    pages = {
        "(../examples/README.md)": "(results.md)",
        "(../CHANGELOG.md)": "(changelog.md)",
    }
    for file, page in pages.items():
        source[0] = source[0].replace(file, page)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", find_by_its_end, priority=400)
    app.connect(
        "autodoc-process-docstring", keep_shapes, priority=100
    )  # before napoleon
    app.connect("source-read", link_to_our_pages)
