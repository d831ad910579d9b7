"""`dinat doctor` with a small network in the place of a published one."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from dinat.app import doctor
from dinat.app.cli import main
from dinat.model import DinatConfig, attention, native
from dinat.model.cpu.features import has_bf16

SMALL = {"embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2], "kernel_size": 3, "dilations": [[1, 2], [1]], "image_size": 32}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DinatConfig, "preset", lambda name, **changes: DinatConfig(**(SMALL | changes)))
    monkeypatch.setattr(doctor, "SECONDS", 0.2)


@pytest.fixture
def examined(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    def examine(*flags: str) -> tuple[int, dict[str, Any]]:
        status = main(["doctor", "--json", "--device", "cpu", *flags])
        return status, json.loads(capsys.readouterr().out)

    return examine


def test_a_sound_machine_is_told_so(examined: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    status, report = examined()
    assert (status, report["wrong"], report["missing"]) == (0, [], [])
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
    assert f"by torch, {'bf16' if has_bf16() else 'fp32'}" in torch["what"]
    assert "by openvino" in openvino["what"]
    assert "HTTP" in http["what"]
    assert all(row["pictures/s"] > 0 for row in report["rates"])
    assert http["seconds to ready"] > 0


def test_numbers_that_are_off_end_in_status_1(
    examined: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = attention.BACKENDS["tiled"]
    monkeypatch.setitem(attention.BACKENDS, "tiled", lambda *args: true(*args) * 1.05)
    monkeypatch.setattr(doctor, "runtimes", lambda *_: [])
    monkeypatch.setattr(doctor, "served_rate", lambda *_: {"what": "nothing"})
    status, report = examined()
    assert status == 1
    assert len(report["wrong"]) == (6 if has_bf16() else 3)  # three layers in each precision
    assert all("attention tiled" in wrong and "off the definition" in wrong for wrong in report["wrong"])


def test_a_service_that_does_not_start_is_said(
    examined: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "runtimes", lambda *_: [])
    monkeypatch.setenv("DINAT_PRECISION", "int8")
    status, report = examined()
    assert status == 1
    assert len(report["wrong"]) == 1
    assert report["wrong"][0].startswith("the service: ")
    assert "precision int8" in report["wrong"][0]


def test_what_is_missing_comes_with_the_command_that_adds_it(
    examined: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: doctor.ABSENT if name == "openvino" else known(name))
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "compiler", list)
    monkeypatch.setattr(doctor, "served_rate", lambda *_: {"what": "nothing"})
    status, report = examined()
    assert status == 0
    assert report["missing"] == [
        {"what": "kernels for this processor: no C compiler: install gcc or clang", "command": "apt-get install gcc libc6-dev"},
        {"what": "openvino, the fastest on this processor", "command": "pip install 'dinat-serve[cpu]'"},
    ]


def test_a_driver_whose_card_pytorch_does_not_see_is_wrong(
    examined: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "driver", lambda: "580.1")
    monkeypatch.setattr(doctor, "runtimes", lambda *_: [])
    monkeypatch.setattr(doctor, "served_rate", lambda *_: {"what": "nothing"})
    status, report = examined()
    assert status == 1
    assert "NVIDIA's driver 580.1 is here, and PyTorch sees no card: this PyTorch has no CUDA" in report["wrong"][0]
    assert report["missing"][0]["command"].startswith("pip install --force-reinstall torch==2.")


@pytest.mark.parametrize("has_matrix_units", [True, False])
def test_matrix_units_are_named_where_the_kernels_have_them(monkeypatch: pytest.MonkeyPatch, has_matrix_units: bool) -> None:
    class Library:
        def __init__(self) -> None:
            self.has_matrix_units = has_matrix_units

    monkeypatch.setattr(native, "library", Library)
    assert doctor.machine()["instructions"].endswith(", AMX") == has_matrix_units


def test_the_tables_can_be_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "runtimes", lambda *_: [])
    monkeypatch.setattr(doctor, "served_rate", lambda *_: {"what": "HTTP", "pictures/s": 12.5})
    assert main(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for part in ("Attention", "8x8, 1 heads, k3 d2", "tiled", "Pictures a second", "12.5", "Nothing is wrong."):
        assert part in shown


def test_a_card_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cuda:7"]) == 1
    assert "dinat: device 'cuda:7' is not available" in capsys.readouterr().err
