# Every target does its own set-up: a virtual environment in .venv with the packages pinned in constraints.txt.
# Needs make and Python 3.10 or newer. ARGS go through to the command:  make train ARGS="--steps 500"
PYTHON ?= python3
ARGS ?=
# Releases of torch, each but the pinned one in an environment of its own: up to 3 GB to download, 7 GB on disk.
RELEASES ?= 2.10 2.11 2.13
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: most modules are never imported, and compiling them all doubles the time of the installation.
PIP := $(BIN)/python -m pip install -q --no-input --no-compile --disable-pip-version-check -c constraints.txt
PACKAGING := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train test test-all test-versions soak bench docs docs-serve lint format clean

help: ## this list
	@echo 'make TARGET [ARGS="..."] [PYTHON=python3.12]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

train: $(VENV)/.train ## train on handwritten digits and draw them in one step; ARGS: see --help
	@$(BIN)/python -m soflow_fast.train $(ARGS)

test: $(VENV)/.test ## the tests that are not slow, in minutes; ARGS go to pytest and may name files
	@PYTHON=$(BIN)/python sh tests/run.sh fast $(ARGS)

test-all: $(VENV)/.test ## all tests, then test-versions unless there are ARGS; RELEASES= leaves those out
	@PYTHON=$(BIN)/python sh tests/run.sh all $(ARGS)
	@$(if $(ARGS),:,$(BIN)/python tests/versions.py $(RELEASES))

test-versions: $(VENV)/.test ## what a release of torch can break, on several: RELEASES="2.11"
	@$(BIN)/python tests/versions.py $(RELEASES) $(ARGS)

soak: $(VENV)/.test ## the tests of reliability, whole: minutes of kills, signals and steps
	@SOFLOW_SOAK=1 $(BIN)/python -m pytest tests/reliability $(ARGS)

bench: $(VENV)/.test ## the benchmarks; ARGS go to pytest
	@$(BIN)/python -m pytest benchmarks/ $(ARGS)

# The theme's maintainers announce their next project in every build.
docs: $(VENV)/.docs ## the book, built into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: $(VENV)/.docs ## the book at http://127.0.0.1:8000, built anew when a page changes
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve $(ARGS)

lint: $(VENV)/.test ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test ## let ruff rewrite the sources
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove what make and the tools made; runs/ stays
	rm -rf $(VENV) $(VENV)-torch* build dist site *.egg-info kernels/build kernels/*.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find soflow_fast kernels tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is written only after its step succeeded, so an interrupted one is done again.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: no '$(PYTHON)' here; install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed, '$(PYTHON)' is older; name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: '$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.train: $(VENV)/.created $(PACKAGING)
	@echo "Installing the pinned packages into $(VENV), once: about 0.3 GB to download, 3 GB where PyTorch comes with CUDA ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.created $(PACKAGING)
	@echo "Installing the pinned packages and test tools into $(VENV), once: about 0.6 GB to download, 3 GB where PyTorch comes with CUDA ..."
	@$(PIP) -e '.[test]'
	@touch $(VENV)/.train $(VENV)/.docs $@

$(VENV)/.docs: $(VENV)/.created $(PACKAGING)
	@echo "Installing the pinned packages that build the book into $(VENV), once ..."
	@$(PIP) -e '.[docs]'
	@touch $(VENV)/.train $@
