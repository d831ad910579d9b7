"""A training step on a CPU: the network's own attention against the gather definition, time and memory.

    python -m benchmarks.training [--preset mini] [--batch 8] [--rounds 3] [--json FILE]

A step is forward, cross entropy, backward and AdamW. Each implementation runs in its own process; its memory is that process's
peak minus what it used before the first step. Implementations are interleaved, and a time is the median over all steps of all
rounds. bf16 is autocast, as in Trainer. `transformers` is dinat.model.hf's network, with separate query, key and value layers.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import report
from dinat.app.server.heap import keep_freed_memory
from dinat.model import DinatConfig, DinatForImageClassification

IMPLEMENTATIONS = {
    "definition": "reference",
    "tiled": "tiled",
    "transformers": "tiled",
}
"""Attention backend by name."""
STEPS = 3


def create_network(preset: str, implementation: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = DinatConfig.preset(preset)
    if implementation != "transformers":
        return DinatForImageClassification(config, attention=IMPLEMENTATIONS[implementation]).train()
    from dinat.model import hf

    return hf.DinatForImageClassification(hf.DinatConfig(**config.to_dict())).train()


def measure(preset: str, implementation: str, precision: str, batch: int) -> dict[str, Any]:
    """Return the seconds of each step after the first, and the bytes of all."""
    keep_freed_memory()
    network = create_network(preset, implementation)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    pixels, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    bytes_before, seconds = _resident(), []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(network(pixels).logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - bytes_before}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("IMPLEMENTATION", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.preset, *arguments.one, arguments.batch)))
        return
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for precision in ("fp32", "bf16"):
            for implementation in IMPLEMENTATIONS:
                command = [sys.executable, "-m", "benchmarks.training", "--preset", arguments.preset, "--batch"]
                command += [str(arguments.batch), "--one", implementation, precision]
                completed = subprocess.run(command, check=True, capture_output=True, text=True)
                measured.setdefault((implementation, precision), []).append(json.loads(completed.stdout.splitlines()[-1]))
    seconds = {key: median(s for run in runs for s in run["seconds"]) for key, runs in measured.items()}
    size = {key: median(run["bytes"] for run in runs) for key, runs in measured.items()}
    rows = [
        {
            "implementation": implementation,
            "precision": precision,
            "ms per step": seconds[implementation, precision] * 1e3,
            "images/s": arguments.batch / seconds[implementation, precision],
            "speedup": seconds["definition", precision] / seconds[implementation, precision],
            "MiB": size[implementation, precision] / 2**20,
            "relative memory": size[implementation, precision] / size["definition", precision],
        }
        for implementation, precision in measured
    ]
    report(f"A training step of {arguments.preset} at 224, batch {arguments.batch}", rows, arguments.json)


if __name__ == "__main__":
    main()
