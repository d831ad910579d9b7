import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinat.app import contention, threads
from dinat.app.cli import main
from dinat.app.contention import CpuTimes, cpu_times, describe_contention

LIMIT = """
import sys, torch
from dinat.app import host, threads
host.cpu_quota = lambda: float(sys.argv[1]) if sys.argv[1] else None
print(threads.limit_threads(int(sys.argv[2]) if sys.argv[2] else None), torch.get_num_threads())
"""
AVAILABLE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quota", "setting", "variable", "expected"),
    [
        ("", "", None, AVAILABLE),
        pytest.param("0.5", "", None, 1, marks=pytest.mark.slow),
        pytest.param("0.5", "", "2", min(2, AVAILABLE), marks=pytest.mark.slow),  # the user's own choice
        ("0.5", "3", "2", 3),
        pytest.param("0.5", "", " ", 1, marks=pytest.mark.slow),  # as none
        pytest.param("0.5", "", "0", 1, marks=pytest.mark.slow),
    ],
)
def test_threads_are_those_of_the_setting_the_variable_or_the_quota(
    quota: str, setting: str, variable: str | None, expected: int
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if variable is None else {"OMP_NUM_THREADS": variable}
    command = [sys.executable, "-c", LIMIT, quota, setting]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(expected)] * 2


@pytest.mark.parametrize(
    "arguments",
    [["export", "none", "x.onnx"], ["quantize", "none", "images", "x"]],
)
def test_commands_without_engine_compute_with_the_threads_of_the_quota(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint does not exist."""
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert main(arguments) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_contention_is_described_by_its_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = CpuTimes(computed=10, waited=1, total=1000, stolen=10)

    def describe(computed: float, waited: float, total: int, stolen: int) -> str | None:
        monkeypatch.setattr(contention, "cpu_times", lambda: CpuTimes(computed, waited, total, stolen))
        return describe_contention(before)

    assert describe(12, 1.1, 1200, 12) is None
    assert describe(10, 1, 1000, 10) is None  # no time has passed
    assert describe(10.05, 3, 1010, 10) is None  # too little to tell
    advice = "give this process CPUs of its own, or set DINAT_THREADS to the number of free ones"
    assert describe(12, 2, 1200, 10) == (
        f"the CPU is shared: threads waited 33% of their time for other programs or a CPU quota; {advice}"
    )
    assert describe(12, 1, 1100, 60) == (
        f"the CPU is shared: the hypervisor gave 50% of the CPU to other virtual machines; {advice}"
    )
    assert " and the hypervisor " in (describe(12, 2, 1100, 60) or "")
    assert describe_contention(None) is None


def test_cpu_times_are_read() -> None:
    times = cpu_times()
    assert times is not None and times.computed > 0 and times.total > times.stolen >= 0
