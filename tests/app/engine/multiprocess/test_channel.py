import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from dinat.app.engine.multiprocess.channel import Channel, mapped, share


class Ends:
    """Two ends of a channel in one process, and what the second receives."""

    def __init__(self) -> None:
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.messages: asyncio.Queue[tuple[Any, Any, Any]] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.one = Channel(one, lambda *_: None, lambda: None)
        self.two = Channel(two, lambda *message: self.messages.put_nowait(message), self.ended.set)

    async def next(self) -> tuple[Any, Any, Any]:
        return await asyncio.wait_for(self.messages.get(), 30)


def with_ends(test: Callable[[Ends], Awaitable[None]]) -> None:
    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        ends = Ends()
        await test(ends)
        ends.one.close()
        ends.two.close()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(main())


def test_messages_arrive_whole_and_in_order() -> None:
    async def test(ends: Ends) -> None:
        sent = [["a", 1, 2.5, None, {"x": "y" * n}] for n in (0, 10, 70_000, 3, 1_000_000)]
        for message in sent:
            ends.one.send(message)
        assert [(await ends.next())[0] for _ in sent] == sent

    with_ends(test)


def test_arrays_keep_their_values_shapes_and_types() -> None:
    async def test(ends: Ends) -> None:
        arrays = [
            np.random.default_rng(0).random((3, 5, 7), dtype=np.float32),
            np.arange(11, dtype=np.int64),
            np.zeros((0, 4), dtype=np.float32),
            np.arange(24, dtype=np.uint8).reshape(4, 6)[:, ::2],
        ]
        ends.one.send(["maps"], arrays)
        message, got, _ = await ends.next()
        assert message == ["maps"]
        for one, other in zip(arrays, got, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        del got, one, other

    with_ends(test)


def test_float32_scores_come_back_to_the_bit() -> None:
    async def test(ends: Ends) -> None:
        scores = np.random.default_rng(0).random(10_000, dtype=np.float32)
        ends.one.send(["scores", scores])
        (_, got), _, _ = await ends.next()
        np.testing.assert_array_equal(np.array(got, np.float32), scores)

    with_ends(test)


def test_what_the_socket_does_not_take_is_kept_and_sent_later() -> None:
    async def test(ends: Ends) -> None:
        for n in range(2000):  # more than a socket holds, and nobody reads meanwhile
            ends.one.send([n, "x" * 500], [np.full(3, n)] if n % 100 == 0 else ())
        for n in range(2000):
            message, arrays, _ = await ends.next()
            assert message[0] == n
            assert [one.tolist() for one in arrays] == ([[n] * 3] if n % 100 == 0 else [])

    with_ends(test)


def test_an_end_that_goes_is_noticed_once_and_what_was_sent_before_arrives() -> None:
    async def test(ends: Ends) -> None:
        ends.one.send(["last"])
        ends.one.close()
        assert (await ends.next())[0] == ["last"]
        await asyncio.wait_for(ends.ended.wait(), 30)
        ends.two.send(["to nobody"], [np.zeros(3)])

    with_ends(test)


def test_pixels_alone_in_shared_memory() -> None:
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    got = mapped(share([pixels]), [4, 5, 3], "|u1")
    np.testing.assert_array_equal(got, pixels)


def test_nothing_is_left_in_dev_shm(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    held = mapped(share([np.zeros(10**6, np.float32)]), [10**6], "<f4")
    assert set(os.listdir("/dev/shm")) == before
    assert held.nbytes == 4 * 10**6
