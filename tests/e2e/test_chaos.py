"""`make chaos`: processes that are killed under load leave no wrong answer, no lost place and no memory behind."""

import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
import pytest

from tests.e2e.processes import DIGITS, Server
from tests.e2e.test_frontends import processes, processes_of_one, samples

CLIENTS = 16
FRONT_END_KILLS = 100
ENGINE_KILLS = 5
GROWTH = 48 * 2**20
"""Bytes that the memory of all processes may wander between the tenth kill and the last."""

pytestmark = [
    pytest.mark.skipif("DINAT_CHAOS" not in os.environ, reason="set DINAT_CHAOS=1 (make chaos)"),
    pytest.mark.timeout(900),
]


@contextmanager
def load(server: Server) -> Iterator[Counter[str]]:
    """Clients that ask for known digits, with maps now and then, whatever happens; what they got. Wrong answers end it."""
    over = threading.Event()
    got: Counter[str] = Counter()

    def ask(seed: int) -> None:
        choose = random.Random(seed)
        pictures = [(path.name[0], path.read_bytes()) for path in sorted(DIGITS.glob("*.png"))]
        while not over.is_set():
            digit, data = choose.choice(pictures)
            maps = {"features": "stage2,pooled"} if choose.random() < 0.2 else {}
            try:
                answer = httpx.post(f"{server.url}/classify", content=data, params=maps, timeout=30)
            except httpx.TransportError as error:
                got[type(error).__name__] += 1
                continue
            got[str(answer.status_code)] += 1
            if answer.status_code == 200:
                assert answer.json()["predictions"][0]["label"] == digit
            else:
                assert answer.status_code == 503, answer.text

    with ThreadPoolExecutor(CLIENTS) as threads:
        asking = [threads.submit(ask, seed) for seed in range(CLIENTS)]
        try:
            yield got
        finally:
            over.set()
        for asked in asking:
            asked.result()


def footprint(server: Server) -> dict[str, int]:
    """Of all processes together. Shared pages count once (PSS)."""
    there = [psutil.Process(told["pid"]) for told in processes(server).values()]
    return {
        "bytes": sum(one.memory_full_info().pss for one in there),
        "descriptors": sum(one.num_fds() for one in there),
        "slots": int(samples(server)["dinat_queue_depth_images",]),
    }


def settled(server: Server) -> dict[str, int]:
    """The footprint when nothing is under way."""
    while samples(server)["dinat_queue_depth_images",]:
        pass
    return footprint(server)


def test_frontends_that_are_killed() -> None:
    marks = []
    with Server(frontends=2, queue_limit=32, runtime="torch") as server:
        for kills in (10, FRONT_END_KILLS - 10):
            with load(server) as got:
                for n in range(kills):
                    name = f"frontend-{n % 2 + 1}"
                    pid = processes_of_one(server, name)
                    before = got["200"]
                    os.kill(pid, signal.SIGKILL)
                    while processes_of_one(server, name) == pid or got["200"] < before + 10:
                        pass
            marks.append(settled(server))
            print(kills, dict(got), marks[-1], file=sys.stderr, flush=True)
        told = processes(server)
        assert told["frontend-1"]["restarts"] + told["frontend-2"]["restarts"] == FRONT_END_KILLS
        assert server.stop() == 0
    early, late = marks
    assert late["slots"] == early["slots"] == 0
    assert late["bytes"] - early["bytes"] < GROWTH
    assert late["descriptors"] <= early["descriptors"] + 4


def test_engines_that_are_killed() -> None:
    killed = 0
    while killed < ENGINE_KILLS:
        kills = min(2, ENGINE_KILLS - killed)  # the second ends the service, and whoever runs it starts it anew
        with Server(frontends=2, queue_limit=32, runtime="torch") as server:
            with load(server) as got:
                for n in range(kills):
                    pid, before = processes_of_one(server, "engine"), got["200"]
                    while got["200"] < before + 50:
                        pass
                    os.kill(pid, signal.SIGKILL)
                    while n == 0 and processes_of_one(server, "engine") == pid:
                        pass
                    killed += 1
            print(killed, dict(got), file=sys.stderr, flush=True)
            if kills == 2:
                assert server.wait() == 1
            else:
                assert settled(server)["slots"] == 0
                assert server.stop() == 0
