"""OpenTelemetry traces of requests. Disabled unless OTLP_ENDPOINT, or OpenTelemetry's own variable for it, is set.

The variables OTEL_* apply as OpenTelemetry's specification has them: service name, resource, headers, sampler, batches.
"""

import asyncio
import os
import threading
import time
from collections.abc import Mapping

import structlog
from fastapi import FastAPI

from dinat.model import ConfigError

log = structlog.get_logger("dinat")

FLUSH_SECONDS = 2
"""At the end of the service, spans are sent to the collector for at most this long."""

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Tracing:
    """A span for every request except health checks and metrics, with child spans for its parts.

    Args:
        app: The application to instrument.
        endpoint: Full URL of an OTLP/HTTP endpoint for traces; None for OpenTelemetry's variables.

    Raises:
        ConfigError: The extra "tracing" is not installed.
    """

    def __init__(self, app: FastAPI, endpoint: str | None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ConfigError(
                "DINAT_OTLP_ENDPOINT is set but OpenTelemetry is not installed: pip install 'dinat-serve[tracing]'"
            ) from None
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {"service.name": "dinat-serve"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("dinat")
        self._current_span = trace.get_current_span
        FastAPIInstrumentor.instrument_app(
            app, tracer_provider=self._provider, excluded_urls="health,metrics", exclude_spans=["receive", "send"]
        )

    def fields(self) -> dict[str, str]:
        """Return the ids of the current span, for the log."""
        context = self._current_span().get_span_context()
        if not context.is_valid:
            return {}
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def add_parts(self, seconds: Mapping[str, float]) -> None:
        """Add a child span to the current span for each part of a request, the last of which ends now."""
        if not self._current_span().is_recording():
            return
        end = time.time_ns()
        for name, duration in reversed(list(seconds.items())):
            start = end - round(duration * 1e9)
            self._tracer.start_span(name, start_time=start).end(end)
            end = start

    async def stop(self) -> None:
        """Send the spans that wait. A collector that does not answer delays the end by at most FLUSH_SECONDS."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, FLUSH_SECONDS)
        if thread.is_alive():
            log.warning("the last spans were not sent: the collector does not answer")


def configure_tracing(app: FastAPI, endpoint: str | None) -> Tracing | None:
    """Trace the requests of an application if an endpoint is set. Arguments and errors as for Tracing."""
    if endpoint is None and not any(map(os.environ.get, ENDPOINTS)):
        return None
    return Tracing(app, endpoint)
