"""Run GPU code on a machine without a GPU: tests/gpu, tests/rehearsal/on_fake_gpu and benchmarks.gpu on a fake GPU.

Each runs in its own process, in which PyTorch reports a GPU (tests/rehearsal/fake_gpu).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("natten", reason="natten is not installed")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
    pytest.mark.timeout(600),
]

ON_FAKE_GPU = "tests/rehearsal/on_fake_gpu"
SUITES = ["tests/gpu", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / ON_FAKE_GPU).glob("test_*.py"))]
TWO_GPUS = f"{ON_FAKE_GPU}/test_devices.py"
"""The suite that requires two GPUs."""


def run(*arguments: str | Path, gpus: int = 1) -> str:
    """Run Python with these arguments, and return its standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "REHEARSAL_GPUS": str(gpus), "TRITON_INTERPRET": "1"}
    completed = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout[-20_000:] + completed.stderr[-5_000:]
    return completed.stdout


def run_suite(suite: str) -> str:
    gpus = 2 if suite == TWO_GPUS else 1
    return run("-m", "pytest", "-q", "-p", "tests.rehearsal.plugin", "--tb=short", suite, gpus=gpus)


def run_bare() -> str:
    """Run some of tests/gpu without the service's dependencies, and without pytest-timeout."""
    selected = ["-k", "fp32_is_fp32 or auto_keeps or keep_their_aspect", "tests/gpu"]
    plugins = ["-pno:timeout", "-ptests.rehearsal.bare", "-ptests.rehearsal.plugin"]
    return run("-m", "pytest", "-q", *plugins, "--tb=short", *selected)


def run_benchmark(folder: Path) -> None:
    data = f"--data-file={folder / 'coverage'}"
    run("-m", "coverage", "run", data, "--include=benchmarks/gpu.py", "-m", "tests.rehearsal.benchmark", folder / "gpu.json")
    run("-m", "coverage", "json", data, "-o", folder / "lines.json")


@pytest.mark.rehearsal
@pytest.mark.parametrize("suite", SUITES)
def test_gpu_suite_passes_on_the_fake_gpu(suite: str) -> None:
    output = run_suite(suite)
    assert re.search(r"^\d+ passed", output, re.MULTILINE), output
    assert "skipped" not in output


def test_gpu_code_runs_without_the_dependencies_of_the_service() -> None:
    assert re.search(r"^3 passed", run_bare(), re.MULTILINE)


@pytest.mark.rehearsal
def test_benchmark_runs_every_line(tmp_path: Path) -> None:
    run_benchmark(tmp_path)
    lines = json.loads((tmp_path / "lines.json").read_text())["files"]["benchmarks/gpu.py"]
    assert lines["missing_lines"] == []
    assert len(lines["executed_lines"]) > 120
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["backend"].partition(" ")[0] for row in rows["layers"]} == {"reference", "triton", "natten", "tiled"}
