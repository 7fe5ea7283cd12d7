# Run `make help` for the targets. Everything is installed into .venv and nothing outside the repository is touched.

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported: to compile everything takes minutes.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt

.DEFAULT_GOAL := help
# Targets share one virtual environment, and two pips must not write to it at once.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint types docs pages figures readme tables acceptance never-worse ablation clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.stamp-dev ## create .venv with everything that development needs

# torch first and on its own, at the one tested version: a looser request may resolve to another build of it, with
# gigabytes of GPU libraries. To choose a build, set pip's own index options in the environment.
$(VENV)/.stamp-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.stamp-plot: $(VENV)/.stamp-torch pyproject.toml
	$(INSTALL) -e '.[plot]'
	touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch pyproject.toml
	$(INSTALL) -e '.[test]'
	touch $(VENV)/.stamp-plot $@

# dev holds what the smaller extras hold, so it satisfies their stamps too.
$(VENV)/.stamp-dev: $(VENV)/.stamp-torch pyproject.toml
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/.stamp-plot $(VENV)/.stamp-test $@

demo: $(VENV)/.stamp-plot ## compare solvers; tables and figures go to build/demo
	$(BIN)/iia-ode compare --out build/demo

# One thread each: the default gives every worker a pool as wide as the machine.
test: $(VENV)/.stamp-test ## run the tests (PYTEST_ARGS="-k name" to choose)
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.stamp-dev ## check types
	$(BIN)/mypy iia_ode

# -E: a page whose own text has not changed must be executed again too.
docs: $(VENV)/.stamp-dev ## build the documentation, executing its pages, into build/docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -j 2 -E -W --keep-going -b html -d build/doctrees docs build/docs

pages: $(VENV)/.stamp-dev ## build the documentation without executing its pages, into build/pages
	$(BIN)/sphinx-build -j 2 -E -W --keep-going -b html -d build/doctrees-pages -D nb_execution_mode=off \
		-D suppress_warnings=myst-nb.lexer docs build/pages

figures: demo ## remake the figures and the table that README and documentation show
	$(BIN)/python benchmarks/update_figures.py build/demo

readme: ## put the stored results of acceptance and further into the README
	$(PYTHON) benchmarks/update_figures.py

tables: $(VENV)/.stamp-plot ## measure every solver again for the documentation (some ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/solver_table.py

# Each of these goes on where it was stopped. Networks take hours on one core: SETTINGS=mixture64 is done in minutes.
SETTINGS_ARG = $(if $(SETTINGS),--settings $(SETTINGS))

acceptance never-worse ablation: $(VENV)/.stamp-plot
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$(subst -,_,$@).py $(SETTINGS_ARG)
	$(BIN)/python benchmarks/$(subst -,_,$@).py --table

acceptance: ## fitted solvers against the best classic ones, on unseen noise
never-worse: ## guarded fits against their bases, on unseen noise
ablation: ## what each ingredient of a fit is worth

clean: ## remove what was built and cached; .venv stays
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find iia_ode tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
