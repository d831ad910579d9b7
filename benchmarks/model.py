"""The whole network against the machine's own matrix-product ceiling.

    python -m benchmarks.model [--preset mini ...] [--batch 1 8] [--json FILE]

`share of ceiling` is 2 * MACs / time over the FLOP/s of a 2048 x 2048 matrix product that takes turns with it. MACs are
those the network needs (arXiv 2209.15001's count), not those a way of computing it spends. `peak MB` is the most resident
memory of a process that does nothing else.
"""

import argparse
import multiprocessing
import resource
from pathlib import Path

import torch

from benchmarks.timing import ceiling, matrix_product, report, take_turns
from model import DinatConfig, DinatForImageClassification

GIGA_MACS = {"mini": 2.695, "tiny": 4.295, "small": 7.772, "base": 13.677, "large": 30.458, "large-384": 89.505, "large-11x11-384": 92.085}  # fmt: skip # noqa: E501


def pixels(config: DinatConfig, batch: int) -> torch.Tensor:
    side = getattr(config, "image_size", 224)
    return torch.randn(batch, 3, side, side)


def peak_memory(preset: str, batch: int) -> int:
    """Most bytes resident in this process after one forward pass."""
    config = DinatConfig.preset(preset)
    network = DinatForImageClassification(config).eval()
    with torch.inference_mode():
        network(pixels(config, batch))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["mini"], choices=GIGA_MACS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for preset in arguments.preset:
        config = DinatConfig.preset(preset)
        network = DinatForImageClassification(config).eval()
        for batch in arguments.batch:
            inputs = pixels(config, batch)
            with torch.inference_mode():
                times = take_turns(
                    {"network": lambda n=network, x=inputs: n(x), "matrix": matrix_product()}, rounds=arguments.rounds
                )
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(peak_memory, (preset, batch))
            rows.append(
                {
                    "preset": preset,
                    "runtime": "torch eager fp32",
                    "batch": batch,
                    "ms per picture": times["network"] / batch * 1e3,
                    "ceiling GFLOP/s": ceiling(times["matrix"]) / 1e9,
                    "share of ceiling": 2e9 * GIGA_MACS[preset] * batch / times["network"] / ceiling(times["matrix"]),
                    "peak MB": round(peak / 1e6),
                }
            )
    report("Whole network", rows, arguments.json)


if __name__ == "__main__":
    main()
