# Every target works in a fresh clone: targets that need an environment create it first.
#   PYTHON=python3.12   interpreter for the environment (3.11 or newer)
#   VENV=path           folder of the environment, new or existing (default: .venv)
#   VENVS=path          folder for the environments of test-versions, several GB each
#   VERSIONS=oldest     versions of PyTorch that test-versions tests (default: all three)

PYTHON ?= python3
VENV ?= .venv
VENVS ?= .venvs
JOBS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
METADATA := pyproject.toml setup.py
STAMP := $(VENV)/.kd-installed
BENCH_STAMP := $(VENV)/.kd-bench-installed
BENCHMARKS := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))
OLD_PYTHON := import sys; v = sys.version_info; v >= (3, 11) or \
  sys.exit("kd needs Python 3.11 or newer; %s is %d.%d. Name another: make install PYTHON=python3.11" \
  % (sys.executable, v[0], v[1]))

# The stamps contain this checkout's path, so that an environment of another checkout is installed again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
ifneq ($(shell cat $(BENCH_STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(BENCH_STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-versions lint types bench clean
.DELETE_ON_ERROR:

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3.12] [VENV=path]"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	  | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

$(STAMP): $(METADATA)
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  command -v "$(PYTHON)" >/dev/null || { echo "no '$(PYTHON)' here; name a Python of 3.11 or newer: make install PYTHON=..." >&2; exit 1; }; \
	  "$(PYTHON)" -c '$(OLD_PYTHON)' || exit 1; \
	  "$(PYTHON)" -m venv "$(VENV)" || { echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	@$(PY) -c '$(OLD_PYTHON)'
	@echo "installing into $(VENV); PyTorch is large, so this takes a few minutes"
	$(PIP) install -e ".[dev]" $(patsubst %,'%',$(REQUIREMENTS))
	@echo "$(CURDIR)" > $@

$(BENCH_STAMP): $(STAMP)
	$(PIP) install -e ".[bench]"
	@echo "$(CURDIR)" > $@

install: $(STAMP) ## create the environment and install kd in editable mode

demo: install ## generate scenes, train a teacher and students, compare them
	$(PY) -m kd.demo

test: install ## run the test suite (JOBS=2, PYTEST_ARGS="-k name")
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(PYTEST_ARGS)

# The PyTorch versions that pyproject.toml allows: the lower bound, one in between, and pip's newest.
VERSIONS ?= oldest middle newest
oldest := torch==2.11.0 torchvision==0.26.*
middle := torch==2.14.1 torchvision==0.29.1
newest := torch>=2.15 torchvision

test-versions: ## run the fast tests on the oldest, a middle and the newest PyTorch (VERSIONS=oldest)
	@status=0; $(foreach version,$(VERSIONS),echo "== $($(version))"; \
	  $(MAKE) --no-print-directory test VENV="$(VENVS)/$(version)" REQUIREMENTS="$($(version))" \
	    PYTEST_ARGS='-m "not slow" $(PYTEST_ARGS)' || status=1;) exit $$status

lint: install ## run ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## run strict mypy on packages, tests and benchmarks
	$(BIN)/mypy --strict --explicit-package-bases kd teachers students tests benchmarks docs/figures.py

bench: $(BENCH_STAMP) ## run all benchmarks, one after the other
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; PYTHONPATH=. $(PY) $$script; done

clean: ## remove caches and build products, but not the environment and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kd teachers students tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
