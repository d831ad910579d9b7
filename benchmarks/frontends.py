"""Overhead of the service besides the network: one process and several, with a fake GPU, under wrk.

    python -m benchmarks.frontends [--seconds 10] [--overload 60] [--json FILE]

Requires wrk (Debian's package) and the extra `bench`. Measures, in this order:
- the engine process alone: images are put into shared memory and sent as a frontend process does it, 256 in flight; its CPU
  time per image, for GPUs of several speeds;
- the whole service with a fake GPU (benchmarks.fake_gpu), FRONTENDS 1 and 2 interleaved: images per second, and CPU time per
  request of frontend processes, engine process and client, without decoding (the cost of handling a request) and with a 500x375
  JPEG;
- from these, computed, the CPU cores that a GPU of each speed requires;
- one connection to the real digits model: what the service adds to decode and compute;
- --overload: 500 closed-loop connections to the real digits model, for so many seconds.
"""

import argparse
import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.fake_gpu import use_fake_gpu
from benchmarks.serving import free_port
from benchmarks.timing import report
from dinat.app.engine.events import BackendEvents
from dinat.app.engine.job import Job
from dinat.app.engine.multiprocess.engine_client import EngineClient
from dinat.app.engine.multiprocess.engine_process import EngineProcess
from dinat.app.engine.runtimes.runtime import InferenceOptions, InferenceResult
from dinat.app.measurements import photograph
from dinat.app.metrics import Metrics
from dinat.app.server.supervisor import FORK
from dinat.app.settings import Settings

ROOT = Path(__file__).parents[1]
DIGIT = ROOT / "examples" / "digits" / "7-1.png"
GPU_RATES = (2_000, 10_000, 20_000)
"""Images per second of the fake GPUs."""
IN_FLIGHT = 256
CONNECTIONS = 64

WRK = """
local file = io.open(os.getenv("IMAGE"), "rb")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Content-Type"] = "application/octet-stream"
"""


@dataclass(frozen=True)
class Load:
    """What wrk measured.

    Attributes:
        requests: requests completed.
        rate: requests per second.
        p50: median latency in milliseconds.
        p99: 99th percentile of latency in milliseconds.
        non_200: responses with another status.
        socket_errors: connections that failed, were cut or timed out, in wrk's words; "none" without.
        cpu: CPU seconds of wrk.
    """

    requests: int
    rate: float
    p50: float
    p99: float
    non_200: int
    socket_errors: str
    cpu: float


