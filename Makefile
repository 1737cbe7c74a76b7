# Every command of the project. `make help` lists them.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train study test soak gpu lint format clean

help: ## List the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(READY) ## Install the project into .venv (the other commands do it by themselves)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[vision,dev]"
	@touch $@

train: $(READY) ## Train the digit-scene segmentation on all local devices; ARGS="norm=local ..." overrides
	PATH="$(abspath $(BIN)):$$PATH" launch/train.sh $(ARGS)

study: $(READY) ## What synchronization buys: local against synchronized statistics; about 45 minutes on two cores
	PATH="$(abspath $(BIN)):$$PATH" launch/study.sh $(ARGS)

test: $(READY) ## Run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

soak: $(READY) ## Thousands of steps on two processes: memory, handles and statistics stay flat; about 10 minutes
	$(BIN)/python tests/programs/soak.py --steps 3000 $(ARGS)
	$(BIN)/python tests/programs/soak.py --steps 1500 --loop trainer $(ARGS)

gpu: ## On a machine with an NVIDIA GPU: tests with compiled kernels and NCCL, then benchmarks; PYTHON has torch
	PYTHON="$(PYTHON)" tests/gpu.sh

lint: $(READY) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and what tools have left; trained models (runs/) stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
