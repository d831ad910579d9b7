"""Servers in processes of their own, whose address is read from their log."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
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


Operation = tuple[str, str]
"""Method and path, as in an OpenAPI document."""


def operations(openapi: Mapping[str, Any]) -> set[Operation]:
    """Return the operations that an OpenAPI document describes."""
    return {(method.upper(), path) for path, item in openapi["paths"].items() for method in item}


def successful_operations(events: Sequence[Mapping[str, Any]]) -> set[Operation]:
    """Return the operations that a log has with status 200."""
    return {
        (event["http.request.method"], re.sub(r":\w+}", "}", event["http.route"]))
        for event in events
        if event.get("http.response.status_code") == 200 and "http.route" in event
    }


@contextmanager
def load_until_rejected(url: str, image: bytes, clients: int = 16, min_responses: int = 100) -> Iterator[list[int]]:
    """Send POST /classify from many clients, each until a status other than 200 or "connection refused".

    Yields the statuses. Enters after more than `min_responses` responses, and exits when every client has ended.
    """
    statuses: list[int] = []
    in_flight = threading.Event()

    def client_loop(_: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while True:
                try:
                    status = client.post("/classify", content=image).status_code
                except httpx.ConnectError:
                    return  # the server is closed; no request was sent
                statuses.append(status)
                if len(statuses) > min_responses:
                    in_flight.set()
                if status != 200:
                    return

    with ThreadPoolExecutor(clients) as threads:
        futures = [threads.submit(client_loop, n) for n in range(clients)]
        assert in_flight.wait(60)
        yield statuses
        for future in futures:
            future.result()


@contextmanager
def servers(ports: list[int], **settings: Any) -> Iterator[list["Server"]]:
    """Several servers, started at the same time."""
    with ThreadPoolExecutor(len(ports)) as threads, ExitStack() as stack:
        starting = [threads.submit(Server(port, **settings).__enter__) for port in ports]
        for started in starting:
            stack.push(started.result())
        yield [started.result() for started in starting]


class Server:
    """`dinat serve` as a context manager: ready on entry, stopped on exit.

    Args:
        port: Port to listen on; 0 selects a free one.
        prefix: Command that runs the service.
        settings: Settings of the service.

    Attributes:
        events: Logged events.
        url: Base URL.
    """

    def __init__(self, port: int = 0, prefix: Sequence[str] = (), **settings: Any) -> None:
        self._port = port
        self._prefix = prefix
        self._settings = {f"DINAT_{name.upper()}": str(value) for name, value in settings.items()}
        self.events: list[dict[str, Any]] = []
        self._ready = threading.Event()
        self.url = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [*self._prefix, sys.executable, "-m", "dinat", "serve", "--port", str(self._port), "--log-format", "json"],
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
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        """Wait for the exit status."""
        try:
            status = self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()
        return int(status)

    def _read(self) -> None:
        """Read the log. Sets `_ready` once the address is known and the model is ready, or when the process has exited."""
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


def check_log(server: Server) -> None:
    """Check that the log of a stopped server has JSON only, and no warning or error."""
    assert not [event for event in server.events if event.get("level") != "info"]
