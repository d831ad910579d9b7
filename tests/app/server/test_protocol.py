"""One connection, as clients that keep to HTTP use it."""

import gc
import re
import socket
import struct
import time
from concurrent.futures import Future
from contextlib import ExitStack

import pytest

from dinat.app.server import protocol
from tests.app.conftest import running
from tests.app.server.raw_http import GET, LARGE, LOOPS, received, serving, statuses, wait_until

UPGRADES = {
    "curl --http2": (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"  # 7.88
    ),
    "Java": (
        b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
        b"Upgrade: h2c\r\nUser-Agent: Java-http-client/17.0.15\r\n"
    ),
    "WebSocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
}
"""Header fields by which clients offer to switch to another protocol."""


@pytest.fixture(autouse=True)
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the deadlines that are not settings."""
    monkeypatch.setattr(protocol, "KEEP_ALIVE_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.3)


@LOOPS
def test_offer_to_upgrade_is_ignored(loop: str) -> None:
    body = b"GET /other HTTP/1.1\r\nHost: x\r\n\r\n"  # which is not to be read as a second request
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    with serving(loop) as target:
        for fields in UPGRADES.values():
            start = b"POST /echo HTTP/1.1\r\nHost: x\r\n" + fields
            head = start + b"Content-Length: %d\r\n\r\n" % len(body)
            data = target.exchange(head + body + start + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + GET)
            assert (statuses(data), data.count(body)) == ([200, 200, 200], 2)
            expected = target.application.requests + 1
            with target.connect(head) as connection:
                target.wait_for_requests(expected)
                connection.sendall(body[:10])
                connection.sendall(body[10:])
                data = received(connection)
            assert (statuses(data), data.count(body)) == ([200], 1)
            assert target.application.requests == expected


def test_image_of_a_client_that_offers_to_upgrade_is_classified(seven: bytes) -> None:
    with running() as service:
        for fields in UPGRADES.values():
            url = service.client.base_url
            with socket.create_connection((url.host, url.port)) as connection:
                connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\n" + fields)
                connection.sendall(b"Content-Length: %d\r\n\r\n" % len(seven))
                connection.sendall(seven)
                data = received(connection)
            assert statuses(data) == [200]
            assert b'"label":"7"' in data


@LOOPS
def test_half_closed_client_gets_its_responses(loop: str) -> None:
    incomplete = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\na"
    with serving(loop) as target:
        with target.connect(b"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab") as connection:
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            target.application.release.set()
            assert received(connection).endswith(b"\r\n\r\nab")
        old = target.exchange(b"POST /wait HTTP/1.0\r\nContent-Length: 2\r\n\r\nab", half_close=True)
        assert old.startswith(b"HTTP/1.1 200")  # HTTP/1.0 has no interim responses
        assert statuses(target.exchange(GET + GET + incomplete, half_close=True)) == [200, 200]
        assert target.exchange(incomplete, half_close=True) == b""


@LOOPS
@pytest.mark.parametrize("reset", [False, True])
def test_request_of_a_disconnected_client_is_told(loop: str, reset: bool) -> None:
    with serving(loop) as target:
        connection = target.connect(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        target.wait_for_requests(1)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        assert target.application.disconnected.wait(10)
        wait_until(lambda: target.connections == 0)


@LOOPS
def test_pipelined_requests_are_answered_in_order(loop: str) -> None:
    requests = [b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n%02d" % n for n in range(protocol.MAX_PIPELINED)]
    with serving(loop) as target:
        for parts in ([b"".join(requests)], requests):
            data = target.exchange(*parts)
            assert re.findall(rb"\r\n\r\n(\d\d)", data) == [b"%02d" % n for n in range(protocol.MAX_PIPELINED)]


@LOOPS
def test_large_response_is_read_by_a_slow_client(loop: str) -> None:
    with serving(loop) as target, target.connect(GET.replace(b"live", b"large"), receive_buffer=65536) as connection:
        time.sleep(0.5)  # longer than a connection may be idle
        head, _, body = received(connection).partition(b"\r\n\r\n")
        assert (statuses(head), len(body)) == ([200], LARGE)


@LOOPS
def test_client_that_sends_a_large_body_reads_an_early_response_afterwards(loop: str) -> None:
    with serving(loop) as target:
        for path in (b"/live", b"/other"):
            head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path, 20 * 2**20)
            assert statuses(target.exchange(head, bytes(20 * 2**20))) == [200 if path == b"/live" else 404]


@LOOPS
def test_connection_is_usable_after_a_small_body_that_was_not_read(loop: str) -> None:
    with serving(loop) as target, target.connect(b"POST /other HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n") as connection:
        assert statuses(connection.recv(4096)) == [404]
        connection.sendall(b"123456789" + GET)
        assert statuses(received(connection)) == [200]


@LOOPS
def test_interim_response_is_sent_only_when_the_body_is_read(loop: str) -> None:
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    with serving(loop) as target:
        with target.connect(head % b"/echo") as connection:
            assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(b"ab")
            assert received(connection).endswith(b"\r\n\r\nab")
        with target.connect(head % b"/other") as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 404")


@LOOPS
@pytest.mark.parametrize("url", [b"http://x/live", b"http://x", b"HTTP://x?a=1"])
def test_target_in_absolute_form(loop: str, url: bytes) -> None:
    with serving(loop) as target:
        data = target.exchange(b"GET " + url + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert statuses(data) == [200 if url.endswith(b"live") else 404]  # / is no path of the application


@LOOPS
def test_head_and_http_1_0(loop: str) -> None:
    with serving(loop) as target:
        for method, version in ((b"HEAD", b"1.1"), (b"GET", b"1.0"), (b"HEAD", b"1.0")):
            data = target.exchange(b"%b /live HTTP/%b\r\nHost: x\r\n\r\n" % (method, version))
            assert statuses(data) == [200]
            assert data.endswith(b"live") == (method == b"GET")
            assert (b"connection: close" in data) == (version == b"1.0")


@LOOPS
def test_closed_connections_leave_no_reference_cycle(loop: str) -> None:
    def connections() -> int:
        return sum(type(item) is protocol.Connection for item in gc.get_objects())

    gc.collect()
    before = connections()
    with serving(loop, upload_seconds=0.5) as target:
        gc.disable()
        try:
            for request in (GET, b"no HTTP\r\n\r\n", GET[:-2] + b"X: 1\r\n" * 200):
                for _ in range(10):
                    with target.connect(request) as connection:
                        connection.recv(4096)
            target.connect().close()
            wait_until(lambda: connections() == before)
        finally:
            gc.enable()


@LOOPS
def test_server_stops_while_connections_linger(loop: str) -> None:
    requests = [GET, b"no HTTP\r\n\r\n", b"GET /", b"POST /other HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", b""]
    with ExitStack() as stack:
        with serving(loop) as target:
            for request in requests:
                stack.enter_context(target.connect(request))
            wait_until(lambda: target.connections == len(requests))
            started = time.monotonic()
        assert time.monotonic() - started < 3


@LOOPS
def test_shutdown_closes_a_connection_that_its_client_has_reset(loop: str) -> None:
    closed: Future[None] = Future()
    with serving(loop) as target, target.connect(b"GET / HT") as connection:
        wait_until(lambda: target.connections == 1)
        (open_connection,) = target.server.server_state.connections

        def reset_and_shut_down() -> None:
            """In one step of the event loop, so that it does not see the reset before."""
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            try:
                closed.set_result(open_connection.shutdown())
            except OSError as error:
                closed.set_exception(error)

        open_connection.loop.call_soon_threadsafe(reset_and_shut_down)  # type: ignore[union-attr]
        closed.result(10)
        wait_until(lambda: target.connections == 0)
