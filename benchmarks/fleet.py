"""How many replicas so many pictures want: a discrete simulation of a fleet behind a balancer, and a check of its one replica.

    python -m benchmarks.fleet [--json FILE] [--picture FILE.svg]

A replica keeps this service's rule: an idle engine starts at once with what waits, up to its largest batch, oldest first;
a batch of n takes base + n * each; beside a batch that runs a full one may be ready; what there is no room for is refused, 503.
The balancer is round-robin, or least-request (the better of two replicas taken at random, as Envoy has it); a request that was
refused, or whose replica died, is tried once more, with another one. Requests arrive as a Poisson process, each with a picture.

The check: the real service over loopback, before a stand-in for a card whose batches take just so long (benchmarks.fake_gpu),
and a client that asks at the same times as the simulation's; the same percentiles of both.

The fleet's replica is DiNAT-Mini on two cores of a Xeon with AMX, by README's serving figures: 36 ms for one picture alone, 145
for a batch of 8, decoding and HTTP included.
"""

import argparse
import asyncio
import heapq
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.serving import closed_loop, free_port, running
from benchmarks.timing import report
from dinat.app.doctor import photograph

PERCENTILES = (50, 90, 99)
STAND_IN_RATE = 50.0
CHECK_SECONDS = 60
WARM = 0.2
"""The share of a run before the fleet is in its stride, of which nothing is counted."""


@dataclass(frozen=True)
class Engine:
    """base, each: seconds of a batch of n are base + n * each.  batch: the largest.  queue: QUEUE_LIMIT.  way: seconds of a
    request's way in and out, which take none of the engine's time."""

    base: float
    each: float
    batch: int
    queue: int
    way: float = 0.0

    @property
    def rate(self) -> float:
        """Pictures a second at most."""
        return self.batch / (self.base + self.batch * self.each)


MINI_ON_TWO_CORES = Engine(base=0.0206, each=0.0156, batch=8, queue=128)
QUEUE = 128


@dataclass(eq=False)
class Request:
    arrived: float
    tried: list["Replica"] = field(default_factory=list)


@dataclass(eq=False)
class Replica:
    """slower: by what its batches take longer.  known: whether the balancer still sends to it."""

    engine: Engine
    slower: float = 1.0
    alive: bool = True
    known: bool = True
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    ready: list[Request] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.ready)


@dataclass
class Fleet:
    """What happens between a balancer and its replicas, event by event.

    outcomes: what became of requests that arrived from counted_from on.  seconds: of those that were answered.  answered: how
    many were since then, whenever they arrived.
    """

    replicas: Sequence[Replica]
    policy: str
    retries: int
    chance: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    counted_from: float = 0.0
    answered: int = 0

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Any]] = []
        self._number = 0
        self._turn = -1

    def at(self, when: float, what: Any) -> None:
        """Have something called at a time."""
        self._number += 1
        heapq.heappush(self._events, (when, self._number, what))

    def run(self, until: float, arrivals: "np.ndarray[Any, Any]") -> None:
        """Send requests at these times, and go on until the time given."""
        times = iter(arrivals.tolist())
        coming = next(times, None)
        while True:
            if coming is not None and (not self._events or coming <= self._events[0][0]):
                self._send(coming, Request(coming))
                coming = next(times, None)
            elif self._events and self._events[0][0] <= until:
                when, _, what = heapq.heappop(self._events)
                what(when)
            else:
                return

    def kill(self, replica: Replica, now: float, noticed: float) -> None:
        """A replica dies with all it has; the balancer notices later."""
        replica.alive = False
        lost = [*replica.waiting, *replica.running, *replica.ready]
        replica.waiting.clear()
        replica.running, replica.ready = [], []
        for request in lost:
            self._again(now, request, "lost")

        def forget(_: float) -> None:
            replica.known = False

        self.at(now + noticed, forget)

    def _send(self, now: float, request: Request) -> None:
        replica = self._choose(request)
        request.tried.append(replica)
        engine = replica.engine
        if not replica.alive:
            self._again(now, request, "lost" if replica.known else "refused")
        elif len(replica.waiting) >= engine.queue:
            self._again(now, request, "refused")
        else:
            replica.waiting.append(request)
            self._start(now, replica)

    def _choose(self, request: Request) -> Replica:
        """By the policy, one that was not tried yet."""
        if len(self.replicas) == 1:
            return self.replicas[0]
        for _ in range(20):
            if self.policy == "round-robin":
                self._turn += 1
                one = self.replicas[self._turn % len(self.replicas)]
            else:
                one, other = self.chance.choice(self.replicas), self.chance.choice(self.replicas)
                if not one.known or (other.known and other.in_flight < one.in_flight):
                    one = other
            if one.known and one not in request.tried:
                break
        return one

    def _again(self, now: float, request: Request, why: str) -> None:
        if len(request.tried) <= self.retries and len(self.replicas) > 1:
            self._send(now, request)
        elif request.arrived >= self.counted_from:
            self.outcomes[why] += 1

    def _start(self, now: float, replica: Replica) -> None:
        """Fill an idle engine; beside a batch that runs, only with a full one."""
        engine = replica.engine
        if not replica.running and (replica.ready or replica.waiting):
            replica.running, replica.ready = replica.ready or self._take(replica), []
            seconds = (engine.base + len(replica.running) * engine.each) * replica.slower

            def over(then: float) -> None:
                if not replica.alive:
                    return
                self.answered += len(replica.running) if then >= self.counted_from else 0
                for request in replica.running:
                    if request.arrived >= self.counted_from:
                        self.outcomes["answered"] += 1
                        self.seconds.append(then - request.arrived + engine.way)
                replica.running = []
                self._start(then, replica)

            self.at(now + seconds, over)
        if replica.running and not replica.ready and len(replica.waiting) >= engine.batch:
            replica.ready = self._take(replica)

    @staticmethod
    def _take(replica: Replica) -> list[Request]:
        return [replica.waiting.popleft() for _ in range(min(replica.engine.batch, len(replica.waiting)))]


