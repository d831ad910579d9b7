"""What the service costs beside the network: one process and several, before a stand-in for a card, under wrk.

    python -m benchmarks.frontends [--seconds 10] [--overload 60] [--json FILE]

Needs wrk (Debian's package) and the extra `bench`. Measured, in this order:
- the engine process alone: pictures are put into shared memory and sent as a front end does it, 256 under way at once; what its
  CPU does for each, before cards of several speeds;
- the whole service before a stand-in (benchmarks.fake_gpu), FRONTENDS 1 and 2 in turns: pictures a second, and CPU for each of
  front ends, engine and client, without decoding (what the way of a request costs) and with a 500x375 JPEG;
- from these, by arithmetic, the cores that a card of each speed needs;
- one connection to the real digits model: what the service adds to decode and compute;
- --overload: 500 connections that come back at once, so many seconds, to the real digits model.
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

from benchmarks.fake_gpu import stand_in
from benchmarks.serving import free_port
from benchmarks.timing import report
from dinat.app.doctor import photograph
from dinat.app.engine.batcher import Job
from dinat.app.engine.multiprocess.engine_client import EngineClient
from dinat.app.engine.multiprocess.engine_process import EngineProcess
from dinat.app.engine.runtimes.runtime import InferenceOptions, InferenceResult
from dinat.app.metrics import Metrics
from dinat.app.server.supervisor import FORK
from dinat.app.settings import Settings

ROOT = Path(__file__).parents[1]
DIGIT = ROOT / "examples" / "digits" / "7-1.png"
CARDS = (2_000, 10_000, 20_000)
"""Pictures a second of the cards that are stood in for."""
UNDER_WAY = 256
CONNECTIONS = 64

WRK = """
local file = io.open(os.getenv("PICTURE"), "rb")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Content-Type"] = "application/octet-stream"
"""


@dataclass(frozen=True)
class Load:
    """What wrk saw. p50, p99: milliseconds.  broken: connections that were not made, were cut or timed out."""

    requests: int
    rate: float
    p50: float
    p99: float
    refused: int
    broken: str
    cpu: float


def wrk(url: str, picture: Path, connections: int, seconds: float) -> Load:
    """A closed loop: each connection asks again as soon as it has its answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK)
        script.flush()
        words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", script.name, url]
        before = os.times()
        done = subprocess.run(words, env={**os.environ, "PICTURE": str(picture)}, capture_output=True, text=True, check=True)
        after = os.times()
    said = done.stdout

    def number(pattern: str) -> float:
        found = re.search(pattern, said)
        return float(found[1]) if found else 0

    def milliseconds(percent: int) -> float:
        value, unit = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)", said).groups()  # type: ignore[union-attr]
        return float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]

    broken = re.search(r"Socket errors: (.*)", said)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Load(
        int(number(r"(\d+) requests in")),
        number(r"Requests/sec:\s+([\d.]+)"),
        milliseconds(50),
        milliseconds(99),
        int(number(r"Non-2xx or 3xx responses: (\d+)")),
        broken[1] if broken else "none",
        cpu,
    )


