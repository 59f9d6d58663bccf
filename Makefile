# Two commands matter on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-targets test-oldest test-newest test-slow check format docs notebook bench constraints clean

demo: $(VENV)/.runtime
	@rm -rf runs/demo
	$(BIN)/expertune train examples/demo.yaml
	@echo "The report of the run, for a browser: $(CURDIR)/runs/demo/report.html"

test: $(VENV)/.development
	$(BIN)/python tools/run_tests.py

# Kernels compiled for every GPU, by the oldest Triton and by the environment's own, and graphs that torch.compile keeps.
# `make test` compiles each kernel once for one GPU; the rest needs minutes and breaks with a kernel, with Triton or with
# torch alone. Continuous integration runs it every time.
test-targets: $(VENV)/.development .triton-oldest/.ready
	$(BIN)/python -m pytest -p no:cacheprovider -m targets tests/kernels

# The oldest releases that pyproject.toml allows, and the newest, each in an environment of its own. What runs is what
# calls transformers, PEFT, TRL, accelerate, datasets, bitsandbytes or trackers, or is called by them. Left to `make test`
# is what would say the same with any release: fuzzed files, injected failures, kernels, plans, reports and pages.
checkpoint = $(addprefix tests/checkpoint/,formats/test_bnb4bit.py formats/test_bnb4bit_experts.py test_convert.py \
	test_hf_quantizer.py test_load.py test_names.py test_quantize_hub.py test_targets.py test_tokenizer.py)
train = $(patsubst %,tests/train/test_%.py,accumulation held_out offload optim optimizer_states promises resume schedule \
	trackers training)
SEAMS = tests/test_registration.py tests/test_training_fields.py tests/adapt $(checkpoint) tests/data \
	tests/evaluation/test_scoring.py tests/experts tests/families tests/generation tests/layers tests/objectives \
	tests/planning/test_generation.py $(train)
LIBRARIES := ^(torch|transformers|peft|trl|accelerate|datasets|bitsandbytes)==

test-oldest test-newest: test-%: .venv-%/.development
	@.venv-$*/bin/python -m pip freeze --exclude-editable | grep -E '$(LIBRARIES)'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -p no:cacheprovider -k 'not fuzz and not quantized_to_a_folder' $(SEAMS)

# Tests that need minutes, or the tutorial's own stack in an environment beside ours; and property tests with all examples.
test-slow: $(VENV)/.development .venv-legacy/.ready .triton-oldest/.ready
	$(BIN)/python -m pytest -m slow --timeout 1800
	$(BIN)/python -m pytest --hypothesis-profile thorough $$(grep -rl --include='test_*.py' '^from hypothesis' tests)

check: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pages, search and API reference, in an environment of their own; nothing of the package is imported.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "The site: build/site/index.html; with its search: $(PYTHON) -m http.server --directory build/site"

# Executes the notebook and keeps its outputs in it.
notebook: $(VENV)/.development
	$(BIN)/python tools/run_notebook.py

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
	@$(PIP) --only-binary mlx,mlx-cpu --editable '.[mlx]' || echo "MLX has no wheel for this machine; its tests are skipped"
	@touch $@ $(VENV)/.runtime

.venv-oldest/.development .venv-newest/.development: .venv-%/.development: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-$*.txt --editable '.[dev]'
	@touch $@

# The oldest Triton that the kernels support, beside the environment's own; they are compiled with both.
.triton-oldest/.ready: $(VENV)/bin/python
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target .triton-oldest triton==3.6.0
	@touch $@

.venv-docs/.ready: constraints-docs.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet --requirement constraints-docs.txt
	@touch $@

.venv-legacy/.ready: constraints-legacy.txt
	PYTHON=$(PYTHON) tools/legacy_env.sh

clean:
	rm -rf $(VENV) .venv-docs .venv-legacy .venv-oldest .venv-newest .triton-oldest runs build
