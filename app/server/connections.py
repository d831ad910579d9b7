"""What the connections of one server share: the limit on their number, and the pace at which their requests start."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from dinat.app.settings import Settings

PROBES = ("/health", "/ping", "/v2/health/")
"""Prefixes of the paths that are answered above MAX_CONNECTIONS, and before other requests."""

SCRAPES = ("/metrics",)
"""Prefixes of further paths that are answered above MAX_CONNECTIONS. They take milliseconds, and wait like other requests."""

STARTS_PER_ITERATION = 32
"""How many requests start in one iteration of the event loop.

An iteration in which a thousand requests start takes a second, and a probe needs several: to be accepted, read and answered.
"""


class Connections:
    """Limits that the connections of one server share.

    Args:
        settings: Settings of the service.
    """

    def __init__(self, settings: Settings) -> None:
        self._probes = _requests([*PROBES, *filter(None, [settings.aip_health_route])], settings.root_path)
        self._exempt = self._probes + _requests(SCRAPES, settings.root_path)
        self._limit = settings.max_connections
        self._over_limit: dict[asyncio.Protocol, asyncio.Transport] = {}
        self._waiting: deque[Callable[[], object]] = deque()
        self._remaining = STARTS_PER_ITERATION
        self._is_scheduled = False

    def is_probe(self, data: bytes) -> bool:
        """Whether data is the whole of one request, a health check."""
        return data.startswith(self._probes) and data.endswith(b"\r\n\r\n")

    def is_exempt(self, data: bytes) -> bool:
        """Whether data is the whole of one request, a health check or a scrape of the metrics."""
        return data.startswith(self._exempt) and data.endswith(b"\r\n\r\n")

    def is_over_limit(self, connection: asyncio.Protocol) -> bool:
        """Whether a connection was above MAX_CONNECTIONS when it was opened."""
        return connection in self._over_limit

    def add(self, connection: asyncio.Protocol, transport: asyncio.Transport, count: int) -> None:
        """Add a connection. Above twice MAX_CONNECTIONS, the oldest of those above the limit is closed.

        Args:
            connection: A new connection.
            transport: Its transport.
            count: Number of open connections, with this one.
        """
        if count - len(self._over_limit) > self._limit:
            self._over_limit[connection] = transport
            if len(self._over_limit) > self._limit:
                self._over_limit.pop(next(iter(self._over_limit))).abort()

    def remove(self, connection: asyncio.Protocol) -> None:
        """Remove a closed connection."""
        self._over_limit.pop(connection, None)

    def start(self, loop: asyncio.AbstractEventLoop, start: Callable[[], object]) -> None:
        """Call `start`, now or in a later iteration of the event loop."""
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._next_iteration, loop)
        if self._remaining:
            self._remaining -= 1
            start()
        else:
            self._waiting.append(start)

    def _next_iteration(self, loop: asyncio.AbstractEventLoop) -> None:
        self._remaining = STARTS_PER_ITERATION
        self._is_scheduled = False
        for _ in range(min(STARTS_PER_ITERATION, len(self._waiting))):
            self.start(loop, self._waiting.popleft())


def _requests(paths: Sequence[str], root_path: str) -> tuple[bytes, ...]:
    """Return what requests of these paths begin with, also if a proxy does not remove the root path."""
    roots = {"", root_path}
    return tuple(f"{method} {root}{path}".encode() for method in ("GET", "HEAD") for root in roots for path in paths)
