# make demo   set up, and run the main job on this computer        make test   set up, and run every test
#
# The steps are readable scripts in scripts/; VENV=PATH puts the virtual environment elsewhere.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help demo test nightly setup horovod lint format clean

VENV ?= .venv
PYTEST ?= $(VENV)/bin/python -m pytest
WORKERS ?= 2
export VENV

help: ## Show what can be made
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

demo: ## Set up; preprocess, pre-train on two ranks, preempt, resume, embed: about five minutes
	@scripts/setup.sh demo
	scripts/demo.sh

test: ## Set up, build Horovod once, install Slurm for the test cluster, and run every test
	@scripts/setup.sh test
	scripts/horovod.sh --if-possible
	scripts/cluster.sh
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

nightly: ## The tests that repeat others many times
	@scripts/setup.sh test
	scripts/horovod.sh --if-possible
	scripts/cluster.sh
	OMP_NUM_THREADS=1 $(PYTEST) -m slow $(PYTEST_ARGS)

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
