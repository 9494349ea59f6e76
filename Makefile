# Every target creates .venv on first use. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= auto
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PYTEST = $(if $(filter 0,$(WORKERS)),,OMP_NUM_THREADS=1) \
  $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal
PARITY := .envs/parity
PARITY_PPO := .envs/parity-1.12

# A .venv that was copied or moved with its checkout refers to the old path. The stamp contains the path of its checkout.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(shell rm -f $(STAMP))
endif

.PHONY: help setup test test-all lint format bench demo docs parity wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON=$(PYTHON)  PIP_ARGS=  WORKERS=$(WORKERS)  PYTEST_ARGS=  DEMO_ARGS=  BENCH_ARGS="
	@echo "  For example: make test WORKERS=0 PYTEST_ARGS='tests/test_architecture.py -x'"

setup: $(STAMP)  ## create .venv (again only when a dependency changes)
	@echo "$(VENV) is up to date."

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "'$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "rlhf_core needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." >&2; \
	  echo "Name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	@SECONDS=0; \
	  if [ -f $(STAMP) ] && $(BIN)/python -c ''; then \
	    echo "Updating $(VENV): its dependencies may have changed ..."; \
	  else \
	    echo "Setting up $(VENV) (once, about a minute and a half) ..."; \
	    rm -rf $(VENV); \
	    $(PYTHON) -m venv $(VENV) || { \
	      rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; Debian and Ubuntu need the package python3-venv." >&2; exit 1; }; \
	  fi; \
	  $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'; \
	  echo "$(CURDIR)" > $(STAMP); \
	  echo "$(VENV) is ready ($${SECONDS} s)."

test: $(STAMP)  ## run the tests except slow ones, in parallel (WORKERS=0: one at a time)
	@$(PYTEST) $(PYTEST_ARGS)

test-all: $(STAMP)  ## run all tests, including slow ones
	@$(PYTEST) -m "" $(PYTEST_ARGS)

lint: $(STAMP)  ## check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## fix what lint can fix, and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## run the benchmarks (BENCH_ARGS=--help)
	@$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

demo: $(STAMP)  ## SFT, reward model, PPO and DPO on a small invented language, in minutes (DEMO_ARGS=--quick)
	@$(BIN)/rlhf demo $(DEMO_ARGS)

docs: $(STAMP)  ## write docs/losses.md from the code
	@$(BIN)/python docs/loss_table.py

parity: $(PARITY)/.stamp $(PARITY_PPO)/.stamp  ## run TRL, Liger and Stable-Baselines3 again for tests/parity/golden
	@$(PARITY)/bin/python tests/parity/regenerate.py
	@$(PARITY_PPO)/bin/python tests/parity/regenerate.py

$(PARITY)/.stamp: tests/parity/requirements.txt
$(PARITY_PPO)/.stamp: tests/parity/requirements-1.12.txt
# torch first and alone, so that nothing else chooses which build of it.
$(PARITY)/.stamp $(PARITY_PPO)/.stamp:
	@echo "Setting up $(@D) (once, a minute or two; 2.5 GB) ..."
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@pip="$(@D)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS)"; \
	  $$pip "$$(grep '^torch==' $<)"; \
	  $$pip -r $<
	@touch $@

wheel: $(STAMP)  ## build the wheel into dist/
	@rm -rf build dist
	@$(BIN)/python -m build -qq --wheel --outdir dist
	@rm -rf build
	@ls dist/*.whl

clean:  ## remove .venv, caches and everything built
	@rm -rf $(VENV) .envs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find rlhf_core kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
