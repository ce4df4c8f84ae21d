# make help            what there is
# make demo            set up, train a small model from scratch, sample it, score it
# make test            set up and run the tests

RUN ?= runs/demo
PYTEST_ARGS ?= -q -n auto --maxprocesses 4 --durations 15

# The first of these that is Python 3.11 or newer; `make PYTHON=/path/to/python3` names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

# `make test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt`: on the oldest versions that pyproject.toml allows.
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test bench-gpu lint types format check docs clean

help:  ## show these targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r target text; do printf '  make %-10s %s\n' "$$target" "$$text"; done

venv: $(STAMP)  ## set up .venv with the pinned versions and this package, editable

# The stamp is newer than what it was made from, so a set-up that was interrupted or is out of date runs again.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: Python 3.11 or newer is needed and none was found; install it, or name one: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "make: $(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "make: $(PYTHON) cannot make a virtual environment; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "setting up $(VENV) with $$("$(PYTHON)" --version) (once; a few minutes and about 6 GB of disk)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## set up, then train, sample and score the demo (again: goes on where it stopped)
	@if [ -e "$(RUN)" ]; then $(BIN)/mmdit train --resume "$(RUN)"; else $(BIN)/mmdit train demo --out "$(RUN)"; fi

test: $(STAMP)  ## set up, then run all tests on the CPU
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

bench-gpu: $(STAMP)  ## on a CUDA GPU: its tests, then speed beside diffusers
	@$(BIN)/python -m pytest -q -m gpu
	@$(BIN)/python -m benchmarks.gpu --out benchmarks/results/gpu.md

lint: $(STAMP)  ## check lint rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)  ## apply the formatting and the lint rules that mend themselves
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP)  ## check types
	@$(BIN)/mypy

check: lint types test  ## all that CI checks

docs: $(STAMP)  ## write docs/config.md again from the fields' own words
	@$(BIN)/python -m training.config_page docs/config.md

clean:  ## remove .venv and caches; runs/ is kept
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
