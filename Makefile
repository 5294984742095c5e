# Two commands for a newcomer: `make run` and `make test`. Each makes its own virtual environment.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv$(VERSION)
BIN := $(VENV)/bin
# Tests at a time; each takes about 2 GB.
WORKERS ?= 2
export JAX_PLATFORMS ?= cpu

.PHONY: run test test-fast test-slow lint format setup setup-dev setup-compile clean

run: setup
	$(BIN)/python -m slmjax.quickstart --folder=runs/quickstart

test: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

test-fast: setup-dev
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow and not medium"

# Compiles the full-size programs for TPU and GPU: installs their compilers, needs no hardware.
test-slow: setup-compile
	$(BIN)/python -m pytest -q -m slow

lint: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(VENV)/.installed

setup-dev: $(VENV)/.installed-dev

setup-compile: $(VENV)/.installed-compile

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

$(VENV)/.installed-compile: $(VENV)/.installed-dev requirements-compile.txt
	$(BIN)/pip install -q -r requirements-compile.txt
	touch $@

clean:
	rm -rf .venv* runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
