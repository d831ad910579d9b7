"""A step of training on a CPU: the network's own attention against the gather definition, time and memory.

    python -m benchmarks.training [--preset mini] [--batch 8] [--rounds 3] [--json FILE]

A step is forward, cross entropy, backward and AdamW. Every way runs in a process of its own, for its memory is that process's
peak beyond what it held before the first step; the ways take turns, and a time is the median over all steps of all turns.
bf16 is autocast, as Trainer has it. `transformers` is dinat.model.hf's network, which has query, key and value apart.
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

WAYS = {
    "definition": "reference",
    "tiled": "tiled",
    "transformers": "tiled",
}
STEPS = 3


def network(preset: str, way: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = DinatConfig.preset(preset)
    if way != "transformers":
        return DinatForImageClassification(config, attention=WAYS[way]).train()
    from dinat.model import hf

    return hf.DinatForImageClassification(hf.DinatConfig(**config.to_dict())).train()


def measure(preset: str, way: str, precision: str, batch: int) -> dict[str, Any]:
    """Seconds of each step after the first, and bytes."""
    keep_freed_memory()
    trained = network(preset, way)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6)
    pixels, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    before, seconds = _resident(), []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(trained(pixels).logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.preset, *arguments.one, arguments.batch)))
        return
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for precision in ("fp32", "bf16"):
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.training", "--preset", arguments.preset, "--batch"]
                command += [str(arguments.batch), "--one", way, precision]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found.setdefault((way, precision), []).append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {key: median(s for run in runs for s in run["seconds"]) for key, runs in found.items()}
    size = {key: median(run["bytes"] for run in runs) for key, runs in found.items()}
    rows = [
        {
            "way": way,
            "precision": precision,
            "ms a step": seconds[way, precision] * 1e3,
            "pictures/s": arguments.batch / seconds[way, precision],
            "times the definition": seconds["definition", precision] / seconds[way, precision],
            "MiB": size[way, precision] / 2**20,
            "of the definition's": size[way, precision] / size["definition", precision],
        }
        for way, precision in found
    ]
    report(f"A training step of {arguments.preset} at 224, {arguments.batch} pictures", rows, arguments.json)


if __name__ == "__main__":
    main()
