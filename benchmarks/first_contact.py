"""The first minutes on a GPU on which this project has not run yet: what teaches most runs first, and every result is written.

    python -m benchmarks.first_contact [--results FILE] [--seconds 540] [--parts NAME ...]

Requires torch, Triton, NumPy, Pillow, safetensors and huggingface_hub, and the last part pytest and hypothesis. Each part runs
in a process of its own that is killed at its deadline, with those that it started. A result is one line of JSON, printed and
appended to FILE (benchmarks/results/first-contact.jsonl by default) as it comes: after a crash, a hang or a kill, the results
so far are there. The exit status is 1 if a part failed.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import gpu
from dinat.app import measurements
from dinat.app.engine.runtimes.cuda_graphs import CapturedComputation
from dinat.app.engine.runtimes.runtime import DeviceLost, InferenceOptions, examples
from dinat.app.engine.runtimes.torch_runtime import TorchRuntime
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.attention import neighborhood_attention, run_candidate
from dinat.model.attention.autotune import MAX_ERROR, candidates, float64_reference, reason
from dinat.model.attention.timing import seconds_on_gpu
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.cpu.fast_layers import LayerNorm
from dinat.model.gpu import pixels_kernel
from dinat.model.gpu.fusing import fuse
from dinat.model.gpu.steps import DEFINITION, Linear, Mlp
from dinat.model.normalization import value_table

Row = dict[str, Any]
CUDA = torch.device("cuda", 0)
NETWORKS = [("mini", 1), ("mini", 64), ("mini", 256), ("large", 64)]
"""Preset and batch."""
PROFILED = ("mini", 64)
FUSED = [(64, 56, 64, 192), (64, 56, 192, 384), (64, 14, 256, 768), (64, 7, 1536, 3072)]
"""Batch, side of the feature map, channels and hidden features: layers of Mini and Large."""
TESTS = "logits_of_a_trained or fp32_is_fp32 or two_threads or runtime_on_a_gpu or gradients or fused_step"
"""Of tests/gpu. The property test of the candidates compiles hundreds of kernels."""


def versions() -> Iterator[Row]:
    """Driver, packages, and properties of the GPU."""
    yield dict(gpu.versions())
    properties = torch.cuda.get_device_properties(CUDA)
    yield {"capability": [properties.major, properties.minor], "memory": properties.total_memory}
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        yield {"nvidia-smi": subprocess.run([smi], capture_output=True, text=True, timeout=10, check=False).stdout.splitlines()}


def kernels() -> Iterator[Row]:
    """Error of every candidate for each layer, against the definition in float64."""
    for dtype in (torch.bfloat16, torch.float32):
        for side, heads, kernel_size, dilation in gpu.LAYERS:
            qkv = torch.randn(2, side, side, 3, heads, 32, device=CUDA).to(dtype)
            rpb = torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1, device=CUDA)
            expected = float64_reference(qkv, rpb, kernel_size, dilation, 32**-0.5)
            for name in candidates(CUDA, dtype, 32):
                row = {"dtype": str(dtype), "layer": [side, heads, kernel_size, dilation], "candidate": name}
                try:
                    output = run_candidate(name, *qkv.unbind(3), rpb, kernel_size, dilation, 32**-0.5)
                    error = float((output.double() - expected).norm() / expected.norm())
                except Exception as failure:
                    yield row | {"failed": reason(failure)}
                else:
                    yield row | {"error": error} | ({} if error <= MAX_ERROR[dtype] else {"failed": "the error is too large"})


def fused() -> Iterator[Row]:
    """Error, against float64, and time of every candidate for the steps of a layer."""
    for batch, side, channels, hidden in FUSED:
        x = torch.randn(batch, side, side, channels, device=CUDA).bfloat16()
        with CUDA:
            up, down = nn.Linear(channels, hidden).bfloat16(), nn.Linear(hidden, channels).bfloat16()
            norm = LayerNorm(channels).bfloat16()
        first = Linear(up, norm, is_gelu=True)
        steps: list[tuple[str, Any, list[torch.Tensor]]] = [
            ("norm, linear layer, GELU", first, [x]),
            ("linear layer, sum", Linear(down), [first.by(DEFINITION, x), x]),
            ("MLP", Mlp(norm, up, down), [x]),
        ]
        for what, step, inputs in steps:
            for name in step.candidates(inputs[0]):
                row = {"layer": [batch, side, channels, hidden], "step": what, "candidate": name}
                try:
                    error = step.relative_error(name, *(y[:2] for y in inputs))
                    us = 1e6 * seconds_on_gpu(lambda: step.by(name, *inputs), CUDA)  # noqa: B023
                except Exception as failure:
                    yield row | {"failed": reason(failure)}
                else:
                    row |= {"error": error, "us": us}
                    yield row | ({} if error <= MAX_ERROR[torch.bfloat16] else {"failed": "the error is too large"})


def pixels() -> Iterator[Row]:
    """Error and time of the normalization of pixels by PyTorch and by the kernel."""
    processor = DinatImageProcessor()
    table = value_table(processor.rescale_factor, (tuple(processor.image_mean), tuple(processor.image_std)), CUDA)
    values = torch.randint(0, 256, (64, 224, 224, 3), dtype=torch.uint8, device=CUDA)
    expected = processor.normalize(values, torch.bfloat16).permute(0, 2, 3, 1)
    output = pixels_kernel.launch(values, table, torch.bfloat16)
    difference = float((output.float() - expected.float()).abs().max())
    row = {
        "difference": difference,
        "us": 1e6 * seconds_on_gpu(lambda: pixels_kernel.launch(values, table, torch.bfloat16), CUDA),
        "us by PyTorch": 1e6 * seconds_on_gpu(lambda: processor.normalize(values, torch.bfloat16), CUDA),
    }
    yield row | ({"failed": "the results differ"} if difference else {})


def graphs() -> Iterator[Row]:
    """Capture a layer as CUDA graphs, replay them, and compare."""
    rpb = torch.randn(2, 13, 13, device=CUDA)

    def compute(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = neighborhood_attention(*x.unbind(3), rpb, 7, 1)
        return output, output.sum((2, 3, 4))

    captured = CapturedComputation(compute, torch.randn(4, 14, 14, 3, 2, 32, device=CUDA))
    for count in (1, 3, 4):
        x = torch.randn(count, 14, 14, 3, 2, 32)
        output, expected = captured.run(x)[0], compute(x.to(CUDA))[0].cpu()
        difference = float((output - expected).abs().max())
        yield {"batch": count, "difference": difference} | ({"failed": "replay differs"} if difference > 1e-4 else {})


def core() -> Iterator[Row]:
    """Warm up the runtime of the service, with its self-check, and compare its scores with those of the CPU."""
    cpu = TorchRuntime(open_checkpoint("digits"), torch.device("cpu"), "fp32", "tiled")
    for precision in ("bf16", "fp32"):
        runtime = TorchRuntime(open_checkpoint("digits"), CUDA, precision, "auto")
        started = time.monotonic()
        count = runtime.warm(4)
        disabled = [[entry.name, entry.reason] for entry in runtime.disabled]
        row: Row = {"precision": runtime.precision, "attention": runtime.attention(), "disabled": disabled}
        yield (
            row | {"warm s": time.monotonic() - started} | ({"failed": "the self-check disabled something"} if disabled else {})
        )
        pixels, options = examples(runtime.processor, count), [InferenceOptions(10)] * count
        scores = [
            np.stack([result.scores[np.argsort(result.class_ids)] for result in each.run(pixels, options)])
            for each in (runtime, cpu)
        ]
        difference = float(np.abs(scores[0] - scores[1]).max())
        yield {"precision": precision, "difference": difference} | ({"failed": "scores differ"} if difference > 0.05 else {})


def networks() -> Iterator[Row]:
    """Images per second of whole networks in CUDA graphs."""
    for preset, batch in NETWORKS:
        yield gpu.measured({"network": preset}, network(preset), 224, batch)


def attention() -> Iterator[Row]:
    """Time of every candidate for each layer of Mini."""
    rows, disabled = measurements.attention_rows(DinatConfig.preset("mini"), DinatImageProcessor(), CUDA, torch.bfloat16)
    yield from rows
    yield {"disabled": disabled}


def profiler() -> Iterator[Row]:
    """Launches of a forward pass by name, with copies and the implementation of scaled dot-product attention."""
    preset, batch = PROFILED
    model, pixels = network(preset), torch.randn(batch, 3, 224, 224, device=CUDA, dtype=torch.bfloat16)
    for _ in range(3):
        model(pixels)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        model(pixels)
        torch.cuda.synchronize()
    for event in profile.key_averages():
        yield {"name": event.key, "count": event.count, "us": getattr(event, "device_time_total", None)}


def network(preset: str) -> DinatForImageClassification:
    with CUDA:
        return fuse(DinatForImageClassification(DinatConfig.preset(preset)).eval().to(torch.bfloat16))


PYTHON, PYTEST = [sys.executable, "-c"], ["-m", "pytest"]
LAYER = """
import torch
from dinat.model.attention import neighborhood_attention
q = torch.randn(3, 1, 14, 14, 2, 32, device="cuda").bfloat16()
neighborhood_attention(*q, torch.randn(2, 13, 13, device="cuda"), 7, 2)
torch.cuda.synchronize()
"""


def sanitizer() -> Iterator[Row]:
    """Run one layer in NVIDIA's compute-sanitizer, if it is installed."""
    command = shutil.which("compute-sanitizer")
    if command is None:
        yield {"skipped": "compute-sanitizer is not installed"}
    else:
        yield from output_of([command, "--error-exitcode", "9", *PYTHON, LAYER])


