"""The decode server: a process that forks the processes that decode images, which can be killed.

    python -m dinat.app.decode_worker DESCRIPTOR

It imports neither PyTorch nor the web framework, and starts in a fraction of a second. A forked process decodes and resizes one
image at a time. The kernel ends it when it exceeds its CPU time, also in C code, and denies it more memory than its limit. It
exits once it has used much memory, which is thus freed.

DESCRIPTOR is the control socket. Each byte on it starts a process, and carries two descriptors: a socket for each DecodeRequest
with its file, and each DecodeReply; and a socket on which the server writes the exit status of the process if it failed.
Closing the other end of the second one kills the process. Closing the control socket kills all of them, and ends the server.
"""

import gc
import json
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import traceback
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import AvifImagePlugin, Image

from dinat.app.errors import NoImage, ServiceError, TooLarge, Unprocessable, UnsupportedImage
from dinat.app.image_file import ImageFile
from dinat.app.images import TooManyPixels, decode, formats, resize_within
from dinat.model.cpu.resize import Pixels
from dinat.model.image_processor import DinatImageProcessor
from dinat.model.native import library

LENGTH = struct.Struct("<I")
"""Precedes the JSON of a message."""

STATUS = struct.Struct("<i")
"""Exit status of a process: a negative number is the signal that ended it."""

NICENESS = 5
"""Decoding large images has a lower priority than answering requests and inference."""

MAX_REUSED_BYTES = 64 * 2**20
"""A process that has used this much more memory than the server exits after its reply."""

ERRORS: dict[str, type[ServiceError]] = {
    error_type.__name__: error_type for error_type in (NoImage, TooLarge, Unprocessable, UnsupportedImage)
}
"""Errors that a process reports, by name."""


