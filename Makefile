# Each target sets up what it needs in a virtual environment of its own and then runs, so that any
# of them may be the first command in a fresh checkout. Arguments: make study ARGS="--data mnist".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes that share the tests out, file by file, the longest first: see tests/conftest.py.
JOBS ?= $(shell nproc)
SHARED = -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Files that have tests with a mark: to read all of them takes each process some seconds.
MARKED = $(shell grep -rl --include=*.py "mark\.$(1)\b" tests)
# Where benchmarks leave their results.
RESULTS ?= .benchmarks
# An environment of the oldest versions, for test-oldest.
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin

.PHONY: help installed study images docs test test-oldest test-cuda test-slow test-faults test-integrations lint format bench bench-training bench-results bench-gpu roofline clean
# Of 20,000 files of other packages the tests import a quarter: Python compiles those as it does.
INSTALL := -m pip install --quiet --no-compile
# Two installs at once into one environment would damage it.
.NOTPARALLEL:
# A half-made environment must not pass for a whole one.
.DELETE_ON_ERROR:
# Tests start a hundred processes: each would compile every module of the project anew.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make study      train two small networks and draw how their gradients are distributed"
	@echo "make images     the same, for the figures of the documentation"
	@echo "make docs       build the pages with search and the reference: open build/docs/index.html"
	@echo "make test       run the tests, but for those of test-slow, test-faults and test-integrations"
	@echo "make test-oldest"
	@echo "                run them with the oldest versions that pyproject.toml names (OLDEST=folder)"
	@echo "make test-cuda  run those of CUDA: on a card, or without one on a CUDA device in software"
	@echo "make test-slow  run the long property tests: 10,000 examples each"
	@echo "make test-faults"
	@echo "                test that interrupts, forks, threads and damaged files do no harm"
	@echo "make test-integrations"
	@echo "                test that pandas, polars, DuckDB, TensorBoard, wandb and Chromium open"
	@echo "                what gradstat writes"
	@echo "make lint       check style, format and types"
	@echo "make format     put the code in the project's format"
	@echo "make bench      measure the speed against other libraries"
	@echo "make bench-training  measure what watching costs a training run"
	@echo "make bench-results   run both; record, plot and put in the pages what they find"
	@echo "make bench-gpu  test and measure the kernels on a GPU"
	@echo "make roofline   compile the kernels and predict their speed; no GPU needed"
	@echo "make clean      remove the environment and everything built"

study: $(VENV)/installed-study
	$(BIN)/python examples/relu_vs_sigmoid.py $(ARGS)

images: $(VENV)/installed-study
	$(BIN)/python examples/relu_vs_sigmoid.py
	$(BIN)/python docs/make_images.py study
	$(BIN)/python examples/incident.py --output docs/images/incident.png

# From nothing each time: a page is warned of only when it is read.
docs: $(VENV)/installed-docs
	rm -rf build/docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs . build/docs
	@echo build/docs/index.html

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(SHARED) -m "not slow and not faults and not integrations" $(ARGS)

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest $(SHARED) $(ARGS)

test-cuda: $(VENV)/installed-test
	$(BIN)/python tests/cuda_suite.py $(ARGS)

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow $(call MARKED,slow) $(ARGS)

test-faults: $(VENV)/installed-test
	$(BIN)/python -m pytest $(SHARED) -m faults $(call MARKED,faults) $(ARGS)

# They wait for pages and servers more than they compute: one process more than processors.
test-integrations: JOBS := $(shell expr $(JOBS) + 1)
test-integrations: $(VENV)/installed-test-integrations
	$(BIN)/python -m pytest $(SHARED) -m integrations $(call MARKED,integrations) $(ARGS)

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-bench
	mkdir -p $(RESULTS)
	for suite in tensors lists; do \
		$(BIN)/python -m pytest bench/test_$$suite.py --benchmark-columns=median,iqr,rounds \
			--benchmark-json=$(RESULTS)/$$suite.json $(ARGS) || exit; \
	done
	$(BIN)/python bench/report.py $(RESULTS)

bench-training: $(VENV)/installed-bench
	mkdir -p $(RESULTS)
	$(BIN)/python bench/training.py --json $(RESULTS)/training.json $(ARGS)
	$(BIN)/python bench/report.py $(RESULTS)

bench-results: RESULTS = bench/results
bench-results: bench bench-training
	$(BIN)/python bench/breakdown.py --markdown $(RESULTS)/breakdown.md
	$(BIN)/python bench/casts.py --markdown $(RESULTS)/casts.md
	$(BIN)/python bench/plot.py $(RESULTS)
	$(BIN)/python bench/report.py $(RESULTS) --pages

bench-gpu: $(VENV)/installed-test $(VENV)/installed-bench
	$(BIN)/python bench/gpu_suite.py $(ARGS)

roofline: $(VENV)/installed-bench
	$(BIN)/python bench/roofline.py $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist gradstat.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# All that .ci/run needs, at once: each installation builds the package and looks at all others.
installed: pyproject.toml | $(BIN)/python
	$(BIN)/python $(INSTALL) --editable ".[docs,lint,test,test-integrations]"
	cd $(VENV) && touch installed-docs installed-lint installed-test installed-test-integrations

# One stamp for each extra of pyproject.toml: installed once, and again when that file changes.
$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python $(INSTALL) --editable ".[$*]"
	touch $@

# uv takes the oldest versions of what pyproject.toml names, and the newest of what that depends on.
$(OLDEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python \
		--resolution lowest-direct --editable ".[test-integrations]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