def tests() -> Iterator[Row]:
    """Run the tests of tests/gpu that matter most. pytest's exit status is 0 if all are skipped."""
    yield from output_of([sys.executable, *PYTEST, "-ra", "-x", "tests/gpu", "-k", TESTS], expected=r"\b[1-9]\d* passed\b")


def output_of(command: list[str], expected: str = "") -> Iterator[Row]:
    """Run a command and return its output line by line; the last row has its exit status.

    Args:
        command: The command.
        expected: Pattern of a line without which it has failed.
    """
    is_found = not expected
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            is_found |= re.search(expected, line) is not None
            yield {"output": line.rstrip()}
        status = process.wait()
    failure = f"exit status {status}" if status else "" if is_found else f"no line matches {expected}"
    yield {"status": status} | ({"failed": failure} if failure else {})


PARTS: dict[str, tuple[Callable[[], Iterator[Row]], float]] = {
    "versions": (versions, 20),
    "kernels": (kernels, 90),
    "fused": (fused, 65),
    "pixels": (pixels, 15),
    "graphs": (graphs, 30),
    "core": (core, 70),
    "networks": (networks, 90),
    "attention": (attention, 50),
    "profiler": (profiler, 30),
    "sanitizer": (sanitizer, 30),
    "tests": (tests, 50),
}
"""Function and deadline in seconds of each part, in order."""


