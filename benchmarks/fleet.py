"""Replicas for a given load: a discrete-event simulation of a load balancer and its replicas, checked against the service.

    python -m benchmarks.fleet [--json FILE] [--plot FILE.svg]

A replica follows this service's rules: an idle engine starts immediately with the oldest waiting requests, up to its largest
batch; a batch of n takes base + n * per_image seconds; while a batch runs, one full batch may be prepared; when the queue is
full, requests are rejected with 503. The load balancer is round-robin or least-request (the better of two random replicas, as
in Envoy). A request that was rejected or whose replica crashed is retried once, on another replica. Requests arrive as a
Poisson process, each with one image.

The check runs the real service over loopback with a fake GPU of a known speed (benchmarks.fake_gpu) and a client that sends
requests at the arrival times of the simulation, and reports the same percentiles of both.

The simulated replica is DiNAT-Mini on two cores of a Xeon with AMX, by README's serving figures: 36 ms for one image alone, 145
for a batch of 8, decoding and HTTP included.
"""

import argparse
import asyncio
import heapq
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt

from benchmarks.serving import closed_loop, free_port, running
from benchmarks.timing import report
from dinat.app.measurements import photograph

PERCENTILES = (50, 90, 99)
FAKE_GPU_RATE = 50.0
"""Images per second of the fake GPU of the check."""
CHECK_SECONDS = 60
WARM_UP = 0.2
"""Share of a run, at its start, that is not counted."""

Times = npt.NDArray[np.float64]
"""Seconds since the start of a run."""


@dataclass(frozen=True)
class Engine:
    """A replica's engine.

    Attributes:
        base: seconds per batch: a batch of n takes base + n * per_image.
        per_image: seconds per image.
        max_batch: images in the largest batch.
        queue_limit: QUEUE_LIMIT.
        overhead: seconds from the client to the engine and back, which take none of the engine's time.
    """

    base: float
    per_image: float
    max_batch: int
    queue_limit: int
    overhead: float = 0.0

    @property
    def rate(self) -> float:
        """Images per second with full batches."""
        return self.max_batch / (self.base + self.max_batch * self.per_image)


QUEUE_LIMIT = 128
MINI_ON_TWO_CORES = Engine(base=0.0206, per_image=0.0156, max_batch=8, queue_limit=QUEUE_LIMIT)


@dataclass(eq=False)
class Request:
    arrived: float
    tried: list["Replica"] = field(default_factory=list)


@dataclass(eq=False)
class Replica:
    """A replica and its requests.

    Attributes:
        slowdown: factor of its batch times.
        alive: False after a crash.
        in_rotation: whether the load balancer still selects it.
        waiting: requests in the queue.
        running: requests of the batch that runs.
        prepared: requests of the full batch that runs next.
    """

    engine: Engine
    slowdown: float = 1.0
    alive: bool = True
    in_rotation: bool = True
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    prepared: list[Request] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.prepared)


