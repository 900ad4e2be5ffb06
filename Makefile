# llmprod: `make help` explains the targets; README.md the rest.

PROFILE  ?= cpu
NOTEBOOK ?=
STUDY    ?=
BENCH    ?= training
PARAMS   ?=
SEEDS    ?= 0 1 2
STORE    ?= runs/answers.sqlite
PYTHON   ?= python3

# The active virtual or conda environment, else .venv here.
ifneq ($(VIRTUAL_ENV),)
  ENV := $(VIRTUAL_ENV)
else ifneq ($(CONDA_PREFIX),)
  ENV := $(CONDA_PREFIX)
else
  ENV := .venv
endif
BIN   := $(ENV)/bin
READY := $(ENV)/.llmprod-ready
LLMPROD = $(BIN)/python -m llmprod

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test serve iterate run smoke verify report bench bench-gpu reference study lab lint pin sync clean

help:  ## explain the targets
	@echo "llmprod. Variables: PROFILE=cpu|smoke|gpu NOTEBOOK=02_finetune PARAMS=\"epochs=2 seed=1\" SEEDS=\"0 1 2\" STUDY=methods BENCH=training"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv (or use the active environment) and install everything that notebooks and tests need, pinned

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llmprod needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(ENV)

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@# notebooks' diffs by nbdime, in this clone only; outside of one there is nothing to set up
	@test ! -e .git || { \
	  git config diff.jupyternotebook.command '"$(abspath $(BIN))/git-nbdiffdriver" diff' && \
	  git config merge.jupyternotebook.driver '"$(abspath $(BIN))/git-nbmergedriver" merge %O %A %B %L %P'; } || true
	@touch $@

reproduce: $(READY)  ## run all notebooks (or NOTEBOOK and those it needs), write the report, print the verdict
	$(LLMPROD) reproduce --notebook '$(NOTEBOOK)' --profile $(PROFILE) --params '$(PARAMS)'

test: $(READY)  ## run all tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

run: $(READY)  ## run NOTEBOOK (or all) and the notebooks it needs, in PROFILE, with PARAMS
	$(LLMPROD) run --notebook '$(NOTEBOOK)' --profile $(PROFILE) --params '$(PARAMS)'

smoke: $(READY)  ## run all notebooks on tiny subsets, into reports/smoke, which nbval checks
	$(LLMPROD) run --profile smoke

serve: $(READY)  ## answer over HTTP with what 05_deploy made, keep answers and feedback, show a page
	$(LLMPROD) serve --store '$(STORE)' --page

iterate: $(READY)  ## train on the reviewed feedback in STORE; promote the new model if it is better and forgets nothing
	$(LLMPROD) iterate --store '$(STORE)'

verify: $(READY)  ## print the verdict on the last run
	$(LLMPROD) verify --profile $(PROFILE)

report: $(READY)  ## write the report and the generated parts of the READMEs
	$(LLMPROD) report --profile $(PROFILE)

bench: $(READY)  ## time BENCH (training, monitor, recommendation, support or peers) and compare it with other libraries
	$(BIN)/python -m benchmarks.$(BENCH)

bench-gpu: $(READY)  ## time training and inference on the GPU and the share of its peak (shrunken without one)
	$(BIN)/python -m benchmarks.gpu

reference: $(READY)  ## measure the studies and the reference (of NOTEBOOK, or all) over SEEDS (hours; continues where it stopped)
	$(LLMPROD) study
	$(LLMPROD) reference --profile $(PROFILE) --seeds $(SEEDS) --notebook '$(NOTEBOOK)'

study: $(READY)  ## run the missing rows of STUDY, or of all studies (notebooks/studies.yaml)
	$(LLMPROD) study $(STUDY)

lab: $(READY)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

lint: $(READY)  ## check code and notebooks for style and dead code, and fix what can be fixed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/python -m tests.dead_code

pin: $(READY)  ## make Colab install the last commit of the module (after a change of it)
	$(LLMPROD) pin

sync: $(READY)  ## upload offline W&B runs
	$(LLMPROD) sync

clean:  ## delete runs/, generated reports and caches (not .venv, not downloads)
	rm -rf runs reports/cpu reports/gpu reports/*/work .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