def poisson(rate: float, seconds: float, seed: int) -> "np.ndarray[Any, Any]":
    """Times of a Poisson process."""
    chance = np.random.default_rng(seed)
    times: np.ndarray[Any, Any] = np.cumsum(chance.exponential(1 / rate, int(rate * seconds * 1.2) + 100))
    return times[times < seconds]


def simulate(
    engine: Engine, replicas: int, policy: str, load: float, fault: str, seconds: float, seed: int = 0, retries: int = 1
) -> dict[str, Any]:
    """A fleet under so many times what it can do."""
    fleet = Fleet([Replica(engine) for _ in range(replicas)], policy, retries, random.Random(seed))
    fleet.counted_from = WARM * seconds
    if fault == "one slow":
        fleet.replicas[0].slower = 3.0
    elif fault == "one dead":
        fleet.at(0.5 * seconds, lambda now: fleet.kill(fleet.replicas[0], now, noticed=1.0))
    fleet.run(seconds, poisson(load * replicas * engine.rate, seconds, seed))
    return {
        "replicas": replicas,
        "balancer": policy if replicas > 1 else "none",
        "load": load,
        "fault": fault or "none",
        **summary(fleet.seconds, fleet.outcomes),
        "goodput": fleet.answered / ((1 - WARM) * seconds * replicas * engine.rate),
    }


def summary(seconds: Sequence[float], outcomes: Counter[str]) -> dict[str, float]:
    """Percentiles of what was answered, and shares of what was not."""
    ended = max(1, outcomes.total())
    return {
        **{f"p{p} ms": float(np.percentile(seconds, p)) * 1e3 if seconds else float("nan") for p in PERCENTILES},
        "refused": outcomes["refused"] / ended,
        "lost": outcomes["lost"] / ended,
    }


async def measure(
    url: str, data: bytes, times: "np.ndarray[Any, Any]", counted_from: float
) -> tuple[list[tuple[float, float]], Counter[str]]:
    """The service, asked at these times: when each that it answered was asked, and how long it took."""
    outcomes: Counter[str] = Counter()
    answered: list[tuple[float, float]] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.monotonic()

        async def ask(when: float) -> None:
            await asyncio.sleep(began + when - time.monotonic())
            async with session.post(url, data=data) as answer:
                await answer.read()
            if when >= counted_from:
                outcomes["answered" if answer.status == 200 else "refused"] += 1
                if answer.status == 200:
                    answered.append((when, time.monotonic() - began - when))

        await asyncio.gather(*map(ask, times.tolist()))
    return answered, outcomes


