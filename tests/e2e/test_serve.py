import asyncio
import math
import signal
import time
from types import SimpleNamespace

import aiohttp
import httpx
import pytest

from tests.e2e.processes import DIGITS, Server, load_until_refused


def test_every_request_is_one_line_of_json_with_its_id() -> None:
    with Server() as server:
        answer = httpx.post(
            f"{server.url}/classify?top_k=1",
            files={"image": (DIGITS / "5-2.png").read_bytes()},
            headers={"X-Request-ID": "mine", "X-API-Key": "never-logged"},
        )
        assert answer.json()["predictions"][0]["label"] == "5"
        assert server.stop() == 0
    (line,) = [event for event in server.events if event["event"] == "request"]
    assert (line["method"], line["path"], line["status"], line["request_id"]) == ("POST", "/classify", 200, "mine")
    assert line["milliseconds"] > 0
    assert line["level"] == "info"
    assert "never-logged" not in str(server.events)


def test_sigterm_under_load_answers_everything_and_exits_with_0() -> None:
    picture = (DIGITS / "5-2.png").read_bytes()
    with Server() as server, load_until_refused(server.url, picture) as statuses:
        assert server.stop() == 0
    assert set(statuses) <= {200, 503}
    answered = [event["status"] for event in server.events if event["event"] == "request"]
    assert sorted(answered) == sorted(statuses)


@pytest.mark.parametrize("frontends", [1, 2])
def test_what_is_sent_before_sigterm_and_in_the_second_after_it_is_answered(frontends: int) -> None:
    picture = (DIGITS / "5-2.png").read_bytes()
    sent: list[tuple[float, object]] = []

    async def load(server: Server) -> float:
        """64 connections, until nobody listens any more; when the signal was sent."""
        in_flight = asyncio.Event()
        trace = aiohttp.TraceConfig()

        @trace.on_request_chunk_sent.append
        async def note(_session: object, context: SimpleNamespace, _what: object) -> None:
            context.trace_request_ctx["at"] = time.monotonic()  # asked for earlier, by a client that is busy

        async def ask(session: aiohttp.ClientSession) -> None:
            while True:
                asked = {"at": math.inf}  # until it is sent
                try:
                    async with session.post(f"{server.url}/classify", data=picture, trace_request_ctx=asked) as answer:
                        await answer.read()
                        sent.append((asked["at"], answer.status))
                except aiohttp.ClientConnectorError:
                    return
                except aiohttp.ClientError as error:
                    sent.append((asked["at"], repr(error)))
                if len(sent) > 200:
                    in_flight.set()

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64), trace_configs=[trace]) as session:
            asking = [asyncio.create_task(ask(session)) for _ in range(64)]
            await in_flight.wait()
            signalled = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            await asyncio.gather(*asking)
        return signalled

    with Server(frontends=frontends) as server:
        signalled = asyncio.run(load(server))
        assert server.wait() == 0
    in_time = [what for at, what in sent if at < signalled + 0.95]  # what is sent later may arrive after the second is over
    assert len(in_time) > 200
    assert set(in_time) == {200}
    assert any(signalled < at < math.inf for at, _ in sent)
