"""The network and the service on a shared CPU: alone, beside busy programs, and within CPU quotas, against peers, in one run.

    python -m benchmarks.contention [--parts network service] [--subjects ours ...] [--conditions alone ...] [--seconds 4]
        [--preset mini] [--json FILE]

Each subject is a process of its own, started once for all busy programs, and once within each quota (a control group of version
1 or 2, as root). `ours` is the default; the other variants of ours fix what it adapts: OpenMP threads that always or never spin
(OMP_WAIT_POLICY), and one thread. The network is called with 1 and 8 images; servers get a closed loop of 1, 8 and 32
connections, from a client that shares the CPU too. `of alone` is the time relative to the same row alone.
Requires the extra `bench` for servers, and the runtimes that are measured.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np

from benchmarks.serving import CONNECTIONS, closed_loop, command, free_port, running
from benchmarks.timing import busy_programs, report
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor

BUSY = {"alone": 0, "1 busy program": 1, "2 busy programs": 2, "4 busy programs": 4}
QUOTAS = {"quota 0.5": 0.5, "quota 1": 1.0, "quota 1.5": 1.5}
VARIANTS = {
    "ours": {},
    "ours, threads spin": {"OMP_WAIT_POLICY": "active"},
    "ours, threads sleep": {"OMP_WAIT_POLICY": "passive"},
    "ours, one thread": {"OMP_NUM_THREADS": "1"},
}
"""Environment variables of each variant of ours."""
RUNTIMES = {"OpenVINO": "openvino", "ONNX Runtime": "onnxruntime"}
PEERS = ("plain", "lit", "rayserve")
BATCHES = (1, 8)


@contextmanager
def within_quota(cpus: float | None) -> Iterator[list[str]]:
    """Create a control group with a CPU quota, and yield the command that starts another one in it."""
    if cpus is None:
        yield []
        return
    version_1 = Path("/sys/fs/cgroup/cpu")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"dinat-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        if version_1.is_dir():
            (group / "cpu.cfs_period_us").write_text("100000")
            (group / "cpu.cfs_quota_us").write_text(str(round(cpus * 100_000)))
        else:
            (group / "cpu.max").write_text(f"{round(cpus * 100_000)} 100000")
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$0" "$@"']
    finally:
        while (group / "cgroup.procs").read_text():
            time.sleep(0.1)
        group.rmdir()


def serve_network(folder: str, subject: str) -> None:
    """In a process of its own: load the network, and measure it for as many seconds as each line on standard input says."""
    from dinat.app.engine.runtimes.runtime import InferenceOptions, examples
    from dinat.app.engine.runtimes.selection import load_runtimes
    from dinat.app.settings import Settings

    name = RUNTIMES.get(subject, "torch")
    settings = Settings(_env_file=None, model=folder, runtime=name, cache_dir=Path(folder) / "cache")
    (runtime,) = load_runtimes(settings)
    runtime.warm(max(BATCHES))
    print("ready", flush=True)
    for line in sys.stdin:
        count, seconds = line.split()
        pixels, options = examples(runtime.processor, int(count)), [InferenceOptions(top_k=5)] * int(count)
        runtime.run(pixels, options)
        times: list[float] = []
        while sum(times) < float(seconds) or len(times) < 3:
            start = time.perf_counter()
            runtime.run(pixels, options)
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


def network_rows(subject: str, conditions: Sequence[str], folder: str, seconds: float) -> Iterator[dict[str, Any]]:
    environment = os.environ | VARIANTS.get(subject, {})
    child = [sys.executable, "-m", "benchmarks.contention", "--serve-network", folder, subject]
    for quota, selected in by_quota(conditions):
        with (
            within_quota(quota) as start,
            subprocess.Popen(
                start + child,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            ) as process,
        ):
            assert process.stdin is not None and process.stdout is not None
            if "ready\n" not in iter(process.stdout.readline, ""):  # after lines of the log
                raise RuntimeError(f"{subject} did not start")
            for condition in selected:
                with busy_programs(BUSY.get(condition, 0)):
                    for batch in BATCHES:
                        print(batch, seconds, file=process.stdin, flush=True)
                        times = np.array(json.loads(process.stdout.readline()))
                        yield {
                            "condition": condition,
                            "subject": subject,
                            "batch or connections": batch,
                            "images/s": batch * len(times) / times.sum(),
                            "p50 ms": float(np.percentile(times, 50) * 1e3),
                            "p99 ms": float(np.percentile(times, 99) * 1e3),
                            "errors": 0,
                        }
            process.stdin.close()


def service_rows(subject: str, conditions: Sequence[str], folder: str, seconds: float) -> Iterator[dict[str, Any]]:
    for quota, selected in by_quota(conditions):
        port = free_port()
        server = command("ours" if subject in VARIANTS else subject, folder, port)
        with within_quota(quota) as start, ExitStack() as stack:
            stack.enter_context(environment_variables(VARIANTS.get(subject, {})))
            url = f"http://127.0.0.1:{port}/classify"
            stack.enter_context(running(start + server, url))
            for condition in selected:
                with busy_programs(BUSY.get(condition, 0)):
                    for connections in CONNECTIONS:
                        latencies, errors, elapsed = asyncio.run(closed_loop(url, connections, seconds))
                        percentiles = quantiles(latencies, n=100)
                        yield {
                            "condition": condition,
                            "subject": f"{subject}, service",
                            "batch or connections": connections,
                            "images/s": len(latencies) / elapsed,
                            "p50 ms": percentiles[49],
                            "p99 ms": percentiles[98],
                            "errors": errors,
                        }


@contextmanager
def environment_variables(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def by_quota(conditions: Sequence[str]) -> list[tuple[float | None, list[str]]]:
    """Group conditions that one process can be measured under, each group with its quota."""
    without = [condition for condition in conditions if condition in BUSY]
    groups: list[tuple[float | None, list[str]]] = [(None, without)] if without else []
    return groups + [(QUOTAS[condition], [condition]) for condition in conditions if condition in QUOTAS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["network", "service"], default=["network", "service"])
    subjects = [*VARIANTS, *RUNTIMES, *PEERS]
    parser.add_argument("--subjects", nargs="+", choices=subjects, default=subjects)
    parser.add_argument("--conditions", nargs="+", choices=[*BUSY, *QUOTAS], default=[*BUSY, *QUOTAS])
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve-network", nargs=2, metavar=("FOLDER", "SUBJECT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_network:
        serve_network(*arguments.serve_network)
        return
    rows: list[dict[str, Any]] = []
    alone: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        DinatForImageClassification(DinatConfig.preset(arguments.preset)).save_pretrained(folder)
        DinatImageProcessor(size=224, resample=3).save_pretrained(folder)
        for part, measure, measured in (
            ("network", network_rows, [*VARIANTS, *RUNTIMES]),
            ("service", service_rows, [*VARIANTS, *PEERS]),
        ):
            for subject in arguments.subjects:
                if part not in arguments.parts or subject not in measured:
                    continue
                for row in measure(subject, arguments.conditions, folder, arguments.seconds):
                    key = (row["subject"], row["batch or connections"])
                    if row["condition"] == "alone":
                        alone[key] = row["images/s"]
                    rows.append(row | {"of alone": alone.get(key, float("nan")) / row["images/s"]})
                    print(rows[-1], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (row["batch or connections"], "service" in row["subject"]))
    report("On a shared CPU", rows, arguments.json)


if __name__ == "__main__":
    main()
