# make demo: set up and run the main job on embedded images.  make test: set up and check everything but what needs the
# heavy packages of others (transformers, lightning, grad-cam, torchcam, a browser) or minutes (compiled training steps,
# benchmarks, soak, a short campaign, a typed user program). Up to Python 3.12 it builds pydensecrf2, which needs a C++
# compiler.  make test-extras: set up and check that.
# make docs: set up, build the site into docs/_build/html, running the code of its pages, and check its links.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test test-extras docs clean

demo: .venv/demo
	$(BIN)/python examples/quickstart.py

test: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) --ignore=tests/extras --ignore=oaa_lib/lightning.py

test-extras: .venv/test-extras
	$(BIN)/mypy
	$(PYTEST) tests/extras oaa_lib/lightning.py

docs: .venv/docs
	$(BIN)/sphinx-build -W --keep-going -n -E -j auto -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

# Each set-up is done once, and again when what it installs has changed.
.venv/demo: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) '.[examples]'
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) '.[dev]'
	touch $@

.venv/test-extras: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) '.[dev,test-extras]'
	touch $@

.venv/docs: pyproject.toml constraints.txt | .venv/bin/pip
	$(INSTALL) '.[docs]'
	touch $@

.venv/bin/pip:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv out runs build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
