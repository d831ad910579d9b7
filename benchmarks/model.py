"""The whole network in every runtime, against its definition and against the machine's own matrix-product ceiling.

    python -m benchmarks.model [--preset mini ...] [--batch 1 8] [--ways ...] [--json FILE]

Same weights for all, which take turns within one run. `share` is 2 * MACs / time over the FLOP/s of a 2048 x 2048 matrix
product in the way's own precision (bf16 for int8), which takes turns with them. MACs are those the network needs
(arXiv 2209.15001's count), not those a way of computing it spends. `off` is the largest difference of a logit from PyTorch's in
float32, relative to the norm of the logits for bf16 and int8.

`torch tiled` is the network as it comes where no C compiler is; `torch compiled` as the service has it where there is one.

`definition` is the gather form of neighborhood attention in the network of transformers 4.53.3, to whose numbers it is equal;
NATTEN 0.14.6's CPU kernels, which that release calls, cannot be built against a current PyTorch. The runtimes are called as
the service calls them. int8 is calibrated on random pictures: its time counts here, not its error.
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

from benchmarks.timing import ceiling, matrix_product, report, take_turns
from dinat.app.server.heap import keep_freed_memory
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.cpu.packing import pack
from dinat.model.export import quantize

GIGA_MACS = {"mini": 2.695, "tiny": 4.295, "small": 7.772, "base": 13.677, "large": 30.458, "large-384": 89.505, "large-11x11-384": 92.085}  # fmt: skip # noqa: E501
EXPORTED = {
    "OpenVINO fp32": ("openvino", "fp32"),
    "OpenVINO bf16": ("openvino", "bf16"),
    "OpenVINO int8": ("openvino", "int8"),
    "ONNX Runtime fp32": ("onnxruntime", "fp32"),
}
EXACT, INDUCTOR, DEFINITION = "torch tiled fp32", "torch.compile fp32", "definition, torch fp32"
WAYS = [DEFINITION, EXACT, "torch tiled bf16", "torch compiled fp32", "torch compiled bf16", INDUCTOR, *EXPORTED]

Way = Callable[[list[np.ndarray]], np.ndarray]
"""(1, 3, H, W) pictures to logits (B, num_labels)."""


def torch_way(network: DinatForImageClassification, inductor: bool = False) -> Way:
    call = torch.compile(network, dynamic=False) if inductor else network
    dtype = next(network.parameters()).dtype

    def run(pixels: list[np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            logits = call(torch.from_numpy(np.concatenate(pixels)).to(dtype)).logits
        return logits.float().numpy()

    return run


def exported_way(folder: Path, runtime: str, precision: str) -> Way:
    from dinat.app.engine.runtimes.selection import load_runtimes
    from dinat.app.settings import Settings

    settings = Settings(_env_file=None, model=str(folder), runtime=runtime, precision=precision, cache_dir=folder / "cache")
    loaded: Any = load_runtimes(settings)[0]
    return lambda pixels: np.concatenate([outputs[0] for outputs in loaded.infer(pixels, features=False)])


def make(way: str, folder: Path) -> Way:
    if way in EXPORTED:
        return exported_way(folder, *EXPORTED[way])
    network = DinatForImageClassification.from_pretrained(
        folder,
        attention="reference" if way == DEFINITION else "compiled" if "compiled" in way else "tiled",
        dtype=torch.bfloat16 if "bf16" in way else None,
    )
    return torch_way(pack(network) if "compiled" in way else network, inductor=way == INDUCTOR)


def save(preset: str, folder: Path, int8: bool) -> None:
    torch.manual_seed(0)
    config = DinatConfig.preset(preset)
    network, size = DinatForImageClassification(config).eval(), getattr(config, "image_size", 224)
    processor = DinatImageProcessor(size=size, resample=3)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    if int8:
        random = np.random.default_rng(0)
        pictures = [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(8)]
        quantize(network, processor, pictures, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["mini"], choices=GIGA_MACS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    rows = []
    for preset in arguments.preset:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save(preset, folder, int8="OpenVINO int8" in arguments.ways)
            side = DinatImageProcessor.from_pretrained(folder).output_size
            assert side is not None
            ways = {way: make(way, folder) for way in arguments.ways}
            for batch in arguments.batch:
                rows += measure(preset, ways, batch, side, arguments.rounds)
    report("Whole network", rows, arguments.json)


def measure(preset: str, ways: dict[str, Way], batch: int, size: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    pixels = [torch.randn(1, 3, *size).numpy() for _ in range(batch)]
    # Whoever follows another finds its threads still spinning, or the caches full of its numbers: each run before one that
    # counts is of the same kind.
    candidates: dict[str, Callable[[], object]] = {}
    ceilings = {"fp32": matrix_product(), "bf16": matrix_product(torch.bfloat16)}
    for name, run in [*ceilings.items(), *((name, partial(way, pixels)) for name, way in ways.items())]:
        candidates |= {f"before {name}": run, name: run}
    times = take_turns(candidates, rounds)
    exact = ways[EXACT](pixels) if EXACT in ways else None
    rows = []
    for name, way in ways.items():
        difference = float("nan")
        if exact is not None:
            got = way(pixels)
            difference = float(
                np.abs(got - exact).max() if "fp32" in name else np.linalg.norm(got - exact) / np.linalg.norm(exact)
            )
        highest = ceiling(times["fp32" if "fp32" in name else "bf16"])
        rows.append(
            {
                "preset": preset,
                "way": name,
                "batch": batch,
                "ms per picture": times[name] / batch * 1e3,
                "share": 2e9 * GIGA_MACS[preset] * batch / times[name] / highest,
                "off": difference,
                "ceiling GFLOP/s": highest / 1e9,
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