@dataclass
class Fleet:
    """Event loop of a load balancer and its replicas.

    Attributes:
        replicas: the replicas.
        policy: "round-robin" or "least-request".
        retries: retries of a request.
        random: selects replicas for least-request.
        counted_from: the time from which requests are counted.
        outcomes: number of requests that arrived since counted_from, by outcome: completed, rejected or lost.
        seconds: latencies of the completed ones.
        completed: requests completed since counted_from, whenever they arrived.
    """

    replicas: Sequence[Replica]
    policy: str
    retries: int
    random: random.Random
    counted_from: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    completed: int = 0

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0
        self._turn = -1

    def schedule(self, when: float, call: Callable[[float], None]) -> None:
        """Call call(when) at a time of the simulation."""
        self._number += 1
        heapq.heappush(self._events, (when, self._number, call))

    def run(self, until: float, arrivals: Times) -> None:
        """Send requests at their arrival times, and simulate until the given time."""
        times = iter(arrivals.tolist())
        arrival = next(times, None)
        while True:
            if arrival is not None and (not self._events or arrival <= self._events[0][0]):
                self._send(arrival, Request(arrival))
                arrival = next(times, None)
            elif self._events and self._events[0][0] <= until:
                when, _, call = heapq.heappop(self._events)
                call(when)
            else:
                return

    def crash(self, replica: Replica, now: float, detected_after: float) -> None:
        """Crash a replica: its requests are lost, and the load balancer detects it `detected_after` seconds later."""
        replica.alive = False
        lost = [*replica.waiting, *replica.running, *replica.prepared]
        replica.waiting.clear()
        replica.running, replica.prepared = [], []
        for request in lost:
            self._retry(now, request, "lost")

        def remove(_: float) -> None:
            replica.in_rotation = False

        self.schedule(now + detected_after, remove)

    def _send(self, now: float, request: Request) -> None:
        replica = self._select(request)
        request.tried.append(replica)
        if not replica.alive:
            self._retry(now, request, "lost" if replica.in_rotation else "rejected")
        elif len(replica.waiting) >= replica.engine.queue_limit:
            self._retry(now, request, "rejected")
        else:
            replica.waiting.append(request)
            self._start(now, replica)

    def _select(self, request: Request) -> Replica:
        """Select a replica by the policy, one that the request has not tried if possible."""
        if len(self.replicas) == 1:
            return self.replicas[0]
        for _ in range(20):
            if self.policy == "round-robin":
                self._turn += 1
                selected = self.replicas[self._turn % len(self.replicas)]
            else:
                selected, other = self.random.choice(self.replicas), self.random.choice(self.replicas)
                if not selected.in_rotation or (other.in_rotation and other.in_flight < selected.in_flight):
                    selected = other
            if selected.in_rotation and selected not in request.tried:
                break
        return selected

    def _retry(self, now: float, request: Request, outcome: str) -> None:
        """Retry a request, or count its outcome if no retry is left."""
        if len(request.tried) <= self.retries and len(self.replicas) > 1:
            self._send(now, request)
        elif request.arrived >= self.counted_from:
            self.outcomes[outcome] += 1

    def _start(self, now: float, replica: Replica) -> None:
        """Start a batch on an idle engine, and prepare a full one while a batch runs."""
        engine = replica.engine
        if not replica.running and (replica.prepared or replica.waiting):
            replica.running, replica.prepared = replica.prepared or self._next_batch(replica), []
            seconds = (engine.base + len(replica.running) * engine.per_image) * replica.slowdown

            def complete(then: float) -> None:
                if not replica.alive:
                    return
                self.completed += len(replica.running) if then >= self.counted_from else 0
                for request in replica.running:
                    if request.arrived >= self.counted_from:
                        self.outcomes["completed"] += 1
                        self.seconds.append(then - request.arrived + engine.overhead)
                replica.running = []
                self._start(then, replica)

            self.schedule(now + seconds, complete)
        if replica.running and not replica.prepared and len(replica.waiting) >= engine.max_batch:
            replica.prepared = self._next_batch(replica)

    @staticmethod
    def _next_batch(replica: Replica) -> list[Request]:
        return [replica.waiting.popleft() for _ in range(min(replica.engine.max_batch, len(replica.waiting)))]


def poisson(rate: float, seconds: float, seed: int) -> Times:
    """Return the arrival times of a Poisson process."""
    random = np.random.default_rng(seed)
    times: Times = np.cumsum(random.exponential(1 / rate, int(rate * seconds * 1.2) + 100))
    return times[times < seconds]


def simulate(
    engine: Engine, replicas: int, policy: str, load: float, fault: str, seconds: float, seed: int = 0, retries: int = 1
) -> dict[str, Any]:
    """Simulate a fleet.

    Args:
        engine: the engine of every replica.
        replicas: number of replicas.
        policy: that of the load balancer.
        load: offered load relative to the fleet's capacity.
        fault: "one slow" (by a factor of 3), "one crashed" (half way) or "".
        seconds: length of the simulation.
        seed: of arrivals and of the load balancer.
        retries: retries of a request.
    """
    fleet = Fleet([Replica(engine) for _ in range(replicas)], policy, retries, random.Random(seed))
    fleet.counted_from = WARM_UP * seconds
    if fault == "one slow":
        fleet.replicas[0].slowdown = 3.0
    elif fault == "one crashed":
        fleet.schedule(0.5 * seconds, lambda now: fleet.crash(fleet.replicas[0], now, detected_after=1.0))
    fleet.run(seconds, poisson(load * replicas * engine.rate, seconds, seed))
    return {
        "replicas": replicas,
        "balancer": policy if replicas > 1 else "none",
        "load": load,
        "fault": fault or "none",
        **summary(fleet.seconds, fleet.outcomes),
        "goodput": fleet.completed / ((1 - WARM_UP) * seconds * replicas * engine.rate),
    }


def summary(seconds: Sequence[float], outcomes: Counter[str]) -> dict[str, float]:
    """Return latency percentiles of completed requests, and the shares of rejected and lost ones."""
    total = max(1, outcomes.total())
    return {
        **{f"p{p} ms": float(np.percentile(seconds, p)) * 1e3 if seconds else float("nan") for p in PERCENTILES},
        "rejected": outcomes["rejected"] / total,
        "lost": outcomes["lost"] / total,
    }