def seconds_of_each(ends: Sequence[float]) -> float:
    """What a picture takes of a busy engine's time: from the end of one batch to that of another."""
    times = np.sort(ends)
    last_of_batch = np.flatnonzero(np.diff(times) > 0.2)
    first, last = int(last_of_batch[0]), int(last_of_batch[-1])
    return float(times[last] - times[first]) / (last - first)


def check(loads: Sequence[float], seconds: float) -> list[dict[str, Any]]:
    """One replica, measured and simulated, on the same arrivals.

    What the engine takes is measured before: for batches of one, by two connections in turn, and full ones, by twice the load.
    """
    rows = []
    port = free_port()
    url = f"http://127.0.0.1:{port}/classify"
    words = [sys.executable, "-m", "benchmarks.fake_gpu", str(STAND_IN_RATE), "--no-decode", "--port", str(port)]
    with running([*words, "--queue-limit", str(QUEUE), "--frontends", "1"], url):
        alone, _ = asyncio.run(measure(url, photograph(), np.arange(1, 101) * 0.05, 0.0))
        latencies, _, taken = asyncio.run(closed_loop(url, 2, 10))
        one_by_one = taken / len(latencies)
        busy, _ = asyncio.run(measure(url, photograph(), poisson(2 * STAND_IN_RATE, 20, seed=2), 0.0))
        each = seconds_of_each([asked + took for asked, took in busy])
        way = float(np.median([took for _, took in alone])) - one_by_one
        engine = Engine(one_by_one - each, each, batch=64, queue=QUEUE, way=way)
        for load in loads:
            times = poisson(load * engine.rate, seconds, seed=1)
            answered, outcomes = asyncio.run(measure(url, photograph(), times, WARM * seconds))
            measured = summary([took for _, took in answered], outcomes)
            fleet = Fleet([Replica(engine)], "none", 0, random.Random(0), counted_from=WARM * seconds)
            fleet.run(2 * seconds, times)
            simulated = summary(fleet.seconds, fleet.outcomes)
            both = {
                f"{name}, {way}": said[name]
                for name in measured
                for way, said in (("measured", measured), ("simulated", simulated))
                if name != "lost"
            }
            off = max(abs(simulated[f"p{p} ms"] / measured[f"p{p} ms"] - 1) for p in PERCENTILES)
            rows.append({"load": load, "pictures/s at most": engine.rate, **both, "largest difference": off})
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Latency and goodput against load, by balancer and fault."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    faults = list(dict.fromkeys(row["fault"] for row in rows))
    left, right = figure.subplots(1, 2)
    for policy, style in (("least-request", "-"), ("round-robin", "--")):
        for fault, colour in zip(faults, ("#1b6ca8", "#d1495b", "#66a182"), strict=False):
            there = [r for r in rows if r["replicas"] == 10 and r["balancer"] == policy and r["fault"] == fault]
            for axes, name in ((left, "p99 ms"), (right, "goodput")):
                axes.plot([r["load"] for r in there], [r[name] for r in there], style, color=colour, label=f"{policy}, {fault}")
    left.set(xlabel="asked for / what the fleet can do", ylabel="99th percentile, ms", yscale="log")
    right.set(xlabel="asked for / what the fleet can do", ylabel="answered / what the fleet can do", ylim=(0, 1.05))
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    checked = check((0.5, 0.8, 0.9, 2.0), CHECK_SECONDS)
    report("one replica", checked, arguments.json and arguments.json.with_suffix(".check.json"))
    rows = [
        simulate(MINI_ON_TWO_CORES, replicas, policy, load, fault, seconds={100: 20, 1000: 6}.get(replicas, 60))
        for replicas in (1, 2, 10, 100, 1000)
        for policy in (("least-request", "round-robin") if replicas > 1 else ("none",))
        for fault in ("", "one slow", "one dead")
        for load in (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.2, 1.5, 2.0)
        if (replicas == 10 or load in (0.5, 0.8, 0.95, 1.2, 2.0)) and (replicas > 1 or not fault)
    ]
    report("fleet", rows, arguments.json)
    if arguments.picture:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
