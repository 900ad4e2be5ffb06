# llmprod: `make help` explains the targets; README.md the rest.

PROFILE  ?= cpu
NOTEBOOK ?=
STUDY    ?=
ENGINE   ?= local
BENCH    ?= training
PARAMS   ?=
SEEDS    ?= 0 1 2
SAMPLE   ?= 3
STORE    ?= runs/answers.sqlite
CRATE    ?=
URL      ?=
PYTHON   ?= python3

# The active virtual or conda environment, else .venv here.
VENV := $(or $(value VIRTUAL_ENV),$(value CONDA_PREFIX),.venv)
BIN := $(VENV)/bin

# What users write reaches the recipes as environment variables, as it is: neither make nor a shell reads it.
VARIABLES := PROFILE NOTEBOOK STUDY ENGINE BENCH PARAMS SEEDS SAMPLE STORE CRATE URL PYTHON
$(foreach name,$(VARIABLES),$(eval override $(name) := $$(value $(name))))
export $(VARIABLES) VENV BIN

# As names of targets: a space in them needs a backslash.
empty   :=
escaped = $(subst $(empty) ,\ ,$(1))
PYTHON_THERE := $(call escaped,$(BIN)/python)
READY        := $(call escaped,$(VENV)/.llmprod-ready)
LLMPROD      := "$$BIN/python" -m llmprod

.DEFAULT_GOAL := help
.PHONY: help setup reproduce plan test serve iterate run smoke verify crate check report bench bench-gpu fuzz reference study lab lint pin address sync clean

help:  ## explain the targets
	@echo "llmprod. Variables: PROFILE=cpu|smoke|zh|gpu NOTEBOOK=02_finetune PARAMS=\"epochs=2 seed=1\" SEEDS=\"0 1 2\" STUDY=methods SAMPLE=3 BENCH=training"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv (or use the active environment) and install everything that notebooks and tests need, pinned

$(PYTHON_THERE):
	@"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llmprod needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	"$$PYTHON" -m venv "$$VENV"

$(READY): pyproject.toml constraints.txt | $(PYTHON_THERE)
	"$$BIN/python" -m pip install --quiet --upgrade -c constraints.txt pip
	"$$BIN/python" -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	@# on all cores, where pip takes one; some packages hold files of another Python's syntax
	@"$$BIN/python" -m compileall -q -j 0 "$$VENV/lib" > /dev/null 2>&1 || true
	@# notebooks' diffs by nbdime, in this clone only; outside of one there is nothing to set up
	@test ! -e .git || { cd "$$BIN" && there=$$(pwd) && cd - > /dev/null && \
	  git config diff.jupyternotebook.command "\"$$there/git-nbdiffdriver\" diff" && \
	  git config merge.jupyternotebook.driver "\"$$there/git-nbmergedriver\" merge %O %A %B %L %P"; } || true
	@touch "$$VENV/.llmprod-ready"

reproduce: $(READY)  ## run all notebooks (or NOTEBOOK and those it needs), write the report, print the verdict
	$(LLMPROD) reproduce --notebook="$$NOTEBOOK" --profile="$$PROFILE" --params="$$PARAMS"

plan: $(READY)  ## say what `make reproduce` would run and fetch, and whether the machine has room for it; run nothing
	$(LLMPROD) plan --notebook="$$NOTEBOOK" --profile="$$PROFILE" --params="$$PARAMS"

# processes that wait for one another, and for which a busy machine is too slow
ALONE = tests/test_parallel.py tests/test_fanout.py tests/test_replicas.py

test: $(READY)  ## run all tests
	"$$BIN/python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder $(ALONE:%=--ignore=%)
	"$$BIN/python" -m pytest --numprocesses 2 --dist loadgroup $(ALONE)

run: $(READY)  ## run NOTEBOOK (or all) and the notebooks it needs, in PROFILE, with PARAMS
	$(LLMPROD) run --notebook="$$NOTEBOOK" --profile="$$PROFILE" --params="$$PARAMS"

smoke: $(READY)  ## run all notebooks on tiny subsets, into reports/smoke, which nbval checks
	$(LLMPROD) run --profile smoke

serve: $(READY)  ## answer over HTTP with what 05_deploy made, keep answers and feedback, show a page
	$(LLMPROD) serve --store="$$STORE" --page

iterate: $(READY)  ## train on the reviewed feedback in STORE; promote the new model if it is better and forgets nothing
	$(LLMPROD) iterate --store="$$STORE"

verify: $(READY)  ## print the verdict on the last run, or on that in CRATE
	$(LLMPROD) verify --profile="$$PROFILE" $${CRATE:+"$$CRATE"}

crate: $(READY)  ## pack the last run as an RO-Crate (CRATE, or runs/crates/PROFILE.zip), to be cited and verified elsewhere
	$(LLMPROD) crate --profile="$$PROFILE" $${CRATE:+"$$CRATE"}

report: $(READY)  ## write the report and the generated parts of the READMEs
	$(LLMPROD) report --profile="$$PROFILE"

bench: $(READY)  ## run BENCH: training, serving, load, monitor, recommendation, support, peers, continual, scaling or verdict
	"$$BIN/python" -m "benchmarks.$$BENCH"

fuzz: $(READY)  ## try the tests that vary their inputs on 2,000 each, where `make test` takes 100
	"$$BIN/python" -m pytest --numprocesses auto --maxprocesses 4 -m hypothesis --hypothesis-profile nightly

bench-gpu: $(READY)  ## time training and inference on the GPU and the share of its peak (shrunken without one)
	"$$BIN/python" -m benchmarks.gpu

reference: $(READY)  ## measure the studies and the reference (of NOTEBOOK, or all) over SEEDS (hours; continues where it stopped)
	$(LLMPROD) study
	$(LLMPROD) reference --profile="$$PROFILE" --seeds $$SEEDS --notebook="$$NOTEBOOK"

study: $(READY)  ## run the missing rows of STUDY, or of all studies (notebooks/studies.yaml); ENGINE=ray: on a Ray cluster
	$(LLMPROD) study $$STUDY --engine="$$ENGINE"

check: $(READY)  ## run SAMPLE random rows of the studies again, and print the verdict on them
	$(LLMPROD) study --check="$$SAMPLE"

lab: $(READY)  ## open the notebooks in JupyterLab
	"$$BIN/python" -m jupyterlab notebooks

lint: $(READY)  ## check code and notebooks for style and dead code, and fix what can be fixed
	"$$BIN/python" -m ruff check --fix . && "$$BIN/python" -m ruff format . && "$$BIN/python" -m tests.dead_code

pin: $(READY)  ## make Colab install the last commit of the module (after a change of it)
	$(LLMPROD) pin

address: $(READY)  ## write URL, the address of a fork, wherever the repository is named: project file, citation, READMEs, notebooks
	$(LLMPROD) address "$$URL"

sync: $(READY)  ## upload offline W&B runs
	$(LLMPROD) sync

clean:  ## delete runs/, generated reports and caches (not .venv, not downloads)
	rm -rf runs reports/cpu reports/gpu reports/*/work .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
