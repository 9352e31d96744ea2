# What one types to work on pocl-ray. Every target that needs the virtual environment depends on its stamp,
# so each sets up what it needs, once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUNS   := $(VENV)/.installed-to-run
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.installed-for-docs
ROWS   := ../shared/data
ARGS   ?=

MODEL  := models/smollm2
FAULTS := $(addprefix tests/ray/,test_kills.py test_nodes.py test_fault_matrix.py test_giving_up.py test_hangs.py test_node_lost_on_s3.py \
    test_rollout_kills.py test_autoscaling.py test_tune_on_two_nodes.py test_tune.py)
# The tools that build the package, pinned in constraints.txt like all the rest.
BUILD_TOOLS := pip setuptools wheel

# The Python versions that the project promises: tests/unit/test_python_versions.py holds README and pyproject to them.
VERSIONS := 3.11 3.12 3.13 3.14
# PYTHON if it is one of them, else the first that this machine has and that runs; empty if none does.
# A name on PATH may be a shim of a version that is not active, so each is asked, not only looked up.
SUPPORTED = import sys; sys.exit(f"{sys.version_info[0]}.{sys.version_info[1]}" not in "$(VERSIONS)".split())
FIND_PYTHON = for python in "$(PYTHON)" $(VERSIONS:%=python%); do \
    if "$$python" -c '$(SUPPORTED)' 2>/dev/null; then echo "$$python"; break; fi; done
# The interpreter of one version, "$$version": on PATH, else among pyenv's, where only the active one is on PATH.
FIND_VERSION = for python in "python$$version" "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/"$$version".*/bin/python; do \
    if "$$python" -c '$(SUPPORTED)' 2>/dev/null; then echo "$$python"; break; fi; done
# pip's output goes to a log, and where it fails one line says what failed and what to do.
PIP = $(BIN)/python scripts/pip_install.py $(VENV)/install.log

.DEFAULT_GOAL := help
.PHONY: help install quickstart smollm2 test test-faults test-versions check docs benchmark clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with everything pinned in constraints.txt, the tests' packages included

# Two stamps: what a run needs, and what the tests add to it in the same environment. A stamp goes before the work and
# comes back only after all of it, so an interrupted install is never taken for a finished one. Without ensurepip (Debian
# splits it off) virtualenv stands in where it is there.
$(RUNS): pyproject.toml constraints.txt
	@rm -f $@ $(STAMP) $(DOCS)
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
	    echo "pocl-ray needs Python 3.11, 3.12, 3.13 or 3.14, and '$(PYTHON)' is none of them: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	    exit 2; \
	fi; \
	if ! $(BIN)/python -c '$(SUPPORTED)' 2>/dev/null || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV) >/dev/null 2>&1 \
	        || "$$python" -m virtualenv --quiet --clear $(VENV) 2>/dev/null \
	        || { echo "$$python has neither ensurepip nor virtualenv: install python3-venv (Debian) or virtualenv" >&2; exit 2; }; \
	fi
	@echo "installing what a run needs, as pinned in constraints.txt (minutes, the first time)"
	@$(PIP) $(BUILD_TOOLS)
	@$(PIP) --build-constraint constraints.txt -e .
	@touch $@

$(STAMP): $(RUNS)
	@rm -f $@
	@echo "installing what the tests need as well"
	@$(PIP) --build-constraint constraints.txt -e '.[dev,s3]'
	@touch $@

quickstart: $(RUNS)  ## teach a tiny student the whole curriculum, in minutes, on a laptop
	@$(BIN)/pocl-ray run configs/quickstart.yaml $(ARGS)

# The real rows where they lie beside the checkout, else the ones the package ships.
smollm2: $(RUNS)  ## distil SmolLM2-135M into 6 of its layers
	@$(BIN)/pocl-ray fetch smollm2
	@$(BIN)/pocl-ray run configs/smollm2.yaml $(if $(wildcard $(ROWS)/s_ni_short_train.jsonl),\
	    data.train.path=$(ROWS)/s_ni_short_train.jsonl data.dev.path=$(ROWS)/s_ni_dev.jsonl) $(ARGS)

test: $(STAMP)  ## run the tests; ARGS='-m "not ray"' passes on to pytest
	@$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations=25 $(ARGS)

test-faults: $(STAMP)  ## kill workers, actors, nodes and the driver in every step, and print what came of it
	@POCL_FAULTS=all $(BIN)/python -m pytest $(FAULTS) $(ARGS)

# An environment of its own for each, .venv-3.12 and so on, which stays; all versions are tried before it fails.
test-versions:  ## install, and run the unit tests, on every promised Python that this machine has
	@failed=; for version in $(VERSIONS); do \
	    python=$$($(FIND_VERSION)); \
	    if [ -z "$$python" ]; then echo "Python $$version: not on this machine"; continue; fi; \
	    if $(MAKE) --no-print-directory install PYTHON="$$python" VENV=.venv-$$version \
	        && POCL_VERSIONS=all .venv-$$version/bin/python -m pytest tests/unit -q -n 2 --dist loadscope $(ARGS); \
	    then echo "Python $$version: passed"; else echo "Python $$version: FAILED"; failed="$$failed $$version"; fi; \
	done; [ -z "$$failed" ] || { echo "failed on Python$$failed" >&2; exit 1; }

check: $(STAMP)  ## lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

$(DOCS): $(RUNS)
	@rm -f $@
	@echo "installing what the documentation site needs as well"
	@$(PIP) --build-constraint constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS)  ## build the documentation site into site/; a warning fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

# With the real model and the real rows where they are (`pocl-ray fetch smollm2`), else random ones of their shape.
benchmark: $(STAMP)  ## one table of speed and memory beside TRL and the authors' way; exit status 1 below a bar
	@$(BIN)/python benchmarks/table.py --json runs/benchmark.json $(if $(wildcard $(MODEL)/config.json),--teacher $(MODEL)) \
	    $(if $(wildcard $(ROWS)/s_ni_train.jsonl),--rows $(ROWS)/s_ni_train.jsonl) $(ARGS)

clean:  ## remove .venv and the caches; runs stay
	@rm -rf site $(VENV) $(VERSIONS:%=.venv-%) .pytest_cache .ruff_cache .mypy_cache *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
