"""This service and its peers under the same load: same network, same images, on loopback, in one run.

    python -m benchmarks.serving [--servers ours plain ...] [--seconds 15] [--overload 60] [--json FILE]

The network is DiNAT-Mini at 224 with random weights, the image a 500x375 JPEG. Each server gets a closed loop of 1, 8 and 32
connections. Between the slices of each row, direct calls are measured in a process without a server: decode, preprocess and
forward of one image together, decode alone, and forward of 8. So every row has its own baseline for the machine's speed.
`--overload` adds an open loop at 4 times this service's measured rate. The client shares the server's cores in every row.
Requires the extra `bench`.
"""

import argparse
import asyncio
import functools
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.timing import median_seconds, report
from dinat.app.measurements import photograph
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor

CONNECTIONS = (1, 8, 32)
OURS = {
    "ours, torch fp32": ["--runtime", "torch", "--precision", "fp32"],
    "ours, OpenVINO": ["--runtime", "openvino"],
    "ours": [],
}
"""Flags of this service: with the peers' runtime, with OpenVINO, and with the default."""
SLICES = 6
DIRECT_ROUNDS = 5
DEADLINE_SECONDS = 20


def save_network(folder: Path) -> None:
    torch.manual_seed(0)
    DinatForImageClassification(DinatConfig.preset("mini")).save_pretrained(folder)
    DinatImageProcessor(size=224, resample=3).save_pretrained(folder)


@functools.cache
def direct_calls(folder: str) -> dict[str, Callable[[], object]]:
    """Return the work for an image without a server: decoding, all for one image, and forward for 8."""
    network, processor = DinatForImageClassification.from_pretrained(folder), DinatImageProcessor.from_pretrained(folder)
    data = photograph()
    pixels = {n: torch.from_numpy(np.stack([processor.resize(Image.open(io.BytesIO(data)))] * n)) for n in (1, 8)}

    @torch.inference_mode()
    def forward(n: int) -> None:
        network(processor.normalize(pixels[n])).logits.softmax(-1).topk(5)

    @torch.inference_mode()
    def one() -> None:
        network(processor(Image.open(io.BytesIO(data)))).logits.softmax(-1).topk(5)

    return {"decode": lambda: processor.resize(Image.open(io.BytesIO(data))), "one": one, "forward8": lambda: forward(8)}


def direct(folder: str) -> dict[str, float]:
    """Return the median seconds of each direct call."""
    return median_seconds(direct_calls(folder), rounds=DIRECT_ROUNDS)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command(server: str, folder: str, port: int) -> list[str]:
    if server in OURS:
        flags = [
            *OURS[server],
            "--model",
            folder,
            "--port",
            str(port),
            "--queue-limit",
            "64",
            "--deadline-ms",
            str(DEADLINE_SECONDS * 1000),
        ]
        return [sys.executable, "-m", "dinat", "serve", *flags]
    return [sys.executable, "-m", f"benchmarks.peers.{server}", folder, str(port)]


@contextmanager
def running(command: list[str], url: str) -> Iterator[psutil.Process]:
    """Run a server in another process, ready, and end it with all its child processes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        asyncio.run(until_ready(url, process))
        yield psutil.Process(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


async def until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    async with aiohttp.ClientSession() as session:
        deadline, last = time.monotonic() + 120, ""
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the server exited with status {process.returncode}")
            try:
                async with session.post(url, data={"image": photograph()}) as response:
                    if response.status == 200:
                        return
                    last = f"{response.status} {(await response.text())[:500]}"
            except aiohttp.ClientError as error:
                last = str(error)
            await asyncio.sleep(0.2)
    raise RuntimeError(f"{url} did not become ready: {last}")


async def post_image(session: aiohttp.ClientSession, url: str, data: bytes) -> int:
    """Send an image as a form, and return the response's status; 0 if there is no response."""
    form = aiohttp.FormData()
    form.add_field("image", data, filename="image.jpg", content_type="image/jpeg")
    try:
        async with session.post(url, data=form) as response:
            await response.read()
            return response.status
    except (aiohttp.ClientError, TimeoutError):
        return 0


async def closed_loop(url: str, connections: int, seconds: float) -> tuple[list[float], int, float]:
    """Send requests: each connection sends the next one as soon as it has a response.

    Returns:
        Latencies in ms of responses with status 200, the number of other outcomes, and the seconds elapsed.
    """
    data, latencies, errors = photograph(), [], 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections)) as session:
        await asyncio.gather(*(post_image(session, url, data) for _ in range(connections)))
        start = time.monotonic()

        async def connection() -> None:
            nonlocal errors
            while time.monotonic() < start + seconds:
                sent = time.monotonic()
                if await post_image(session, url, data) == 200:
                    latencies.append((time.monotonic() - sent) * 1e3)
                else:
                    errors += 1

        await asyncio.gather(*(connection() for _ in range(connections)))
        return latencies, errors, time.monotonic() - start


