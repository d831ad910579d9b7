"""Messages between the processes of one service: JSON over a Unix socket, and beside it arrays in shared memory.

The memory is anonymous (memfd) and travels as a file descriptor: it has no name that could be left behind, and needs nothing of
/dev/shm. It is gone when the last process that holds it lets go of it or dies, also while it is still on its way.
"""

import array
import asyncio
import mmap
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

SMALL = 64 * 1024
"""Bytes of JSON that go through the socket itself, which takes some 200 kB at once."""

_JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
_HEAD = struct.Struct("<I")
_LARGEST = SMALL + _HEAD.size
_ALIGNED = 64
_DESCRIPTORS = 2

Arrays = Sequence[npt.NDArray[Any]]
Received = Callable[[Any, Arrays, Sequence[int]], object]


class Channel:
    """One end. A message is [kind, ...], of what JSON has, and arrays.

    received: called on the event loop's thread with each message, its arrays, and descriptors that it brings.  ended: called
    then, once, when the other end has gone.
    """

    def __init__(self, connection: socket.socket, received: Received, ended: Callable[[], object]) -> None:
        self._connection = connection
        self._received, self._ended = received, ended
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._kept: deque[tuple[bytes, Sequence[int]]] = deque()
        self._open = True
        connection.setblocking(False)
        self._loop.add_reader(connection, self._read)

    def send(self, message: Any, arrays: Arrays = (), descriptors: Sequence[int] = ()) -> None:
        """Send, from any thread. Never waits: what the socket does not take now is kept, and sent as soon as it does.

        To an end that has gone nothing is sent. descriptors: stay open here, and are open there.
        """
        body = orjson.dumps([message, [[one.dtype.str, one.shape] for one in arrays]], option=_JSON)
        own = [os.dup(descriptor) for descriptor in descriptors]
        if arrays or len(body) > SMALL:
            own.insert(0, share([np.frombuffer(body, np.uint8), *arrays]))
            body = _HEAD.pack(len(body))
        with self._lock:
            self._kept.append((body, own))
            if len(self._kept) > 1:
                return
            if self._write() or not self._open:
                return
        self._loop.call_soon_threadsafe(self._wait_to_write)

    def close(self) -> None:
        """End it. On the event loop's thread."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        with self._lock:
            self._connection.close()
            while self._kept:
                _close(self._kept.popleft()[1])

    def _write(self) -> bool:
        """Send what is kept; whether all of it went. With the lock held."""
        while self._kept:
            body, descriptors = self._kept[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                self._connection.sendmsg([body], rights)
            except BlockingIOError:
                return False
            except OSError:
                pass  # it has gone, which _read sees
            _close(descriptors)
            self._kept.popleft()
        return True

    def _wait_to_write(self) -> None:
        if self._open:
            self._loop.add_writer(self._connection, self._write_on)

    def _write_on(self) -> None:
        with self._lock:
            if self._write():
                self._loop.remove_writer(self._connection)

    def _read(self) -> None:
        while self._open:
            try:
                body, rights, _, _ = self._connection.recvmsg(
                    _LARGEST, socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                body, rights = b"", []
            if not body:
                self.close()
                self._ended()
                return
            descriptors = array.array("i")
            for _, _, data in rights:
                descriptors.frombytes(data)
            if body[0] != ord("["):
                self._received(*_unpacked(descriptors.pop(0), *_HEAD.unpack(body)), descriptors)
            else:
                self._received(orjson.loads(body)[0], (), descriptors)


def share(arrays: Arrays) -> int:
    """A descriptor of shared memory that holds these arrays, one after the other."""
    descriptor = os.memfd_create("dinat", os.MFD_CLOEXEC)
    offset = 0
    for one in arrays:
        data = np.ascontiguousarray(one).reshape(-1).view(np.uint8).data
        written = 0
        while written < len(data):  # a call writes 2 GiB at most
            written += os.pwrite(descriptor, data[written:], offset + written)
        offset = _aligned(offset + len(data))
    os.ftruncate(descriptor, max(1, offset))
    return descriptor


def mapped(descriptor: int, shape: Sequence[int], dtype: str) -> npt.NDArray[Any]:
    """The array that is alone in shared memory. Closes the descriptor; the memory stays while the array does."""
    memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    os.close(descriptor)
    return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)


def _unpacked(descriptor: int, length: int) -> tuple[Any, Arrays]:
    """The message and the arrays in shared memory, which stays for as long as they do."""
    memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    os.close(descriptor)
    message, kinds = orjson.loads(memory[:length])
    arrays, offset = [], _aligned(length)
    for kind, shape in kinds:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(memory, kind, count, offset).reshape(shape))
        offset = _aligned(offset + count * np.dtype(kind).itemsize)
    return message, arrays


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNED) * _ALIGNED


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
