PYTHON ?= python3
BIN := .venv/bin

.PHONY: install serve test lint rehearsal gpu api-test chaos fuzz soak image-test bench bench-serving bench-frontends digits clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# natten's own build environment would fetch a second torch; without CUDA it is built in seconds, for the CPU.
.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel triton
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --no-deps natten
	touch $@

serve: install
	$(BIN)/dinat serve

test: .venv/tested
	$(BIN)/python -m pytest

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The GPU's code, whole, on a stand-in for a card: tests/gpu, every published network, the benchmark. Ten minutes.
rehearsal: .venv/tested
	DINAT_REHEARSAL=1 $(BIN)/python -m pytest tests/rehearsal tests/model/attention/test_triton_kernel.py

# On a machine with a CUDA card: tests, doctor and benchmark, at most 9 minutes each; leaves its results in benchmarks/results.
gpu: .venv/tested
	PYTHON=$(abspath $(BIN))/python benchmarks/on_gpu.sh

# Kills processes of a service under load: a hundred front ends, five engines.
chaos: install
	DINAT_CHAOS=1 $(BIN)/python -m pytest -s tests/e2e/test_chaos.py

# Schemathesis over every door, for two minutes.
api-test: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	PATH="$(abspath $(BIN)):$$PATH" DINAT_API_TEST=120 $(BIN)/python -m pytest -s tests/e2e/test_api.py

# 200,000 mutated pictures and 20,000 mutated requests.
fuzz: install
	DINAT_FUZZ=200000 $(BIN)/python -m pytest -s tests/e2e/test_fuzz.py

soak: install
	DINAT_SOAK=1 $(BIN)/python -m pytest -s tests/e2e/test_soak.py

# As root on Debian 12: builds and runs the Dockerfile's CPU variant with no container engine.
image-test: install
	which buildah debootstrap prometheus >/dev/null || \
	    { apt-get update -qq && apt-get install -qq --no-install-recommends buildah debootstrap prometheus; }
	DINAT_IMAGE=1 $(BIN)/python -m pytest -s tests/image

bench: install
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.model

bench-serving: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.serving --overload 60

# Needs wrk (Debian's package).
bench-frontends: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.frontends --overload 60 --json benchmarks/results/frontends-cpu.json

digits: install
	$(BIN)/python -m examples.digits_data build/digits
	$(BIN)/dinat evaluate digits build/digits/held-out --runtime torch

clean:
	rm -rf .venv build *.egg-info
