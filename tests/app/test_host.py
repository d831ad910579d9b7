import os
from pathlib import Path
from typing import Any

import pytest

import dinat.app.server.supervisor
from dinat.app import host
from dinat.app.server.supervisor import resolve_frontends
from dinat.app.settings import Settings

HERE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("limit", "cores"),
    [(None, HERE), ("max 100000", HERE), ("100000 100000", 1), ("50000 100000", 1), ("99900000 100000", HERE)],
)
def test_cores_are_no_more_than_the_container_has(
    limit: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert host.cores() == cores


def test_free_memory_is_no_more_than_the_container_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    there = host.free_memory()
    assert there > 10 * 2**20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7340032\n")
    (tmp_path / "memory.stat").write_text("anon 3145728\ninactive_file 4194304\n")
    assert host.free_memory() > 10 * 2**20
    (tmp_path / "memory.max").write_text("10485760\n")
    assert host.free_memory() == 10 * 2**20 - 3 * 2**20  # what the kernel can drop is not in use


def settings(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)


def test_frontends_are_one_on_a_processor_and_one_a_core_but_two_beside_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_frontends(settings()) == 1
    assert resolve_frontends(settings(frontends=5)) == 5
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(dinat.app.server.supervisor, "cores", lambda: 16)
    assert resolve_frontends(settings()) == 1  # PyTorch for CUDA, and no card
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve_frontends(settings()) == 14
    assert resolve_frontends(settings(device="cpu")) == 1
    monkeypatch.setattr(dinat.app.server.supervisor, "cores", lambda: 2)
    assert resolve_frontends(settings(device="cuda")) == 1


def test_frontends_share_threads_and_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinat.app.settings.cores", lambda: 16)
    share = settings(max_connections=100).share(3)
    assert (share.decode_threads, share.max_connections) == (6, 34)
    assert settings().share(14).decode_threads == 2
    assert settings(decode_threads=7).share(14).decode_threads == 7
