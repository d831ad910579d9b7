import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from dinat.app.engine.multiprocess.channel import Channel, mapped, share


class Pair:
    """Two ends of a connection in one process, and the messages that the second end receives."""

    def __init__(self) -> None:
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.messages: asyncio.Queue[tuple[Any, Any, Any]] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.one = Channel(one, lambda *_: None, lambda: None)
        self.two = Channel(two, lambda *message: self.messages.put_nowait(message), self.closed.set)

    async def next(self) -> tuple[Any, Any, Any]:
        return await asyncio.wait_for(self.messages.get(), 30)


def with_pair(test: Callable[[Pair], Awaitable[None]]) -> None:
    """Run a test on a connection, and check that it leaves no open file descriptors."""

    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        pair = Pair()
        await test(pair)
        pair.one.close()
        pair.two.close()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(main())


def test_messages_arrive_complete_and_in_order() -> None:
    async def test(pair: Pair) -> None:
        sent = [["a", 1, 2.5, None, {"x": "y" * n}] for n in (0, 10, 70_000, 3, 1_000_000)]
        for message in sent:
            pair.one.send(message)
        assert [(await pair.next())[0] for _ in sent] == sent

    with_pair(test)


def test_arrays_keep_values_shapes_and_dtypes() -> None:
    async def test(pair: Pair) -> None:
        arrays = [
            np.random.default_rng(0).random((3, 5, 7), dtype=np.float32),
            np.arange(11, dtype=np.int64),
            np.zeros((0, 4), dtype=np.float32),
            np.arange(24, dtype=np.uint8).reshape(4, 6)[:, ::2],
        ]
        pair.one.send(["maps"], arrays)
        message, received, _ = await pair.next()
        assert message == ["maps"]
        for array, other in zip(arrays, received, strict=True):
            assert array.dtype == other.dtype
            np.testing.assert_array_equal(array, other)
        del received, array, other

    with_pair(test)


def test_float32_scores_are_bit_exact() -> None:
    async def test(pair: Pair) -> None:
        scores = np.random.default_rng(0).random(10_000, dtype=np.float32)
        pair.one.send(["scores", scores])
        (_, received), _, _ = await pair.next()
        np.testing.assert_array_equal(np.array(received, np.float32), scores)

    with_pair(test)


def test_messages_beyond_the_socket_buffer_are_sent_later() -> None:
    async def test(pair: Pair) -> None:
        for n in range(2000):  # more than the socket holds; nothing is read meanwhile
            pair.one.send([n, "x" * 500], [np.full(3, n)] if n % 100 == 0 else ())
        for n in range(2000):
            message, arrays, _ = await pair.next()
            assert message[0] == n
            assert [array.tolist() for array in arrays] == ([[n] * 3] if n % 100 == 0 else [])

    with_pair(test)


def test_closed_end_is_reported_once_after_its_last_message() -> None:
    async def test(pair: Pair) -> None:
        pair.one.send(["last"])
        pair.one.close()
        assert (await pair.next())[0] == ["last"]
        await asyncio.wait_for(pair.closed.wait(), 30)
        pair.two.send(["discarded"], [np.zeros(3)])

    with_pair(test)


def test_mapped_returns_a_shared_array() -> None:
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    received = mapped(share([pixels]), [4, 5, 3], "|u1")
    np.testing.assert_array_equal(received, pixels)


def test_shared_memory_has_no_name_in_dev_shm(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    held = mapped(share([np.zeros(10**6, np.float32)]), [10**6], "<f4")
    assert set(os.listdir("/dev/shm")) == before
    assert held.nbytes == 4 * 10**6
