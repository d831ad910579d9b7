"""The driver's answers come from a compiled libcuda and an nvidia-smi of the test."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from dinat.app import doctor
from dinat.app.engine.runtimes import nvidia_driver
from dinat.app.engine.runtimes.selection import load_runtimes
from dinat.app.engine.runtimes.torch_runtime import resolve_devices
from dinat.app.settings import Settings
from dinat.model import ConfigError

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or torch.cuda.is_available(), reason="requires a C compiler, and no GPU"
)

OLD = (
    "NVIDIA driver 535.104.05 supports CUDA up to 12.2, but PyTorch 2.13.0+cu130 requires CUDA 13.0: "
    "install driver 580 or later, or build the image with --build-arg CUDA=12.6"
)


@pytest.fixture
def install_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, int], None]:
    """A function that installs a driver: its version, the CUDA version that it reports, and the status of that call."""

    def install(version: str, cuda: int, status: int = 0) -> None:
        source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
        source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = {cuda}; return {status}; }}\n")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\necho {version}\n")
        smi.chmod(0o755)
        monkeypatch.setattr(nvidia_driver, "LIBRARY", str(library))
        monkeypatch.setattr(nvidia_driver, "KERNEL_MODULE", tmp_path / "version")
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


def use_pytorch(monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("pytorch", "driver", "driver_cuda", "found", "build"),
    [
        ("13.0", "535.104.05", 12020, "supports CUDA up to 12.2", "12.6"),
        ("13.2", "570.86.10", 12080, "supports CUDA up to 12.8", "12.8"),
        ("13.0", "575.57.08", 12090, "supports CUDA up to 12.9", "12.8"),
        ("12.6", "470.57.02", 11040, "supports CUDA up to 11.4", None),
        ("13.0", "580.95.05", 13000, None, None),
        ("13.2", "580.95.05", 13000, None, None),
        ("12.6", "535.104.05", 12020, None, None),
        ("12.6", "580.95.05", 13000, None, None),
        (None, "535.104.05", 12020, None, None),
    ],
)
def test_driver_is_too_old_if_its_major_version_of_cuda_is(
    pytorch: str | None,
    driver: str,
    driver_cuda: int,
    found: str | None,
    build: str | None,
    install_driver: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_driver(driver, driver_cuda)
    use_pytorch(monkeypatch, "2.13.0", pytorch)
    message = nvidia_driver.too_old()
    if found is None:
        assert message is None
        return
    assert message is not None
    required = {"13": 580, "12": 525}[str(pytorch)[:2]]
    assert f"NVIDIA driver {driver} {found}" in message
    assert f"requires CUDA {pytorch}: install driver {required} or later" in message
    assert message.endswith(f"--build-arg CUDA={build}" if build else "or later")


def test_driver_that_does_not_answer_is_not_called_old(
    install_driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_driver("535.104.05", 0, status=999)
    use_pytorch(monkeypatch, "2.13.0", "13.0")
    assert nvidia_driver.too_old() is None
    monkeypatch.setattr(nvidia_driver, "LIBRARY", "libcuda-of-no-driver.so.1")
    assert nvidia_driver.too_old() is None


def test_version_is_that_of_the_kernel_module(install_driver: Callable[..., None], tmp_path: Path) -> None:
    install_driver("535.104.05", 12020)
    assert nvidia_driver.version() == "535.104.05"
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (builder)\n"
    )
    assert nvidia_driver.version() == "580.95.05"


def test_service_and_doctor_name_the_driver(install_driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver("535.104.05", 12020)
    use_pytorch(monkeypatch, "2.13.0+cu130", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # NVML counts GPUs that CUDA cannot use
    with pytest.raises(ConfigError) as error:
        resolve_devices("cuda")
    assert str(error.value) == f"device 'cuda' is not available: {OLD}"
    assert resolve_devices("auto") == [torch.device("cpu")]
    assert doctor.gpus() == []
    problems, _ = doctor.check_installation(torch.device("cpu"), {name: "1.0" for name in doctor.PACKAGES})
    assert problems == [OLD]


def test_fallback_to_the_cpu_warns_with_the_driver(
    install_driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_driver("535.104.05", 12020)
    use_pytorch(monkeypatch, "2.13.0+cu130", "13.0")
    with capture_logs() as events:
        load_runtimes(Settings(_env_file=None, device="auto", runtime="torch"))
    (warning,) = [event for event in events if "no GPU was found" in event["event"]]
    assert warning["reason"] == OLD
