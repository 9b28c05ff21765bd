# `make train` and `make test` need nothing but Python 3.11 or newer and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEEPSPEED := $(VENV)/.deepspeed

.PHONY: train test test-full check format bench clean help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# DeepSpeed is built beside the torch that is installed; its kernels are compiled when they are used.
$(DEEPSPEED): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools ninja
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --editable '.[deepspeed]'
	@touch $@

train: $(READY) ## train a byte-level GPT on Python's documentation (under 3 minutes on 2 cores)
	$(BIN)/python examples/char_lm.py $(ARGS)

check: $(READY) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## everything: lint, types, unit and property tests, examples
	$(BIN)/pytest -n 2 $(ARGS)

test-full: check $(DEEPSPEED) ## the same with DeepSpeed, and every case of what `make test` samples (takes long)
	TRAINSTEP_FULL=1 $(BIN)/pytest -n 2 $(ARGS)

format: $(READY) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## measure the cost of a step beside a plain loop and other trainers
	$(BIN)/python benchmarks/overhead.py

clean: ## remove the environment and caches
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
