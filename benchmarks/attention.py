"""Tiled attention against the gather definition, on the layers of the published networks.

    python -m benchmarks.attention [--json FILE]

float32, kernel 7, head_dim 32. Both are interleaved in one run; `speedup` is the ratio of their medians.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.timing import median_seconds, report
from dinat.model.attention import neighborhood_attention

LAYERS = [(56, 2, 1), (56, 2, 8), (28, 4, 1), (28, 4, 4), (14, 8, 1), (14, 8, 2), (7, 16, 1)]
"""Side of the feature map, heads and dilation: Mini and Tiny at 224."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    rows = []
    for batch in arguments.batch:
        for side, heads, dilation in LAYERS:
            q, k, v = (torch.randn(batch, side, side, heads, 32) for _ in range(3))
            rpb = torch.randn(heads, 13, 13)
            with torch.inference_mode():

                def attend(backend: str, inputs: tuple[torch.Tensor, ...] = (q, k, v, rpb), d: int = dilation) -> torch.Tensor:
                    return neighborhood_attention(*inputs, kernel_size=7, dilation=d, backend=backend)

                times = median_seconds({"gather": lambda: attend("reference"), "tiled": lambda: attend("tiled")}, rounds=7)
                difference = (attend("tiled") - attend("reference")).abs().max().item()
            rows.append(
                {
                    "feature map": f"{side}x{side}",
                    "heads": heads,
                    "dilation": dilation,
                    "batch": batch,
                    "gather ms": times["gather"] * 1e3,
                    "tiled ms": times["tiled"] * 1e3,
                    "speedup": times["gather"] / times["tiled"],
                    "max difference": difference,
                }
            )
    report("Neighborhood attention with RPB, fp32, kernel 7", rows, arguments.json)


if __name__ == "__main__":
    main()
