"""uvicorn: limits to its connections, requests timed from their first byte, and stopping without losing one."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dinat.app.engine.engine import Engine
from dinat.app.server.protocol import KEEP_ALIVE_SECONDS, LINGER_SECONDS, http_protocol

QUIET_SECONDS = 0.25
"""A door closes once nobody has asked for so long: who asks just then would be cut off unheard."""


class Server(uvicorn.Server):
    """On a signal, takes work for LAME_DUCK_SECONDS more, drains the engine while still answering, then closes.

    Work that comes while it drains gets 503, and so does what comes until it is quiet, or LINGER_SECONDS have passed. On a
    second signal it closes at once.

    lifeline: of a front end; it drains as on a signal when the other end is closed, and leaves to its supervisor what is to
    happen on a second signal, and when the engine fails.  say: told of the engine's state.
    """

    def __init__(
        self, app: FastAPI, engine: Engine, lifeline: int | None = None, say: Callable[[str], object] = lambda _: None
    ) -> None:
        settings = engine.settings
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=http_protocol(engine),
            ws="none",
            backlog=settings.max_connections,
            server_header=False,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        super().__init__(config)
        self._engine = engine
        self._lifeline, self._say = lifeline, say
        self._draining: asyncio.Task[None] | None = None
        if lifeline is None:
            engine.on_started = self._stop_if_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self._lifeline is not None:
            asyncio.get_running_loop().add_reader(self._lifeline, self._drain)

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn."""
        self._say(self._engine.state)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn, whose own handler raises the signal again when all is over; here the exit status is the command's."""
        if self._draining is not None and self._lifeline is None:
            self.should_exit = self.force_exit = True
        else:
            self._drain()

    def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        if self._lifeline is not None:
            loop.remove_reader(self._lifeline)
        if self._draining is None:
            self._draining = loop.create_task(self._drain_then_exit())
            loop.call_soon_threadsafe(lambda: None)  # wakes the loop, which may be asleep

    async def _drain_then_exit(self) -> None:
        await self._engine.drain(self._engine.settings.lame_duck_seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self._quiet()
        self.should_exit = True

    async def _quiet(self) -> None:
        answered = -1
        while answered != self.server_state.total_requests:
            answered = self.server_state.total_requests
            await asyncio.sleep(QUIET_SECONDS)

    def _stop_if_failed(self) -> None:
        if self._engine.failure is not None:
            self.should_exit = True
