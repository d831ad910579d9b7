"""Traces, as a collector receives them."""

import gzip
import http.server
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.app.conftest import running
from tests.e2e.processes import Server

pytest.importorskip("opentelemetry.proto", reason="OpenTelemetry is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


class Collector:
    """What a collector has received.

    Attributes:
        url: Its endpoint for traces.
        requests: Decoded exports, in order.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Any] = []

    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def service_names(self) -> set[str]:
        return {
            attribute.value.string_value
            for request in self.requests
            for resource in request.resource_spans
            for attribute in resource.resource.attributes
            if attribute.key == "service.name"
        }


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def test_request_has_a_span_with_its_parts(seven: bytes) -> None:
    with collecting() as collector:
        with running(otlp_endpoint=collector.url) as service:
            assert service.client.get("/health").status_code == 200
            started = time.time_ns()
            headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
            assert service.client.post("/classify", content=seven, headers=headers).status_code == 200
            ended = time.time_ns()
        spans = {span.name: span for span in collector.spans()}
    assert collector.service_names() == {"dinat-serve"}
    assert spans.keys() == {"POST /classify", "decode", "queue", "compute", "encode"}
    root = spans.pop("POST /classify")
    assert root.trace_id.hex() == TRACE_ID
    for span in spans.values():
        assert span.parent_span_id == root.span_id
        assert started <= span.start_time_unix_nano <= span.end_time_unix_nano <= ended
    order = ["decode", "queue", "compute", "encode"]
    for before, after in itertools.pairwise(order):
        assert spans[before].end_time_unix_nano == spans[after].start_time_unix_nano


def test_standard_variables_apply(seven: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_SERVICE_NAME", "flowers")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.removesuffix("/v1/traces"))
        with running() as service:
            service.client.post("/classify", content=seven)
        assert collector.service_names() == {"flowers"}
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
        count = len(collector.spans())
        with running() as service:
            service.client.post("/classify", content=seven)
        assert len(collector.spans()) == count


@pytest.mark.process
@pytest.mark.parametrize("frontends", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_no_span_is_lost_at_sigterm(frontends: int, seven: bytes) -> None:
    with collecting() as collector:
        with Server(frontends=frontends, otlp_endpoint=collector.url) as server:
            with httpx.Client(base_url=server.url) as client:
                for _ in range(20):
                    client.post("/classify", content=seven).raise_for_status()
            assert server.stop() == 0
        names = Counter(span.name for span in collector.spans())
    assert names == {"POST /classify": 20, "decode": 20, "queue": 20, "compute": 20, "encode": 20}
    logged = {event["trace_id"] for event in server.events if event["event"] == "request"}
    assert logged == {span.trace_id.hex() for span in collector.spans()}


@pytest.mark.process
@pytest.mark.slow
def test_collector_that_does_not_answer_does_not_delay_the_end(seven: bytes) -> None:
    with Server(otlp_endpoint="http://127.0.0.1:9/v1/traces", lame_duck_seconds=0) as server:
        httpx.post(f"{server.url}/classify", content=seven).raise_for_status()
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 5
