import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dinat.app.server.supervisor
from dinat.app import host
from dinat.app.server.supervisor import resolve_frontends
from dinat.app.settings import Settings

AVAILABLE = len(os.sched_getaffinity(0))


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the control groups' mount point, and a process in group /pod/container of it."""
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    monkeypatch.setattr(host, "MEMBERSHIPS", tmp_path / "memberships")
    (tmp_path / "memberships").write_text("0::/pod/container\n")
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "quota", "cores"),
    [
        (None, None, AVAILABLE),
        ("max 100000", None, AVAILABLE),
        ("100000 100000", 1, 1),
        ("50000 100000", 0.5, 1),
        ("150000 100000", 1.5, 1),
        ("99900000 100000", 999, AVAILABLE),
    ],
)
def test_cores_are_limited_by_the_container(limit: str | None, quota: float | None, cores: int, cgroup: Path) -> None:
    if limit is not None:
        (cgroup / "cpu.max").write_text(limit + "\n")
    assert host.cpu_quota() == quota
    assert host.cores() == cores


def test_lowest_quota_of_the_groups_around_a_process_counts(cgroup: Path) -> None:
    (cgroup / "pod" / "container").mkdir(parents=True)
    (cgroup / "pod" / "container" / "cpu.max").write_text("max 100000\n")
    (cgroup / "pod" / "cpu.max").write_text("25000 10000\n")
    (cgroup / "cpu.max").write_text("800000 100000\n")
    assert host.cpu_quota() == 2.5


def test_control_groups_of_version_1_limit_cores_and_memory(cgroup: Path) -> None:
    """On the host, and in a container, where the path is that of the host and the root is the container's own group."""
    (cgroup / "memberships").write_text("4:memory:/docker/1a2b\n2:cpu,cpuacct:/docker/1a2b\n1:name=systemd:/docker/1a2b\n")
    for folder in ("cpu,cpuacct", "memory"):
        (cgroup / folder).mkdir()
    (cgroup / "cpu,cpuacct" / "cpu.cfs_quota_us").write_text("-1\n")
    (cgroup / "cpu,cpuacct" / "cpu.cfs_period_us").write_text("100000\n")
    assert host.cpu_quota() is None
    (cgroup / "cpu,cpuacct" / "cpu.cfs_quota_us").write_text("70000\n")
    assert host.cpu_quota() == 0.7
    (cgroup / "memory" / "memory.limit_in_bytes").write_text("10485760\n")
    (cgroup / "memory" / "memory.usage_in_bytes").write_text("7340032\n")
    (cgroup / "memory" / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 4194304\n")
    assert host.free_memory() == 10 * 2**20 - 3 * 2**20


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/cpu/cpu.cfs_period_us", os.W_OK), reason="no control groups to create")
def test_quota_of_a_real_control_group_is_read() -> None:
    group = Path(f"/sys/fs/cgroup/cpu/dinat-test-{os.getpid()}")
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("130000")
        code = "from dinat.app import host; print(host.cpu_quota(), host.cores())"
        done = subprocess.run(
            ["sh", "-c", f"echo $$ > {group}/cgroup.procs; exec {sys.executable} -c '{code}'"],
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == ["1.3", "1"]
    finally:
        group.rmdir()


def test_free_memory_is_limited_by_the_container(cgroup: Path) -> None:
    assert host.free_memory() > 10 * 2**20
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("7340032\n")
    (cgroup / "memory.stat").write_text("anon 3145728\ninactive_file 4194304\n")
    assert host.free_memory() > 10 * 2**20
    (cgroup / "memory.max").write_text("10485760\n")
    assert host.free_memory() == 10 * 2**20 - 3 * 2**20  # inactive page cache counts as free


def settings(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)


def test_auto_frontends_are_1_on_a_cpu_and_cores_minus_2_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_frontends(settings()) == 1
    assert resolve_frontends(settings(frontends=5)) == 5
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(dinat.app.server.supervisor, "cores", lambda: 16)
    assert resolve_frontends(settings()) == 1  # PyTorch for CUDA, but no GPU
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve_frontends(settings()) == 14
    assert resolve_frontends(settings(device="cpu")) == 1
    monkeypatch.setattr(dinat.app.server.supervisor, "cores", lambda: 2)
    assert resolve_frontends(settings(device="cuda")) == 1


def test_frontends_share_threads_connections_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinat.app.settings.cores", lambda: 16)
    frontend = settings(max_connections=100).for_frontend(3)
    assert (frontend.decode_threads, frontend.max_connections) == (6, 34)
    assert settings().for_frontend(14).decode_threads == 2
    assert settings().body_budget == 2**28
    assert settings().for_frontend(4).body_budget == 2**26
    assert settings().for_frontend(64).body_budget == settings().max_upload_bytes  # one body always fits
    assert settings(max_upload_bytes=2**30).body_budget == 2**30
    assert settings(max_body_bytes_in_flight=2**26).for_frontend(2).body_budget == 2**25
    assert settings(max_response_bytes=2**20).response_budget == 2**22
    assert settings(max_response_bytes=2**20).for_frontend(2).response_budget == 2**21
    assert settings(max_response_bytes=2**20).for_frontend(16).response_budget == 2**20
    assert settings(decode_threads=7).for_frontend(14).decode_threads == 7
