# One command to see it work, one to see that it works: make demo, make test.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-rest test-all lint types docs clean

demo: $(VENV)/ready
	$(BIN)/llmprune prune testbed --recipe demo --output out/demo --overwrite

# What a contributor needs, in a few minutes; the rest; and all of it, one after the other.
SPECIAL = families or kernels or slow or browser
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/ready
	$(PYTEST) -m "not ($(SPECIAL))"

test-rest: $(VENV)/ready
	$(PYTEST) -m "$(SPECIAL)"

test-all: test
	$(MAKE) test-rest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,serve,archive,cluster,onnx,eval,recover,docs]'
	touch $@
