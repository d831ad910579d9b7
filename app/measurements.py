"""Measurements of correctness and speed on a machine, with a published network of random weights.

The service's own packages are imported where they are used: without them, the other measurements run.
"""

import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinat.app.engine.runtimes.runtime import InferenceOptions, Runtime, examples
from dinat.app.engine.runtimes.torch_runtime import PRECISIONS, TorchRuntime, half_precision
from dinat.app.host import cores
from dinat.app.images import decode
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor, attention
from dinat.model.attention import autotune, timing
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.config import image_size
from dinat.model.cpu.features import has_bf16

SECONDS = 2.0
"""Duration of each throughput measurement."""
ROUNDS = 5
"""Rounds of each throughput measurement. What is compared is measured in turns, so that other load meets all of it."""
CONNECTIONS = 8

COPIED = {"cuda": 2**28, "cpu": 2**25}
"""Number of float32 values in the copy measurement."""
SIDE = {"cuda": 8192, "cpu": 2048}
"""Side of the matrices in the matrix product measurement."""
BATCH = {"cuda": 64, "cpu": 1}
"""Batch size of the attention measurement."""

Row = dict[str, Any]


def precisions(device: torch.device) -> list[torch.dtype]:
    """Return the data types that the service uses on a device."""
    if device.type == "cuda":
        return [PRECISIONS[half_precision(device)], torch.float32]
    return [torch.bfloat16, torch.float32] if has_bf16() else [torch.float32]


def ceilings(device: torch.device) -> list[Row]:
    """Measure memory bandwidth, and throughput of a matrix product."""
    source, target = torch.empty(2, COPIED[device.type], device=device)
    source.normal_()
    rows = [{"what": "copy", "GB/s": 2 * source.nbytes / timing.seconds(lambda: target.copy_(source), device) / 1e9}]
    side = SIDE[device.type]
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        seconds = timing.seconds(partial(torch.matmul, a, b), device)
        rows.append({"what": f"{side}x{side} product, {_dtype_name(dtype)}", "TFLOP/s": 2 * side**3 / seconds / 1e12})
    return rows


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save_random_network(preset: str, folder: Path) -> DinatImageProcessor:
    """Save a network with random weights, from a fixed seed, and its image processor, which is returned."""
    config = DinatConfig.preset(preset)
    torch.manual_seed(0)
    DinatForImageClassification(config).save_pretrained(folder)
    processor = DinatImageProcessor(size=image_size(config), resample=3)
    processor.save_pretrained(folder)
    return processor


def attention_rows(
    config: DinatConfig, processor: DinatImageProcessor, device: torch.device, dtype: torch.dtype
) -> tuple[list[Row], list[str]]:
    """Measure error and time (in us) of each attention backend for each layer shape.

    Returns:
        A row per layer shape and backend, and a message per backend that failed or was inaccurate.
    """
    height, width = processor.output_size or (224, 224)
    batch = BATCH[device.type]
    rows: list[Row] = []
    problems: list[str] = []
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
            choice = autotune.selections[layer]
            shape = f"{size[0]}x{size[1]}, {heads} heads, k{config.kernel_size} d{dilation}"
            for name in names:
                row: Row = {"layer": shape, "precision": _dtype_name(dtype), "batch": batch, "backend": name}
                row |= {"error": choice.errors.get(name), "us": None, "selected": name == choice.backend}
                if name in choice.seconds:
                    row["us"] = choice.seconds[name] * 1e6
                rows.append(row)
            problems += [f"attention {name} ({layer}, {_dtype_name(dtype)}): {why}" for name, why in choice.disabled.items()]
    return rows, problems


def _attend(layer: autotune.LayerKey) -> autotune.Attend:
    """Return a function that computes a layer's attention with a named backend."""

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        return attention.run_candidate(name, q, k, v, rpb, layer.kernel_size, layer.dilation, layer.scale)

    return attend


