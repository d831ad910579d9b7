"""What a machine has, whether it computes rightly, and how fast: measured there, with a published network of random weights.

Imports of the service's own packages are made where they are used: what is missing is part of the answer.
"""

import http.client
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinat.app.engine.runtimes.runtime import InferenceOptions, Runtime, examples
from dinat.app.engine.runtimes.torch_runtime import PRECISIONS, TorchRuntime, half_precision, resolve_devices
from dinat.app.host import cores
from dinat.app.natten_wheel import PAGE, requirement
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor, attention, native
from dinat.model.attention import autotune
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.cpu.features import has_bf16

PACKAGES = ("dinat-serve", "torch", "triton", "natten", "openvino", "onnxruntime", "transformers", "pillow", "numpy")
SECONDS = 2.0
"""How long a rate is measured."""
CONNECTIONS = 8
COPIED = {"cuda": 2**28, "cpu": 2**25}
SIDE = {"cuda": 8192, "cpu": 2048}
BATCH = {"cuda": 64, "cpu": 1}
"""Numbers that are copied, side of the matrices multiplied, and pictures that attention is timed with."""

Row = dict[str, Any]


@dataclass
class Report:
    """What was found. wrong: what must not be;  missing: what could be added, and the command that adds it."""

    machine: Row = field(default_factory=dict)
    devices: list[Row] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    ceilings: list[Row] = field(default_factory=list)
    attention: list[Row] = field(default_factory=list)
    rates: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    missing: list[Row] = field(default_factory=list)


def examine(preset: str, device: str, cache: Path, say: Callable[[str], None]) -> Report:
    """Examine this machine with a preset network on a device, as resolve_devices takes it.

    cache: where the choice of attention on a card is remembered.  say: told what is being done.  Raises ConfigError.
    """
    report = Report(machine(), cards(), {name: _version(name) for name in PACKAGES})
    first = resolve_devices(device)[0]
    report.machine["examined"] = f"{preset} on {first}"
    report.wrong, report.missing = faults(first, report.versions)
    say("ceilings")
    report.ceilings = ceilings(first)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image_processor = save(preset, folder)
        say("attention")
        config = DinatConfig.preset(preset)
        for dtype in precisions(first):
            rows, disabled = attention_rows(config, image_processor, first, dtype)
            report.attention += rows
            report.wrong += disabled
        say("decoding")
        report.rates.append(decode_rate(image_processor))
        for runtime_name, load in runtimes(folder, first, cache):
            say(f"forward by {runtime_name}")
            try:
                runtime = load()
                report.rates.append(forward_rate(runtime))
            except Exception as error:
                report.wrong.append(f"{runtime_name}: {autotune.reason(error)}")
            else:
                others = [left for left in runtime.disabled if not left.name.startswith("attention ")]  # those are said
                report.wrong += [f"{left.name}: {left.reason}" for left in others]
        say("the service")
        try:
            report.rates.append(served_rate(folder, device))
        except ModuleNotFoundError as missing:
            report.missing.append(
                {"what": f"the service ({missing.name} is not installed)", "command": "pip install dinat-serve"}
            )
        except Exception as error:
            report.wrong.append(f"the service: {autotune.reason(error)}")
    return report


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def instructions() -> str:
    """What PyTorch uses, and the matrix units, if the kernels may have them."""
    found = native.library()
    return torch.backends.cpu.get_cpu_capability() + (", AMX" if found is not None and found.has_matrix_units else "")


def machine() -> Row:
    """Processor, cores that this process may use, memory, system."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "processor": processor(),
        "instructions": instructions(),
        "cores": cores(),
        "memory GB": round(pages / 1e9, 1),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def cards() -> list[Row]:
    """The CUDA cards that PyTorch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory GB": round(properties.total_memory / 1e9, 1),
                "multiprocessors": properties.multi_processor_count,
                "driver": driver() or "not known",
                "CUDA of PyTorch": str(torch.version.cuda),
            }
        )
    return found


