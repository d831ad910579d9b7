"""Servers as processes of their own, found by what they log and ended by their own pid."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def load_until_refused(url: str, picture: bytes, clients: int = 16, first: int = 100) -> Iterator[list[int]]:
    """The statuses of POST /classify, asked by many clients, each until it gets another than 200 or nobody listens any more.

    Entered once more than `first` have come, left once every client has ended.
    """
    statuses: list[int] = []
    in_flight = threading.Event()

    def ask(_: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while True:
                try:
                    status = client.post("/classify", content=picture).status_code
                except httpx.ConnectError:
                    return  # it no longer listens: nothing was sent
                statuses.append(status)
                if len(statuses) > first:
                    in_flight.set()
                if status != 200:
                    return

    with ThreadPoolExecutor(clients) as threads:
        asking = [threads.submit(ask, n) for n in range(clients)]
        assert in_flight.wait(60)
        yield statuses
        for asked in asking:
            asked.result()


@contextmanager
def servers(ports: list[int], **settings: Any) -> Iterator[list["Server"]]:
    """Several, started at once."""
    with ThreadPoolExecutor(len(ports)) as threads, ExitStack() as stack:
        starting = [threads.submit(Server(port, **settings).__enter__) for port in ports]
        for started in starting:
            stack.push(started.result())
        yield [started.result() for started in starting]


class Server:
    """`dinat serve`, ready when entered, told to stop when left. events: what it logged."""

    def __init__(self, port: int = 0, **settings: Any) -> None:
        self._port = port
        self._settings = {f"DINAT_{name.upper()}": str(value) for name, value in settings.items()}
        self.events: list[dict[str, Any]] = []
        self._ready = threading.Event()
        self.url = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dinat", "serve", "--port", str(self._port), "--log-format", "json"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self._settings},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._ready.wait(60), self.events
        assert self.url, self.events
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.stop()

    def stop(self) -> int:
        """SIGTERM, and wait; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, by which it says nothing to anybody."""
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """The exit status, when it comes."""
        try:
            status = self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()
        return int(status)

    def _read(self) -> None:
        """Read the log to its end; ready once the address is known and the model warm, or when it has ended."""
        assert self.process.stderr is not None
        ready = False
        for line in self.process.stderr:
            event = json.loads(line) if line.startswith("{") else {"event": line}
            self.events.append(event)
            address = re.search(r"http://127\.0\.0\.1:\d+", event["event"])
            self.url = address[0] if address else self.url
            ready = ready or event["event"] == "ready"
            if ready and self.url:
                self._ready.set()
        self._ready.set()
