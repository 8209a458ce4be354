# Each target works alone from a clean clone: it makes the venv and installs the pinned packages first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= cluster_configs/cpu_local.yaml
PORT ?= 8000

.PHONY: install serve test test-ci test-all fuzz lint clean

install: $(VENV)/.installed

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

serve: install
	@exec $(BIN)/tetriserve serve --config $(CONFIG) --port $(PORT)

test: install lint
	$(BIN)/python -m pytest

# what CI runs: every kind of fault, family and degree
test-ci: install lint
	$(BIN)/python -m pytest -m "not long"

# with the longest runs, such as all of bench/gpu on the CPU
test-all: install lint
	$(BIN)/python -m pytest -m "long or not long"

# some thousands of requests, right and wrong ones, made from the server's own OpenAPI document
fuzz: install
	TETRISERVE_FUZZ_CASES=2000 $(BIN)/python -m pytest tests/http/test_openapi.py --timeout=1800

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
