# `make demo` and `make test` need Python 3.10 or later and nothing else; `make help` lists the rest.
#
#   make test PYTHON=python3.12        which interpreter makes the environment
#   make test VENV=~/envs/surgeon      where it is, or which existing one to use
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   make test ARGS="-k fold -x"        extra arguments of the program that runs

VENV     ?= .venv
PIP_ARGS ?=
WANTED   ?= dev
ARGS     ?=
WORKERS  ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)

# The first Python that is new enough.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
PYTHON   ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)

BIN   := $(VENV)/bin
STAMP := $(VENV)/.surgeon-installed
# One thread per worker: small networks gain nothing from more, and workers would fight for cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: demo test test-all test-lowest test-between test-highest test-prerelease versions breakeven constraints docs docs-serve build lint types check format install clean help

demo: $(STAMP)  ## fine-tune a small ResNet on real digits, fold its gates, export and verify it
	$(BIN)/surgeon finetune digits $(ARGS)

test: $(STAMP)  ## the tests (a few minutes)
	$(PYTEST) $(ARGS)

test-all: $(STAMP)  ## the tests with the slow ones and the model zoo
	$(PYTEST) -m "not gpu and not network" $(ARGS)

# Each in an environment of its own, .venv-lowest and so on; constraints/ has the versions of every package.
test-lowest:  ## the tests on the oldest versions that pyproject.toml allows
	$(MAKE) test VENV=.venv-lowest PYTHON=python3.10 WANTED=test,recipes PIP_ARGS="$(PIP_ARGS) -c constraints/lowest.txt"

test-between:  ## the tests on versions in between, PyTorch 2.11
	$(MAKE) test VENV=.venv-between PYTHON=python3.12 WANTED=test,recipes PIP_ARGS="$(PIP_ARGS) -c constraints/between.txt"

test-highest:  ## the tests on the newest versions that they have passed on
	$(MAKE) test VENV=.venv-highest PYTHON=python3.13 WANTED=test,recipes PIP_ARGS="$(PIP_ARGS) -c constraints/highest.txt"

test-prerelease:  ## the tests on whatever is newest today, pre-releases too
	rm -rf .venv-prerelease
	$(MAKE) test VENV=.venv-prerelease WANTED=test,recipes PIP_ARGS="$(PIP_ARGS) --upgrade --pre"

versions: $(STAMP)  ## try eight models on the versions of this environment, and write docs/versions.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.versions

breakeven: $(STAMP)  ## from which drop rate skipping takes less than a mask: docs/breakeven.md (some minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.breakeven $(ARGS)

COMPILE := uv pip compile --quiet --no-header --no-annotate --extra test --extra recipes pyproject.toml
constraints:  ## resolve the versions in constraints/ anew (with uv)
	$(COMPILE) --python-version 3.10 --resolution lowest-direct -o constraints/lowest.txt
	echo 'torch==2.11.*' | $(COMPILE) --python-version 3.12 -c - -o constraints/between.txt
	$(COMPILE) --python-version 3.13 --upgrade -o constraints/highest.txt

DOCS_VENV ?= .venv-docs
MKDOCS = $(DOCS_VENV)/bin/python -m mkdocs
docs: $(DOCS_VENV)/.surgeon-docs  ## the site, in build/site; reads without a network
	NO_MKDOCS_2_WARNING=1 $(MKDOCS) build --strict --quiet $(ARGS)

docs-serve: $(DOCS_VENV)/.surgeon-docs  ## the site, while it is written
	NO_MKDOCS_2_WARNING=1 $(MKDOCS) serve $(ARGS)

$(DOCS_VENV)/.surgeon-docs: pyproject.toml
	$(MAKE) install VENV=$(DOCS_VENV) WANTED=recipes,docs
	@touch $@

build: $(STAMP)  ## the wheel and the sdist, in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w dist . && $(BIN)/python -m hatchling build -t sdist

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
			echo "surgeon needs Python 3.10 or later with its venv module, and '$(PYTHON)' is none;" >&2; \
			echo "name one: make $(or $(MAKECMDGOALS),install) PYTHON=..." >&2; exit 1; }; \
		echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch, timm, onnx and the rest (about 6 GB, some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[$(WANTED)]'
	@touch $@

clean:  ## remove the environment, the runs and the caches
	rm -rf .venv .venv-* runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{ printf "  make %-15s %s\n", $$1, $$2 }'
