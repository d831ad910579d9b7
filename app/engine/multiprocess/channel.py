"""Transport between the processes of one service: JSON over a Unix socket, and arrays in shared memory.

The memory is anonymous (memfd) and is passed as a file descriptor: it has no name that could be left behind, and does not use
/dev/shm. The kernel frees it when the last process that holds it closes it or exits, also while the message is in transit.
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

MAX_INLINE_BYTES = 64 * 1024
"""Largest JSON that is sent through the socket itself, whose buffer holds some 200 kB."""

_JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
_LENGTH = struct.Struct("<I")
_MAX_PACKET = MAX_INLINE_BYTES + _LENGTH.size
_ALIGNMENT = 64
_MAX_DESCRIPTORS = 2

Arrays = Sequence[npt.NDArray[Any]]
OnMessage = Callable[[Any, Arrays, Sequence[int]], object]


class Channel:
    """One end of a connection. A message is a JSON value, arrays, and file descriptors.

    Args:
        connection: A SOCK_SEQPACKET socket.
        on_message: Called on the event loop's thread with the body, the arrays and the descriptors of each message. It owns
            the descriptors.
        on_closed: Called once on that thread, when the other end has closed the connection.
    """

    def __init__(self, connection: socket.socket, on_message: OnMessage, on_closed: Callable[[], object]) -> None:
        self._connection = connection
        self._on_message, self._on_closed = on_message, on_closed
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        self._open = True
        connection.setblocking(False)
        self._loop.add_reader(connection, self._read)

    def send(self, body: Any, arrays: Arrays = (), descriptors: Sequence[int] = ()) -> None:
        """Send a message, from any thread, without blocking. What the socket does not accept now is sent later.

        A message to a closed connection is discarded.

        Args:
            body: A value that orjson encodes.
            arrays: Sent in shared memory.
            descriptors: Duplicated for the receiver; they stay open here.
        """
        data = orjson.dumps([body, [[values.dtype.str, values.shape] for values in arrays]], option=_JSON)
        own = [os.dup(descriptor) for descriptor in descriptors]
        if arrays or len(data) > MAX_INLINE_BYTES:
            own.insert(0, share([np.frombuffer(data, np.uint8), *arrays]))
            data = _LENGTH.pack(len(data))
        with self._lock:
            self._unsent.append((data, own))
            if len(self._unsent) > 1:
                return
            if self._write() or not self._open:
                return
        self._loop.call_soon_threadsafe(self._wait_to_write)

    def close(self) -> None:
        """Close the connection. On the event loop's thread."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        with self._lock:
            self._connection.close()
            while self._unsent:
                _close(self._unsent.popleft()[1])

    def _write(self) -> bool:
        """Send the unsent messages. Return whether all were sent. The caller holds the lock."""
        while self._unsent:
            data, descriptors = self._unsent[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                self._connection.sendmsg([data], rights)
            except BlockingIOError:
                return False
            except OSError:
                pass  # the connection is closed, which _read notices
            _close(descriptors)
            self._unsent.popleft()
        return True

    def _wait_to_write(self) -> None:
        if self._open:
            self._loop.add_writer(self._connection, self._resume_writing)

    def _resume_writing(self) -> None:
        with self._lock:
            if self._write():
                self._loop.remove_writer(self._connection)

    def _read(self) -> None:
        while self._open:
            try:
                data, rights, _, _ = self._connection.recvmsg(
                    _MAX_PACKET, socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                data, rights = b"", []
            if not data:
                self.close()
                self._on_closed()
                return
            descriptors = array.array("i")
            for _, _, received in rights:
                descriptors.frombytes(received)
            if data[0] != ord("["):
                self._on_message(*_unpack(descriptors.pop(0), *_LENGTH.unpack(data)), descriptors)
            else:
                self._on_message(orjson.loads(data)[0], (), descriptors)


def share(arrays: Arrays) -> int:
    """Copy arrays into shared memory, one after the other. Return its file descriptor."""
    descriptor = os.memfd_create("dinat", os.MFD_CLOEXEC)
    offset = 0
    for values in arrays:
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        written = 0
        while written < len(data):  # a call writes 2 GiB at most
            written += os.pwrite(descriptor, data[written:], offset + written)
        offset = _align(offset + len(data))
    os.ftruncate(descriptor, max(1, offset))
    return descriptor


def mapped(descriptor: int, shape: Sequence[int], dtype: str) -> npt.NDArray[Any]:
    """The only array in shared memory. Closes the descriptor; the memory lives as long as the array."""
    memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    os.close(descriptor)
    return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)


def _unpack(descriptor: int, length: int) -> tuple[Any, Arrays]:
    """Body and arrays of a message in shared memory, which lives as long as the arrays. Closes the descriptor."""
    memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    os.close(descriptor)
    body, types = orjson.loads(memory[:length])
    arrays, offset = [], _align(length)
    for dtype, shape in types:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(memory, dtype, count, offset).reshape(shape))
        offset = _align(offset + count * np.dtype(dtype).itemsize)
    return body, arrays


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
