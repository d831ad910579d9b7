"""Observation of a service under attack: memory, latency of /health/live, and the responses that an honest client gets."""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.e2e.processes import DIGITS, Server


@dataclass
class Observation:
    """What was seen while an attack ran.

    Attributes:
        baseline_rss: Resident memory of all processes of the service before the attack, in bytes.
        peak_rss: Largest resident memory seen.
        worst_live_seconds: Longest time that GET /health/live took.
        live_statuses: Responses of /health/live by status; 0 for none.
        honest_statuses: Responses of POST /classify with a small image by status; 0 for none.
        worst_honest_seconds: Longest time that such a request took.
    """

    baseline_rss: int
    peak_rss: int = 0
    worst_live_seconds: float = 0.0
    live_statuses: Counter[int] = field(default_factory=Counter)
    honest_statuses: Counter[int] = field(default_factory=Counter)
    worst_honest_seconds: float = 0.0

    @property
    def growth(self) -> int:
        """Bytes of resident memory above the baseline, at the peak."""
        return self.peak_rss - self.baseline_rss

    def __str__(self) -> str:
        return (
            f"RSS {self.baseline_rss / 2**20:.0f} -> {self.peak_rss / 2**20:.0f} MiB, /health/live at most "
            f"{self.worst_live_seconds:.3f} s {dict(self.live_statuses)}, honest client {dict(self.honest_statuses)} at most "
            f"{self.worst_honest_seconds:.2f} s"
        )


def resident_memory(pid: int) -> int:
    """Resident memory of a process and its children, in bytes; shared pages count once for each process.

    A child that has just been started shares all memory of its parent (vfork) until it runs its program: it does not count.
    """
    total = 0
    try:
        parent = psutil.Process(pid)
        own = parent.memory_info()
        total = own.rss
        for process in parent.children(recursive=True):
            memory = process.memory_info()
            total += memory.rss if memory.vms != own.vms else 0
    except psutil.NoSuchProcess:
        pass
    return total


@contextmanager
def observed(server: Server) -> Iterator[Observation]:
    """Observe a service while the body of the `with` attacks it."""
    pid, address = server.process.pid, server.url.removeprefix("http://")
    observation = Observation(resident_memory(pid))
    stop = threading.Event()
    image = (DIGITS / "7-1.png").read_bytes()

    def sample_memory() -> None:
        while not stop.wait(0.02):
            observation.peak_rss = max(observation.peak_rss, resident_memory(pid))

    def probe() -> None:
        while not stop.is_set():
            started = time.monotonic()
            connection = http.client.HTTPConnection(address, timeout=60)  # httpx takes 30 ms to create a client
            try:
                connection.request("GET", "/health/live")
                response = connection.getresponse()
                response.read()
                status = response.status
            except (OSError, http.client.HTTPException):
                status = 0
            finally:
                connection.close()
            observation.live_statuses[status] += 1
            observation.worst_live_seconds = max(observation.worst_live_seconds, time.monotonic() - started)
            stop.wait(0.05)

    def classify() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                started = time.monotonic()
                try:
                    status = client.post("/classify", content=image).status_code
                except httpx.HTTPError:
                    status = 0
                observation.honest_statuses[status] += 1
                observation.worst_honest_seconds = max(observation.worst_honest_seconds, time.monotonic() - started)
                stop.wait(0.05)

    threads = [threading.Thread(target=target) for target in (sample_memory, probe, classify)]
    for thread in threads:
        thread.start()
    try:
        yield observation
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        observation.peak_rss = max(observation.peak_rss, resident_memory(pid))


def temporary_files() -> set[str]:
    """Names of this project's files in the temporary folder."""
    return {path.name for path in Path("/tmp").glob("dinat-*")}
