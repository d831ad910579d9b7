"""`dinat doctor` with a small network instead of a published one."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from dinat.app import doctor, measurements
from dinat.app.cli import main
from dinat.app.engine.runtimes import nvidia_driver
from dinat.model import DinatConfig, attention, native
from dinat.model.cpu.features import has_bf16

SMALL = {"embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2], "kernel_size": 3, "dilations": [[1, 2], [1]], "image_size": 32}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DinatConfig, "preset", lambda name, **changes: DinatConfig(**(SMALL | changes)))
    monkeypatch.setattr(measurements, "SECONDS", 0.2)


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """A function that runs the command and returns its exit status and report."""

    def run(*flags: str) -> tuple[int, dict[str, Any]]:
        status = main(["doctor", "--json", "--device", "cpu", *flags])
        return status, json.loads(capsys.readouterr().out)

    return run


def hide_openvino_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: doctor.NOT_INSTALLED if name == "openvino" else version(name))
    monkeypatch.setattr(measurements, "find_spec", lambda name: None)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "_select", lambda: (None, "no C compiler: install gcc or clang"))


@pytest.mark.slow
def test_report_without_problems(examine: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    status, report = examine()
    assert (status, report["problems"], report["missing"]) == (0, [], [])
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["torch"].startswith("2.")
    assert [row["what"].split()[0] for row in report["ceilings"]] == ["copy", "2048x2048", "2048x2048"]
    assert {row["layer"] for row in report["attention"]} == {
        "8x8, 1 heads, k3 d1",
        "8x8, 1 heads, k3 d2",
        "4x4, 2 heads, k3 d1",
    }
    for row in report["attention"]:
        assert row["us"] > 0
        assert row["backend"] == "reference" or row["error"] < (1e-6 if row["precision"] == "float32" else 1e-2)
    decode, torch, openvino, http = report["rates"]
    assert "decode" in decode["what"]
    assert f"with torch, {'bf16' if has_bf16() else 'fp32'}" in torch["what"]
    assert "with openvino" in openvino["what"]
    assert "HTTP" in http["what"]
    assert all(0 < row["lowest"] <= row["images/s"] <= row["highest"] for row in report["rates"])
    assert http["seconds to ready"] > 0


@pytest.mark.slow
def test_inaccurate_backend_sets_exit_status_1(
    examine: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = attention.BACKENDS["tiled"]
    monkeypatch.setitem(attention.BACKENDS, "tiled", lambda *args: exact(*args) * 1.05)
    monkeypatch.setattr(doctor, "runtimes", lambda *_: [])
    monkeypatch.setattr(doctor, "served_rate", lambda *_: {"what": "nothing"})
    status, report = examine()
    assert status == 1
    assert len(report["problems"]) == (6 if has_bf16() else 3)  # three layers in each precision
    assert all("attention tiled" in problem and "relative error" in problem for problem in report["problems"])


@pytest.mark.slow
def test_service_startup_failure_is_reported(
    examine: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "runtimes", lambda *_: [])
    monkeypatch.setenv("DINAT_PRECISION", "int8")
    status, report = examine()
    assert status == 1
    assert len(report["problems"]) == 1
    assert report["problems"][0].startswith("the service: ")
    assert "precision int8" in report["problems"][0]


def test_missing_packages_come_with_install_commands(
    examine: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_openvino_and_kernels(monkeypatch)
    monkeypatch.setattr(doctor, "served_rate", lambda *_: {"what": "nothing"})
    status, report = examine()
    assert status == 0
    assert report["missing"] == [
        {"what": "compiled CPU kernels: no C compiler: install gcc or clang", "command": "apt-get install gcc libc6-dev"},
        {"what": "openvino, the fastest runtime on this CPU", "command": "pip install 'dinat-serve[cpu]'"},
    ]


@pytest.mark.slow
def test_driver_without_gpu_in_pytorch_is_a_problem(
    examine: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia_driver, "version", lambda: "580.1")
    monkeypatch.setattr(doctor, "runtimes", lambda *_: [])
    monkeypatch.setattr(doctor, "served_rate", lambda *_: {"what": "nothing"})
    status, report = examine()
    assert status == 1
    assert (
        "NVIDIA driver 580.1 is installed, but PyTorch finds no GPU: this PyTorch is built without CUDA"
        in report["problems"][0]
    )
    assert report["missing"][0]["command"].startswith("pip install --force-reinstall torch==2.")


@pytest.mark.parametrize("has_matrix_units", [True, False])
def test_amx_is_named_if_the_kernels_use_it(monkeypatch: pytest.MonkeyPatch, has_matrix_units: bool) -> None:
    class Library:
        def __init__(self) -> None:
            self.has_matrix_units = has_matrix_units

    monkeypatch.setattr(native, "library", Library)
    assert doctor.machine()["instructions"].endswith(", AMX") == has_matrix_units


def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "runtimes", lambda *_: [])
    monkeypatch.setattr(doctor, "served_rate", lambda *_: {"what": "HTTP", "images/s": 12.5})
    assert main(["doctor", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    for part in ("Attention", "8x8, 1 heads, k3 d2", "tiled", "Throughput", "12.5", "No problems found."):
        assert part in output


def test_words_in_brackets_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a tensor of [two] :cat: [/]")

    monkeypatch.setattr(doctor, "runtimes", lambda *_: [])
    monkeypatch.setattr(doctor, "served_rate", fail)
    hide_openvino_and_kernels(monkeypatch)
    assert main(["doctor", "--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "pip install 'dinat-serve[cpu]'" in output
    assert "problem: the service: RuntimeError: a tensor of [two] :cat: [/]" in output


def test_missing_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cuda:7"]) == 1
    assert "dinat: device 'cuda:7' is not available" in capsys.readouterr().err
