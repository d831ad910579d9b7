"""Every attention backend and whole networks on a CUDA GPU: error, time, and share of the GPU's measured ceilings.

    python -m benchmarks.gpu [--json FILE] [--quick] [--seconds 480]

All in one run, timed with CUDA events, alternating between several inputs; `us` and `ms` are times within a CUDA graph, as in
the service. The ceilings are measured in the same run: a copy of 1 GiB (bytes read and written) and a matrix product of
side 8192 in bf16. The minimum time of a layer (`floor`) is the larger of its bytes (q, k, v, output, once each) over the first
and its operations (4 * head_dim * kernel_size**2 per query and head) over the second; `share` is that minimum over the measured
time. `error` is relative to the norm of the definition in float64. The networks have random weights; torchvision's Swin is
measured too where torchvision is installed. Last comes images per second over HTTP, if the extra `bench` is installed. The
result is written to benchmarks/results/gpu-NAME.json by default. What does not fit into --seconds is listed as failed.
"""

import argparse
import asyncio
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dinat.model import DinatConfig, DinatError, DinatForImageClassification
from dinat.model.attention import autotune, bias_cache, run_candidate
from dinat.model.attention.autotune import candidates, float64_reference
from dinat.model.attention.timing import seconds_on_gpu
from dinat.model.config import image_size
from dinat.model.gpu.fusing import fuse

CUDA = torch.device("cuda")
LAYERS = [(56, 2, 7, 1), (56, 2, 7, 8), (28, 4, 7, 1), (28, 4, 7, 4), (14, 8, 7, 1), (14, 8, 7, 2), (7, 16, 7, 1), (96, 6, 11, 1), (96, 6, 11, 8)]  # fmt: skip # noqa: E501
"""Side of the feature map, heads, kernel size and dilation: Mini at 224, and the first stage of Large, kernel 11, at 384."""
NETWORKS = ["mini", "tiny", "small", "base", "large", "large-384", "large-11x11-384"]
BATCHES = [1, 8, 64, 256]
SWINS = ["swin_t", "swin_b"]
SERVED_CONNECTIONS, SERVED_SECONDS = [1, 32, 256], 10
SERVED_FLAGS = ["--device", "cuda:0", "--max-batch", "256", "--queue-limit", "1024"]

NO_TIME = "no time left"

_ends_at = float("inf")


def is_time_left() -> bool:
    return time.monotonic() < _ends_at


