# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test check bench conformance faults clean

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) -e ".[test]"
	touch $@

demo: .venv/.installed  ## the main job on scikit-learn's digits: train, cut, recover, ship, prove
	$(BIN)/aerogel compress lenet5 --data digits --target latency=0.5 --max-drop 3

test: .venv/.installed check  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not faults"

check: .venv/.installed  ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: .venv/.installed  ## timings; none of them decides a test
	$(BIN)/python benchmarks/latency_aa.py

conformance: .venv/.installed  ## the long half of the suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "slow and not faults"

faults: .venv/.installed  ## kills, flipped bits, hostile files in full counts; writes tests/faults/results.json
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/faults -m faults

clean:
	rm -rf .venv runs
