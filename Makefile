# make demo | test | lint | types | bench | clean. Each makes .venv itself; nothing else has to be done before.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-full lint types bench clean

help:
	@echo 'make demo    load a 500 MB checkpoint in four threads at once, check and time it'
	@echo 'make test    the suite; of a few long tests a selection'
	@echo 'make test-full   those long tests whole'
	@echo 'make lint    ruff and import-linter'
	@echo 'make types   mypy'
	@echo 'make bench   the benchmarks'
	@echo 'make clean   remove .venv and what the tools leave'

demo: $(VENV)/.installed
	$(BIN)/weightlift demo

# A file's tests stay together, and many of them start threads and processes of their own.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-full: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m full

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/.installed-dev
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks --out benchmarks/results

clean:
	rm -rf $(VENV) build dist demo-checkpoint .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Torch goes first and alone, in exactly this spelling: pip then takes a CPU build where one is at hand. Asked for
# together with something else, or with other words, it fetches gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -q torch==2.13.0
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $@
