from pathlib import Path

import pytest
import torch

from dinat.app import natten_wheel
from dinat.app.natten_wheel import main, requirement


@pytest.mark.parametrize(
    ("pytorch", "cuda", "wheel"),
    [
        ("2.13.0+cu130", "13.0", "natten==0.21.7+torch2130cu130"),
        ("2.13.0", "13.2", "natten==0.21.7+torch2130cu132"),
        ("2.12.1+cu126", "12.6", "natten==0.21.7+torch2121cu126"),
        ("2.11.0+cu130", "cu130", "natten==0.21.6+torch2110cu130"),
        ("2.10.0", "12.8", "natten==0.21.6+torch2100cu128"),
        ("2.13.0+cpu", None, None),
        ("2.9.1", "12.8", None),
        ("2.14.0", "13.0", None),
    ],
)
def test_requirement_for_pytorch_and_cuda(pytorch: str, cuda: str | None, wheel: str | None) -> None:
    assert requirement(pytorch, cuda) == wheel


def test_missing_wheel_is_reported_without_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("NATTEN_WHEELS", str(tmp_path))
    monkeypatch.setenv("NATTEN_CUDA", "cu130")
    monkeypatch.setattr(natten_wheel, "RELEASES", {".".join(torch.__version__.split(".")[:2]): "0.21.7"})
    main(str(tmp_path / "wheels"))
    assert f"cu130 is not at {tmp_path}; attention uses triton and tiled" in capfd.readouterr().out
