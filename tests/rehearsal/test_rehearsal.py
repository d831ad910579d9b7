"""The GPU's code on a machine with none: tests/gpu, tests/rehearsal/on_fake_gpu and benchmarks.gpu, on a stand-in for the card.

Each in a process of its own, which believes that PyTorch sees a card (tests/rehearsal/card.py).
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("natten", reason="natten is not installed")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there: nothing needs to stand in for it"),
    pytest.mark.timeout(600),
]


SUITES = [
    "tests/gpu",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/rehearsal/on_fake_gpu").glob("test_*.py")),
]
QUICK = "tests/rehearsal/on_fake_gpu/test_self_check.py"
"""What is part of `make test`; all else takes minutes."""

whole = pytest.mark.skipif("DINAT_REHEARSAL" not in os.environ, reason="DINAT_REHEARSAL is not set (make rehearsal)")


def run(*arguments: str | Path, cards: int = 1) -> str:
    """What Python printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "REHEARSAL_CARDS": str(cards), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    return done.stdout


def run_suite(tests: str) -> str:
    cards = 2 if "test_cards" in tests else 1
    return run("-m", "pytest", "-q", "-p", "tests.rehearsal.plugin", "--tb=short", tests, cards=cards)


def run_bare() -> str:
    """Some of tests/gpu with none of the service's own packages."""
    chosen = ["-k", "fp32_is_fp32 or auto_keeps or keep_their_aspect", "tests/gpu"]
    return run("-m", "pytest", "-q", "-p", "tests.rehearsal.bare", "-p", "tests.rehearsal.plugin", "--tb=short", *chosen)


def run_benchmark(folder: Path) -> None:
    data = f"--data-file={folder / 'coverage'}"
    run("-m", "coverage", "run", data, "--include=benchmarks/gpu.py", "-m", "tests.rehearsal.benchmark", folder / "gpu.json")
    run("-m", "coverage", "json", data, "-o", folder / "lines.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def runs(folder: Path) -> Iterator[dict[str, Future[Any]]]:
    """All of them, two at a time."""
    with ThreadPoolExecutor(2) as threads:
        runs = {"bare": threads.submit(run_bare)}
        if "DINAT_REHEARSAL" in os.environ:
            runs |= {tests: threads.submit(run_suite, tests) for tests in SUITES}
            runs["benchmark"] = threads.submit(run_benchmark, folder)
        else:
            runs[QUICK] = threads.submit(run_suite, QUICK)
        yield runs


@pytest.mark.parametrize("tests", [one if one == QUICK else pytest.param(one, marks=whole) for one in SUITES])
def test_what_is_for_a_card_passes_on_a_stand_in(tests: str, runs: dict[str, Future[Any]]) -> None:
    printed = runs[tests].result()
    assert re.search(r"^\d+ passed", printed, re.MULTILINE), printed
    assert "skipped" not in printed


def test_a_card_needs_nothing_of_the_services_own_packages(runs: dict[str, Future[Any]]) -> None:
    assert re.search(r"^3 passed", runs["bare"].result(), re.MULTILINE)


@whole
def test_the_benchmark_runs_from_its_first_line_to_its_last(folder: Path, runs: dict[str, Future[Any]]) -> None:
    runs["benchmark"].result()
    lines = json.loads((folder / "lines.json").read_text())["files"]["benchmarks/gpu.py"]
    assert lines["missing_lines"] == []
    assert len(lines["executed_lines"]) > 120
    rows = json.loads((folder / "gpu.json").read_text())
    assert {row["backend"].partition(" ")[0] for row in rows["layers"]} == {"reference", "triton", "natten", "tiled"}
