# Every target may run twice in a row and in any order; `install` does nothing once it is done.

SHELL := /bin/bash
PYTHON ?= $(shell for python in python3.12 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# uv takes a fifth of pip's time but does not read pip's settings: pip installs where those name another index.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-deps --no-compile
UV_INSTALL = $(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python
# Bytecode is kept whatever the environment says: every process would compile torch and Megatron anew, for half a minute.
unexport PYTHONDONTWRITEBYTECODE
OUT ?= out/demo
DATA ?= data/stdlib
OUT_BENCH ?= out/bench
OUT_STUDY ?= out/study
BENCH ?= router
FLAGS ?=
# A process per core, which takes whole files: the tests of a file share its training runs. The slow files come first.
PYTEST_PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
RUN = $(BIN)/python -W ignore -m benchmarks.run
PARTS ?=
MINUTES ?= 30
AGAIN ?=
DRY ?=

.DEFAULT_GOAL := help
.PHONY: help install data train test test-all test-fast test-versions golden patches limits lint bench bench-gpu bench-layer bench-compare gpu gpu-curves study clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | awk -F: '{printf "  make %-14s%s\n", $$1, $$2}'

install: $(STAMP)  ## Make .venv with the pinned packages and this one (Python 3.12)

$(STAMP): requirements.txt setup.py
	@test -n "$(PYTHON)" || { echo "make install: Python 3.12 is missing; install it (with pyenv: 'pyenv install 3.12'," \
		"Debian, Ubuntu: 'apt install python3.12 python3.12-venv') or name it: make install PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -m pip config list | grep -q '\.index-url='; then \
		echo "pip has an index of its own: installing with pip"; $(PIP_INSTALL) -r requirements.txt; \
	else \
		$(PIP_INSTALL) "$$(grep '^uv==' requirements.txt)" && $(UV_INSTALL) -r requirements.txt \
		|| { echo "uv could not install the packages: installing with pip"; $(PIP_INSTALL) -r requirements.txt; }; \
	fi
	$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

data: $(DATA)/stdlib_test.idx  ## Make the byte-level data set from Python's standard library

# The test split is written last: where it is, the other two are too.
$(DATA)/stdlib_test.idx: examples/prepare_stdlib.py | $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore examples/prepare_stdlib.py --out $(DATA)

train: install data  ## Train the demo on two CPU processes and write $(OUT), with a page that explains the run
	PYTHON=$(abspath $(BIN)/python) DATA=$(abspath $(DATA)) OUT=$(abspath $(OUT)) bash examples/pretrain_demo.sh

test: install  ## Run the tests that need no GPU (12 to 15 minutes on two quiet cores)
	@echo "The tests take 12 to 15 minutes on two quiet cores. 'make test-fast' leaves out those marked slow: 5 minutes."
	$(PYTEST_PARALLEL)

test-all: install  ## Run the long tests too: layouts, faults, command lines at random (an hour)
	$(PYTEST_PARALLEL) -m "not gpu"

test-fast: install  ## Run those that are not slow either (5 minutes)
	$(PYTEST_PARALLEL) -m "not gpu and not slow and not long"

test-versions: install  ## Test each supported Megatron in a folder of its own under out/versions (ten minutes, downloads)
	$(BIN)/python -W ignore -m tests.versions

golden: install  ## Write tests/golden/losses.json anew, after a change that is meant to move losses
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.golden.losses

limits: install  ## Write docs/limits.md from the tables of refusals
	$(BIN)/python -W ignore docs/make_limits.py

patches: install  ## Write the patches of other Megatron versions anew from that of 0.19
	$(BIN)/python patches/derive.py

lint: install  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The sizes are those of the targets, which `targets.py` prints at the end.
bench: install  ## Run all benchmarks (12 minutes on two cores), write $(OUT_BENCH)/*.csv, print the targets
	$(RUN) router --repetitions 11 --slow-repetitions 2 --out $(OUT_BENCH)/router.csv
	$(RUN) router --experts 16384 --topk 32 --repetitions 11 --slow-repetitions 3 --out $(OUT_BENCH)/router_medium.csv
	$(RUN) recall --out $(OUT_BENCH)/recall.csv
	$(RUN) recall --experts 16384 --topk 32 --out $(OUT_BENCH)/recall_medium.csv
	$(RUN) growth --out $(OUT_BENCH)/growth.csv
	$(RUN) layer --slow-repetitions 2 --out $(OUT_BENCH)/layer.csv
	$(RUN) refresh --out $(OUT_BENCH)/refresh.csv
	$(RUN) diagnostics --out $(OUT_BENCH)/diagnostics.csv
	$(RUN) train --slow-repetitions 2 --out $(OUT_BENCH)/train.csv
	$(RUN) dispatch --slow-repetitions 2 --out $(OUT_BENCH)/dispatch.csv
	$(RUN) scaling --out $(OUT_BENCH)/scaling.csv --plot $(OUT_BENCH)/route_time.png
	@$(BIN)/python -m benchmarks.targets $(OUT_BENCH)

bench-gpu: install  ## The same on a large GPU, with its sizes, into $(OUT_BENCH)/gpu
	$(BIN)/python -W ignore -m benchmarks.gpu bench --again --out $(OUT_BENCH)/gpu
	@$(BIN)/python -m benchmarks.targets $(OUT_BENCH)

gpu: install  ## All that needs a GPU, in 30 minutes, into docs/results/gpu; PARTS="tests bench", MINUTES=12, AGAIN=1, DRY=1
	$(BIN)/python -W ignore -m benchmarks.gpu $(PARTS) --minutes $(MINUTES) --data $(DATA) $(if $(AGAIN),--again) $(if $(DRY),--dry)

gpu-curves: install  ## Train the demo on the CPU four times, for the comparison in `make gpu` (12 minutes)
	$(BIN)/python -W ignore -m benchmarks.gpu --curves --data $(DATA)

bench-layer: install  ## Time the whole layer, also at a million experts, and measure its memory
	$(RUN) layer --out $(OUT_BENCH)/layer.csv
	$(RUN) layer --experts 1048576 --hidden 128 --no-baseline --repetitions 3 --out $(OUT_BENCH)/layer_million.csv

bench-compare: install  ## Time BENCH (router) on BASE=<commit> and on this tree in turn; more flags in FLAGS
	@test -n "$(BASE)" || { echo "make bench-compare: name a commit, as in make bench-compare BASE=HEAD~1" >&2; exit 1; }
	$(BIN)/python -W ignore -m benchmarks.compare $(BASE) --bench $(BENCH) $(FLAGS)

study: install data  ## Compare the routers' quality on small models (10 minutes on two cores); table and plots in $(OUT_STUDY)
	$(BIN)/python -W ignore -m benchmarks.quality.study benchmarks/quality/small.toml --data-dir $(DATA) --out $(OUT_STUDY)
	$(BIN)/python -W ignore -m benchmarks.quality.report $(OUT_STUDY)/small.jsonl --out $(OUT_STUDY)

clean:  ## Remove what the targets above make by default, .venv included
	rm -rf $(VENV) data/stdlib out .pytest_cache .ruff_cache .hypothesis *.egg-info
