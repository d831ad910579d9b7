import asyncio
import math
import signal
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import aiohttp
import httpx
import psutil
import pytest

from dinat.app.server.protocol import LINGER_SECONDS, SHUTDOWN_SECONDS
from tests.app.server.raw_http import received, statuses
from tests.e2e.processes import DIGITS, Server, load_until_rejected

pytestmark = pytest.mark.process


@pytest.mark.slow
def test_every_request_is_logged_as_one_json_line() -> None:
    with Server() as server:
        response = httpx.post(
            f"{server.url}/classify?top_k=1",
            files={"image": (DIGITS / "5-2.png").read_bytes()},
            headers={"X-Request-ID": "mine", "X-API-Key": "never-logged"},
        )
        assert response.json()["predictions"][0]["label"] == "5"
        assert server.stop() == 0
    (line,) = [event for event in server.events if event["event"] == "request"]
    assert (line["http.request.method"], line["url.path"], line["http.response.status_code"]) == ("POST", "/classify", 200)
    assert line["request_id"] == "mine"
    assert 0 < line["http.server.request.duration"] < 10
    assert line["http.request.body.size"] > (DIGITS / "5-2.png").stat().st_size
    assert line["http.response.body.size"] == len(response.content)
    assert line["client.address"] == "127.0.0.1"
    assert line["level"] == "info"
    assert "never-logged" not in str(server.events)


def test_sigterm_under_load_answers_all_requests_and_exits_with_0() -> None:
    image = (DIGITS / "5-2.png").read_bytes()
    with Server() as server, load_until_rejected(server.url, image) as statuses:
        assert server.stop() == 0
    assert set(statuses) <= {200, 503}
    logged = [event["http.response.status_code"] for event in server.events if event["event"] == "request"]
    assert sorted(logged) == sorted(statuses)
    details = [event["detail"] for event in server.events if event["event"] == "request" and "detail" in event]
    assert len(details) == statuses.count(503) and all(details)


@pytest.mark.parametrize("frontends", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_request_that_arrives_in_time_is_answered_if_it_is_read_late(frontends: int) -> None:
    image = (DIGITS / "5-2.png").read_bytes()
    with Server(frontends=frontends) as server, ThreadPoolExecutor(1) as threads:
        main = psutil.Process(server.process.pid)
        processes = [main, *(main.children() if frontends > 1 else ())]
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        for process in processes:
            process.suspend()
        response = threads.submit(httpx.post, f"{server.url}/classify", content=image, timeout=30)
        time.sleep(1.5)  # more than what is left of LAME_DUCK_SECONDS
        assert not response.done()
        for process in processes:
            process.resume()
        assert response.result().status_code == 200, response.result().text
        assert server.wait() == 0


def test_request_whose_body_arrives_during_the_drain_is_answered() -> None:
    image = (DIGITS / "5-2.png").read_bytes()

    async def slow_image() -> AsyncIterator[bytes]:
        yield image[:50]
        server.process.send_signal(signal.SIGTERM)
        while (await client.post("/classify", content=image)).status_code == 200:
            await asyncio.sleep(0.05)
        await asyncio.sleep(SHUTDOWN_SECONDS + LINGER_SECONDS + 1)  # a server that does not wait for the body has ended
        yield image[50:]

    async def upload() -> httpx.Response:
        async with client:
            return await client.post("/classify", content=slow_image())

    with Server() as server:
        client = httpx.AsyncClient(base_url=server.url, timeout=30)
        response = asyncio.run(upload())
        assert (response.status_code, response.json()["predictions"][0]["label"]) == (200, "5")
        assert server.wait() == 0


@pytest.mark.parametrize("frontends", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_incomplete_requests_are_rejected_once_the_drain_has_timed_out(frontends: int) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
    incomplete = [head + b"a", head[:-2]]
    with Server(frontends=frontends, drain_seconds=0.5) as server, ExitStack() as stack:
        url = httpx.URL(server.url)
        connections = [stack.enter_context(socket.create_connection((url.host, url.port or 0))) for _ in incomplete]
        for connection, data in zip(connections, incomplete, strict=True):
            connection.settimeout(30)
            connection.sendall(data)
        server.process.send_signal(signal.SIGTERM)
        responses = [received(connection) for connection in connections]
        assert server.wait() == 0
    assert [statuses(response) for response in responses] == [[503], [503]]
    assert all(b"the service is stopping: retry on another instance" in response for response in responses)
    logged = [event["http.response.status_code"] for event in server.events if event["event"] == "request"]
    assert logged == [503, 503]


@pytest.mark.slow
@pytest.mark.parametrize("frontends", [1, 2])
def test_requests_sent_up_to_a_second_after_sigterm_are_answered(frontends: int) -> None:
    image = (DIGITS / "5-2.png").read_bytes()
    sent: list[tuple[float, object]] = []

    async def load(server: Server) -> float:
        """Send requests on 64 connections until the server is closed. Returns when SIGTERM was sent."""
        in_flight = asyncio.Event()
        trace = aiohttp.TraceConfig()

        @trace.on_request_chunk_sent.append
        async def record_time(_session: object, context: SimpleNamespace, _what: object) -> None:
            context.trace_request_ctx["at"] = time.monotonic()  # later than the call, if the client is busy

        async def client_loop(session: aiohttp.ClientSession) -> None:
            while True:
                request = {"at": math.inf}  # until it is sent
                try:
                    async with session.post(f"{server.url}/classify", data=image, trace_request_ctx=request) as response:
                        await response.read()
                        sent.append((request["at"], response.status))
                except aiohttp.ClientConnectorError:
                    return
                except aiohttp.ClientError as error:
                    sent.append((request["at"], repr(error)))
                if len(sent) > 200:
                    in_flight.set()

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64), trace_configs=[trace]) as session:
            clients = [asyncio.create_task(client_loop(session)) for _ in range(64)]
            await in_flight.wait()
            signaled = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            await asyncio.gather(*clients)
        return signaled

    with Server(frontends=frontends) as server:
        signaled = asyncio.run(load(server))
        assert server.wait() == 0
    in_time = [outcome for at, outcome in sent if at < signaled + 0.95]  # later ones may arrive after the second
    assert len(in_time) > 200
    assert set(in_time) == {200}
    assert any(signaled < at < math.inf for at, _ in sent)
