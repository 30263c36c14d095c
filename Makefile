# make demo: set up and run the main job on embedded images.  make test: set up and check everything.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test clean

demo: .venv/demo
	$(BIN)/python examples/quickstart.py

test: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Each set-up is done once, and again when what it installs has changed.
.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[examples]'
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[dev]'
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv out runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
