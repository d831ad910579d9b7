"""Check a machine: hardware, installed packages, correctness and speed.

Nothing here imports the service's own packages: a missing one is part of the report.
"""

import os
import platform
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dinat.app.contention import cpu_times, describe_contention
from dinat.app.engine.runtimes import nvidia_driver
from dinat.app.engine.runtimes.runtime import Runtime
from dinat.app.engine.runtimes.torch_runtime import resolve_devices
from dinat.app.host import cores
from dinat.app.measurements import (
    Row,
    WarmRuntime,
    attention_rows,
    ceilings,
    decode_rate,
    forward_rates,
    precisions,
    runtimes,
    save_random_network,
    served_rate,
    spread,
)
from dinat.app.natten_wheel import PAGE, requirement
from dinat.app.threads import limit_threads
from dinat.model import DinatConfig, native
from dinat.model.attention import autotune

PACKAGES = ("dinat-serve", "torch", "triton", "natten", "openvino", "onnxruntime", "transformers", "pillow", "numpy")
NOT_INSTALLED = "not installed"


@dataclass
class Report:
    """Result of the examination.

    Attributes:
        machine: CPU, cores, memory and operating system.
        devices: GPUs.
        versions: Versions of packages.
        ceilings: Memory bandwidth and matrix product throughput of the device.
        attention: Error and time of each attention backend for each layer shape.
        rates: Throughput of decoding, inference and the service.
        problems: Errors that must be fixed.
        missing: Optional packages, each with the command that installs it.
        notes: What made the measurements less certain.
    """

    machine: Row = field(default_factory=dict)
    devices: list[Row] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    ceilings: list[Row] = field(default_factory=list)
    attention: list[Row] = field(default_factory=list)
    rates: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine(preset: str, device: str, cache: Path, on_step: Callable[[str], None]) -> Report:
    """Examine this machine with a published network.

    Args:
        preset: Name of the network.
        device: Device, as resolve_devices accepts it.
        cache: Folder where a GPU's attention backends are cached.
        on_step: Called with the name of each measurement before it starts.

    Raises:
        ConfigError: The preset or the device does not exist.
    """
    limit_threads()
    times = cpu_times()
    report = Report(machine(), gpus(), {name: _version(name) for name in PACKAGES})
    first = resolve_devices(device)[0]
    report.machine["examined"] = f"{preset} on {first}"
    report.problems, report.missing = check_installation(first, report.versions)
    on_step("ceilings")
    report.ceilings = ceilings(first)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image_processor = save_random_network(preset, folder)
        on_step("attention")
        config = DinatConfig.preset(preset)
        for dtype in precisions(first):
            rows, disabled = attention_rows(config, image_processor, first, dtype)
            report.attention += rows
            report.problems += disabled
        on_step("decoding")
        report.rates.append(decode_rate(image_processor))
        _measure_runtimes(report, runtimes(folder, first, cache), on_step)
        on_step("the service")
        _measure_service(report, folder, device)
    if (shared := describe_contention(times)) is not None:
        report.notes.append(f"{shared}: the rates are lower than on a CPU of its own")
    return report


def _measure_runtimes(
    report: Report, available: Iterable[tuple[str, Callable[[], Runtime]]], on_step: Callable[[str], None]
) -> None:
    """Add the rate of each runtime that can be loaded to the report, and the problems of the others."""
    loaded: list[WarmRuntime] = []
    for name, load in available:
        on_step(f"inference with {name}")
        try:
            warm = WarmRuntime.of(load())
            warm.rate(0)
        except Exception as error:
            report.problems.append(f"{name}: {autotune.reason(error)}")
        else:
            loaded.append(warm)
            for disabled in warm.runtime.disabled:
                if not disabled.name.startswith("attention "):  # attention_rows reports those
                    report.problems.append(f"{disabled.name}: {disabled.reason}")
    for warm, measured in zip(loaded, forward_rates(loaded), strict=True):
        report.rates.append({"what": warm.description} | spread(measured))


def _measure_service(report: Report, folder: Path, device: str) -> None:
    """Add the rate of the service to the report, or why it does not run."""
    try:
        report.rates.append(served_rate(folder, device))
    except ModuleNotFoundError as error:
        report.missing.append({"what": f"the service ({error.name} is not installed)", "command": "pip install dinat-serve"})
    except Exception as error:
        report.problems.append(f"the service: {autotune.reason(error)}")


def cpu_name() -> str:
    """Return the CPU's model name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def cpu_capability() -> str:
    """Return the instruction set that PyTorch uses, and AMX if the compiled kernels use it."""
    library = native.library()
    return torch.backends.cpu.get_cpu_capability() + (", AMX" if library is not None and library.has_matrix_units else "")


def machine() -> Row:
    """Return the CPU, the cores available to this process, memory, Python and operating system."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "CPU": cpu_name(),
        "instructions": cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory GB": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def gpus() -> list[Row]:
    """Return the CUDA GPUs that PyTorch can use."""
    rows = []
    for device in resolve_devices("auto"):
        if device.type != "cuda":
            continue
        properties = torch.cuda.get_device_properties(device)
        rows.append(
            {
                "device": str(device),
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory GB": round(properties.total_memory / 1e9, 1),
                "multiprocessors": properties.multi_processor_count,
                "driver": nvidia_driver.version() or "unknown",
                "CUDA of PyTorch": str(torch.version.cuda),
            }
        )
    return rows


def check_installation(device: torch.device, versions: dict[str, str]) -> tuple[list[str], list[Row]]:
    """Return problems with the installed packages, and missing optional packages."""
    problems: list[str] = []
    missing: list[Row] = []
    if (too_old := nvidia_driver.too_old()) is not None:
        problems.append(too_old)
    elif (driver := nvidia_driver.version()) is not None and not torch.cuda.is_available():
        cause = "this PyTorch is built without CUDA" if torch.version.cuda is None else "run nvidia-smi, it reports why"
        problems.append(f"NVIDIA driver {driver} is installed, but PyTorch finds no GPU: {cause}")
        if torch.version.cuda is None:
            public = _version("torch").partition("+")[0]
            missing.append({"what": "a PyTorch build for CUDA", "command": f"pip install --force-reinstall torch=={public}"})
    if device.type == "cuda":
        if versions["triton"] == NOT_INSTALLED:
            missing.append({"what": "triton, for the fused attention kernel", "command": "pip install triton"})
        if versions["natten"] == NOT_INSTALLED:
            wheel = requirement(versions["torch"], torch.version.cuda)
            command = (
                f"pip install --no-deps '{wheel}' --find-links {PAGE}" if wheel else "pip install --no-build-isolation natten"
            )
            missing.append({"what": "natten, another attention backend", "command": command})
        return problems, missing
    kernels = native.library()
    if kernels is None:
        missing.append(
            {"what": f"compiled CPU kernels: {native.unavailable_reason()}", "command": "apt-get install gcc libc6-dev"}
        )
    if versions["openvino"] == NOT_INSTALLED and (kernels is None or kernels.lanes < 16):
        missing.append({"what": "openvino, the fastest runtime on this CPU", "command": "pip install 'dinat-serve[cpu]'"})
    return problems, missing


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
