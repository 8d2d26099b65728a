# Every target does its own set-up in .venv; see tools/setup_env.py for how and for the environment
# variables that it honours (SLAK_MM_CACHE, SLAK_MM_MMCV_WHEEL, MAX_JOBS, FORCE_CUDA).

SHELL := /bin/sh
BIN := .venv/bin

# The interpreter that .venv is made with: python3 if it is a supported version, else the newest
# that is. Override by `make PYTHON=/path/to/python3.11 ...`.
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.12 python3.11 python3.10; do \
	if "$$python" -c '$(SUPPORTED)' >/dev/null 2>&1; then echo "$$python"; break; fi; done)
endif

# These variables would bring packages from outside into .venv, or keep pip and uv from installing into it.
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX PIP_CONSTRAINT PIP_REQUIRE_VIRTUALENV UV_CONSTRAINT UV_OVERRIDE

SETUP = @if ! "$(PYTHON)" -c '$(SUPPORTED)' >/dev/null 2>&1; then \
	echo "Python 3.10, 3.11 or 3.12 is needed, and $(if $(PYTHON),$(PYTHON) is none,none of \
	python3 python3.12 python3.11 python3.10 is one): install one or name it by PYTHON=/path/to/python3.12." \
	>&2; exit 2; fi; exec "$(PYTHON)" -I tools/setup_env.py
LINT = $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy slak_mm

DEMO_ARGS ?=
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test quick lint env clean

help:
	@echo 'make demo   train and test UperNet + SLaK-T on a small generated data set (DEMO_ARGS=...)'
	@echo 'make test   lint, types and all tests; compiles the operators of mmcv once (PYTEST_ARGS=...)'
	@echo 'make quick  lint, types and the tests that need neither minutes nor the operators of mmcv'
	@echo 'make lint   lint and types only'
	@echo 'make env    the environment only, with a check of every component'
	@echo 'make clean  remove the environment and what builds left; the cache of wheels stays'

demo:
	$(SETUP) -- $(BIN)/python tools/demo.py $(DEMO_ARGS)

test:
	$(SETUP) --ops -- sh -c '$(LINT) && $(BIN)/python -m pytest "$$@"' pytest $(PYTEST_ARGS)

quick:
	$(SETUP) -- sh -c '$(LINT) && $(BIN)/python -m pytest -m "not slow and not operators" "$$@"' pytest $(PYTEST_ARGS)

lint:
	$(SETUP) -- sh -c '$(LINT)'

env:
	$(SETUP) --check

clean:
	rm -rf .venv .venv.lock build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find slak_mm tests tools configs -name __pycache__ -type d -prune -exec rm -rf {} +
