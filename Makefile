# make quickstart | test | test-slow | test-kernels | lint | serve | bench | clean     (PYTHON=python3.12 picks another interpreter)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRITON := 3.9.0
KERNELS := $(VENV)/triton-$(TRITON)
CONFIG ?= configs/quickstart.yaml
export RAY_AUTH_MODE ?= token
export RAY_AUTH_TOKEN ?= $(shell od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_USAGE_STATS_ENABLED ?= 0
export PYTHONUNBUFFERED := 1

.PHONY: quickstart test test-slow test-kernels lint format serve bench clean

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "longer needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV): some gigabytes, which take minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,examples]'
	@touch $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/python -m jobs.pipeline --config $(CONFIG) $(if $(FRESH),--fresh)

# Two processes share the files, in their order: what a file's tests have in common is made once.
test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest tests/serve_apps/test_malformed.py --malformed 10000

# Beside the environment, not in it: a gigabyte. CUDA builds of PyTorch bring the one that fits them, and `make test` runs its kernels.
$(KERNELS)/.installed: $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$(TRITON)
	@touch $@

test-kernels: $(KERNELS)/.installed
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= PYTHONPATH=$(KERNELS) $(BIN)/python -m pytest -m kernels

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: $(INSTALLED)
	$(BIN)/python -m jobs.serve --config $(CONFIG)

# At sizes for two cores, about 25 minutes in all; the pages in benchmarks/results say theirs. `multi_gpu` tells nothing without GPUs.
SMALL_batch_scoring := --runs 1
SMALL_point_reads := --users 100000
SMALL_quality := --log all --quick --processes 2 --results runs/quality_quick.jsonl
SMALL_sequences := --events 1000000
SMALL_serving := --quick
BENCHMARKS := $(filter-out conditions multi_gpu,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py))))
MOVIELENS := runs/quickstart/movielens

$(MOVIELENS): | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ recbole==1.2.1

bench: quickstart | $(MOVIELENS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(foreach name,$(BENCHMARKS),$(BIN)/python -m benchmarks.$(name) $(SMALL_$(name)) &&) true

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
