"""Raw HTTP over loopback, to a small application behind the service's own connections."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from dinat.app.engine.engine import Engine
from dinat.app.server.server import Server
from dinat.app.settings import Settings

LOOPS = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])

GET = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = 32 * 2**20
"""Bytes of a response that the buffers of the kernel do not hold."""


class Application:
    """An ASGI application: /live, /echo, /large, and /wait and /busy, which respond after `release`; others are 404.

    Attributes:
        requests: Number of requests.
        disconnected: Set when a /wait is told that its client has disconnected.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.release, self.disconnected = threading.Event(), threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        self.requests += 1
        path, body = scope["path"], b"live"
        if path == "/large":
            body = bytes(LARGE)
        elif path in ("/echo", "/wait"):
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body, more = body + message["body"], message["more_body"]
        if path == "/wait":
            watch = asyncio.ensure_future(receive())
            while not self.release.is_set() and not watch.done():
                await asyncio.sleep(0.01)
            if watch.done():
                self.disconnected.set()
                return
            watch.cancel()
        while path == "/busy" and not self.release.is_set():
            time.sleep(0.02)
            await asyncio.sleep(0)
        status = 200 if path in ("/live", "/echo", "/large", "/wait", "/busy") else 404
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@dataclass
class Target:
    """A running server of an Application."""

    address: tuple[str, int]
    application: Application
    server: Server

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self.server.server_state.connections)

    def connect(self, *parts: bytes, receive_buffer: int | None = None) -> socket.socket:
        """Open a connection and send the parts."""
        connection = socket.socket()
        connection.settimeout(10)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(self.address)
        for part in parts:
            connection.sendall(part)
        return connection

    def exchange(self, *parts: bytes, half_close: bool = False) -> bytes:
        """Send the parts on a connection of their own, and return everything received until it is closed."""
        with self.connect(*parts) as connection:
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return received(connection)

    def wait_for_requests(self, count: int) -> None:
        """Wait until the application has received this number of requests."""
        wait_until(lambda: self.application.requests >= count)


@contextmanager
def serving(loop: str = "uvloop", **changes: Any) -> Iterator[Target]:
    """Serve an Application on a free port in another thread, on this kind of event loop."""
    application = Application()
    server = Server(application, Engine(Settings(_env_file=None, **changes)))  # type: ignore[arg-type]
    server.config.loop, server.config.lifespan = loop, "off"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Target(listener.getsockname(), application, server)
        finally:
            application.release.set()
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def received(connection: socket.socket) -> bytes:
    """Receive until the other side is closed."""
    data = b""
    while part := connection.recv(2**20):
        data += part
    return data


def statuses(data: bytes) -> list[int]:
    """Return the statuses of the responses, without interim ones."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([2-5]\d\d) ", data)]


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition that another thread fulfills."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
