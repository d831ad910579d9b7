"""Images decoded in processes: equal results, limits, cancellation and restarts."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import psutil
import pytest

from dinat.app.decode_processes import DecodeProcesses
from dinat.app.errors import TooLarge, Unavailable, Unprocessable, UnsupportedImage
from dinat.app.images import decode, formats, inspect
from dinat.model import DinatImageProcessor
from tests.app.sample_images import encoded, noise, png_bomb
from tests.security.hostile_images import bmp_rle, jpeg_scans

pytestmark = pytest.mark.process

PROCESSOR = DinatImageProcessor(size=20, resample=3)
SLOW = inspect(jpeg_scans(90, 7000))
"""A small file that takes a second to decode."""


@asynccontextmanager
async def decode_processes(
    processes: int = 2, max_pixels: int = 50_000_000, cpu_seconds: float = 60
) -> AsyncIterator[DecodeProcesses]:
    decoding = DecodeProcesses(processes, max_pixels, cpu_seconds)
    try:
        yield decoding
    finally:
        await decoding.stop()


def run(test: Callable[[DecodeProcesses], Awaitable[None]], **options: float) -> None:
    async def main() -> None:
        async with decode_processes(**options) as decoding:
            await test(decoding)

    asyncio.run(main())


def server_of(decoding: DecodeProcesses) -> psutil.Process:
    assert decoding._server is not None
    return psutil.Process(decoding._server.pid)


def children(decoding: DecodeProcesses) -> list[psutil.Process]:
    """The decode processes, not the server that forks them."""
    return [] if decoding._server is None else server_of(decoding).children()


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_result_is_that_of_decoding_in_a_thread() -> None:
    async def test(decoding: DecodeProcesses) -> None:
        for kind in formats():
            data = encoded(noise(50, 60), kind)
            pixels = await decoding.decode(inspect(data), PROCESSOR, None)
            np.testing.assert_array_equal(pixels, PROCESSOR.resize(decode(data, 10**6)))
        large = encoded(noise(5, 6).resize((2000, 1500)), "BMP")  # larger than reserved at first
        pixels = await decoding.decode(inspect(large), DinatImageProcessor(do_resize=False), None)
        np.testing.assert_array_equal(pixels, np.asarray(decode(large, 10**7)))
        jpeg = encoded(noise(5, 6).resize((800, 600)), "JPEG")
        pixels = await decoding.decode(inspect(jpeg), PROCESSOR, (40, 40))
        np.testing.assert_array_equal(pixels, PROCESSOR.resize(decode(jpeg, 10**6, (40, 40))))

    run(test)


@pytest.mark.parametrize(
    ("data", "error", "detail"),
    [
        (b"hello", UnsupportedImage, "the image is text"),
        (encoded(noise(50, 60), "TIFF")[:-3000], Unprocessable, "damaged"),
        (png_bomb(4000, 3000), TooLarge, "4000x3000 = 12,000,000 pixels, the maximum is 10,000,000"),
        (
            encoded(noise(5, 6).resize((4000, 3000)), "GIF"),
            TooLarge,
            "4000x3000 = 12,000,000 pixels, the maximum is 10,000,000",
        ),
    ],
)
def test_errors_are_those_of_decoding_in_a_thread(data: bytes, error: type[Exception], detail: str) -> None:
    async def test(decoding: DecodeProcesses) -> None:
        with pytest.raises(error, match=detail):
            await decoding.decode(inspect(data), PROCESSOR, None)

    run(test, max_pixels=10_000_000)


def test_process_ends_at_its_limit_of_cpu_time() -> None:
    async def test(decoding: DecodeProcesses) -> None:
        with pytest.raises(Unprocessable, match=r"decoding the image takes more than 0\.2 s of CPU time"):
            await decoding.decode(inspect(bmp_rle(7000)), PROCESSOR, None)
        with pytest.raises(Unprocessable, match=r"decoding the image takes more than 0\.2 s of CPU time"):
            await decoding.decode(SLOW, PROCESSOR, None)  # in C code
        assert (await decoding.decode(inspect(encoded(noise(5, 6), "BMP")), PROCESSOR, None)).shape == (20, 20, 3)

    run(test, cpu_seconds=0.2)


def test_process_is_denied_more_memory_than_the_size_of_the_image_allows() -> None:
    async def test(decoding: DecodeProcesses) -> None:
        with pytest.raises(Unprocessable, match="takes more memory than its size allows"):
            await decoding.decode(inspect(png_bomb(30_000_000, 1)), PROCESSOR, None)  # Pillow's table for resizing: 960 MB

    run(test)


def test_small_images_share_a_process_and_large_ones_leave_no_memory() -> None:
    async def test(decoding: DecodeProcesses) -> None:
        small, large = inspect(encoded(noise(50, 60), "BMP")), inspect(png_bomb(6000, 6000))
        await decoding.decode(small, PROCESSOR, None)
        (first,) = children(decoding)
        await decoding.decode(small, PROCESSOR, None)
        assert children(decoding) == [first]
        await decoding.decode(large, PROCESSOR, None)
        await wait_until(lambda: not children(decoding))

    run(test)


def test_cancelling_kills_the_process() -> None:
    async def test(decoding: DecodeProcesses) -> None:
        task = asyncio.create_task(decoding.decode(SLOW, PROCESSOR, None))
        await wait_until(lambda: bool(children(decoding)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until(lambda: not children(decoding))
        assert (await decoding.decode(inspect(encoded(noise(5, 6), "BMP")), PROCESSOR, None)).shape == (20, 20, 3)

    run(test)


def test_stopping_kills_all_processes() -> None:
    async def test(decoding: DecodeProcesses) -> None:
        tasks = [asyncio.create_task(decoding.decode(SLOW, PROCESSOR, None)) for _ in range(3)]
        await wait_until(lambda: len(children(decoding)) == 2)
        processes = [server_of(decoding), *children(decoding)]
        await decoding.stop()
        for task in tasks:
            with pytest.raises(Unavailable):
                await task
        assert not psutil.wait_procs(processes, timeout=10)[1]

    run(test, max_pixels=100_000_000)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_crash_fails_only_its_image(number: signal.Signals) -> None:
    async def test(decoding: DecodeProcesses) -> None:
        task = asyncio.create_task(decoding.decode(SLOW, PROCESSOR, None))
        await wait_until(lambda: bool(children(decoding)))
        (process,) = children(decoding)
        process.send_signal(number)
        with pytest.raises(Unprocessable if number == signal.SIGSEGV else Unavailable):
            await task
        assert (await decoding.decode(inspect(encoded(noise(5, 6), "BMP")), PROCESSOR, None)).shape == (20, 20, 3)

    run(test)


def test_server_that_exits_is_restarted() -> None:
    async def test(decoding: DecodeProcesses) -> None:
        image = inspect(encoded(noise(5, 6), "BMP"))
        for _ in range(2):
            assert (await decoding.decode(image, PROCESSOR, None)).shape == (20, 20, 3)
            server, processes = server_of(decoding), children(decoding)
            for process in (*processes, server):
                process.kill()
            os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
            psutil.wait_procs(processes, timeout=10)

    run(test)


def test_server_imports_neither_torch_nor_the_web_framework_and_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DINAT_API_KEYS", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret")

    async def test(decoding: DecodeProcesses) -> None:
        await decoding.decode(inspect(encoded(noise(5, 6), "BMP")), PROCESSOR, None)
        server = server_of(decoding)
        files = " ".join(mapped.path for mapped in server.memory_maps())
        assert "_imaging" in files
        assert not any(f"/{name}/" in files for name in ("torch", "uvloop", "pydantic_core"))
        assert "secret" not in server.environ().values()

    run(test)
