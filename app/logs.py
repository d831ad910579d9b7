"""One line for each event, with fields: JSON for machines, plain for people."""

import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

import orjson
import structlog


def configure_logs(log_format: Literal["auto", "json", "console"]) -> None:
    """Send every event to standard error, those of other libraries too. auto: console on a terminal, else JSON.

    Events of this project pass by the standard library's logging, which takes a tenth of the time of a request.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not console:
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(_json_bytes)],
        logger_factory=lambda *_: _StandardError(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    render: structlog.types.Processor = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render], foreign_pre_chain=shared
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


class _StandardError:
    """Writes lines to what standard error is at that time."""

    def msg(self, line: str | bytes) -> None:
        """Write one, in one piece."""
        stream = sys.stderr.buffer
        stream.write((line.encode() if isinstance(line, str) else line) + b"\n")
        stream.flush()

    debug = info = warning = error = critical = exception = msg


def _json_bytes(event: Any, default: Callable[[Any], Any]) -> bytes:
    return orjson.dumps(event, default=default, option=orjson.OPT_NON_STR_KEYS)
