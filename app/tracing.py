"""OpenTelemetry traces of requests, by OpenTelemetry's FastAPI instrumentation. Disabled unless OTLP_ENDPOINT is set."""

from fastapi import FastAPI

from dinat.model import ConfigError


def trace_requests(app: FastAPI, endpoint: str) -> None:
    """Export a span for every request, except health and metrics.

    Args:
        app: The application to instrument.
        endpoint: Full URL of an OTLP/HTTP endpoint for traces.

    Raises:
        ConfigError: The extra "tracing" is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            "DINAT_OTLP_ENDPOINT is set but OpenTelemetry is not installed: pip install dinat-serve[tracing]"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "dinat-serve"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls="health,metrics")
    app.router.add_event_handler("shutdown", provider.shutdown)
