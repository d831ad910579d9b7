"""benchmarks/on_gpu.sh with a fake Python that prints its arguments."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
    -) cat >/dev/null; echo {gpu} ;;
    *"import natten"*) exit 1 ;;
    *pip*) echo "$@"; exit {pip} ;;
    *doctor*) echo "$@"; exit 1 ;;
    *) echo "$@" ;;
esac
"""


def run(folder: Path, *parts: str, gpu: str = "a-gpu", pip: int = 0, natten: str = "") -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(PYTHON.format(gpu=gpu, pip=pip))
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "NATTEN": natten, "NATTEN_CUDA_ARCH": "9.0"}
    command = [ROOT / "benchmarks" / "on_gpu.sh", folder / "results", *parts]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_every_part_runs_and_its_output_is_stored(tmp_path: Path) -> None:
    completed = run(tmp_path)
    assert completed.returncode == 1  # that of dinat doctor
    assert "natten is not installed, and NATTEN is not set to an sdist or wheel: skipped" in completed.stdout
    assert "== doctor exited with status 1" in completed.stdout
    results = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert results.keys() == {f"gpu-a-gpu.{part}.txt" for part in ("first", "tests", "doctor", "benchmark")}
    assert results["gpu-a-gpu.first.txt"].startswith("-m benchmarks.first_contact --seconds 520 --results ")
    assert results["gpu-a-gpu.tests.txt"] == "-m pytest -ra tests/gpu\n"
    assert results["gpu-a-gpu.doctor.txt"] == "-m dinat doctor --device cuda --json\n"
    assert results["gpu-a-gpu.benchmark.txt"].startswith("-m benchmarks.gpu --seconds 480 --json ")


def test_parts_are_selected_by_name(tmp_path: Path) -> None:
    completed = run(tmp_path, "tests")
    assert completed.returncode == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["gpu-a-gpu.tests.txt"]
    assert run(tmp_path, "everything").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("pip", [0, 1])
def test_natten_is_built_or_skipped_with_a_message(tmp_path: Path, pip: int) -> None:
    completed = run(tmp_path, "natten", "tests", natten="natten-0.21.7.tar.gz", pip=pip)
    assert completed.returncode == 0
    assert "--no-build-isolation --target build/natten natten-0.21.7.tar.gz" in completed.stdout
    assert ("natten could not be built within 9 minutes: skipped" in completed.stdout) == bool(pip)


def test_script_fails_without_a_gpu(tmp_path: Path) -> None:
    completed = run(tmp_path, gpu="")
    assert completed.returncode == 1
    assert "PyTorch finds no CUDA GPU" in completed.stderr
