"""This service and its peers under the same load: the same network, the same pictures, in turns on loopback, in one run.

    python -m benchmarks.serving [--servers ours plain ...] [--seconds 15] [--overload 60] [--json FILE]

The network is DiNAT-Mini at 224 with random weights, the picture a 500x375 JPEG. Each server meets a closed loop of 1, 8
and 32 connections. Between the slices of each row the same is called directly, in a process with nothing else: decode,
preprocess and forward of one picture, and each part alone, forward also of 8. So every row has its own measure of the machine
beside it. `--overload` adds an open loop at 4 times this service's measured rate. The client shares the cores, as in every
row. Needs the extra `bench`.
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

from benchmarks.timing import report, take_turns
from dinat.app.doctor import photograph as picture
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor

CONNECTIONS = (1, 8, 32)
OURS = {
    "ours, torch fp32": ["--runtime", "torch", "--precision", "fp32"],
    "ours, OpenVINO": ["--runtime", "openvino"],
    "ours": [],
}
"""This service by the runtime that the peers have too, by OpenVINO, and as it comes."""
SLICES = 6
DIRECT_ROUNDS = 5
DEADLINE_SECONDS = 20


def save_network(folder: Path) -> None:
    torch.manual_seed(0)
    DinatForImageClassification(DinatConfig.preset("mini")).save_pretrained(folder)
    DinatImageProcessor(size=224, resample=3).save_pretrained(folder)


@functools.cache
def direct_calls(folder: str) -> dict[str, Callable[[], object]]:
    """What a server does for a picture, without a server: in whole, and by part."""
    network, processor = DinatForImageClassification.from_pretrained(folder), DinatImageProcessor.from_pretrained(folder)
    data = picture()
    pixels = {n: torch.from_numpy(np.stack([processor.resize(Image.open(io.BytesIO(data)))] * n)) for n in (1, 8)}

    @torch.inference_mode()
    def forward(n: int) -> None:
        network(processor.normalize(pixels[n])).logits.softmax(-1).topk(5)

    @torch.inference_mode()
    def whole() -> None:
        network(processor(Image.open(io.BytesIO(data)))).logits.softmax(-1).topk(5)

    return {"decode": lambda: processor.resize(Image.open(io.BytesIO(data))), "one": whole, "forward8": lambda: forward(8)}


def direct(folder: str) -> dict[str, float]:
    """Seconds of each direct call, in turns."""
    return take_turns(direct_calls(folder), rounds=DIRECT_ROUNDS)


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
def running(words: list[str], url: str) -> Iterator[psutil.Process]:
    """A server as a process of its own, ended with what it started."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
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
        until, last = time.monotonic() + 120, ""
        while time.monotonic() < until:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            try:
                async with session.post(url, data={"image": picture()}) as answer:
                    if answer.status == 200:
                        return
                    last = f"{answer.status} {(await answer.text())[:500]}"
            except aiohttp.ClientError as error:
                last = str(error)
            await asyncio.sleep(0.2)
    raise RuntimeError(f"{url} did not become ready: {last}")


async def ask(session: aiohttp.ClientSession, url: str, data: bytes) -> int:
    form = aiohttp.FormData()
    form.add_field("image", data, filename="picture.jpg", content_type="image/jpeg")
    try:
        async with session.post(url, data=form) as answer:
            await answer.read()
            return answer.status
    except (aiohttp.ClientError, TimeoutError):
        return 0


async def closed_loop(url: str, connections: int, seconds: float) -> tuple[list[float], int, float]:
    """Each connection asks again as soon as it has its answer. Latencies in ms, errors, and the seconds it took."""
    data, latencies, errors = picture(), [], 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections)) as session:
        await asyncio.gather(*(ask(session, url, data) for _ in range(connections)))
        started = time.monotonic()

        async def loop() -> None:
            nonlocal errors
            while time.monotonic() < started + seconds:
                asked = time.monotonic()
                if await ask(session, url, data) == 200:
                    latencies.append((time.monotonic() - asked) * 1e3)
                else:
                    errors += 1

        await asyncio.gather(*(loop() for _ in range(connections)))
        return latencies, errors, time.monotonic() - started


def row(
    server: str, connections: int, url: str, seconds: float, measure_direct: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    """A server under a closed loop, in slices, with the direct calls measured between them."""
    latencies: list[float] = []
    errors, taken, directs = 0, 0.0, [measure_direct()]
    for _ in range(SLICES):
        more, failed, slice_taken = asyncio.run(closed_loop(url, connections, seconds / SLICES))
        latencies, errors, taken = latencies + more, errors + failed, taken + slice_taken
        directs.append(measure_direct())
    parts = {name: mean(sample[name] for sample in directs) for name in directs[0]}
    possible = 1 / (parts["decode"] / len(os.sched_getaffinity(0)) + parts["forward8"] / 8)
    cuts = quantiles(latencies, n=100)
    return {
        "server": server,
        "connections": connections,
        "images/s": len(latencies) / taken,
        "p50 ms": cuts[49],
        "p99 ms": cuts[98],
        "errors": errors,
        "direct ms": parts["one"] * 1e3,
        "direct images/s": possible,
        "share of direct": len(latencies) / taken / possible,
    }


async def open_loop(url: str, rate: float, seconds: float, process: psutil.Process) -> dict[str, Any]:
    """Ask at a fixed rate whatever comes back; then ask again closed-loop, to see how soon full speed is back."""
    data, answers, memory, ready = picture(), [], [], []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> None:
            asked = time.monotonic()
            answers.append((await ask(session, url, data), time.monotonic() - asked))

        async def watch() -> None:
            while True:
                memory.append((time.monotonic() - started, resident(process)))
                async with session.get(url.replace("/classify", "/health/ready")) as answer:
                    ready.append(answer.status)
                await asyncio.sleep(1)

        started = time.monotonic()
        watching = asyncio.create_task(watch())
        asking = []
        for n in range(int(rate * seconds)):
            await asyncio.sleep(max(0, started + n / rate - time.monotonic()))
            asking.append(asyncio.create_task(one()))
        await asyncio.gather(*asking)
        watching.cancel()
        ended = time.monotonic()
        while await ask(session, url, data) != 200:
            await asyncio.sleep(0.1)
        back = time.monotonic() - ended
    statuses = [status for status, _ in answers]
    accepted = [taken for status, taken in answers if status == 200]
    flat = [size for at, size in memory if at > 10]
    return {
        "asked": len(answers),
        "asked/s": rate,
        "200": statuses.count(200),
        "503": statuses.count(503),
        "504": statuses.count(504),
        "other": len(statuses) - statuses.count(200) - statuses.count(503) - statuses.count(504),
        "accepted p99 s": quantiles(accepted, n=100)[98],
        "deadline s": DEADLINE_SECONDS,
        "MB after 10 s": round(flat[0] / 1e6),
        "MB at the end": round(flat[-1] / 1e6),
        "ready always": set(ready) == {200},
        "seconds to recover": back,
    }


def resident(process: psutil.Process) -> int:
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
        best = {row["connections"]: row["share of direct"] for row in rows if row["server"] == "ours, torch fp32"}
        for measured in rows:
            measured["ours, torch / it"] = best.get(measured["connections"], float("nan")) / measured["share of direct"]
        report("Closed loop", rows, arguments.json)


if __name__ == "__main__":
    main()
