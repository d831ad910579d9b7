"""benchmarks.first_contact on the fake GPU: every line, its deadlines, and what is written when it is killed."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest
import torch

from dinat.app.engine.runtimes.runtime import DeviceLost

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("natten", reason="natten is not installed")

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
    pytest.mark.timeout(600),
]


TOOLS = {"nvidia-smi": "#!/bin/sh\necho Fake GPU", "compute-sanitizer": '#!/bin/sh\nshift 2; exec "$@"'}
BROKEN_TOOLS = {"nvidia-smi": "#!/does/not/exist"}


def start(folder: Path, *arguments: str, tools: dict[str, str] = TOOLS) -> subprocess.Popen[str]:
    """Start benchmarks.first_contact, with fake tools of NVIDIA in PATH."""
    path = folder / str(len(tools))
    path.mkdir(exist_ok=True)
    for name, script in tools.items():
        (path / name).write_text(script + "\n")
        (path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{path}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "REHEARSAL_COVERAGE": str(folder / "coverage"),
    }
    command = [sys.executable, "-m", "tests.rehearsal.first_contact", "--results", str(folder / "results"), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def run(folder: Path, *arguments: str, tools: dict[str, str] = TOOLS) -> tuple[int, list[dict[str, Any]]]:
    """Return the exit status, and the results written."""
    (folder / "results").unlink(missing_ok=True)
    with start(folder, *arguments, tools=tools) as process:
        process.communicate()
    return process.returncode, rows(folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results").read_text().splitlines()]


def test_every_line_runs_and_failures_are_reported(tmp_path: Path) -> None:
    """NATTEN raises in float32, and the kernel of MLPs always; the self-check disables it."""
    from dinat.model.gpu import mlp_kernel

    status, written = run(tmp_path, "--seconds", "3600")
    assert status == 1
    statuses = {row["part"]: row["status"] for row in written if "seconds" in row}
    assert list(statuses) == [
        "versions", "kernels", "fused", "pixels", "graphs", "core", "networks", "attention", "profiler", "sanitizer", "tests"
    ]  # fmt: skip
    assert {part for part, status in statuses.items() if status} == {"kernels", "fused", "core"}, written
    failed = {(row["part"], row["candidate"].partition(" ")[0]) for row in written if "failed" in row and "candidate" in row}
    assert failed == {("kernels", "natten"), *(("fused", str(config)) for config in mlp_kernel.configs(32, 64))}
    status, (*_, last) = run(tmp_path, "--part", "versions", tools=BROKEN_TOOLS)
    assert (status, last["failed"].partition(":")[0]) == (1, "FileNotFoundError")
    (disabled,) = [row for row in written if "failed" in row and row["part"] == "core"]
    assert (disabled["precision"], {name.partition(" ")[0] for name, _ in disabled["disabled"]}) == ("bf16", {"MLP"})
    assert run(tmp_path, "--part", "sanitizer", tools={})[1] == [
        {"part": "sanitizer", "skipped": "compute-sanitizer is not installed"}
    ]
    check_full_disk(tmp_path)
    check_deadlines(tmp_path)
    data = coverage.Coverage(str(tmp_path / "coverage"), config_file=False)
    data.combine([str(tmp_path)])
    assert data.analysis2(str(ROOT / "benchmarks" / "first_contact.py"))[3] == []


def check_full_disk(folder: Path) -> None:
    with start(folder, "--part", "sanitizer", "--results", "/dev/full", tools={}) as process:
        assert json.loads(process.communicate()[0])["skipped"] == "compute-sanitizer is not installed"
    assert process.returncode == 0


def check_deadlines(folder: Path) -> None:
    status, (first, second) = run(folder, "--seconds", "1e-3", "--parts", "versions", "kernels")
    assert status == 1
    assert (first["part"], first["status"]) == ("versions", "killed at its deadline of 0 s")
    assert (second["part"], second["status"]) == ("kernels", "no time left")


def test_parts_end_at_their_deadline(tmp_path: Path) -> None:
    check_deadlines(tmp_path)


def test_results_are_printed_if_the_disk_is_full(tmp_path: Path) -> None:
    check_full_disk(tmp_path)


def test_results_so_far_are_there_after_a_kill(tmp_path: Path) -> None:
    with start(tmp_path, "--part", "kernels") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    assert rows(tmp_path)[0]["part"] == "kernels"


def test_skipped_tests_are_a_failure() -> None:
    """Those of tests/gpu are skipped without a GPU."""
    from benchmarks import first_contact

    *_, last = first_contact.tests()
    assert last == {"status": 0, "failed": "no line matches \\b[1-9]\\d* passed\\b"}


def test_lost_gpu_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import first_contact

    def lost() -> Iterator[dict[str, Any]]:
        yield {"warm": 1}
        raise DeviceLost("cuda:0 no longer responds")

    monkeypatch.setitem(first_contact.PARTS, "core", (lost, 1))
    assert not first_contact.run_part("core", tmp_path / "results")
    assert [row.get("failed") for row in rows(tmp_path)] == [None, "DeviceLost: cuda:0 no longer responds"]


def test_processes_that_a_part_started_end_with_it(tmp_path: Path) -> None:
    from benchmarks import first_contact

    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with open(reader, "rb") as file:
        status = first_contact.run_until(["sh", "-c", f"sleep 300 > {tmp_path}/fifo & wait"], 3)
        assert status == "killed at its deadline of 3 s"
        os.set_blocking(reader, True)
        assert select.select([file], [], [], 20)[0]  # no process holds the other end
        assert file.read() == b""