def photograph() -> bytes:
    """Return a synthetic 500x375 JPEG of about 60 kB, which decodes like a photograph."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + random.integers(-20, 21, (375, 500, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=78)
    return buffer.getvalue()


def decode_rate(processor: DinatImageProcessor) -> Row:
    """Measure decoding and resizing on all cores, in images/s."""
    data = photograph()
    threads = cores()

    def work(deadline: float) -> int:
        count = 0
        while time.perf_counter() < deadline:
            processor.resize(decode(data, 10**6))
            count += 1
        return count

    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            count = sum(pool.map(work, [start + SECONDS / ROUNDS] * threads))
            rates.append(count / (time.perf_counter() - start))
    return {"what": f"decode and resize a 500x375 JPEG, {threads} threads"} | spread(rates)


def runtimes(folder: Path, device: torch.device, cache: Path) -> Iterator[tuple[str, Callable[[], Runtime]]]:
    """Yield each runtime available on a device, with its name."""
    if device.type == "cuda":
        yield "torch", lambda: TorchRuntime(open_checkpoint(folder), device, "auto", "auto", cache)
        return
    yield "torch", lambda: TorchRuntime(open_checkpoint(folder), device, "auto", "auto")
    if find_spec("openvino") is not None:

        def openvino() -> Runtime:
            from dinat.app.engine.runtimes.openvino_runtime import OpenVinoRuntime

            return OpenVinoRuntime(open_checkpoint(folder), "auto", folder / "cache")

        yield "openvino", openvino


@dataclass(frozen=True)
class WarmRuntime:
    """A runtime that is ready for full batches.

    Attributes:
        runtime: The runtime.
        pixels: A batch.
    """

    runtime: Runtime
    pixels: Any

    @classmethod
    def of(cls, runtime: Runtime) -> "WarmRuntime":
        """Warm up a runtime."""
        return cls(runtime, examples(runtime.processor, runtime.warm(runtime.default_batch)))

    @property
    def description(self) -> str:
        """What is measured."""
        return f"inference with {self.runtime.name}, {self.runtime.precision}, batches of {len(self.pixels)}"

    def rate(self, seconds: float) -> float:
        """Measure inference with full batches, without decoding, in images/s, for at least one batch."""
        start, count, elapsed = time.perf_counter(), 0, 0.0
        while count == 0 or elapsed < seconds:
            self.runtime.run(self.pixels, [InferenceOptions(top_k=5)] * len(self.pixels))
            count += len(self.pixels)
            elapsed = time.perf_counter() - start
        return count / elapsed


def forward_rates(warm: Sequence[WarmRuntime]) -> list[list[float]]:
    """Measure the inference of several runtimes in turns. Returns ROUNDS rates of each, in images/s."""
    rounds = [[runtime.rate(SECONDS / ROUNDS) for runtime in warm] for _ in range(ROUNDS)]
    return [[rates[i] for rates in rounds] for i in range(len(warm))]


def spread(rates: Sequence[float]) -> Row:
    """Return the median and the range of a rate."""
    return {"images/s": median(rates), "lowest": min(rates), "highest": max(rates)}


@contextmanager
def serving(folder: Path, device: str) -> Iterator[tuple[int, float]]:
    """Run the service in a subprocess. Yields its port and the seconds until it was ready."""
    flags = ["--model", str(folder), "--device", device, "--port", "0", "--log-format", "json", "--api-keys", ""]
    environment = {**os.environ, "DINAT_CACHE_DIR": str(folder / "cache"), "DINAT_API_KEYS_FILE": ""}
    start = time.monotonic()
    command = [sys.executable, "-m", "dinat", "serve", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
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
            raise RuntimeError(log.strip().splitlines()[-1] if log.strip() else "it exited without output")
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield port, time.monotonic() - start
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def served_rate(folder: Path, device: str) -> Row:
    """Measure the service over HTTP on loopback, one image per request, in images/s. The client runs on the same machine."""
    import uvicorn  # noqa: F401  # raises ModuleNotFoundError if the service's packages are missing

    data = photograph()
    with serving(folder, device) as (port, ready_seconds):

        def send(deadline: float) -> list[float]:
            latencies: list[float] = []
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            while (sent := time.perf_counter()) < deadline:
                connection.request("POST", "/classify", data, {"Content-Type": "image/jpeg"})
                response = connection.getresponse()
                body = response.read()
                if response.status != 200:
                    raise RuntimeError(f"status {response.status}: {json.loads(body).get('detail')}")
                latencies.append(time.perf_counter() - sent)
            return latencies

        rates: list[float] = []
        latencies: list[float] = []
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for _ in range(ROUNDS):
                start = time.perf_counter()
                sent = list(chain.from_iterable(pool.map(send, [start + SECONDS / ROUNDS] * CONNECTIONS)))
                rates.append(len(sent) / (time.perf_counter() - start))
                latencies += sent
    row: Row = {"what": f"HTTP on loopback, {CONNECTIONS} connections"} | spread(rates)
    return row | {"p50 ms": median(latencies) * 1e3, "seconds to ready": ready_seconds}
