# Two commands matter on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-slow check format bench constraints clean

demo: $(VENV)/.runtime
	@rm -rf runs/demo
	$(BIN)/expertune train examples/demo.yaml

test: $(VENV)/.development .triton-oldest/.ready
	tools/run_tests.sh $(BIN)/python

# Tests that need minutes, or the tutorial's own stack in an environment beside ours.
test-slow: $(VENV)/.development .venv-legacy/.ready .triton-oldest/.ready
	$(BIN)/python -m pytest -m slow --timeout 1800

check: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.development .venv-legacy/.ready
	$(BIN)/python benchmarks/run.py all

constraints: $(VENV)/.development
	@(head -2 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable --exclude expertune --exclude triton | sed 's/+cpu$$//') > constraints.new
	@mv constraints.new constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/.development: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.runtime

# The oldest Triton that the kernels support, beside the environment's own; they are compiled with both.
.triton-oldest/.ready: $(VENV)/bin/python
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target .triton-oldest triton==3.6.0
	@touch $@

.venv-legacy/.ready: constraints-legacy.txt
	PYTHON=$(PYTHON) tools/legacy_env.sh

clean:
	rm -rf $(VENV) .venv-legacy .triton-oldest runs build
