"""Clients that misuse connections: slow and oversized requests, endless bodies, unread responses, floods."""

import asyncio
import re
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from dinat.app.server import protocol
from tests.app.server.raw_http import GET, LOOPS, Target, received, serving, statuses, wait_until
from tests.e2e.processes import Server
from tests.security.observer import observed

ECHO = b"POST /echo HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the deadlines that are not settings."""
    monkeypatch.setattr(protocol, "KEEP_ALIVE_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.3)


def assert_problem(data: bytes, status: int, detail: str = "") -> None:
    """Check that the data is one error response, and that it closes the connection."""
    head, _, body = data.partition(b"\r\n\r\n")
    assert statuses(data) == [status], data[:1000]
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    (request_id,) = re.findall(rb"x-request-id: (\w+)", head)
    assert b'"request_id":"' + request_id in body
    assert detail.encode() in body, body


@LOOPS
def test_malformed_requests_get_a_problem_with_a_request_id(loop: str, short_deadlines: None) -> None:
    large = "65,535 bytes or 100 headers"
    cases: list[tuple[bytes, int, str]] = [
        (b"\x16\x03\x01\x02\r\n\r\n", 400, "the request is not HTTP/1.1: Invalid method"),
        (b"GET / HTTP/9.9\r\n\r\n", 400, "Invalid HTTP version"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "not HTTP/1.1"),
        (b"CONNECT other:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "CONNECT is not supported"),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400, "not HTTP/1.1"),
        (b"GET /live HTTP/1.1\r\n\r\n", 400, "no Host fields"),
        (b"GET /live HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400, "2 Host fields"),
        (b"GET /live HTTP/1.1\r\nHost: x/y\r\n\r\n", 400, "Host is 'x/y'"),
        (ECHO + b"Content-Length: " + b"0" * 5000 + b"2\r\n\r\nab", 400, "5001 digits, at most 19"),
        (ECHO + b"Content-Length: 99999999999999999999\r\n\r\n", 400, "not HTTP/1.1"),
        (ECHO + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400, "not HTTP/1.1"),
        (ECHO + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "not HTTP/1.1"),
        (ECHO + b"Transfer-Encoding: gzip, chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 501, "only chunked is supported"),
        (ECHO + CHUNKED + b"1\r\na\r\nno size\r\n", 400, "not HTTP/1.1"),
        (ECHO + CHUNKED + b"1\r\na\r\n" * 5000, 400, "chunks"),
        (ECHO + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431, large),
        (ECHO + b"X: 1\r\n" * 200 + b"\r\n", 431, large),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, large),
    ]
    with serving(loop) as target:
        for request, status, detail in cases:
            assert_problem(target.exchange(request), status, detail)
            assert statuses(target.exchange(GET + request)) == [200, status], request[:100]  # in order


@LOOPS
def test_head_and_trailers_are_bounded(loop: str, short_deadlines: None) -> None:
    starts = [
        (b"GET /", b"a"),
        (b"GET /echo HTTP/1.1\r\nX: ", b"a"),
        (b"GET /echo HTTP/1.1\r\n", b"X: 1\r\n"),
        (ECHO + CHUNKED + b"1\r\na\r\n0\r\nX: ", b"a"),
        (ECHO + CHUNKED + b"1\r\na\r\n0\r\n", b"X: 1\r\n"),
        (ECHO + CHUNKED + b"1;x=", b"a"),
    ]
    with serving(loop) as target:
        for start, part in starts:
            with target.connect(start) as connection:
                sent = 0
                while not select.select([connection], [], [], 0)[0]:
                    connection.sendall(part * 1000)
                    sent += len(part) * 1000
                connection.shutdown(socket.SHUT_WR)
                assert sent < 16 * 2**20  # more than the buffers of the kernel hold
                assert_problem(received(connection), 431)


@LOOPS
def test_thousands_of_pipelined_requests_in_one_packet_are_rejected(loop: str, short_deadlines: None) -> None:
    with serving(loop) as target:
        data = target.exchange(GET * 4000)
        assert statuses(data) == [200] * (1 + protocol.MAX_PIPELINED) + [400]
        assert b"64 requests wait for their responses" in data
        assert target.application.requests == 1 + protocol.MAX_PIPELINED


SLOW: list[tuple[bytes, bytes, list[int]]] = [
    (b"", b"", []),
    (b"GET /live HT", b"", [408]),
    (b"GET /live HTTP/1.1\r\nX: ", b"a", [408]),
    (GET, b"", [200]),
    (GET, b"\r\n", [200]),
    (GET + b"GET /li", b"v", [200, 408]),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n", b"a", [408]),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\n" + CHUNKED, b"1\r\na\r\n", [408]),
    (b"POST /other HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n", b"a", [404]),
    (b"GET /live HTTP/1.1\r\nHost: x\r\n" + CHUNKED, b"1\r\na\r\n", [200]),
    (b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\nPOST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n", b"a", [200, 408]),
    (b"no HTTP\r\n\r\n", b"a", [400]),
    (b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\nGET /li", b"v", [200]),
]
"""What a client sends first, then in small parts without end, and the statuses of the responses."""


@LOOPS
def test_every_phase_of_a_connection_ends_by_its_deadline(loop: str, short_deadlines: None) -> None:
    def run(target: Target, first: bytes, drip: bytes) -> list[int]:
        with target.connect(first) as connection:
            data = b""
            while True:
                if select.select([connection], [], [], 0.02)[0]:
                    part = connection.recv(4096)
                    if not part:
                        break
                    data += part
                elif drip:
                    connection.sendall(drip)
            while drip:  # the server discards what is sent, until its deadline
                try:
                    connection.sendall(drip)
                    time.sleep(0.02)
                except OSError:
                    break
            return statuses(data)

    with serving(loop, upload_seconds=0.5) as target, ThreadPoolExecutor(len(SLOW)) as threads:
        started = time.monotonic()
        release = threading.Timer(1, target.application.release.set)
        release.start()
        outcomes = list(threads.map(lambda case: (*case[:2], run(target, *case[:2])), SLOW))
        assert time.monotonic() - started < 3
        assert outcomes == SLOW
        release.join()


@LOOPS
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_unread_responses_are_dropped(loop: str, count: int, version: bytes, short_deadlines: None) -> None:
    request = b"GET /large HTTP/" + version + b"\r\nHost: x\r\n\r\n"
    with serving(loop, download_seconds=0.5, deadline_ms=100) as target, ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(target.connect(request * count, receive_buffer=4096))
        wait_until(lambda: target.connections == 4)
        wait_until(lambda: target.connections == 0, 3)


@LOOPS
def test_probes_are_answered_under_a_flood_of_connections(loop: str, short_deadlines: None) -> None:
    probes = [b"GET /health/live", b"HEAD /health/ready", b"GET /metrics", b"GET /ping", b"GET /v2/health/live", b"GET /alive"]
    with serving(loop, max_connections=50, aip_health_route="/alive") as target, ExitStack() as stack:
        for _ in range(200):  # 50 are accepted, 50 are above the limit, the others are closed
            stack.enter_context(target.connect())
        for probe in probes * 10:
            data = target.exchange(probe + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            assert statuses(data) == [404]  # by the application, which has no such endpoints
            assert b"connection: close" in data
        assert target.application.requests == len(probes) * 10
        assert target.connections <= 101
        for request in (GET, b"POST /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /health HT", b"GET /health HTTP/1.1\r\nX: "):
            assert_problem(target.exchange(request), 503, "50 connections are open")


@LOOPS
def test_connection_above_the_limit_ends_by_its_deadline(loop: str, short_deadlines: None) -> None:
    slow = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    with serving(loop, max_connections=1) as target, target.connect(GET.replace(b"live", b"wait")):
        target.wait_for_requests(1)
        for probe in (b"", slow):
            started = time.monotonic()
            target.exchange(probe)
            assert time.monotonic() - started < 2


@LOOPS
def test_probe_does_not_wait_behind_hundreds_of_connections(loop: str) -> None:
    with serving(loop) as target, ExitStack() as stack:
        stack.enter_context(
            target.connect(b"GET /busy HTTP/1.1\r\nHost: x\r\n\r\n")
        )  # an iteration of the event loop takes 20 ms
        target.wait_for_requests(1)
        for _ in range(300):
            stack.enter_context(target.connect())
        started = time.monotonic()
        assert statuses(target.exchange(b"GET /health HTTP/1.0\r\n\r\n")) == [404]
        assert time.monotonic() - started < 2  # not 300 iterations
        target.application.release.set()


MISUSES: list[tuple[bytes, bytes]] = [
    (b"", b""),
    (b"GET /health/live HTTP/1.1\r\nX: ", b"a"),
    (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n", b"a"),
    (b"POST /other HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n", b"a"),
    (b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + CHUNKED, b"1\r\na\r\n"),
    (b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n"),
    (b"no HTTP\r\n\r\n", b"a"),
]
"""What a client sends first, and then four times a second without end."""


@pytest.mark.process
@pytest.mark.slow
def test_honest_clients_are_served_beside_a_hundred_misuses_of_each_phase() -> None:
    async def misuse(port: int, first: bytes, drip: bytes) -> float:
        """Return how long the connection was open."""
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(first)
            while True:
                await asyncio.sleep(0.25)
                if drip:
                    writer.write(drip)
                    await writer.drain()
                elif reader.at_eof():
                    break
        except OSError:
            pass
        finally:
            writer.close()
        return time.monotonic() - started

    async def attack(port: int) -> list[float]:
        return await asyncio.gather(*(misuse(port, *case) for case in MISUSES for _ in range(100)))

    with Server(upload_seconds=1) as server, observed(server) as observation:
        open_seconds = asyncio.run(attack(int(server.url.rpartition(":")[2])))
    print(f"{len(open_seconds)} connections, open for at most {max(open_seconds):.1f} s, {observation}")
    assert max(open_seconds) < 1 + protocol.KEEP_ALIVE_SECONDS + protocol.LINGER_SECONDS + 2
    assert set(observation.honest_statuses) == set(observation.live_statuses) == {200}
    assert observation.growth < 64 * 2**20