def row(
    server: str, connections: int, url: str, seconds: float, measure_direct: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    """Measure a server under a closed loop, in slices, with direct calls measured between them."""
    latencies: list[float] = []
    errors, elapsed, samples = 0, 0.0, [measure_direct()]
    for _ in range(SLICES):
        slice_latencies, slice_errors, slice_elapsed = asyncio.run(closed_loop(url, connections, seconds / SLICES))
        latencies, errors, elapsed = latencies + slice_latencies, errors + slice_errors, elapsed + slice_elapsed
        samples.append(measure_direct())
    direct_seconds = {name: mean(sample[name] for sample in samples) for name in samples[0]}
    direct_rate = 1 / (direct_seconds["decode"] / len(os.sched_getaffinity(0)) + direct_seconds["forward8"] / 8)
    percentiles = quantiles(latencies, n=100)
    return {
        "server": server,
        "connections": connections,
        "images/s": len(latencies) / elapsed,
        "p50 ms": percentiles[49],
        "p99 ms": percentiles[98],
        "errors": errors,
        "direct ms": direct_seconds["one"] * 1e3,
        "direct images/s": direct_rate,
        "share of direct": len(latencies) / elapsed / direct_rate,
    }


async def open_loop(url: str, rate: float, seconds: float, process: psutil.Process) -> dict[str, Any]:
    """Send requests at a fixed rate, whatever the responses; then measure how soon a request succeeds again."""
    data, outcomes, memory, ready = photograph(), [], [], []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def send() -> None:
            sent = time.monotonic()
            outcomes.append((await post_image(session, url, data), time.monotonic() - sent))

        async def watch() -> None:
            while True:
                memory.append((time.monotonic() - start, resident(process)))
                async with session.get(url.replace("/classify", "/health/ready")) as response:
                    ready.append(response.status)
                await asyncio.sleep(1)

        start = time.monotonic()
        watcher = asyncio.create_task(watch())
        requests = []
        for n in range(int(rate * seconds)):
            await asyncio.sleep(max(0, start + n / rate - time.monotonic()))
            requests.append(asyncio.create_task(send()))
        await asyncio.gather(*requests)
        watcher.cancel()
        end = time.monotonic()
        while await post_image(session, url, data) != 200:
            await asyncio.sleep(0.1)
        recovery = time.monotonic() - end
    statuses = [status for status, _ in outcomes]
    accepted = [latency for status, latency in outcomes if status == 200]
    sizes = [size for elapsed, size in memory if elapsed > 10]
    return {
        "requests": len(outcomes),
        "requests/s": rate,
        "200": statuses.count(200),
        "503": statuses.count(503),
        "504": statuses.count(504),
        "other": len(statuses) - statuses.count(200) - statuses.count(503) - statuses.count(504),
        "accepted p99 s": quantiles(accepted, n=100)[98],
        "deadline s": DEADLINE_SECONDS,
        "MB after 10 s": round(sizes[0] / 1e6),
        "MB at the end": round(sizes[-1] / 1e6),
        "always ready": set(ready) == {200},
        "seconds to recover": recovery,
    }


def resident(process: psutil.Process) -> int:
    """Return the resident bytes of a process and its child processes."""
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", default=[*OURS, "plain", "lit", "rayserve"])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--overload", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        save_network(Path(folder))
        rows: list[dict[str, Any]] = []
        for server in arguments.servers:
            port = free_port()
            url = f"http://127.0.0.1:{port}/classify"
            with running(command(server, folder, port), url) as process:
                for connections in CONNECTIONS:
                    measured = row(server, connections, url, arguments.seconds, lambda: pool.apply(direct, (folder,)))
                    rows.append(measured | {"MB": round(resident(process) / 1e6)})
                    print(rows[-1], flush=True)
                if server == "ours" and arguments.overload:
                    rate = 4 * max(row["images/s"] for row in rows if row["server"] == server)
                    overload = asyncio.run(open_loop(url, rate, arguments.overload, process))
                    report(
                        "Open loop at 4 times capacity",
                        [overload],
                        arguments.json and arguments.json.with_suffix(".overload.json"),
                    )
        ours = {row["connections"]: row["share of direct"] for row in rows if row["server"] == "ours, torch fp32"}
        for measured in rows:
            measured["speedup of ours, torch"] = ours.get(measured["connections"], float("nan")) / measured["share of direct"]
        report("Closed loop", rows, arguments.json)


if __name__ == "__main__":
    main()
