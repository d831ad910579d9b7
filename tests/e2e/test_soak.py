"""`make soak`: 20,000 requests of mixed good and bad input leave nothing behind. Too long for `make test`."""

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
"""Bytes that resident memory may wander between the end of the first fifth and the end."""

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


def test_nothing_grows() -> None:
    good = [path.read_bytes() for path in sorted(DIGITS.glob("*.png"))] + [encoded(noise(375, 500), "JPEG")]
    bad = [b"", b"text", good[0][:900], good[-1][:-2000], png_bomb(20_000, 20_000)]
    expected = {0: {400}, 1: {415}, 2: {422}, 3: {422}, 4: {413}}
    done, lock, marks = 0, threading.Lock(), []

    with Server(deadline_ms=60_000) as server, ThreadPoolExecutor(CLIENTS) as threads:

        def ask(seed: int) -> None:
            nonlocal done
            choose = random.Random(seed)
            with httpx.Client(base_url=server.url, timeout=60) as client:
                for _ in range(REQUESTS // CLIENTS):
                    kind = choose.randrange(8)
                    if kind < len(bad):
                        assert client.post("/classify", content=bad[kind]).status_code in expected[kind]
                    elif kind == 5:
                        answer = client.post("/classify", files={"image": choose.choice(good)}, params={"features": "stage3"})
                        assert answer.status_code == 200
                    else:
                        assert client.post("/classify", content=choose.choice(good)).status_code == 200
                    with lock:
                        done += 1
                        if done % (REQUESTS // 10) == 0:
                            marks.append(footprint(server.process.pid))
                            print(done, marks[-1], flush=True)

        for asked in [threads.submit(ask, seed) for seed in range(CLIENTS)]:
            asked.result()
        assert server.stop() == 0
    early, late = marks[1], marks[-1]
    assert late["bytes"] - early["bytes"] < GROWTH
    assert late["threads"] <= early["threads"]
    assert late["descriptors"] <= early["descriptors"] + CLIENTS
