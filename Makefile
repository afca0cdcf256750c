# `make demo` and `make test` need Linux, Python 3.11 or newer, make and a way to PyPI; everything else they install
# themselves into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
# One thread that waits without spinning: the tests run two processes side by side, each with its own ranks. Modules are
# compiled once, also where the caller's environment forbids bytecode: the tests start some hundred processes.
QUIET := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE WANDB_MODE=offline HF_HUB_OFFLINE=1

KILLS ?= 100
SEED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup demo test check soak bench lock clean

help: ## this text
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP) ## make .venv with the locked versions

$(STAMP): setup.cfg pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("keye_train needs Python 3.11 or newer; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP) ## train a tiny Keye through the whole chain; writes runs/demo/report.html
	$(BIN)/keye-pipeline pipeline=demo

test: check ## style, types, import contract and every test
	$(QUIET) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

check: $(STAMP) ## style, types and import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(STAMP) ## the tests that take long, properties on other values, a run killed KILLS times (make soak KILLS=20 SEED=1)
	$(QUIET) $(BIN)/python -m pytest -m slow --timeout 3600
	$(QUIET) $(BIN)/python -m pytest -n 2 -m "hypothesis and not slow" --hypothesis-profile other
	$(QUIET) $(BIN)/python tests/training/soak.py --kills $(KILLS) --seed $(SEED)

bench: $(STAMP) ## measure; writes dated files under benchmarks/results
	$(BIN)/python -m benchmarks

lock: ## write requirements.lock from what .venv holds, after `pip install -U` of whatever shall move
	@{ echo "# Exact versions that make installs; written by \`make lock\`. torch without a local label: pip takes the CPU"; \
	   echo "# build where an index offers one, else the CUDA build."; \
	   $(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+[a-z0-9.]*$$//'; } > requirements.lock

clean: ## remove .venv, caches and everything under runs/ and data/
	rm -rf $(VENV) runs data .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build ./*.egg-info
