"""Connections, deadlines and endings, over real sockets."""

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from dinat.app.api.middleware import _RateLimit
from tests.app.conftest import Service, running
from tests.app.server.test_overload import Held, send_head


def connect(service: Service) -> httpx.Client:
    """A client with a connection of its own."""
    return httpx.Client(base_url=service.client.base_url, timeout=30)


def test_a_connection_too_many_is_told_so_and_closed(seven: bytes) -> None:
    with running(max_connections=1) as service:
        assert service.client.get("/health").status_code == 200  # and stays connected
        with connect(service) as other:
            for _ in range(3):
                refused = other.post("/classify", content=seven)
                assert refused.status_code == 503
                assert refused.headers["connection"] == "close"
                assert refused.headers["retry-after"] == "1"
                assert "1 connections are open" in refused.json()["detail"]
        assert service.client.post("/classify", content=seven).status_code == 200
        service.client.close()
        with connect(service) as third:
            while third.get("/health").status_code == 503:
                pass  # until the server has seen the first one go
            assert third.post("/classify", content=seven).status_code == 200
            counted = third.get("/metrics").text
    assert 'dinat_requests_total{route="none",status="503"}' in counted


def test_a_deadline_counts_from_the_first_byte_and_what_is_late_is_not_computed(seven: bytes) -> None:
    with running(Held) as service:
        core: Any = service.engine.backend
        core.let_go.set()
        url = service.client.base_url
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nX-Deadline-Ms: 200\r\nContent-Length: {len(seven)}\r\n\r\n"
        with socket.create_connection((url.host, url.port)) as connection:
            connection.settimeout(30)
            connection.sendall(head.encode() + seven[:10])
            time.sleep(0.3)  # the client's own time
            connection.sendall(seven[10:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 504")
        assert core.computed == 0


def test_what_waits_in_the_process_past_its_deadline_is_504(seven: bytes) -> None:
    with running(Held, deadline_ms=100) as service:
        core: Any = service.engine.backend
        core.let_go.set()
        connection = send_head(service, len(seven))
        time.sleep(0.2)
        connection.sendall(seven)
        assert connection.recv(65536).startswith(b"HTTP/1.1 504")
        connection.close()
        assert core.computed == 0


def test_what_was_taken_before_the_end_is_answered(seven: bytes) -> None:
    with running(Held) as service, ThreadPoolExecutor(1) as threads:
        engine, core = service.engine, service.engine.backend
        assert isinstance(core, Held)
        taken = threads.submit(service.client.post, "/classify", content=seven)
        assert core.entered.wait(30)
        assert engine._loop is not None
        draining = asyncio.run_coroutine_threadsafe(engine.drain(), engine._loop)
        with connect(service) as other:
            while (refused := other.post("/classify", content=seven)).status_code != 503:
                pass
            assert "is stopping" in refused.json()["detail"]
            assert refused.headers["connection"] == "close"
        core.let_go.set()
        assert taken.result().status_code == 200
        assert taken.result().json()["predictions"][0]["label"] == "7"
        draining.result(30)


def test_a_lame_duck_takes_work_and_says_that_it_is_not_ready(seven: bytes) -> None:
    with running() as service:
        engine = service.engine
        assert engine._loop is not None
        draining = asyncio.run_coroutine_threadsafe(engine.drain(lame_duck_seconds=60), engine._loop)
        with connect(service) as client:
            while (ready := client.get("/health/ready")).status_code == 200:
                pass
            assert ready.json()["status"] == "draining"
            assert client.get("/health/live").status_code == 200
            answer = client.post("/classify", content=seven)
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        draining.cancel()


@pytest.mark.parametrize("sent", [b"", b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Le"])
def test_a_connection_that_asks_for_nothing_is_closed(seven: bytes, sent: bytes) -> None:
    with running(upload_seconds=0.3) as service:
        url = service.client.base_url
        with socket.create_connection((url.host, url.port)) as connection:
            connection.settimeout(30)
            connection.sendall(sent)
            assert connection.recv(100) == b""
        with socket.create_connection((url.host, url.port)) as connection:  # a second request, begun and not ended
            connection.settimeout(30)
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /health/li")
            while connection.recv(4096):
                pass
        assert service.client.post("/classify", content=seven).status_code == 200


def test_refusals_beyond_their_rate_wait_for_their_turn() -> None:
    async def refuse(count: int) -> float:
        limit, started = _RateLimit(1000), time.monotonic()
        await asyncio.gather(*(limit.acquire() for _ in range(count)))
        return time.monotonic() - started

    assert asyncio.run(refuse(400)) >= 0.2  # a hundred at once, and a hundred in each tenth of a second that follows
