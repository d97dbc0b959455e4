# `make demo` and `make test` need Python 3.11 or later and nothing else; `make help` lists the rest.
#
#   make test PYTHON=python3.12        which interpreter makes the environment
#   make test VENV=~/envs/surgeon      where it is, or which existing one to use
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   make test ARGS="-k fold -x"        extra arguments of the program that runs

VENV     ?= .venv
PIP_ARGS ?=
ARGS     ?=
WORKERS  ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)

# The first Python that is new enough.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON   ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)

BIN   := $(VENV)/bin
STAMP := $(VENV)/.surgeon-installed
# One thread per worker: small networks gain nothing from more, and workers would fight for cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: demo test test-all lint types check format install clean help

demo: $(STAMP)  ## fine-tune a small ResNet on real digits, fold its gates, export and verify it
	$(BIN)/surgeon finetune digits $(ARGS)

test: $(STAMP)  ## the tests (a few minutes)
	$(PYTEST) $(ARGS)

test-all: $(STAMP)  ## the tests with the slow ones and the model zoo
	$(PYTEST) -m "not gpu and not network" $(ARGS)

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

check: lint types test  ## lint, types and tests

format: $(STAMP)  ## ruff: put right what can be put right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)  ## make the environment

# The stamp is newer than pyproject.toml when the environment holds what it asks for.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || { \
		$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
			echo "surgeon needs Python 3.11 or later with its venv module, and '$(PYTHON)' is none;" >&2; \
			echo "name one: make $(or $(MAKECMDGOALS),install) PYTHON=..." >&2; exit 1; }; \
		echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch, timm, onnx and the rest (about 6 GB, some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[all]'
	@touch $@

clean:  ## remove the environment, the runs and the caches
	rm -rf .venv runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'
