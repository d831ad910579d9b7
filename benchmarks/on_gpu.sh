#!/usr/bin/env bash
# Run benchmarks.first_contact, tests/gpu, dinat doctor and benchmarks.gpu on a machine with a CUDA GPU, each at most 9 minutes.
#
#   benchmarks/on_gpu.sh [FOLDER] [natten] [first] [tests] [doctor] [benchmark]
#
# Output and results are written to FOLDER, benchmarks/results by default. All parts run unless some are named.
# Requires only a Python (PYTHON, default python3) with torch, triton, numpy, pillow, safetensors, huggingface_hub, pytest and
# hypothesis; what else is missing is skipped with a message. If NATTEN is an sdist or wheel of natten, it is first built for
# this GPU, unless that takes over 9 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
folder=${1:-benchmarks/results}
shift || true
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(natten first tests doctor benchmark)
mkdir -p "$folder"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

gpu=$("$PYTHON" - <<'PYTHON'
import re, torch
print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower() if torch.cuda.is_available() else "")
PYTHON
) || exit 1
if [ -z "$gpu" ]; then
    echo "PyTorch finds no CUDA GPU: run this where nvidia-smi lists one" >&2
    exit 1
fi

# run_part NAME COMMAND...: run for at most 9 minutes, and store the output.
run_part() {
    local name=$1
    shift
    echo "== $name"
    timeout --kill-after=10 540 "$@" 2>&1 | tee "$folder/gpu-$gpu.$name.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { echo "== $name exited with status $status"; failed=1; }
}

build_natten() {
    if [ -z "${NATTEN:-}" ]; then
        "$PYTHON" -c 'import natten' 2>/dev/null || echo "natten is not installed, and NATTEN is not set to an sdist or wheel: skipped"
        return
    fi
    export NATTEN_CUDA_ARCH=${NATTEN_CUDA_ARCH:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
    export NATTEN_N_WORKERS=${NATTEN_N_WORKERS:-$(nproc)}
    if timeout 540 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation --target build/natten "$NATTEN"; then
        export PYTHONPATH=$PWD/build/natten:$PYTHONPATH
    else
        echo "natten could not be built within 9 minutes: skipped"
        rm -rf build/natten
    fi
}

for name in "${parts[@]}"; do
    case $name in
        natten) build_natten ;;
        first) run_part first "$PYTHON" -m benchmarks.first_contact --seconds 520 --results "$folder/gpu-$gpu.first.jsonl" ;;
        tests) run_part tests "$PYTHON" -m pytest -ra tests/gpu ;;
        doctor) run_part doctor "$PYTHON" -m dinat doctor --device cuda --json ;;
        benchmark) run_part benchmark "$PYTHON" -m benchmarks.gpu --seconds 480 --json "$folder/gpu-$gpu.json" ;;
        *) echo "unknown part $name: must be natten, first, tests, doctor or benchmark" >&2; exit 2 ;;
    esac
done
exit $failed