def seconds(runs: Sequence[Callable[[], object]], rounds: int = 20) -> float:
    """Return the median seconds of a run, alternating between runs that differ only in their inputs."""
    for run in runs[:3]:
        run()
    times = []
    for i in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        runs[i % len(runs)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def captured_seconds(call: Callable[[torch.Tensor], object], inputs: Sequence[torch.Tensor]) -> float:
    """Return the median seconds of a call in a CUDA graph, as in the service, over all inputs."""
    return seconds_on_gpu(lambda: [call(x) for x in inputs], CUDA) / len(inputs)


def ceilings() -> dict[str, float]:
    """Measure bytes per second of a copy, and bf16 operations per second of a matrix product."""
    source, target = torch.empty(2, 2**28, device=CUDA)
    source.normal_()
    a, b = torch.randn(2, 8192, 8192, device=CUDA).bfloat16()
    copy, product = seconds([lambda: target.copy_(source)]), seconds([lambda: a @ b])
    return {"bytes/s": 2 * source.nbytes / copy, "flop/s": 2 * 8192**3 / product}


def layer_rows(ceiling: dict[str, float], batch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    rows = []
    for side, heads, kernel_size, dilation in LAYERS:
        if not is_time_left():
            rows.append({"feature map": side, "kernel": kernel_size, "dilation": dilation, "batch": batch, "failed": NO_TIME})
            continue
        inputs = [torch.randn(batch, side, side, 3, heads, 32, device=CUDA).to(dtype) for _ in range(3)]
        rpb = torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1, device=CUDA)
        expected = float64_reference(inputs[0][:2], rpb, kernel_size, dilation, 32**-0.5)
        transferred = 4 * inputs[0].nbytes / 3
        operations = 4 * 32 * kernel_size**2 * batch * side * side * heads
        floor = max(transferred / ceiling["bytes/s"], operations / ceiling["flop/s"])
        for candidate in ["reference", *candidates(CUDA, dtype, 32)]:

            def attend(x: torch.Tensor) -> torch.Tensor:
                return run_candidate(candidate, *x.unbind(3), rpb, kernel_size, dilation, 32**-0.5)  # noqa: B023

            row = {
                "feature map": side,
                "heads": heads,
                "kernel": kernel_size,
                "dilation": dilation,
                "batch": batch,
                "backend": candidate,
            }
            try:
                error = float((attend(inputs[0][:2]).double() - expected).norm() / expected.norm())
                eager, captured = seconds([lambda x=x: attend(x) for x in inputs]), captured_seconds(attend, inputs)
            except Exception as failure:
                rows.append(row | {"failed": " ".join(str(failure).split())[:200]})
            else:
                times = {"us": captured * 1e6, "us eager": eager * 1e6, "share": floor / captured}
                rows.append(row | {"dtype": str(dtype), "error": error} | times)
            print(rows[-1], flush=True)
    return rows


def network_rows(presets: Sequence[str], batches: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for preset in presets:
        config = DinatConfig.preset(preset)
        side = image_size(config)
        for attention in ("auto", "reference", "tiled", "triton", "natten"):
            row = {"network": preset, "attention": attention}
            try:
                with CUDA:
                    network = fuse(DinatForImageClassification(config, attention=attention).eval().to(torch.bfloat16))
            except DinatError as failure:  # pragma: no cover
                rows.append(row | {"failed": str(failure)})
            else:
                rows += [measured(row, network, side, batch) for batch in batches]
    try:
        import torchvision
    except ImportError:  # pragma: no cover
        return rows
    for name in SWINS:
        network = getattr(torchvision.models, name)().eval().to(CUDA, torch.bfloat16)
        rows += [measured({"network": name, "attention": "torchvision"}, network, 224, batch) for batch in batches]
    return rows


def measured(row: dict[str, Any], network: torch.nn.Module, side: int, batch: int) -> dict[str, Any]:
    """Measure images per second of a network in a CUDA graph, as in the service."""
    row = row | {"batch": batch}
    if not is_time_left():
        return row | {"failed": NO_TIME}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        pixels = torch.randn(batch, 3, side, side, device=CUDA, dtype=torch.bfloat16)
        with autotune.autotuning():
            network(pixels)
        bias_cache.clear()
        elapsed = seconds_on_gpu(lambda: network(pixels), CUDA)
    except Exception as failure:
        torch.cuda.empty_cache()
        row |= {"failed": " ".join(str(failure).split())[:200]}
    else:
        row |= {"ms": elapsed * 1e3, "images/s": batch / elapsed, "peak GB": torch.cuda.max_memory_allocated() / 1e9}
    print(row, flush=True)
    return row


def served_rows() -> list[dict[str, Any]]:
    """Measure images per second over HTTP: Mini in bf16, one image per request, client and server on one machine."""
    try:
        from benchmarks import serving
    except ImportError as missing:  # pragma: no cover
        return [{"failed": f"the extra bench is not installed: {missing}"}]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        serving.save_network(Path(folder))
        port = serving.free_port()
        url = f"http://127.0.0.1:{port}/classify"
        try:
            with serving.running([*serving.command("ours", folder, port), *SERVED_FLAGS], url):
                for connections in SERVED_CONNECTIONS:
                    latencies, errors, elapsed = asyncio.run(serving.closed_loop(url, connections, SERVED_SECONDS))
                    row = {"connections": connections, "images/s": len(latencies) / elapsed, "p50 ms": median(latencies)}
                    rows.append(row | {"errors": errors})
                    print(rows[-1], flush=True)
        except Exception as failure:
            rows.append({"failed": " ".join(f"the service did not start: {failure}".split())[:200]})
    return rows


def versions() -> dict[str, str]:
    found = {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name(CUDA)}
    for package in ("torch", "triton", "natten", "torchvision"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    global _ends_at
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="only Mini, only batches of 1 and 64")
    parser.add_argument("--seconds", type=float, default=480)
    arguments = parser.parse_args()
    _ends_at = time.monotonic() + arguments.seconds
    if not torch.cuda.is_available():  # pragma: no cover
        raise SystemExit("benchmarks.gpu requires a CUDA GPU, and PyTorch finds none: run it where nvidia-smi lists one")
    with torch.inference_mode():
        ceiling = ceilings()
        result = {
            "machine": versions(),
            "ceilings": ceiling,
            "layers": [
                row
                for dtype in (torch.bfloat16, torch.float32)
                for batch in ([64] if arguments.quick else [1, 64])
                for row in layer_rows(ceiling, batch, dtype)
            ],
            "networks": network_rows(NETWORKS[:1] if arguments.quick else NETWORKS, [1, 64] if arguments.quick else BATCHES),
        }
    result["served"] = served_rows() if is_time_left() else [{"failed": NO_TIME}]
    result["selected"] = [
        {"kind": key.kind} | asdict(key) | asdict(choice)  # type: ignore[call-overload]
        for key, choice in autotune.selections.items()
    ]
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(CUDA)).strip("-").lower()
    path = arguments.json or Path(__file__).parent / "results" / f"gpu-{name}.json"
    path.write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":  # pragma: no cover
    main()
