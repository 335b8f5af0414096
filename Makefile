# make demo       the whole pipeline, small, on sample photographs (ARGS="--photos DIR" for yours)
# make test       the fast tests and one run of the whole flow, at most ten minutes
# make test-all   the rest: crashes, clusters, S3, a browser, the product as a user runs it
# make mutants    breaks each guarantee in one line and runs its tests (ARGS="--only lease")
# make gpu        checks and benchmarks on a GPU, nine minutes (ARGS="--only step"; "--quick" on a CPU)
# make gpu-pack   one folder with all of it, for a borrowed machine (PHOTOS=DIR: photos to train on)
# make lint       style and types
# make up         Prefect with its UI, a worker and MLflow, local, until Ctrl-C (ARGS="--ray")
# make setup      the virtual environment that all of them use; made once
#
# A Python of your choice: make PYTHON=python3.12 setup

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
ARGS ?=
PHOTOS ?=

.PHONY: help setup demo test test-all mutants gpu gpu-pack lint up

help:
	@sed -n '/^[^\#]/q;/^$$/q;s/^\# \{0,1\}//p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is missing or older than Python 3.11: run 'make PYTHON=python3.11 setup'" \
	    "with the name of a newer one." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "make: $(PYTHON) cannot make virtual environments: install its venv package" \
	    "(Debian, Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	@echo "make: installing the packages of constraints.txt into $(VENV): minutes and gigabytes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	@$(BIN)/dpnet demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow and not e2e and not gpu" $(ARGS)

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations 30 -m "slow or e2e" $(ARGS)

mutants: setup
	$(BIN)/python tests/mutants/run.py $(ARGS)

gpu: setup
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

gpu-pack: setup
	@test -n "$(PHOTOS)" || { \
	  echo "make: which photos? Run 'make gpu-pack PHOTOS=DIR' with the name of a folder." >&2; exit 1; }
	@$(BIN)/python benchmarks/gpu_pack.py --photos "$(PHOTOS)" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

up: setup
	@$(BIN)/dpnet up $(ARGS)
