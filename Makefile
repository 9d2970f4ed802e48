# `make demo` and `make test` are all the set-up there is: each makes the virtual environment and installs what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2

.PHONY: demo test test-all lint types generate clean help

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*##/\t/'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Torchive needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Torchive and what it needs into $(VENV) (PyTorch is large: a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: $(STAMP)   ## compare a method with its baseline on the solar cells; ends with a table and a report
	$(BIN)/torchive compare dynamic_relu --recipe demo --seeds 3 --out runs/demo

test: $(STAMP)   ## lint, types and the tests; under 20 minutes on two cores
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/torchive data get solar nuclei trees
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-all: $(STAMP)  ## everything, with compile and export checks of all methods
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/torchive data get solar fashion-mnist trees nuclei scenes
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(STAMP)   ## format and lint in place
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

generate: $(STAMP)  ## rewrite what is generated from the cards: the index, the lazy names' stub, the README's table
	$(BIN)/python -m torchive.catalogue.generate

clean:           ## remove the virtual environment and runs
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
