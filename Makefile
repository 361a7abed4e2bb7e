# Every target sets itself up: the first one that you call makes .venv and installs into it.
#   make PYTHON=python3.12 ...    another interpreter (3.11 or newer) for .venv
#   make WORKERS=8 test           more test processes

PYTHON    ?= python3
WORKERS   ?= 2
RUN       ?= tinystories
BENCHMARK ?=

# A file's tests stay in one process: what they share is made once.
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

VENV  := .venv
BIN   := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed

# Stages are called as `python -m flows.stage`: that python must be ours.
export PATH := $(BIN):$(PATH)

# Nothing here reports home. `true`, not 1: MLflow ignores DO_NOT_TRACK=1.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export ITERATIVE_DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo repro validate test test-doors gc lint format up down deploy server worker mlflow clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install everything into .venv (each target below does it too)

# One rule for the environment: redone when the dependencies or their versions change.
# A torch build that is already in .venv is kept when its version is the one of constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; some minutes the first time)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[workflow,dev]' --constraint constraints.txt
	@touch $@

demo: $(STAMP)  ## corpus to report on the embedded model and stories; a few minutes on a CPU (RUN=... for another run)
	@$(BIN)/python -m flows.pipeline $(RUN)

repro: $(STAMP)  ## run what is out of date, for every run of params/active.yaml (dvc repro)
	@$(BIN)/dvc repro

validate: $(STAMP)  ## every active benchmark against the true response, an hour (BENCHMARK=... for one)
	@$(BIN)/dvc repro validation/dvc.yaml$(if $(BENCHMARK),:validate@$(BENCHMARK))
	@$(BIN)/python -m flows results

test: $(STAMP)  ## the tests, no network; some minutes
	@$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "not doors"

test-doors: $(STAMP)  ## the longer tests of servers, workers and runners, no network either
	@$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m doors

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)  ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

up: $(STAMP)  ## Prefect's server, a worker, deployments, MLflow and report pages in the background
	@$(BIN)/python -m flows up

down: $(STAMP)  ## end what `make up` started
	@$(BIN)/python -m flows down

deploy: $(STAMP)  ## register the deployments again (after a change of the flows or a new run)
	@$(BIN)/python -m flows deploy

server: $(STAMP)  ## only Prefect's server and UI, here: http://127.0.0.1:4200
	@$(BIN)/python -m flows serve server

worker: $(STAMP)  ## only a worker, here; one run at a time; deploys first; needs the server
	@$(BIN)/python -m flows serve worker

mlflow: $(STAMP)  ## only MLflow's UI, here: http://127.0.0.1:5000
	@$(BIN)/python -m flows serve mlflow

gc: $(STAMP)  ## remove what no stage will use again (make gc DRY=1 only lists it)
	@$(BIN)/python -m flows gc $(if $(DRY),--dry-run)

clean:  ## remove all that runs and tests make, results and DVC's cache included; .venv stays
	@test ! -x $(BIN)/python || $(BIN)/python -m flows down
	rm -rf artifacts .work .prefect mlruns mlartifacts mlflow.db mlflow.db-* dvc_plots
	rm -rf .dvc/cache .dvc/tmp .pytest_cache .ruff_cache .hypothesis build dist
	find benchmarks flows influence tasks tests -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