def run_part(name: str, results: Path) -> bool:
    """Run a part in this process. Return whether nothing failed."""
    passed = True
    try:
        with torch.inference_mode(name not in ("tests", "sanitizer")):
            for row in PARTS[name][0]():
                write(results, {"part": name} | row)
                passed &= "failed" not in row
    except (Exception, DeviceLost) as failure:
        write(results, {"part": name, "failed": reason(failure)})
        return False
    return passed


def run_parts(names: list[str], results: Path, seconds: float) -> bool:
    """Run each part in a process of its own, until its deadline or that of all. Return whether all passed."""
    ends_at = time.monotonic() + seconds
    passed = True
    for name in names:
        started = time.monotonic()
        limit = min(PARTS[name][1], ends_at - started)
        command = [sys.executable, *sys.orig_argv[1 : -len(sys.argv) + 1 or None], "--part", name, "--results", str(results)]
        status: int | str = "no time left"
        if limit > 0:
            status = run_until(command, limit)
        write(results, {"part": name, "status": status, "seconds": time.monotonic() - started})
        passed &= status == 0
    return passed


def run_until(command: list[str], limit: float) -> int | str:
    """Run a command; after `limit` seconds, kill it and what it started. Return its exit status, or that it was killed."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"killed at its deadline of {limit:.0f} s"
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process ends only when the driver returns
                process.wait(10)


def write(results: Path, row: Row) -> None:
    """Append a result to a file, and print it. A full disk does not stop the other parts."""
    line = json.dumps(row, default=str)
    try:
        with results.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        print(f"{results}: {error}", file=sys.stderr)
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "first-contact.jsonl")
    parser.add_argument("--seconds", type=float, default=540, help="deadline of all parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():  # pragma: no cover
        parser.error("PyTorch finds no CUDA GPU: run this where nvidia-smi lists one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part that is running
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        return 0 if run_part(arguments.part, arguments.results) else 1
    return 0 if run_parts(arguments.parts, arguments.results, arguments.seconds) else 1


if __name__ == "__main__":  # pragma: no cover
    raise SystemExit(main())
