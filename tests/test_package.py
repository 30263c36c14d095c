"""What a user installs: the wheel's content and what the core depends on."""

import ast
import graphlib
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import oaa_lib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_typed_package_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = [str(p.relative_to(ROOT)) for p in (ROOT / "oaa_lib").rglob("*") if p.suffix == ".py"]
    expected.append("oaa_lib/py.typed")
    assert sorted(names) == sorted(expected)
    assert "oaa_lib/py.typed" in names


@pytest.mark.slow
def test_the_core_needs_three_packages(wheel):
    told = wheel_metadata(wheel)
    required = [r for r in told.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(r.split(">")[0].strip() for r in required) == ["numpy", "torch", "typing-extensions"]
    assert told["Version"] == oaa_lib.__version__
    assert {"examples", "tests", "docs", "dev"} <= set(told.get_all("Provides-Extra"))


@pytest.mark.slow
@pytest.mark.parametrize(("python", "extras"), [("3.12", {"crf", "dev"}), ("3.13", {"crf"})])
def test_working_on_the_library_asks_for_the_crf_only_where_it_builds(wheel, python, extras):
    """The build backend writes an extra out into what it stands for, and drops a marker that it bore."""
    crf = [Requirement(r) for r in wheel_metadata(wheel).get_all("Requires-Dist") if r.startswith("pydensecrf2")]
    asked = {e for e in ("crf", "dev") if any(r.marker.evaluate({"extra": e, "python_version": python}) for r in crf)}
    assert asked == extras


def wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    return Parser().parsestr(archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode())


@pytest.mark.slow
def test_the_wheel_imports_on_its_own(wheel, tmp_path):
    program = f"import sys; sys.path.insert(0, {str(wheel)!r}); import oaa_lib; print(oaa_lib.__file__)"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert wheel.name in result.stdout


EXTRAS = {  # of those who use these modules
    "streams.py": {"hypothesis"},
    "augmentation.py": {"PIL"},
    "torchvision_views.py": {"PIL", "torchvision"},
    "interop_layouts.py": {"PIL", "safetensors"},
    "lightning.py": {"lightning"},
    "pictures.py": {"matplotlib"},
    "plotting.py": {"matplotlib"},
}


FILES = sorted((ROOT / "oaa_lib").rglob("*.py"))


def imported(path):
    """The modules that a file imports, wherever it does; names that are themselves modules of ours count as such."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            inside = ROOT.joinpath(*node.module.split("."))
            names = [name.name for name in node.names]
            modules = [name for name in names if (inside / f"{name}.py").exists() or (inside / name).is_dir()]
            yield from (f"{node.module}.{name}" for name in modules)
            if len(modules) < len(names):
                yield node.module


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_core_imports_only_what_it_declares(path):
    modules = {module.split(".")[0] for module in imported(path)}
    core = sys.stdlib_module_names | {"torch", "numpy", "typing_extensions", "oaa_lib"}
    assert modules <= core | EXTRAS.get(path.name, set())


def test_what_keeps_maps_knows_nothing_of_what_is_above_it():
    below = [path for path in FILES if path.parent.name == "maps"]
    assert len(below) > 5
    for path in below:
        ours = {module for module in imported(path) if module.split(".")[0] == "oaa_lib"}
        allowed = {"oaa_lib.arguments"}  # the sentences of errors, which know nothing of ours themselves
        assert {module for module in ours if not module.startswith("oaa_lib.maps")} <= allowed, path
    assert not {each for each in imported(ROOT / "oaa_lib" / "arguments.py") if each.startswith("oaa_lib")}


def test_no_two_modules_need_each_other():
    graph = {module_of(path): [m for m in imported(path) if m.startswith("oaa_lib.")] for path in FILES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(FILES)  # a circle raises a CycleError


def test_importing_the_library_imports_none_of_its_extras():
    extras = ("hypothesis", "torchvision", "lightning", "matplotlib")
    program = f"import sys, oaa_lib; print([name for name in {extras} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_exists_and_is_documented():
    for name in oaa_lib.__all__:
        assert getattr(oaa_lib, name).__doc__, name


def test_pre_commit_formats_with_the_version_of_make_test():
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ruff=="))
    assert (ROOT / ".pre-commit-config.yaml").read_text().count(f"[{pin}]") == 2


def test_no_pin_rules_out_a_python_that_is_promised():
    """Or `make test` cannot install there. Packages tell here, where they are installed, which Pythons they need."""
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert "3.10" in promised
    told = 0
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        try:
            installed = metadata(pin.name)
        except PackageNotFoundError:
            continue
        if installed["Version"].split("+")[0] not in pin.specifier:
            continue
        told += 1
        for python in promised:
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert f"{python}.99" in SpecifierSet(installed.get("Requires-Python", "")), (line, python)
    assert told > 5