def wrk(url: str, image: Path, connections: int, seconds: float) -> Load:
    """Run wrk, a closed loop: each connection sends the next request as soon as it has a response."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK)
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", script.name, url]
        before = os.times()
        completed = subprocess.run(command, env={**os.environ, "IMAGE": str(image)}, capture_output=True, text=True, check=True)
        after = os.times()
    output = completed.stdout

    def number(pattern: str) -> float:
        match = re.search(pattern, output)
        return float(match[1]) if match else 0

    def milliseconds(percent: int) -> float:
        value, unit = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)", output).groups()  # type: ignore[union-attr]
        return float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]

    socket_errors = re.search(r"Socket errors: (.*)", output)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Load(
        int(number(r"(\d+) requests in")),
        number(r"Requests/sec:\s+([\d.]+)"),
        milliseconds(50),
        milliseconds(99),
        int(number(r"Non-2xx or 3xx responses: (\d+)")),
        socket_errors[1] if socket_errors else "none",
        cpu,
    )


@contextmanager
def serving(module: Sequence[str], **settings: object) -> Iterator[str]:
    """Run `python -m` with a server in another process, and yield its URL when it is ready."""
    port = free_port()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    environment = {**os.environ, "DINAT_LOG_FORMAT": "json"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module, *flags, "--port", str(port)], stdout=log, stderr=log, env=environment, cwd=ROOT
        )
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 60
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"the server did not become ready: {log.read().decode()}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


def metrics(url: str) -> dict[str, float]:
    """Return the value of every metric, by its name and labels."""
    text = httpx.get(f"{url}/metrics").text
    return {
        f"{sample.name}{sample.labels or ''}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def cpu(url: str) -> dict[str, float]:
    """Return the CPU seconds of frontend and engine processes; those of a single process as "frontend"."""
    spent: dict[str, float] = {"frontend": 0, "engine": 0}
    for name, value in metrics(url).items():
        if name.startswith("process_cpu_seconds_total") and "supervisor" not in name:
            spent["engine" if "engine" in name else "frontend"] += value
    return spent


def engine_row(rate: float, seconds: float) -> dict[str, Any]:
    """Measure the engine process alone, with this process as its client."""
    settings = Settings(_env_file=None, queue_limit=IN_FLIGHT, deadline_ms=600_000)
    assert FORK is not None
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{folder}/engine")
        listener.listen()
        read_end, write_end = os.pipe()  # the engine process ends when the write end is closed
        child = FORK.Process(target=_engine, args=(rate, settings, listener, read_end, write_end))
        child.start()
        try:
            row = asyncio.run(_feed(settings, f"{folder}/engine", child.pid or 0, seconds))
        finally:
            os.close(write_end)
            child.join()
    return {"GPU images/s": "no limit" if rate > 1e6 else rate} | row


def _engine(rate: float, settings: Settings, listener: socket.socket, read_end: int, write_end: int) -> None:
    os.close(write_end)
    use_fake_gpu(rate)
    sys.exit(asyncio.run(EngineProcess(settings, Metrics(), listener, read_end, lambda _: None, 1).run()))


async def _feed(settings: Settings, address: str, pid: int, seconds: float) -> dict[str, Any]:
    """Keep IN_FLIGHT images in flight, and measure."""
    loop = asyncio.get_running_loop()
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    completed, stopping = 0, False

    class Feeder(BackendEvents):
        """Replaces every job that ended by a new one."""

        def on_batch_start(self, batch: Sequence[Job]) -> None:
            pass

        def on_results(self, jobs: Sequence[Job], results: Sequence[InferenceResult | Exception]) -> None:
            nonlocal completed
            if not stopping:
                assert all(isinstance(result, InferenceResult) for result in results), results[0]
                completed += len(jobs)
                loop.call_soon(submit, len(jobs))

        async def on_state_change(self) -> None:
            pass

    client = EngineClient(settings, Metrics(), Feeder(), address)

    def submit(count: int) -> None:
        now = time.monotonic()
        jobs = [Job(InferenceOptions(5), now, now + 600, pixels=pixels, decoded=now) for _ in range(count)]
        assert client.reserve(jobs)
        for job in jobs:
            client.put(job)

    await client.start()
    engine = psutil.Process(pid)
    submit(IN_FLIGHT)
    await asyncio.sleep(1)
    first, before, start = completed, engine.cpu_times(), time.monotonic()
    await asyncio.sleep(seconds)
    images, after, elapsed = completed - first, engine.cpu_times(), time.monotonic() - start
    spent = after.user + after.system - before.user - before.system
    stopping = True
    await client.stop()
    return {"images/s": images / elapsed, "engine us/image": spent / images * 1e6, "engine cores": spent / elapsed}


def service_rows(rate: float, decode: bool, image: Path, seconds: float) -> list[dict[str, Any]]:
    """Measure FRONTENDS 1 and 2 with a fake GPU, interleaved."""
    module = ["benchmarks.fake_gpu", str(rate), *([] if decode else ["--no-decode"])]
    with serving(module, frontends=1) as one, serving(module, frontends=2) as two:
        rows = []
        for _ in range(2):
            for frontends, url in ((1, one), (2, two)):
                wrk(f"{url}/classify", image, CONNECTIONS, 1)
                cpu_before, metrics_before = cpu(url), metrics(url)
                load = wrk(f"{url}/classify", image, CONNECTIONS, seconds)
                cpu_after, metrics_after = cpu(url), metrics(url)
                count = "dinat_batch_size_images_count"
                batches = metrics_after[count] - metrics_before[count]
                rows.append(
                    {
                        "frontends": frontends,
                        "GPU images/s": rate,
                        "image": "JPEG 500x375" if decode else "not decoded",
                        "images/s": load.rate,
                        "p50 ms": load.p50,
                        "p99 ms": load.p99,
                        "non-200": load.non_200,
                        "socket errors": load.socket_errors,
                        "batch": load.requests / batches,
                        **{
                            f"{process} us/request": (cpu_after[process] - cpu_before[process]) / load.requests * 1e6
                            for process in cpu_after
                        },
                        "client us/request": load.cpu / load.requests * 1e6,
                    }
                )
        predictions = [_predictions(url, decode) for url in (one, two)]
        assert predictions[0] == predictions[1], "one process and several return different predictions"
    return rows


def _predictions(url: str, decode: bool) -> list[Any]:
    files = (
        [photograph()] if not decode else [photograph(), *(path.read_bytes() for path in sorted(DIGIT.parent.glob("*.png")))]
    )
    return [httpx.post(f"{url}/classify", content=data).json()["predictions"] for data in files]


def sizing(engine: Sequence[dict[str, Any]], service: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compute the CPU cores for a GPU of each speed: images per second times CPU time per image, by process."""
    rows = []
    for rate in GPU_RATES:
        per_image = next(row["engine us/image"] for row in engine if row["GPU images/s"] == rate)
        row: dict[str, Any] = {"GPU images/s": rate, "engine cores": rate * per_image / 1e6}
        for image in ("not decoded", "JPEG 500x375"):
            per_request = [row["frontend us/request"] for row in service if row["image"] == image and row["frontends"] == 2]
            row[f"frontend cores, {image}"] = rate * mean(per_request) / 1e6
        rows.append(row)
    return rows


