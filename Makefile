# Everything runs in .venv, which is made from requirements.lock on first use and again when the lock changes.

BIN := .venv/bin
UV := $(BIN)/uv
UV_VERSION := 0.13.9
IS_NEW_ENOUGH := -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" $(IS_NEW_ENOUGH) && echo "$$python" && break; done)
# What .venv/.ready holds when the environment is complete: what it was made from, and where, because its scripts know
# their own place. A hash and not a time: a fresh clone gives every file a new time.
STAMP = $(shell cat requirements.lock pyproject.toml Makefile | cksum) $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check faults lock format clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1: /p' Makefile

setup:  ## Make the environment unless it is there
	@if [ "$$(cat .venv/.ready 2>/dev/null)" != "$(STAMP)" ]; then $(MAKE) --no-print-directory .venv/.ready; fi

demo: setup  ## Cluster handwritten digits from scratch, results in runs/demo
	$(BIN)/spice-ray demo --out runs/demo

test: setup  ## Run the tests
	$(BIN)/pytest

check: setup  ## Check format, style, types and the direction of imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

faults: setup  ## Run the tests that take minutes each, such as a driver killed in every other stage
	$(BIN)/pytest -m faults

lock: setup  ## Choose the versions of all dependencies anew
	$(UV) pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		-o requirements.lock

format: setup  ## Format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## Remove the environment and what the tools left
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist

# Phony in effect: only setup asks for it, and only when the stamp differs. It is written last, so that an interrupted
# setup is begun again.
.PHONY: .venv/.ready
.venv/.ready:
	@"$(PYTHON)" $(IS_NEW_ENOUGH) || { echo "spice-ray needs Python 3.11 or newer with its venv module:" \
		"$(if $(PYTHON),$(PYTHON) is not that,no such python3 was found);" \
		"install it or name it: make setup PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	@echo "installing about 7 GB of packages, which takes some minutes the first time"
	@$(UV) pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@echo "$(STAMP)" > $@
