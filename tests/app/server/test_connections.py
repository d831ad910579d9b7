"""Limits that the connections of one server share."""

import asyncio
from collections import Counter

from dinat.app.server.connections import STARTS_PER_ITERATION, Connections
from dinat.app.settings import Settings


def test_requests_start_in_order_and_a_few_in_each_iteration() -> None:
    async def start(count: int) -> tuple[list[int], Counter[int]]:
        loop, connections = asyncio.get_running_loop(), Connections(Settings(_env_file=None))
        iteration, order, started = 0, [], Counter[int]()

        def count_iterations() -> None:
            nonlocal iteration
            iteration += 1
            loop.call_soon(count_iterations)

        def note(n: int) -> None:
            order.append(n)
            started[iteration] += 1

        count_iterations()
        for n in range(count):
            connections.start(loop, lambda n=n: note(n))  # type: ignore[misc]
        while len(order) < count:
            await asyncio.sleep(0)
        connections.start(loop, lambda: note(count))
        return order, started

    order, started = asyncio.run(start(1000))
    assert order == list(range(1001))
    assert max(started.values()) == STARTS_PER_ITERATION


def test_probes_are_whole_requests() -> None:
    connections = Connections(Settings(_env_file=None, aip_health_route="/alive"))
    assert connections.is_probe(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
    assert connections.is_probe(b"HEAD /alive HTTP/1.1\r\n\r\n")
    assert not connections.is_probe(b"GET /health/ready HTTP/1.1\r\n")
    assert not connections.is_probe(b"POST /health HTTP/1.1\r\n\r\n")
    assert not connections.is_probe(b"GET /model HTTP/1.1\r\n\r\n")