def added_row(seconds: float) -> dict[str, Any]:
    """Measure one connection to the real digits model, with a minimal client."""
    with serving(["dinat", "serve"], frontends=1) as url:
        host, port = url.removeprefix("http://").split(":")
        body = DIGIT.read_bytes()
        request = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def send() -> float:
                start = time.perf_counter()
                connection.sendall(request)
                response = b""
                while not response.endswith(b"}"):
                    response += connection.recv(65536)
                assert response.startswith(b"HTTP/1.1 200"), response
                return time.perf_counter() - start

            for _ in range(300):
                send()
            before, deadline = metrics(url), time.monotonic() + seconds
            latencies = []
            while time.monotonic() < deadline:
                latencies.append(send())
            after = metrics(url)

        def part(name: str) -> float:
            sample = f"dinat_part_duration_seconds_sum{ {'part': name} }"
            return (after[sample] - before[sample]) / len(latencies) * 1e3

        return {
            "requests": len(latencies),
            "mean ms": mean(latencies) * 1e3,
            "p50 ms": median(latencies) * 1e3,
            "decode ms": part("decode"),
            "compute ms": part("compute"),
            "added ms": mean(latencies) * 1e3 - part("decode") - part("compute"),
        }


def overload_row(seconds: float, **settings: object) -> dict[str, Any]:
    """Measure 500 closed-loop connections, with another one that measures the latency of accepted requests."""
    with serving(["dinat", "serve"], queue_limit=64, deadline_ms=2000, **settings) as url:
        endpoint = f"{url}/classify"
        wrk(endpoint, DIGIT, 32, 3)
        capacity_before = wrk(endpoint, DIGIT, 32, 10).rate
        before = metrics(url)
        processes = [psutil.Process(pid) for pid in _pids(url)]
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.frontends", "--probe", endpoint, "--seconds", str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as probe:
            memory: list[int] = []
            stop = threading.Event()

            def record_memory() -> None:
                while not stop.wait(1):
                    memory.append(sum(process.memory_info().rss for process in processes))

            recorder = threading.Thread(target=record_memory)
            recorder.start()
            start = time.monotonic()
            load = wrk(endpoint, DIGIT, 500, seconds)
            elapsed = time.monotonic() - start
            stop.set()
            recorder.join()
            accepted = [float(word) for word in probe.stdout.read().split()] if probe.stdout else []
        after = metrics(url)
        rate_after = wrk(endpoint, DIGIT, 32, 2).rate
        capacity = mean([capacity_before, wrk(endpoint, DIGIT, 32, 10).rate])  # the machine's speed varies
        statuses = {
            status: after.get(key, 0) - before.get(key, 0)
            for status in ("200", "503", "504", "500", "499")
            if (key := f"dinat_requests_total{ {'route': '/classify', 'status': status} }")
        }
        return {
            **{name: str(value) for name, value in settings.items()},
            "capacity/s": capacity,
            "200/s": statuses["200"] / elapsed,
            "goodput": statuses["200"] / elapsed / capacity,
            "503/s": statuses["503"] / elapsed,
            "504": statuses["504"],
            "other": statuses["500"] + statuses["499"],
            "socket errors": load.socket_errors,
            "accepted p50 ms": median(accepted),
            "accepted p99 ms": quantiles(accepted, n=100)[98],
            "MB after a sixth": memory[len(memory) // 6] / 1e6,
            "MB at the end": memory[-1] / 1e6,
            "share of capacity 2 s after": rate_after / capacity,
        }


def _pids(url: str) -> list[int]:
    processes = httpx.get(f"{url}/health").json().get("processes")
    if processes:
        return [process["pid"] for process in processes]
    port = int(url.rpartition(":")[2])
    return [
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.laddr and connection.laddr.port == port and connection.status == "LISTEN" and connection.pid
    ][:1]


async def probe(url: str, seconds: float) -> list[float]:
    """Return the latency in milliseconds of every 200, of one closed-loop connection."""
    accepted: list[float] = []
    data, deadline = DIGIT.read_bytes(), time.monotonic() + seconds

    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            start = time.monotonic()
            async with session.post(url, data=data) as response:
                await response.read()
                if response.status == 200:
                    accepted.append((time.monotonic() - start) * 1e3)
    return accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--overload", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--probe", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        print(*asyncio.run(probe(arguments.probe, arguments.seconds)))
        return
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: apt-get install wrk")

    def json_file(name: str) -> Path | None:
        return arguments.json and arguments.json.with_suffix(f".{name}.json")

    with tempfile.TemporaryDirectory() as folder:
        jpeg = Path(folder) / "image.jpg"
        jpeg.write_bytes(photograph())
        engine = [engine_row(rate, arguments.seconds) for rate in (*GPU_RATES, 1e9)]
        report("The engine process", engine, json_file("engine"))
        service = [
            row
            for decode in (False, True)
            for row in service_rows(10_000, decode, jpeg if decode else DIGIT, arguments.seconds)
        ]
        report("One process and several, fake GPU", service, json_file("service"))
        report("CPU cores per GPU, computed", sizing(engine, service), json_file("sizing"))
        report("One connection, digits", [added_row(arguments.seconds)], json_file("added"))
        if arguments.overload:
            rows = [overload_row(arguments.overload, frontends=n) for n in (1, 2)]
            report("Overload: 500 closed-loop connections, digits", rows, json_file("overload"))


if __name__ == "__main__":
    main()
