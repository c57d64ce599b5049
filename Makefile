# Every verb of the project; CI calls the same ones. `make` alone lists them.

VENV ?= .venv
# The newest interpreter is not always one that the pinned torch has a wheel for: 3.11 first.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Each worker imports torch and uses about 1 GiB: no more than eight of them.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses=8

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-full test-gpu lint types imports format bench clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install stowplan with its tools, if anything changed

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "stowplan needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,hf]"
	@touch $@

demo: setup ## plan a small model, train it under the plan, show predicted beside measured
	$(BIN)/stowplan demo

test: setup lint types imports ## lint, types, layers and every test but the longest: what CI runs
	$(PYTEST) -m "not full and not gpu"

test-fast: setup ## the quick tests, under five minutes
	$(PYTEST) -m "not slow and not full and not gpu"

test-full: setup lint types imports ## all that needs no GPU, the longest tests included (an hour)
	$(PYTEST) -m "not gpu"

test-gpu: setup ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy, strict
	$(BIN)/mypy

imports: setup ## the layers hold
	$(BIN)/lint-imports

format: setup ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each benchmark is a module with a main; all write JSON to benchmarks/results.
bench: setup ## side-by-side benchmarks, one after the other; JSON under benchmarks/results
	@set -e; for file in $$(grep -l '^if __name__ == "__main__"' benchmarks/*.py); do \
		name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

clean: ## remove builds and caches; .venv stays
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find stowplan tests -name __pycache__ -type d -prune -exec rm -rf {} +
