"""Images that are small to send and expensive to decode: what they cost the service, and what other clients notice."""

import gzip
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from dinat.model import DinatForImageClassification, DinatImageProcessor
from tests.app.sample_images import encoded, noise, png_bomb
from tests.e2e.processes import Server
from tests.security.hostile_images import (
    bmp_rle,
    exif_directory,
    gif_comments,
    jpeg_junk,
    jpeg_scans,
    jpeg_segments,
    narrow_png,
    png_chunks,
    tiff_directory,
    webp_huffman_tables,
)
from tests.security.observer import observed, resident_memory

pytestmark = pytest.mark.process

MIB = 2**20
GZIP = {"Content-Encoding": "gzip"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(runtime="torch", precision="fp32", decode_threads=2, decode_seconds=1, lame_duck_seconds=0) as server:
        httpx.post(f"{server.url}/classify", content=encoded(noise(8, 8), "BMP"))  # starts the decode server
        yield server


def attack(server: Server, images: list[bytes], clients: int = 16) -> Counter[int]:
    """Send all images, compressed, from many clients. Returns the responses by status."""
    bodies = {image: gzip.compress(image, 1) for image in set(images)}

    with httpx.Client(base_url=server.url, headers=GZIP, timeout=60) as client, ThreadPoolExecutor(clients) as threads:
        responses = threads.map(lambda image: client.post("/classify", content=bodies[image]), images)
        return Counter(response.status_code for response in responses)


ATTACKS: dict[str, tuple[Callable[[], list[bytes]], set[int], int]] = {
    "scans": (lambda: [jpeg_scans(60_000, 7000)] * 4, {422}, 160),
    "junk": (lambda: [jpeg_junk(20 * MIB - 3)] * 16, {422, 503}, 500),
    "scans below the limit": (lambda: [jpeg_scans(90, 7000)] * 4, {200, 422}, 700),
    "segments": (lambda: [jpeg_segments(900)] * 16, {200}, 100),
    "EXIF directories": (lambda: [jpeg_segments(1, 0xE1, b"Exif\0\0" + exif_directory(4500, 11_000))] * 16, {200}, 100),
    "lossless WebP": (lambda: [webp_huffman_tables(1412)] * 4, {200, 422}, 500),
    "chunks": (lambda: [png_chunks(100_000)] * 16, {422}, 200),
    "rows of any width": (lambda: [narrow_png(999_900 - n) for n in range(32)], {200}, 250),
    "GIF comments": (lambda: [gif_comments(20_000)] * 8, {200}, 350),
    "run-length encoding in Python": (lambda: [bmp_rle(7000)] * 4, {422}, 350),
    "TIFF directories": (lambda: [tiff_directory(4000, 1_000_000)] * 32, {200}, 350),
}
"""Images, allowed statuses, and how far the memory of all processes may grow, in MiB, including the bodies."""


@pytest.mark.parametrize("name", ATTACKS)
def test_expensive_images_do_not_delay_other_clients(server: Server, name: str, record_property: Callable[..., None]) -> None:
    make, allowed, growth = ATTACKS[name]
    images = make()
    with observed(server) as observation:
        statuses = attack(server, images)
    print(f"{name}: {dict(statuses)}, {observation}")
    record_property("observation", str(observation))
    assert set(statuses) <= allowed
    assert set(observation.honest_statuses) == {200}
    assert set(observation.live_statuses) == {200}
    assert observation.growth < growth * MIB


@pytest.mark.slow
def test_memory_of_large_images_is_given_back() -> None:
    with Server(runtime="torch", precision="fp32", decode_threads=2) as server:
        attack(server, [png_bomb(1000, 1000)] * 4)
        before = resident_memory(server.process.pid)
        with observed(server) as observation:
            statuses = attack(server, [png_bomb(7000, 7000)] * 16)
        after = resident_memory(server.process.pid)
        print(f"{dict(statuses)}, {observation}, then {after / MIB:.0f} MiB")
        assert statuses == {200: 16}
        assert set(observation.honest_statuses) == {200}
        assert observation.growth < 700 * MIB
        assert after - before < 150 * MIB


@pytest.mark.slow
def test_sigterm_during_a_long_decode_ends_the_service() -> None:
    options = {"decode_seconds": 60, "deadline_ms": 60_000, "drain_seconds": 0.5, "max_pixels": 200_000_000}
    with Server(runtime="torch", lame_duck_seconds=0, **options) as server, ThreadPoolExecutor(1) as threads:
        process = psutil.Process(server.process.pid)
        with httpx.Client(base_url=server.url, headers=GZIP, timeout=60) as client:
            response = threads.submit(client.post, "/classify", content=gzip.compress(bmp_rle(14_000)))
            while all(child.ppid() == process.pid for child in process.children(recursive=True)):
                assert not response.done()
            started = time.monotonic()
            status = server.stop()
            seconds = time.monotonic() - started
            with pytest.raises(httpx.HTTPError):
                response.result().raise_for_status()
    print(f"exit status {status} after {seconds:.1f} s")
    assert status == 0
    assert seconds < 10


@pytest.mark.slow
@pytest.mark.parametrize("original", [False, True])
def test_extreme_aspect_ratio_with_a_crop_costs_no_more_than_its_output(tmp_path: Path, original: bool) -> None:
    DinatForImageClassification.from_pretrained("digits").save_pretrained(tmp_path)
    cropped = DinatImageProcessor(size={"shortest_edge": 64}, do_center_crop=True, crop_size=64)
    (DinatImageProcessor.original(64) if original else cropped).save_pretrained(tmp_path)
    with Server(runtime="torch", precision="fp32", model=tmp_path) as server:
        attack(server, [encoded(noise(64, 64))])
        with observed(server) as observation:
            statuses = attack(server, [encoded(Image.new("L", (1, height))) for height in (10_000, 60_000)] * 4)
        print(f"{dict(statuses)}, {observation}")
        assert statuses == {200: 8}
        assert observation.growth < 200 * MIB
