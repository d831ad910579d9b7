"""`make soak`: 20,000 requests with valid and invalid input leak nothing. Too long for `make test`."""

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.app.sample_images import encoded, noise, png_bomb
from tests.e2e.processes import DIGITS, Server

REQUESTS = 20_000
CLIENTS = 8
GROWTH = 24 * 2**20
"""Largest growth of resident memory after the first fifth of the requests, in bytes."""

pytestmark = [
    pytest.mark.skipif("DINAT_SOAK" not in os.environ, reason="set DINAT_SOAK=1 (make soak)"),
    pytest.mark.timeout(1800),
]


def footprint(pid: int) -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "bytes": int(status["VmRSS"].split()[0]) * 1024,
        "threads": int(status["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
    }


def test_memory_threads_and_descriptors_do_not_grow() -> None:
    valid = [path.read_bytes() for path in sorted(DIGITS.glob("*.png"))] + [encoded(noise(375, 500), "JPEG")]
    invalid = [b"", b"text", valid[0][:900], valid[-1][:-2000], png_bomb(20_000, 20_000)]
    expected = {0: {400}, 1: {415}, 2: {422}, 3: {422}, 4: {413}}
    done, lock, marks = 0, threading.Lock(), []

    with Server(deadline_ms=60_000) as server, ThreadPoolExecutor(CLIENTS) as threads:

        def client_loop(seed: int) -> None:
            nonlocal done
            choose = random.Random(seed)
            with httpx.Client(base_url=server.url, timeout=60) as client:
                for _ in range(REQUESTS // CLIENTS):
                    kind = choose.randrange(8)
                    if kind < len(invalid):
                        assert client.post("/classify", content=invalid[kind]).status_code in expected[kind]
                    elif kind == 5:
                        files = {"image": choose.choice(valid)}
                        assert client.post("/classify", files=files, params={"features": "stage3"}).status_code == 200
                    else:
                        assert client.post("/classify", content=choose.choice(valid)).status_code == 200
                    with lock:
                        done += 1
                        if done % (REQUESTS // 10) == 0:
                            marks.append(footprint(server.process.pid))
                            print(done, marks[-1], flush=True)

        for future in [threads.submit(client_loop, seed) for seed in range(CLIENTS)]:
            future.result()
        assert server.stop() == 0
    early, late = marks[1], marks[-1]
    assert late["bytes"] - early["bytes"] < GROWTH
    assert late["threads"] <= early["threads"]
    assert late["descriptors"] <= early["descriptors"] + CLIENTS
