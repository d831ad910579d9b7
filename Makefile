PYTHON ?= python3
BIN := .venv/bin

.PHONY: install serve test lint bench digits clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

serve: install
	$(BIN)/dinat serve

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.model

digits: install
	$(BIN)/python -m examples.train_digits evaluate

clean:
	rm -rf .venv build *.egg-info
