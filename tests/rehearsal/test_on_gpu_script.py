"""benchmarks/on_gpu.sh with a Python that only says what it was asked."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
    -) cat >/dev/null; echo {card} ;;
    *"import natten"*) exit 1 ;;
    *pip*) echo "$@"; exit {pip} ;;
    *doctor*) echo "$@"; exit 1 ;;
    *) echo "$@" ;;
esac
"""


def run(folder: Path, *parts: str, card: str = "a-card", pip: int = 0, natten: str = "") -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(PYTHON.format(card=card, pip=pip))
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "NATTEN": natten, "NATTEN_CUDA_ARCH": "9.0"}
    command = [ROOT / "benchmarks" / "on_gpu.sh", folder / "results", *parts]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_every_part_runs_and_leaves_what_it_printed(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1  # the doctor's
    assert "natten is not installed, and NATTEN names no sdist or wheel: it is left out" in done.stdout
    assert "== doctor ended with 1" in done.stdout
    results = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert results.keys() == {f"gpu-a-card.{part}.txt" for part in ("tests", "doctor", "benchmark")}
    assert results["gpu-a-card.tests.txt"] == "-m pytest -ra tests/gpu\n"
    assert results["gpu-a-card.doctor.txt"] == "-m dinat doctor --device cuda --json\n"
    assert results["gpu-a-card.benchmark.txt"].startswith("-m benchmarks.gpu --seconds 480 --json ")


def test_parts_can_be_named(tmp_path: Path) -> None:
    done = run(tmp_path, "tests")
    assert done.returncode == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["gpu-a-card.tests.txt"]
    assert run(tmp_path, "everything").returncode == 2


@pytest.mark.parametrize("pip", [0, 1])
def test_natten_is_built_or_left_out_with_a_word(tmp_path: Path, pip: int) -> None:
    done = run(tmp_path, "natten", "tests", natten="natten-0.21.7.tar.gz", pip=pip)
    assert done.returncode == 0
    assert "--no-build-isolation --target build/natten natten-0.21.7.tar.gz" in done.stdout
    assert ("natten could not be built within 9 minutes: it is left out" in done.stdout) == bool(pip)


def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, card="")
    assert done.returncode == 1
    assert "PyTorch sees no CUDA card" in done.stderr