def driver() -> str | None:
    """The version of NVIDIA's driver, None where there is none."""
    kernel = Path("/proc/driver/nvidia/version")
    if kernel.exists() and (found := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", kernel.read_text())):
        return found[1]
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None


def faults(device: torch.device, versions: dict[str, str]) -> tuple[list[str], list[Row]]:
    """What is wrong with how things are installed, and what is missing."""
    wrong: list[str] = []
    missing: list[Row] = []
    if driver() is not None and not torch.cuda.is_available():
        build = "has no CUDA" if torch.version.cuda is None else f"is for CUDA {torch.version.cuda}, which wants a newer driver"
        wrong.append(f"NVIDIA's driver {driver()} is here, and PyTorch sees no card: this PyTorch {build}")
        missing.append(
            {
                "what": "a PyTorch that sees the card",
                "command": f"pip install --force-reinstall torch=={_version('torch').partition('+')[0]}",
            }
        )
    if device.type == "cuda":
        if versions["triton"] == ABSENT:
            missing.append({"what": "triton, the fused kernel", "command": "pip install triton"})
        if versions["natten"] == ABSENT:
            wheel = requirement(versions["torch"], torch.version.cuda)
            command = (
                f"pip install --no-deps '{wheel}' --find-links {PAGE}" if wheel else "pip install --no-build-isolation natten"
            )
            missing.append({"what": "natten, one more backend", "command": command})
        return wrong, missing
    kernels = native.library()
    if kernels is None:
        missing.append(
            {"what": f"kernels for this processor: {native.unavailable_reason()}", "command": "apt-get install gcc libc6-dev"}
        )
    if versions["openvino"] == ABSENT and (kernels is None or kernels.lanes < 16):
        missing.append({"what": "openvino, the fastest on this processor", "command": "pip install 'dinat-serve[cpu]'"})
    return wrong, missing


ABSENT = "not installed"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def precisions(device: torch.device) -> list[torch.dtype]:
    """Those that are served there."""
    if device.type == "cuda":
        return [PRECISIONS[half_precision(device)], torch.float32]
    return [torch.bfloat16, torch.float32] if has_bf16() else [torch.float32]


def ceilings(device: torch.device) -> list[Row]:
    """What a copy and a matrix product reach there."""
    source, target = torch.empty(2, COPIED[device.type], device=device)
    source.normal_()
    rows = [{"what": "copy", "GB/s": 2 * source.nbytes / autotune.seconds(lambda: target.copy_(source), device) / 1e9}]
    side = SIDE[device.type]
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        taken = autotune.seconds(partial(torch.matmul, a, b), device)
        rows.append({"what": f"{side}x{side} product, {_name(dtype)}", "TFLOP/s": 2 * side**3 / taken / 1e12})
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save(preset: str, folder: Path) -> DinatImageProcessor:
    """Write a network of random weights, the same every time."""
    config = DinatConfig.preset(preset)
    torch.manual_seed(0)
    DinatForImageClassification(config).save_pretrained(folder)
    processor = DinatImageProcessor(size=getattr(config, "image_size", 224), resample=3)
    processor.save_pretrained(folder)
    return processor


def attention_rows(
    config: DinatConfig, processor: DinatImageProcessor, device: torch.device, dtype: torch.dtype
) -> tuple[list[Row], list[str]]:
    """Error and microseconds of every backend for every shape of layer, and what is wrong with some."""
    height, width = processor.output_size or (224, 224)
    batch = BATCH[device.type]
    rows: list[Row] = []
    wrong: list[str] = []
    for stage, heads in enumerate(config.num_heads):
        sides = [-(-length // (4 << stage)) for length in (height, width)]
        head_dim = config.channels_of(stage) // heads
        for dilation in sorted(set(config.dilations[stage])):
            size = [max(side, config.kernel_size * dilation) for side in sides]
            q, k, v = torch.randn(batch, *size, 3, heads, head_dim, device=device).to(dtype).unbind(3)
            rpb = torch.randn(heads, 2 * config.kernel_size - 1, 2 * config.kernel_size - 1, device=device).to(dtype)
            names = autotune.candidates(device, dtype, head_dim)
            if device.type != "cuda":
                names.append("reference")
            layer = autotune.LayerKey.of(q, config.kernel_size, dilation, head_dim**-0.5)
            attend = _attend(layer)
            autotune.selections.pop(layer, None)
            with torch.inference_mode(), autotune.autotuning():
                autotune.select_backend(layer, names, attend, q, k, v, rpb)
            kept = autotune.selections[layer]
            short = f"{size[0]}x{size[1]}, {heads} heads, k{config.kernel_size} d{dilation}"
            for name in names:
                row: Row = {"layer": short, "precision": _name(dtype), "batch": batch, "backend": name}
                row |= {"error": kept.errors.get(name), "us": None, "kept": name == kept.backend}
                if name in kept.seconds:
                    row["us"] = kept.seconds[name] * 1e6
                rows.append(row)
            wrong += [f"attention {name} ({layer}, {_name(dtype)}): {why}" for name, why in kept.disabled.items()]
    return rows, wrong


def _attend(layer: autotune.LayerKey) -> autotune.Attend:
    """A candidate's attention, by its name."""

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        return attention.run_candidate(name, q, k, v, rpb, layer.kernel_size, layer.dilation, layer.scale)

    return attend


def photograph() -> bytes:
    """A 500x375 JPEG of about 60 kB."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + random.integers(-20, 21, (375, 500, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=78)
    return buffer.getvalue()


def decode_rate(processor: DinatImageProcessor) -> Row:
    """Pictures a second decoded and resized by all cores."""
    data = photograph()
    threads = int(machine()["cores"] or 1)

    def work(until: float) -> int:
        done = 0
        while time.perf_counter() < until:
            processor.resize(Image.open(io.BytesIO(data)))
            done += 1
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, [started + SECONDS] * threads))
    return {
        "what": f"decode and resize a 500x375 JPEG, {threads} threads",
        "pictures/s": done / (time.perf_counter() - started),
    }


def runtimes(folder: Path, device: torch.device, cache: Path) -> Iterator[tuple[str, Callable[[], Runtime]]]:
    """What may serve there, by name."""
    if device.type == "cuda":
        yield "torch", lambda: TorchRuntime(open_checkpoint(folder), device, "auto", "auto", cache)
        return
    yield "torch", lambda: TorchRuntime(open_checkpoint(folder), device, "auto", "auto")
    if _version("openvino") != ABSENT:

        def openvino() -> Runtime:
            from dinat.app.engine.runtimes.openvino_runtime import OpenVinoRuntime

            return OpenVinoRuntime(open_checkpoint(folder), "auto", folder / "cache")

        yield "openvino", openvino


def forward_rate(runtime: Runtime) -> Row:
    """Pictures a second of a runtime alone, in full batches."""
    batch = runtime.warm(runtime.default_batch)
    pixels = examples(runtime.processor, batch)
    started, done = time.perf_counter(), 0
    while time.perf_counter() < started + SECONDS:
        runtime.run(pixels, [InferenceOptions(top_k=5)] * batch)
        done += batch
    taken = time.perf_counter() - started
    return {"what": f"network by {runtime.name}, {runtime.precision}, batches of {batch}", "pictures/s": done / taken}


@contextmanager
def serving(folder: Path, device: str) -> Iterator[tuple[int, float]]:
    """The service as a process of its own: its port, and the seconds until it was ready."""
    flags = ["--model", str(folder), "--device", device, "--port", "0", "--log-format", "json"]
    settings = {**os.environ, "DINAT_CACHE_DIR": str(folder / "cache"), "DINAT_API_KEYS": ""}
    started = time.monotonic()
    command = [sys.executable, "-m", "dinat", "serve", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=settings)
    assert process.stderr is not None
    try:
        port, log = 0, ""
        for line in process.stderr:
            log += line
            if address := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                port = int(address[1])
            if '"ready"' in line:
                break
        else:
            raise RuntimeError(log.strip().splitlines()[-1] if log.strip() else "it ended without a word")
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield port, time.monotonic() - started
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def served_rate(folder: Path, device: str) -> Row:
    """Pictures a second through HTTP on loopback, one a request, client and server on this machine."""
    import uvicorn  # noqa: F401  # says that the service's packages are there

    data = photograph()
    with serving(folder, device) as (port, ready):

        def ask(until: float) -> list[float]:
            times: list[float] = []
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            while (asked := time.perf_counter()) < until:
                connection.request("POST", "/classify", data, {"Content-Type": "image/jpeg"})
                answer = connection.getresponse()
                body = answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"answered {answer.status}: {json.loads(body).get('detail')}")
                times.append(time.perf_counter() - asked)
            return times

        started = time.perf_counter()
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            times = [one for some in pool.map(ask, [started + SECONDS] * CONNECTIONS) for one in some]
        taken = time.perf_counter() - started
    row: Row = {"what": f"HTTP on loopback, {CONNECTIONS} connections", "pictures/s": len(times) / taken}
    return row | {"p50 ms": median(times) * 1e3, "seconds to ready": ready}
