"""`make chaos`: processes killed under load cause no wrong result, no leaked slot and no leaked memory."""

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
FRONTEND_KILLS = 100
ENGINE_KILLS = 5
GROWTH = 48 * 2**20
"""Largest growth of the memory of all processes between the tenth kill and the last, in bytes."""

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.chaos,
    pytest.mark.timeout(900),
]


@contextmanager
def load(server: Server) -> Iterator[Counter[str]]:
    """Clients that classify known digits, one in five with feature maps. Yields counts of statuses and errors.

    A wrong result fails the test.
    """
    stop = threading.Event()
    counts: Counter[str] = Counter()

    def client_loop(seed: int) -> None:
        choose = random.Random(seed)
        images = [(path.name[0], path.read_bytes()) for path in sorted(DIGITS.glob("*.png"))]
        while not stop.is_set():
            digit, data = choose.choice(images)
            params = {"features": "stage2,pooled"} if choose.random() < 0.2 else {}
            try:
                response = httpx.post(f"{server.url}/classify", content=data, params=params, timeout=30)
            except httpx.TransportError as error:
                counts[type(error).__name__] += 1
                continue
            counts[str(response.status_code)] += 1
            if response.status_code == 200:
                assert response.json()["predictions"][0]["label"] == digit
            else:
                assert response.status_code == 503, response.text

    with ThreadPoolExecutor(CLIENTS) as threads:
        futures = [threads.submit(client_loop, seed) for seed in range(CLIENTS)]
        try:
            yield counts
        finally:
            stop.set()
        for future in futures:
            future.result()


def footprint(server: Server) -> dict[str, int]:
    """Memory, file descriptors and used slots of all processes. Shared pages count once (PSS)."""
    running = [psutil.Process(status["pid"]) for status in processes(server).values()]
    return {
        "bytes": sum(process.memory_full_info().pss for process in running),
        "descriptors": sum(process.num_fds() for process in running),
        "slots": int(samples(server)["dinat_queue_depth_images",]),
    }


def idle_footprint(server: Server) -> dict[str, int]:
    """The footprint when no image is queued."""
    while samples(server)["dinat_queue_depth_images",]:
        pass
    return footprint(server)


def test_killed_frontends_leave_nothing_behind() -> None:
    marks = []
    with Server(frontends=2, queue_limit=32, runtime="torch") as server:
        for kills in (10, FRONTEND_KILLS - 10):
            with load(server) as counts:
                for n in range(kills):
                    name = f"frontend-{n % 2 + 1}"
                    pid = processes_of_one(server, name)
                    before = counts["200"]
                    os.kill(pid, signal.SIGKILL)
                    while processes_of_one(server, name) == pid or counts["200"] < before + 10:
                        pass
            marks.append(idle_footprint(server))
            print(kills, dict(counts), marks[-1], file=sys.stderr, flush=True)
        statuses = processes(server)
        assert statuses["frontend-1"]["restarts"] + statuses["frontend-2"]["restarts"] == FRONTEND_KILLS
        assert server.stop() == 0
    early, late = marks
    assert late["slots"] == early["slots"] == 0
    assert late["bytes"] - early["bytes"] < GROWTH
    assert late["descriptors"] <= early["descriptors"] + 4


def test_killed_engines_leave_nothing_behind() -> None:
    killed = 0
    while killed < ENGINE_KILLS:
        kills = min(2, ENGINE_KILLS - killed)  # the service exits at the second and is started again
        with Server(frontends=2, queue_limit=32, runtime="torch") as server:
            with load(server) as counts:
                for n in range(kills):
                    pid, before = processes_of_one(server, "engine"), counts["200"]
                    while counts["200"] < before + 50:
                        pass
                    os.kill(pid, signal.SIGKILL)
                    while n == 0 and processes_of_one(server, "engine") == pid:
                        pass
                    killed += 1
            print(killed, dict(counts), file=sys.stderr, flush=True)
            if kills == 2:
                assert server.wait() == 1
            else:
                assert idle_footprint(server)["slots"] == 0
                assert server.stop() == 0
