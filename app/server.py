"""uvicorn, stopping without losing a request."""

import asyncio
from types import FrameType

import uvicorn

from app.engine.engine import Engine


class Server(uvicorn.Server):
    """On a signal, drains the engine while still answering (503 to new work), then closes; on a second one, closes at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self._draining: asyncio.Task[None] | None = None
        engine.on_started = self._stop_if_failed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn, whose own handler raises the signal again when all is over; here the exit status is the command's."""
        if self._draining is None:
            loop = asyncio.get_running_loop()
            self._draining = loop.create_task(self._drain_then_exit())
            loop.call_soon_threadsafe(lambda: None)  # wakes the loop, which may be asleep
        else:
            self.should_exit = self.force_exit = True

    async def _drain_then_exit(self) -> None:
        await self._engine.drain()
        self.should_exit = True

    def _stop_if_failed(self) -> None:
        if self._engine.failure is not None:
            self.should_exit = True