@dataclass(frozen=True)
class DecodeRequest:
    """An image to decode and resize; its file follows.

    Attributes:
        num_bytes: Size of the file.
        format: See ImageFile.
        orientation: See ImageFile.
        processor: DinatImageProcessor.to_dict of the image processor.
        draft: See decode.
        max_pixels: Maximum number of pixels, of the image and of the result.
        reserved_pixels: Number of pixels for which memory is reserved. If the image has more, they are the reply.
        cpu_seconds: Limit of the CPU time.
        memory_bytes: Limit of the memory, in addition to that of the server.
    """

    num_bytes: int
    format: str | None
    orientation: int | None
    processor: dict[str, Any]
    draft: tuple[int, int] | None
    max_pixels: int
    reserved_pixels: int
    cpu_seconds: float
    memory_bytes: int

    def encode(self) -> bytes:
        """Encode as length and JSON."""
        return _encode(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> "DecodeRequest":
        """Decode JSON."""
        values = json.loads(text)
        return cls(**values | {"draft": values["draft"] and tuple(values["draft"])})


@dataclass(frozen=True)
class DecodeReply:
    """The outcome for an image.

    Attributes:
        shape: (H, W, 3) of the pixels, uint8, which follow; None if there are none.
        pixels: Number of pixels of an image that is larger than reserved; otherwise None.
        error: A name in ERRORS; empty if there is no error; another name for an error that is not the client's.
        detail: Its message, or a stack trace.
        is_last: Whether the process exits after this reply.
    """

    shape: tuple[int, int, int] | None = None
    pixels: int | None = None
    error: str = ""
    detail: str = ""
    is_last: bool = False

    def encode(self) -> bytes:
        """Encode as length and JSON."""
        return _encode(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> "DecodeReply":
        """Decode JSON."""
        values = json.loads(text)
        return cls(**values | {"shape": values["shape"] and tuple(values["shape"])})


def _encode(values: dict[str, Any]) -> bytes:
    text = json.dumps(values).encode()
    return LENGTH.pack(len(text)) + text


def process_image(request: DecodeRequest, data: bytes) -> tuple[DecodeReply, Pixels | None]:
    """Decode and resize an image. Returns the reply and the pixels, if there are any."""
    file = ImageFile(data, request.format, orientation=request.orientation)
    processor = DinatImageProcessor.from_dict(request.processor)
    try:
        image = decode(file, min(request.reserved_pixels, request.max_pixels), request.draft)
        pixels = resize_within(processor, image, request.max_pixels)
    except TooManyPixels as error:
        if error.pixels <= request.max_pixels:
            return DecodeReply(pixels=error.pixels), None
        return DecodeReply(error="TooLarge", detail=TooManyPixels(error.size, request.max_pixels).detail), None
    except ServiceError as error:
        return DecodeReply(error=type(error).__name__, detail=error.detail), None
    except MemoryError:
        return DecodeReply(error="Unprocessable", detail="decoding the image takes more memory than its size allows"), None
    except Exception:
        return DecodeReply(error="Exception", detail=traceback.format_exc()), None
    return DecodeReply(shape=(pixels.shape[0], pixels.shape[1], 3)), pixels


def _run(connection: socket.socket) -> None:
    """In a forked process: decode the image of each request and send the reply."""
    max_memory = _memory() + MAX_REUSED_BYTES
    is_last = False
    while not is_last:
        request = DecodeRequest.decode(_receive(connection, LENGTH.unpack(_receive(connection, LENGTH.size))[0]))
        data = _receive(connection, request.num_bytes)
        _limit(request)
        reply, pixels = process_image(request, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _set_memory_limit(resource.getrlimit(resource.RLIMIT_AS)[1])
        is_last = _memory() > max_memory
        connection.sendall(replace(reply, is_last=is_last).encode())
        if pixels is not None:
            connection.sendall(np.ascontiguousarray(pixels).data)


def _memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def _limit(request: DecodeRequest) -> None:
    """Limit the CPU time and the memory of this process. Pillow then raises MemoryError; SIGPROF ends the process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    _set_memory_limit(used + request.memory_bytes)
    signal.setitimer(signal.ITIMER_PROF, request.cpu_seconds)


def _set_memory_limit(limit: int) -> None:
    with suppress(OSError, ValueError):  # a lower hard limit is in force
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _receive(connection: socket.socket, length: int) -> bytes:
    """Receive exactly this many bytes. Raises EOFError if the connection is closed before."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if not received:
            raise EOFError
        view = view[received:]
    return bytes(data)


class DecodeServer:
    """Forks a process for each byte on the control socket.

    Args:
        control: The control socket.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._processes: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._wakeup, wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup.setblocking(False)
        self._wakeup_writer = wakeup
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup.fileno())
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._selector.register(control, selectors.EVENT_READ)

    def run(self) -> None:
        """Run until the control socket is closed, then kill all processes."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._wakeup:
                    self._wakeup.recv(4096)
                    self._collect()
                elif key.fileobj is not self._control:
                    if key.data in self._processes:
                        os.kill(key.data, signal.SIGKILL)
                        self._selector.unregister(key.fileobj)
                elif not self._start():
                    signal.set_wakeup_fd(-1)
                    for pid in self._processes:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                    return

    def _start(self) -> bool:
        """Fork a process. Returns False if the control socket is closed."""
        message, descriptors, _, _ = socket.recv_fds(self._control, 1, 2)
        if not message:
            return False
        connection, lifeline = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        try:
            pid = os.fork()
        except OSError:
            connection.close()
            lifeline.close()
            return True
        if pid == 0:
            self._in_process(connection)
        connection.close()
        self._processes[pid] = lifeline
        self._selector.register(lifeline, selectors.EVENT_READ, pid)
        return True

    def _in_process(self, connection: socket.socket) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for inherited in (self._control, self._wakeup, self._wakeup_writer, *self._processes.values()):
                inherited.close()
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # libtiff writes warnings there
            os.nice(NICENESS)
            with suppress(OSError):  # if memory runs out, the kernel ends this process rather than the service
                Path("/proc/self/oom_score_adj").write_text("1000")
            _run(connection)
            status = 0
        except (EOFError, ConnectionError):
            status = 0  # the caller no longer waits
        finally:
            os._exit(status)

    def _collect(self) -> None:
        """Report the exit status of the processes that have exited."""
        while self._processes:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self._processes.pop(pid) as lifeline:
                with suppress(KeyError):  # unregistered when it was killed
                    self._selector.unregister(lifeline)
                if status:
                    with suppress(OSError):  # the caller no longer waits
                        lifeline.send(STATUS.pack(os.waitstatus_to_exitcode(status)))


def main(descriptor: int) -> None:
    """Run a decode server on a control socket."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.MAX_IMAGE_PIXELS = None  # limited by each request
    Image.init()
    formats()
    library()
    _decode_in_one_thread()
    gc.disable()
    gc.freeze()  # forked processes share the memory of existing objects
    DecodeServer(socket.socket(fileno=descriptor)).run()


def _decode_in_one_thread() -> None:
    """Let the decoders of AVIF and HEIC start no threads, whose stacks count as memory of the process."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if "pillow_heif" in sys.modules:
        sys.modules["pillow_heif"].options.DECODE_THREADS = 1


if __name__ == "__main__":
    main(int(sys.argv[1]))
