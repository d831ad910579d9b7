"""Connections, deadlines and shutdown, over real sockets."""

import asyncio
import contextvars
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import structlog
from structlog.testing import capture_logs

from dinat.app.api.middleware import _RateLimit
from tests.app.conftest import Service, running
from tests.app.server.raw_http import received, serving, statuses, wait_until
from tests.app.server.test_overload import PausedBackend, send_head


def connect(service: Service) -> httpx.Client:
    """A client with a connection of its own."""
    return httpx.Client(base_url=service.client.base_url, timeout=30)


def test_connection_over_the_limit_is_rejected_and_closed(seven: bytes) -> None:
    with running(max_connections=1) as service:
        assert service.client.get("/health").status_code == 200  # keeps its connection open
        with connect(service) as other:
            for _ in range(3):
                rejected = other.post("/classify", content=seven)
                assert rejected.status_code == 503
                assert rejected.headers["connection"] == "close"
                assert rejected.headers["retry-after"] == "1"
                assert "1 connections are open" in rejected.json()["detail"]
        assert service.client.post("/classify", content=seven).status_code == 200
        service.client.close()
        with connect(service) as third:
            while third.get("/health").status_code == 503:
                pass  # until the server notices the closed connection
            assert third.post("/classify", content=seven).status_code == 200
            counted = third.get("/metrics").text
    assert 'dinat_requests_total{route="none",status="503"}' in counted


def test_deadline_starts_at_the_first_byte_and_late_images_are_not_computed(seven: bytes) -> None:
    with running(PausedBackend) as service:
        backend: Any = service.engine.backend
        backend.resume.set()
        url = service.client.base_url
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nX-Deadline-Ms: 200\r\nContent-Length: {len(seven)}\r\n\r\n"
        with socket.create_connection((url.host, url.port)) as connection:
            connection.settimeout(30)
            connection.sendall(head.encode() + seven[:10])
            time.sleep(0.3)  # a slow client
            connection.sendall(seven[10:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 504")
        assert backend.computed == 0


def test_upload_past_the_deadline_is_504_and_not_computed(seven: bytes) -> None:
    with running(PausedBackend, deadline_ms=100) as service:
        backend: Any = service.engine.backend
        backend.resume.set()
        connection = send_head(service, len(seven))
        time.sleep(0.2)
        connection.sendall(seven)
        assert connection.recv(65536).startswith(b"HTTP/1.1 504")
        connection.close()
        assert backend.computed == 0


def test_drain_answers_accepted_requests_and_rejects_new_ones(seven: bytes) -> None:
    with running(PausedBackend) as service, ThreadPoolExecutor(1) as threads:
        engine, backend = service.engine, service.engine.backend
        assert isinstance(backend, PausedBackend)
        accepted = threads.submit(service.client.post, "/classify", content=seven)
        assert backend.entered.wait(30)
        assert engine._loop is not None
        draining = asyncio.run_coroutine_threadsafe(engine.drain(), engine._loop)
        with connect(service) as other:
            while (rejected := other.post("/classify", content=seven)).status_code != 503:
                pass
            assert "is stopping" in rejected.json()["detail"]
            assert rejected.headers["connection"] == "close"
        backend.resume.set()
        assert accepted.result().status_code == 200
        assert accepted.result().json()["predictions"][0]["label"] == "7"
        draining.result(30)


def test_lame_duck_accepts_work_and_reports_not_ready(seven: bytes) -> None:
    with running() as service:
        service.engine.announce_drain()
        with connect(service) as client:
            ready = client.get("/health/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "draining")
            assert client.get("/health/live").status_code == 200
            response = client.post("/classify", content=seven)
            assert (response.status_code, response.headers["connection"]) == (200, "close")


@pytest.mark.parametrize(("sent", "status"), [(b"", b""), (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Le", b"408")])
def test_connection_without_a_complete_request_head_is_closed(seven: bytes, sent: bytes, status: bytes) -> None:
    with running(upload_seconds=0.3) as service:
        url = service.client.base_url
        with socket.create_connection((url.host, url.port)) as connection:
            connection.settimeout(30)
            connection.sendall(sent)
            assert connection.recv(4096)[9:12] == status
        with socket.create_connection((url.host, url.port)) as connection:  # an incomplete second request
            connection.settimeout(30)
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /health/li")
            while connection.recv(4096):
                pass
        assert service.client.post("/classify", content=seven).status_code == 200


@pytest.mark.parametrize("together", [True, False], ids=["one packet", "two packets"])
def test_request_that_the_connection_rejects_is_logged_and_counted_once(together: bool) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine\r\nTransfer-Encoding: chunked\r\n\r\n"
    with running() as service, capture_logs() as events:
        url = service.client.base_url
        with socket.create_connection((url.host, url.port)) as connection:
            connection.settimeout(30)
            if together:
                connection.sendall(head + b"1\r\na\r\nno size\r\n")
            else:
                connection.sendall(head + b"1\r\na\r\n")
                while service.engine._in_flight == 0:  # until the application reads the body
                    time.sleep(0.01)
                connection.sendall(b"no size\r\n")
            data = received(connection)
        assert (statuses(data), b"x-request-id: mine\r\n" in data) == ([400], True)
        counted = service.client.get("/metrics").text
    (logged,) = [event for event in events if event.get("http.request.method") != "GET" and event["event"] == "request"]
    assert (logged["http.response.status_code"], logged["http.route"]) == (400, "/classify")
    (line,) = re.findall("dinat_requests_total{.*", counted)
    assert line == 'dinat_requests_total{route="/classify",status="400"} 1.0'


def test_log_of_the_drain_has_no_request_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinat.app.server.server.exit_after", lambda *_, **__: None)  # it would end the tests
    in_request = contextvars.copy_context()
    in_request.run(structlog.contextvars.bind_contextvars, request_id="x")
    with (
        serving(lame_duck_seconds=0, drain_seconds=0) as target,
        capture_logs([structlog.contextvars.merge_contextvars]) as events,
    ):
        wait_until(lambda: target.server.started)
        with target.server._engine.in_flight():
            loop = target.server.servers[0].get_loop()
            loop.call_soon_threadsafe(target.server.handle_exit, signal.SIGTERM, None, context=in_request)
            wait_until(lambda: target.server.should_exit)
    (warning,) = [event for event in events if event["log_level"] == "warning"]
    assert warning["event"].startswith("drain timed out")
    assert "request_id" not in warning


def test_rejections_are_rate_limited() -> None:
    async def reject(count: int) -> float:
        limit, started = _RateLimit(1000), time.monotonic()
        await asyncio.gather(*(limit.acquire() for _ in range(count)))
        return time.monotonic() - started

    assert asyncio.run(reject(400)) >= 0.2  # 100 at once, then 100 in each 0.1 s
