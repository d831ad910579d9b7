"""The whole network in every runtime, against its definition and against the CPU's measured ceiling, a matrix product.

    python -m benchmarks.model [--preset mini ...] [--batch 1 8] [--implementations ...] [--json FILE]

All have the same weights and are interleaved in one run. `share` is 2 * MACs / time over the FLOP/s of a 2048 x 2048 matrix
product in the implementation's own precision (bf16 for int8), which is interleaved with them. MACs are those that the network
requires (arXiv 2209.15001's count), not those that an implementation executes. `error` is the largest difference of a logit
from PyTorch's in float32; for bf16 and int8 the norm of the difference relative to that of the logits.

`torch tiled` is the network without a C compiler, `torch compiled` the network as the service runs it where there is one.

`definition` is the gather form of neighborhood attention in the network of transformers 4.53.3, whose values it equals; NATTEN
0.14.6's CPU kernels, which that release calls, cannot be built against a current PyTorch. Runtimes are called as the service
calls them. int8 is calibrated on random images: only its time is meaningful, not its error.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import matrix_product, matrix_product_flops, median_seconds, report
from dinat.app.server.heap import keep_freed_memory
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.config import image_size
from dinat.model.cpu.packing import pack
from dinat.model.quantization import quantize

GIGA_MACS = {"mini": 2.695, "tiny": 4.295, "small": 7.772, "base": 13.677, "large": 30.458, "large-384": 89.505, "large-11x11-384": 92.085}  # fmt: skip # noqa: E501
EXPORTED = {
    "OpenVINO fp32": ("openvino", "fp32"),
    "OpenVINO bf16": ("openvino", "bf16"),
    "OpenVINO int8": ("openvino", "int8"),
    "ONNX Runtime fp32": ("onnxruntime", "fp32"),
}
REFERENCE, INDUCTOR, DEFINITION = "torch tiled fp32", "torch.compile fp32", "definition, torch fp32"
IMPLEMENTATIONS = [DEFINITION, REFERENCE, "torch tiled bf16", "torch compiled fp32", "torch compiled bf16", INDUCTOR, *EXPORTED]

Forward = Callable[[list[np.ndarray]], np.ndarray]
"""B images of shape (1, 3, H, W) to logits of shape (B, num_labels)."""


def torch_forward(network: DinatForImageClassification, inductor: bool = False) -> Forward:
    call = torch.compile(network, dynamic=False) if inductor else network
    dtype = next(network.parameters()).dtype

    def run(pixels: list[np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            logits = call(torch.from_numpy(np.concatenate(pixels)).to(dtype)).logits
        return logits.float().numpy()

    return run


def exported_forward(folder: Path, runtime: str, precision: str) -> Forward:
    from dinat.app.engine.runtimes.selection import load_runtimes
    from dinat.app.settings import Settings

    settings = Settings(_env_file=None, model=str(folder), runtime=runtime, precision=precision, cache_dir=folder / "cache")
    loaded: Any = load_runtimes(settings)[0]
    return lambda pixels: np.concatenate([outputs[0] for outputs in loaded.infer(pixels, features=False)])


def load(implementation: str, folder: Path) -> Forward:
    if implementation in EXPORTED:
        return exported_forward(folder, *EXPORTED[implementation])
    network = DinatForImageClassification.from_pretrained(
        folder,
        attention="reference" if implementation == DEFINITION else "compiled" if "compiled" in implementation else "tiled",
        dtype=torch.bfloat16 if "bf16" in implementation else None,
    )
    return torch_forward(pack(network) if "compiled" in implementation else network, inductor=implementation == INDUCTOR)


def save(preset: str, folder: Path, int8: bool) -> None:
    torch.manual_seed(0)
    config = DinatConfig.preset(preset)
    network, size = DinatForImageClassification(config).eval(), image_size(config)
    processor = DinatImageProcessor(size=size, resample=3)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    if int8:
        random = np.random.default_rng(0)
        images = [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(8)]
        quantize(network, processor, images, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["mini"], choices=GIGA_MACS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--implementations", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    rows = []
    for preset in arguments.preset:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save(preset, folder, int8="OpenVINO int8" in arguments.implementations)
            side = DinatImageProcessor.from_pretrained(folder).output_size
            assert side is not None
            implementations = {name: load(name, folder) for name in arguments.implementations}
            for batch in arguments.batch:
                rows += measure(preset, implementations, batch, side, arguments.rounds)
    report("Whole network", rows, arguments.json)


def measure(
    preset: str, implementations: dict[str, Forward], batch: int, size: tuple[int, int], rounds: int
) -> list[dict[str, Any]]:
    pixels = [torch.randn(1, 3, *size).numpy() for _ in range(batch)]
    # A run is affected by the previous one, whose threads still spin and whose data fills the caches: before each run that is
    # counted, the same candidate runs once uncounted.
    candidates: dict[str, Callable[[], object]] = {}
    products = {"fp32": matrix_product(), "bf16": matrix_product(torch.bfloat16)}
    for name, run in [*products.items(), *((name, partial(forward, pixels)) for name, forward in implementations.items())]:
        candidates |= {f"before {name}": run, name: run}
    times = median_seconds(candidates, rounds)
    expected = implementations[REFERENCE](pixels) if REFERENCE in implementations else None
    rows = []
    for name, forward in implementations.items():
        error = float("nan")
        if expected is not None:
            difference = forward(pixels) - expected
            error = float(np.abs(difference).max() if "fp32" in name else np.linalg.norm(difference) / np.linalg.norm(expected))
        ceiling = matrix_product_flops(times["fp32" if "fp32" in name else "bf16"])
        rows.append(
            {
                "preset": preset,
                "implementation": name,
                "batch": batch,
                "ms per image": times[name] / batch * 1e3,
                "share": 2e9 * GIGA_MACS[preset] * batch / times[name] / ceiling,
                "error": error,
                "ceiling GFLOP/s": ceiling / 1e9,
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
