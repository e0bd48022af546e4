# The same few commands on a laptop and in CI. `make` alone says what there is.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Which interpreter makes the environment: `make env PYTHON=/path/to/python3.12` takes that one.
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3 python3.11 python3.12 python3.13)
# torch's locked version: `torch==...`
TORCH = $(shell grep '^torch==' requirements.lock)

.DEFAULT_GOAL := help
.PHONY: help env demo test test-faults lint docs format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## make .venv from requirements.lock; does nothing when it is up to date

demo: export OMP_NUM_THREADS = 1
demo: env  ## Table 3 of the paper on the `shapes` set: about 10 minutes on 2 cores; Ctrl-C, then again: goes on
	$(BIN)/python sweeps/ablation.py --preset shapes --tables 3a 3b

test: lint  ## formatting, lint, types and tests; COSA_TEST_DATA=DIR (holding data/ and weights/) adds the real images
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-faults: env  ## what a week on bad machines does: kills, losses, outages; about an hour on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults -s tests/faults

lint: env  ## formatting, lint and types, without the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: env  ## these pages and the API reference as a site in build/site; a broken link fails
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[docs]'
	$(BIN)/python docs/house.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

format: env  ## rewrite the code in the house's format, with the safe fixes of lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and builds; the environment, data sets and results stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find cosa sweeps tests -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and alone: the build that your pip configuration prefers then satisfies the lock, and
# torchvision does not fetch a second one. An environment that works is kept and brought up to date.
USABLE = -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null

$(STAMP): requirements.lock pyproject.toml
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	  for python in $(PYTHONS); do $$python $(USABLE) && break; python=; done; \
	  if [ -z "$$python" ]; then \
	    echo "make env needs Python >= 3.11 with its venv module, found none among: $(PYTHONS);" \
	      "install one, or name yours: make env PYTHON=/path/to/python" >&2; exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$python --version)" && $$python -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install '$(TORCH)'
	@echo "installing what requirements.lock names: one to five minutes without a word"
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