@contextmanager
def serving(words: Sequence[str], **settings: object) -> Iterator[str]:
    """A server as a process of its own, ready; its address."""
    port = free_port()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    environment = {**os.environ, "DINAT_LOG_FORMAT": "json"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *words, *flags, "--port", str(port)], stdout=log, stderr=log, env=environment, cwd=ROOT
        )
        url = f"http://127.0.0.1:{port}"
        try:
            until = time.monotonic() + 60
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > until:
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
    """Every sample, by its name and labels."""
    text = httpx.get(f"{url}/metrics").text
    return {
        f"{sample.name}{sample.labels or ''}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def cpu(url: str) -> dict[str, float]:
    """CPU seconds so far of front ends and engine; of the one process, where there is but one, as "front"."""
    said = metrics(url)
    spent: dict[str, float] = {"front": 0, "engine": 0}
    for name, value in said.items():
        if name.startswith("process_cpu_seconds_total") and "supervisor" not in name:
            spent["engine" if "engine" in name else "front"] += value
    return spent


def engine_row(rate: float, seconds: float) -> dict[str, Any]:
    """The engine process alone, fed from this one."""
    settings = Settings(_env_file=None, queue_limit=UNDER_WAY, deadline_ms=600_000)
    assert FORK is not None
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as doors:
        doors.bind(f"{folder}/engine")
        doors.listen()
        end, life = os.pipe()
        child = FORK.Process(target=_engine, args=(rate, settings, doors, end, life))
        child.start()
        try:
            fed = asyncio.run(_feed(settings, f"{folder}/engine", child.pid or 0, seconds))
        finally:
            os.close(life)
            child.join()
    return {"card, pictures/s": "no limit" if rate > 1e6 else rate} | fed


def _engine(rate: float, settings: Settings, doors: socket.socket, lifeline: int, life: int) -> None:
    os.close(life)
    stand_in(rate)
    sys.exit(asyncio.run(EngineProcess(settings, Metrics(), doors, lifeline, lambda _: None, 1).run()))


async def _feed(settings: Settings, address: str, pid: int, seconds: float) -> dict[str, Any]:
    """Keep UNDER_WAY pictures under way."""
    loop = asyncio.get_running_loop()
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    done, over = 0, False

    def answered(jobs: Sequence[Job], answers: Sequence[InferenceResult | Exception]) -> None:
        nonlocal done
        if not over:
            assert all(isinstance(answer, InferenceResult) for answer in answers), answers[0]
            done += len(jobs)
            loop.call_soon(feed, len(jobs))

    core = EngineClient(settings, Metrics(), answered, address)

    def feed(count: int) -> None:
        now = time.monotonic()
        jobs = [Job(InferenceOptions(5), now, now + 600, pixels=pixels, decoded=now) for _ in range(count)]
        assert core.take(jobs)
        for job in jobs:
            core.put(job)

    await core.start()
    engine = psutil.Process(pid)
    feed(UNDER_WAY)
    await asyncio.sleep(1)
    first, before, started = done, engine.cpu_times(), time.monotonic()
    await asyncio.sleep(seconds)
    pictures, after, taken = done - first, engine.cpu_times(), time.monotonic() - started
    spent = after.user + after.system - before.user - before.system
    over = True
    await core.stop()
    return {"pictures/s": pictures / taken, "engine us/picture": spent / pictures * 1e6, "engine cores": spent / taken}


def service_rows(rate: float, decode: bool, picture: Path, seconds: float) -> list[dict[str, Any]]:
    """FRONTENDS 1 and 2 before a stand-in, in turns."""
    words = ["benchmarks.fake_gpu", str(rate), *([] if decode else ["--no-decode"])]
    with serving(words, frontends=1) as one, serving(words, frontends=2) as two:
        rows = []
        for _ in range(2):
            for frontends, url in ((1, one), (2, two)):
                wrk(f"{url}/classify", picture, CONNECTIONS, 1)
                before, counted = cpu(url), metrics(url)
                load = wrk(f"{url}/classify", picture, CONNECTIONS, seconds)
                after, now = cpu(url), metrics(url)
                batches = now["dinat_batch_size_images_count"] - counted["dinat_batch_size_images_count"]
                rows.append(
                    {
                        "frontends": frontends,
                        "card, pictures/s": rate,
                        "picture": "JPEG 500x375" if decode else "not decoded",
                        "pictures/s": load.rate,
                        "p50 ms": load.p50,
                        "p99 ms": load.p99,
                        "not 200": load.refused,
                        "broken": load.broken,
                        "batch": load.requests / batches,
                        **{f"{who} us/request": (after[who] - before[who]) / load.requests * 1e6 for who in after},
                        "client us/request": load.cpu / load.requests * 1e6,
                    }
                )
        answers = [_predictions(url, decode) for url in (one, two)]
        assert answers[0] == answers[1], "one process and several answer differently"
    return rows


def _predictions(url: str, decode: bool) -> list[Any]:
    files = (
        [photograph()] if not decode else [photograph(), *(path.read_bytes() for path in sorted(DIGIT.parent.glob("*.png")))]
    )
    return [httpx.post(f"{url}/classify", content=data).json()["predictions"] for data in files]


def sizing(engine: Sequence[dict[str, Any]], service: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cores for each card: pictures a second times CPU for each, of the front ends and of the engine."""
    rows = []
    for card in CARDS:
        per_picture = next(row["engine us/picture"] for row in engine if row["card, pictures/s"] == card)
        row: dict[str, Any] = {"card, pictures/s": card, "engine cores": card * per_picture / 1e6}
        for what in ("not decoded", "JPEG 500x375"):
            each = [row["front us/request"] for row in service if row["picture"] == what and row["frontends"] == 2]
            row[f"front-end cores, {what}"] = card * mean(each) / 1e6
        rows.append(row)
    return rows


def added_row(seconds: float) -> dict[str, Any]:
    """One connection to the real digits model, by a client that has nothing else to do."""
    with serving(["dinat", "serve"], frontends=1) as url:
        host, port = url.removeprefix("http://").split(":")
        body = DIGIT.read_bytes()
        request = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def ask() -> float:
                started = time.perf_counter()
                connection.sendall(request)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += connection.recv(65536)
                assert answer.startswith(b"HTTP/1.1 200"), answer
                return time.perf_counter() - started

            for _ in range(300):
                ask()
            before, until = metrics(url), time.monotonic() + seconds
            taken = []
            while time.monotonic() < until:
                taken.append(ask())
            after = metrics(url)

        def part(name: str) -> float:
            sample = f"dinat_part_duration_seconds_sum{ {'part': name} }"
            return (after[sample] - before[sample]) / len(taken) * 1e3

        return {
            "requests": len(taken),
            "mean ms": mean(taken) * 1e3,
            "p50 ms": median(taken) * 1e3,
            "decode ms": part("decode"),
            "compute ms": part("compute"),
            "added ms": mean(taken) * 1e3 - part("decode") - part("compute"),
        }


def overload_row(seconds: float, **settings: object) -> dict[str, Any]:
    """500 connections that come back at once; beside them one that measures how long an answer takes."""
    with serving(["dinat", "serve"], queue_limit=64, deadline_ms=2000, **settings) as url:
        door = f"{url}/classify"
        wrk(door, DIGIT, 32, 3)
        capacity_before = wrk(door, DIGIT, 32, 10).rate
        before = metrics(url)
        processes = [psutil.Process(pid) for pid in _pids(url)]
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.frontends", "--probe", door, "--seconds", str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as probe:
            memory: list[int] = []
            over = threading.Event()

            def watch() -> None:
                while not over.wait(1):
                    memory.append(sum(process.memory_info().rss for process in processes))

            watching = threading.Thread(target=watch)
            watching.start()
            start = time.monotonic()
            load = wrk(door, DIGIT, 500, seconds)
            ended = time.monotonic()
            over.set()
            watching.join()
            accepted = [float(word) for word in probe.stdout.read().split()] if probe.stdout else []
        after = metrics(url)
        back = wrk(door, DIGIT, 32, 2).rate
        capacity = mean([capacity_before, wrk(door, DIGIT, 32, 10).rate])  # the machine's own speed wanders
        statuses = {
            status: after.get(key, 0) - before.get(key, 0)
            for status in ("200", "503", "504", "500", "499")
            if (key := f"dinat_requests_total{ {'route': '/classify', 'status': status} }")
        }
        return {
            **{name: str(value) for name, value in settings.items()},
            "capacity/s": capacity,
            "200/s": statuses["200"] / (ended - start),
            "goodput": statuses["200"] / (ended - start) / capacity,
            "503/s": statuses["503"] / (ended - start),
            "504": statuses["504"],
            "other": statuses["500"] + statuses["499"],
            "broken": load.broken,
            "accepted p50 ms": median(accepted),
            "accepted p99 ms": quantiles(accepted, n=100)[98],
            "MB early": memory[len(memory) // 6] / 1e6,
            "MB at the end": memory[-1] / 1e6,
            "speed in the 2 s after": back / capacity,
        }


def _pids(url: str) -> list[int]:
    said = httpx.get(f"{url}/health").json().get("processes")
    if said:
        return [one["pid"] for one in said]
    port = int(url.rpartition(":")[2])
    return [
        one.pid
        for one in psutil.net_connections("tcp")
        if one.laddr and one.laddr.port == port and one.status == "LISTEN" and one.pid
    ][:1]


async def probe(url: str, seconds: float) -> list[float]:
    """Milliseconds of every 200, by one connection that comes back at once."""
    accepted: list[float] = []
    data, until = DIGIT.read_bytes(), time.monotonic() + seconds

    async with aiohttp.ClientSession() as session:
        while time.monotonic() < until:
            started = time.monotonic()
            async with session.post(url, data=data) as answer:
                await answer.read()
                if answer.status == 200:
                    accepted.append((time.monotonic() - started) * 1e3)
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

    def kept(name: str) -> Path | None:
        return arguments.json and arguments.json.with_suffix(f".{name}.json")

    with tempfile.TemporaryDirectory() as folder:
        jpeg = Path(folder) / "picture.jpg"
        jpeg.write_bytes(photograph())
        engine = [engine_row(rate, arguments.seconds) for rate in (*CARDS, 1e9)]
        report("The engine process", engine, kept("engine"))
        service = [
            row
            for decode in (False, True)
            for row in service_rows(10_000, decode, jpeg if decode else DIGIT, arguments.seconds)
        ]
        report("One process and several", service, kept("service"))
        report("Cores for a card, by arithmetic", sizing(engine, service), kept("sizing"))
        report("One connection, digits", [added_row(arguments.seconds)], kept("added"))
        if arguments.overload:
            rows = [overload_row(arguments.overload, frontends=n) for n in (1, 2)]
            report("500 connections that come back at once, digits", rows, kept("overload"))


if __name__ == "__main__":
    main()
