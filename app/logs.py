"""Structured logs: one event with fields a line, as JSON or for a terminal."""

import asyncio
import atexit
import contextlib
import logging
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import orjson
import structlog

from dinat.app.printable_text import printable

FLUSH_SECONDS = 0.05


def configure_logs(log_format: Literal["auto", "json", "console"], level: int = logging.INFO) -> None:
    """Write the events of this project and of other libraries to standard error.

    This project's events do not go through the logging module, which would take a tenth of the time of a request.

    Args:
        log_format: "auto" is "console" on a terminal, else "json".
        level: The lowest level that is written.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    shared.append(_escape_control_characters if console else structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(_json_bytes)],
        logger_factory=lambda *_: _StandardError(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    render: structlog.types.Processor = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render], foreign_pre_chain=shared
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of malformed forms, which get 400


class _StandardError:
    """Buffers lines and writes them to the current sys.stderr.

    Lines that an event loop logs within FLUSH_SECONDS are written together: under load each write waits for the GIL. Warnings
    and errors flush the buffer at once, and so do lines that are logged outside an event loop.
    """

    _lines: ClassVar[list[bytes]] = []

    def _later(self, line: str | bytes) -> None:
        self._lines.append(line.encode() if isinstance(line, str) else line)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            flush_logs()
        else:
            if len(self._lines) == 1:
                loop.call_later(FLUSH_SECONDS, flush_logs)

    def _now(self, line: str | bytes) -> None:
        self._lines.append(line.encode() if isinstance(line, str) else line)
        flush_logs()

    debug = info = msg = _later
    warning = error = critical = exception = _now


def flush_logs() -> None:
    """Write the buffered lines."""
    lines = _StandardError._lines[:]
    del _StandardError._lines[: len(lines)]
    if lines:
        with contextlib.suppress(OSError):  # the terminal or the reader of a pipe is gone; requests are served all the same
            stream = sys.stderr.buffer
            stream.write(b"\n".join([*lines, b""]))
            stream.flush()


atexit.register(flush_logs)


def _escape_control_characters(_: Any, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """Escape what a terminal would obey in texts that a client sent. structlog quotes values that have several lines."""
    return {name: printable(value, also="\n\t") if isinstance(value, str) else value for name, value in event.items()}


def _json_bytes(event: Any, default: Callable[[Any], Any]) -> bytes:
    return orjson.dumps(event, default=default, option=orjson.OPT_NON_STR_KEYS)
