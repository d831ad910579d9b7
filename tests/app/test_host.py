import os
from pathlib import Path
from typing import Any

import pytest

import dinat.app.server.supervisor
from dinat.app import host
from dinat.app.server.supervisor import resolve_frontends
from dinat.app.settings import Settings

AVAILABLE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("limit", "cores"),
    [(None, AVAILABLE), ("max 100000", AVAILABLE), ("100000 100000", 1), ("50000 100000", 1), ("99900000 100000", AVAILABLE)],
)
def test_cores_are_limited_by_the_container(
    limit: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert host.cores() == cores


def test_free_memory_is_limited_by_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    assert host.free_memory() > 10 * 2**20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7340032\n")
    (tmp_path / "memory.stat").write_text("anon 3145728\ninactive_file 4194304\n")
    assert host.free_memory() > 10 * 2**20
    (tmp_path / "memory.max").write_text("10485760\n")
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
