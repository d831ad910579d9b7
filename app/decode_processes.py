"""Decode images in processes that can be killed: whatever could cost much time or memory, and cannot be limited in a thread."""

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import structlog

from dinat.app.decode_worker import ERRORS, LENGTH, STATUS, DecodeReply, DecodeRequest
from dinat.app.errors import Unavailable, Unprocessable
from dinat.app.image_file import CHEAP_PIXELS, ImageFile
from dinat.app.images import check_pixels
from dinat.app.reservations import Reservations
from dinat.model.cpu.resize import Pixels
from dinat.model.image_processor import DinatImageProcessor

log = structlog.get_logger("dinat")

MEMORY_BYTES = 128 * 2**20
BYTES_PER_PIXEL = 20
"""Memory limit of a process: MEMORY_BYTES, the file twice, and BYTES_PER_PIXEL for each pixel. WebP requires most, 17 bytes."""

STOP_SECONDS = 5
"""How long the decode server may take to exit before it is killed."""


class DecodeProcesses:
    """Decodes images, each in a process of its own. All methods run on the event loop's thread.

    The server that forks these processes is started with the first image, and again if it exits.

    Args:
        processes: Maximum number of processes.
        max_pixels: Maximum number of pixels of an image, and of a result.
        cpu_seconds: Maximum CPU time for an image.
    """

    def __init__(self, processes: int, max_pixels: int, cpu_seconds: float) -> None:
        self._max_pixels, self._cpu_seconds = max_pixels, cpu_seconds
        self._reservations = Reservations(processes, max_pixels * max(4, processes) // 4)
        self._is_stopped = False
        self._idle: list[_Process] = []
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def decode(self, file: ImageFile, processor: DinatImageProcessor, draft: tuple[int, int] | None) -> Pixels:
        """Decode and resize an image when it is its turn: images that cost less are first. Cancelling kills its process.

        Args:
            file: The file.
            processor: Resizes and crops.
            draft: See dinat.app.images.decode.

        Raises:
            ServiceError: The image cannot be decoded, or not within the limits.
        """
        if file.size is not None:
            check_pixels(file.size, self._max_pixels)
        request = DecodeRequest(
            num_bytes=len(file.data),
            format=file.format,
            orientation=file.orientation,
            processor=processor.to_dict(),
            draft=draft,
            max_pixels=self._max_pixels,
            reserved_pixels=file.pixels or min(CHEAP_PIXELS, self._max_pixels),
            cpu_seconds=self._cpu_seconds,
            memory_bytes=0,
        )
        reply, pixels = await self._decode(request, file)
        if reply.pixels is not None:  # known only now
            reply, pixels = await self._decode(replace(request, reserved_pixels=reply.pixels), file)
        if reply.error in ERRORS:
            raise ERRORS[reply.error](reply.detail)
        if pixels is None:
            raise RuntimeError(f"decoding failed: {reply.detail}")
        return pixels

    async def stop(self) -> None:
        """Stop the server and all processes."""
        self._is_stopped = True
        while self._idle:
            self._idle.pop().close()
        if self._server is not None and self._control is not None:
            self._control.close()
            await asyncio.to_thread(_wait, self._server)

    async def _decode(self, request: DecodeRequest, file: ImageFile) -> tuple[DecodeReply, Pixels | None]:
        cost = max(request.reserved_pixels * file.scans, len(file.data))
        memory = MEMORY_BYTES + 2 * len(file.data) + BYTES_PER_PIXEL * request.reserved_pixels
        async with self._reservations.reserve(cost, request.reserved_pixels):
            if self._is_stopped:
                raise Unavailable("the service stopped before this image was decoded")
            process = self._idle_process() or self._start_process()
            loop = asyncio.get_running_loop()
            is_last = True
            try:
                await loop.sock_sendall(process.connection, replace(request, memory_bytes=memory).encode())
                await loop.sock_sendall(process.connection, file.data)
                (length,) = LENGTH.unpack(await _receive(process.connection, LENGTH.size))
                reply = DecodeReply.decode(bytes(await _receive(process.connection, length)))
                pixels = None
                if reply.shape is not None:
                    received = await _receive(process.connection, math.prod(reply.shape))
                    pixels = np.frombuffer(received, dtype=np.uint8).reshape(reply.shape)
                is_last = reply.is_last
                return reply, pixels
            except (EOFError, ConnectionError):
                status = await loop.sock_recv(process.lifeline, STATUS.size)
                raise self._failure(STATUS.unpack(status)[0] if len(status) == STATUS.size else None) from None
            finally:
                if is_last:
                    process.close()
                else:
                    self._idle.append(process)

    def _failure(self, status: int | None) -> Exception:
        """Return the error for a process that exited without a complete reply; status None if the server exited too."""
        if status == -signal.SIGPROF:
            return Unprocessable(f"decoding the image takes more than {self._cpu_seconds:g} s of CPU time")
        if status in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE):
            return Unprocessable("the image is damaged: its decoder crashed")
        if not self._is_stopped:
            log.error("decode process exited", status=status)
        return Unavailable("the process that decoded the image exited: retry later", {"Retry-After": "1"})

    def _idle_process(self) -> "_Process | None":
        while self._idle:
            process = self._idle.pop()
            if process.is_running:
                return process
            process.close()
        return None

    def _start_process(self) -> "_Process":
        """Start a process."""
        pairs = socket.socketpair(), socket.socketpair()
        try:
            theirs = [pair[1].fileno() for pair in pairs]
            try:
                socket.send_fds(self._control_socket(), [b"."], theirs)
            except ConnectionError:
                self._discard_server()
                socket.send_fds(self._control_socket(), [b"."], theirs)
        except BaseException:
            for pair in pairs:
                pair[0].close()
            raise
        finally:
            for pair in pairs:
                pair[1].close()
        for pair in pairs:
            pair[0].setblocking(False)
        return _Process(pairs[0][0], pairs[1][0])

    def _discard_server(self) -> None:
        """Release a server that exited unexpectedly."""
        assert self._server is not None and self._control is not None
        self._control.close()
        _wait(self._server)
        log.error("decode server exited", status=self._server.returncode)
        self._server = None

    def _control_socket(self) -> socket.socket:
        """Return the control socket of the server, which is started if it does not run."""
        if self._server is not None and self._control is not None:
            return self._control
        self._control, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "dinat.app.decode_worker", str(theirs.fileno())],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # signals of a terminal are for the service, which stops this server itself
            )
        return self._control


@dataclass(frozen=True)
class _Process:
    """A process that decodes images.

    Attributes:
        connection: For requests and replies.
        lifeline: Receives the exit status of the process if it fails. Closing it kills the process.
    """

    connection: socket.socket
    lifeline: socket.socket

    @property
    def is_running(self) -> bool:
        """Whether the process has not exited."""
        try:
            self.lifeline.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        """Kill the process, unless it has exited."""
        self.connection.close()
        self.lifeline.close()


def _environment() -> dict[str, str]:
    """Environment variables of the server: the modules of this process, and no settings or secrets of the service."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DINAT_", "HF_"))}
    modules = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return inherited | {"PYTHONPATH": modules, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _wait(server: "subprocess.Popen[bytes]") -> None:
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


async def _receive(connection: socket.socket, length: int) -> bytearray:
    """Receive exactly this many bytes. Raises EOFError if the connection is closed before."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        received = await asyncio.get_running_loop().sock_recv_into(connection, view)
        if not received:
            raise EOFError
        view = view[received:]
    return data
