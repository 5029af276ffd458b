# `make serve` and `make test` do all their own set-up in .venv. PYTHON and PIP_ARGS can be set, for example
# PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for the CPU build of torch.
PYTHON ?= python3
PIP_ARGS ?=
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve chat test check lint bench host-time eval docs clean

serve: $(VENV)/.installed
	exec $(BIN)/tidar serve --host $(HOST) --port $(PORT) $(ARGS)

chat: $(VENV)/.installed
	exec $(BIN)/tidar chat --url http://$(HOST):$(PORT) $(ARGS)

# A process for each core, each computing on one thread: torch's threads would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test: $(VENV)/.installed-dev
	$(PYTEST) $(ARGS)

# Format, lint, types and the fast tests.
check: lint
	$(PYTEST) tests/unit tests/rules tests/server

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.decode_modes $(ARGS)

# What schedule and apply cost the host at 256 running requests; printed, not gated: a shared machine's clock proves nothing.
host-time: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.scheduler_host $(ARGS)

# lm-eval through the server in every exact mode, beside its own Transformers backend.
eval: $(VENV)/.installed-eval
	$(BIN)/python -m benchmarks.lm_eval_parity $(ARGS)

# Reference pages are generated from the code; tests/rules checks that they are current.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m docs.generate

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-eval: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[eval]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
