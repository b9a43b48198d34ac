# make demo   set up, and run the main job on this computer        make test   set up, and run every test
#
# The steps are readable scripts in scripts/; VENV=PATH puts the virtual environment elsewhere.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help demo test nightly chaos setup horovod lint format clean

VENV ?= .venv
PYTEST ?= $(VENV)/bin/python -m pytest
WORKERS ?= 3
FAULTS ?= 20
SEED ?= 1
MINUTES ?= 60
TABLE ?= chaos.md
export VENV

help: ## Show what can be made
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

demo: ## Set up; preprocess, pre-train on two ranks, preempt, resume, embed: about five minutes
	@scripts/setup.sh demo
	scripts/demo.sh

test: ## Set up, build Horovod once, install Slurm and a browser for the tests that want them, and run every test
	@scripts/setup.sh test
	scripts/horovod.sh --if-possible
	scripts/cluster.sh
	scripts/browser.sh
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile --max-worker-restart 0 $(PYTEST_ARGS)

nightly: ## The tests that repeat others many times
	@scripts/setup.sh test
	scripts/horovod.sh --if-possible
	scripts/cluster.sh
	OMP_NUM_THREADS=1 $(PYTEST) -m slow $(PYTEST_ARGS)

chaos: ## Throw FAULTS=20 drawn by SEED=1 at one training on the test cluster, for MINUTES=60 at most; the table goes to TABLE=chaos.md
	@scripts/setup.sh test
	scripts/cluster.sh
	export CHAOS_FAULTS=$(FAULTS) CHAOS_SEED=$(SEED) CHAOS_MINUTES=$(MINUTES) CHAOS_TABLE="$(abspath $(TABLE))"
	OMP_NUM_THREADS=1 $(PYTEST) --timeout 0 tests/cluster/life/test_chaos.py $(PYTEST_ARGS)

setup: ## Only set up, with everything that the tests need
	@scripts/setup.sh test

horovod: ## Build Horovod for the environment, or install the build that is kept
	@scripts/setup.sh test
	scripts/horovod.sh

lint: ## ruff, mypy --strict, codespell
	@scripts/setup.sh test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict prottrans_hpc
	$(VENV)/bin/codespell

format: ## Let ruff format and repair
	@scripts/setup.sh test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove what was built here; the virtual environment and Horovod's wheel stay
	@rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find prottrans_hpc tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	find prottrans_hpc -name '*.so' -delete
