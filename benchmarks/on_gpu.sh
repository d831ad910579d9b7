#!/usr/bin/env bash
# All that a machine with a CUDA card has to show: tests/gpu, dinat doctor and benchmarks.gpu, each within 9 minutes.
#
#   benchmarks/on_gpu.sh [FOLDER] [tests] [doctor] [benchmark] [natten]
#
# What they print and find goes to FOLDER (benchmarks/results if none is named); without further words, all of them run.
# It wants nothing but a Python (PYTHON, python3 if not set) with torch and triton, pytest and hypothesis; what else is missing
# is left out with a word. NATTEN may name an sdist or a wheel of natten: it is built for this card first, if it can be in time.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
folder=${1:-benchmarks/results}
shift || true
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(natten tests doctor benchmark)
mkdir -p "$folder"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

card=$("$PYTHON" - <<'PYTHON'
import re, torch
print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower() if torch.cuda.is_available() else "")
PYTHON
) || exit 1
if [ -z "$card" ]; then
    echo "PyTorch sees no CUDA card: run this where nvidia-smi lists one" >&2
    exit 1
fi

# part NAME COMMAND...: at most 9 minutes; what it prints is kept.
part() {
    local name=$1
    shift
    echo "== $name"
    timeout --kill-after=10 540 "$@" 2>&1 | tee "$folder/gpu-$card.$name.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { echo "== $name ended with $status"; failed=1; }
}

build_natten() {
    if [ -z "${NATTEN:-}" ]; then
        "$PYTHON" -c 'import natten' 2>/dev/null || echo "natten is not installed, and NATTEN names no sdist or wheel: it is left out"
        return
    fi
    export NATTEN_CUDA_ARCH=${NATTEN_CUDA_ARCH:-$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
    export NATTEN_N_WORKERS=${NATTEN_N_WORKERS:-$(nproc)}
    if timeout 540 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation --target build/natten "$NATTEN"; then
        export PYTHONPATH=$PWD/build/natten:$PYTHONPATH
    else
        echo "natten could not be built within 9 minutes: it is left out"
        rm -rf build/natten
    fi
}

for name in "${parts[@]}"; do
    case $name in
        natten) build_natten ;;
        tests) part tests "$PYTHON" -m pytest -ra tests/gpu ;;
        doctor) part doctor "$PYTHON" -m dinat doctor --device cuda --json ;;
        benchmark) part benchmark "$PYTHON" -m benchmarks.gpu --seconds 480 --json "$folder/gpu-$card.json" ;;
        *) echo "there is no part $name: take natten, tests, doctor or benchmark" >&2; exit 2 ;;
    esac
done
exit $failed