async def measure(url: str, data: bytes, times: Times, counted_from: float) -> tuple[list[tuple[float, float]], Counter[str]]:
    """Send requests to the service at the given times.

    Returns:
        Start time and latency in seconds of each completed request, and the number of requests by outcome; of requests sent
        since counted_from.
    """
    outcomes: Counter[str] = Counter()
    completed: list[tuple[float, float]] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.monotonic()

        async def send(when: float) -> None:
            await asyncio.sleep(start + when - time.monotonic())
            async with session.post(url, data=data) as response:
                await response.read()
            if when >= counted_from:
                outcomes["completed" if response.status == 200 else "rejected"] += 1
                if response.status == 200:
                    completed.append((when, time.monotonic() - start - when))

        await asyncio.gather(*map(send, times.tolist()))
    return completed, outcomes


def seconds_per_image(ends: Sequence[float]) -> float:
    """Return the seconds per image of a busy engine, from the times at which requests completed."""
    times = np.sort(ends)
    last_of_batch = np.flatnonzero(np.diff(times) > 0.2)
    first, last = int(last_of_batch[0]), int(last_of_batch[-1])
    return float(times[last] - times[first]) / (last - first)


def check(loads: Sequence[float], seconds: float) -> list[dict[str, Any]]:
    """Compare one replica, measured and simulated, with the same arrivals.

    The engine's times are measured first: batches of one with two closed-loop connections, full batches at twice the capacity.
    """
    rows = []
    port = free_port()
    url = f"http://127.0.0.1:{port}/classify"
    command = [sys.executable, "-m", "benchmarks.fake_gpu", str(FAKE_GPU_RATE), "--no-decode", "--port", str(port)]
    with running([*command, "--queue-limit", str(QUEUE_LIMIT), "--frontends", "1"], url):
        idle, _ = asyncio.run(measure(url, photograph(), np.arange(1, 101) * 0.05, 0.0))
        latencies, _, elapsed = asyncio.run(closed_loop(url, 2, 10))
        batch_of_one = elapsed / len(latencies)
        busy, _ = asyncio.run(measure(url, photograph(), poisson(2 * FAKE_GPU_RATE, 20, seed=2), 0.0))
        per_image = seconds_per_image([start + latency for start, latency in busy])
        overhead = float(np.median([latency for _, latency in idle])) - batch_of_one
        engine = Engine(batch_of_one - per_image, per_image, max_batch=64, queue_limit=QUEUE_LIMIT, overhead=overhead)
        for load in loads:
            times = poisson(load * engine.rate, seconds, seed=1)
            completed, outcomes = asyncio.run(measure(url, photograph(), times, WARM_UP * seconds))
            measured = summary([latency for _, latency in completed], outcomes)
            fleet = Fleet([Replica(engine)], "none", 0, random.Random(0), counted_from=WARM_UP * seconds)
            fleet.run(2 * seconds, times)
            simulated = summary(fleet.seconds, fleet.outcomes)
            both = {
                f"{name}, {source}": values[name]
                for name in measured
                for source, values in (("measured", measured), ("simulated", simulated))
                if name != "lost"
            }
            difference = max(abs(simulated[f"p{p} ms"] / measured[f"p{p} ms"] - 1) for p in PERCENTILES)
            rows.append({"load": load, "max images/s": engine.rate, **both, "max difference": difference})
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot latency and goodput of ten replicas against load, by load balancer and fault."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    faults = list(dict.fromkeys(row["fault"] for row in rows))
    left, right = figure.subplots(1, 2)
    for policy, style in (("least-request", "-"), ("round-robin", "--")):
        for fault, color in zip(faults, ("#1b6ca8", "#d1495b", "#66a182"), strict=False):
            selected = [r for r in rows if r["replicas"] == 10 and r["balancer"] == policy and r["fault"] == fault]
            loads = [row["load"] for row in selected]
            for axes, name in ((left, "p99 ms"), (right, "goodput")):
                label = f"{policy}, {'no fault' if fault == 'none' else fault}"
                axes.plot(loads, [row[name] for row in selected], style, color=color, label=label)
    left.set(xlabel="offered load / capacity", ylabel="99th percentile latency, ms", yscale="log")
    right.set(xlabel="offered load / capacity", ylabel="goodput / capacity", ylim=(0, 1.05))
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fleet"}):  # text as text, and the same file from the same rows
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    checked = check((0.5, 0.8, 0.9, 2.0), CHECK_SECONDS)
    report("One replica, measured and simulated", checked, arguments.json and arguments.json.with_suffix(".check.json"))
    rows = [
        simulate(MINI_ON_TWO_CORES, replicas, policy, load, fault, seconds={100: 20, 1000: 6}.get(replicas, 60))
        for replicas in (1, 2, 10, 100, 1000)
        for policy in (("least-request", "round-robin") if replicas > 1 else ("none",))
        for fault in ("", "one slow", "one crashed")
        for load in (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.2, 1.5, 2.0)
        if (replicas == 10 or load in (0.5, 0.8, 0.95, 1.2, 2.0)) and (replicas > 1 or not fault)
    ]
    report("Fleet, simulated", rows, arguments.json)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
