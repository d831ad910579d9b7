"""Attacks at full size on a service of its own: memory, the slowest health check, and what an honest client gets.

    python -m tests.security.measure [NAME ...]

Each row is an attack by 64 clients in another process, unless its name says otherwise. An attack whose name contains one of
the NAMEs is run; by default all are. Without other load, every slowest health check should stay below 0.5 s on two cores.
"""

import gzip
import json
import multiprocessing
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx

from tests.app.sample_images import encoded, noise, png_bomb
from tests.e2e.processes import Server
from tests.security.hostile_images import (
    bmp_rle,
    deflate_without_output,
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
from tests.security.observer import observed
from tests.security.test_bodies import AS_JSON, BODIES, SEVEN, SEVEN_TEXT, UPLOAD, address_of, exchange, raw_request

CLIENTS = 64
SECONDS = 5
MIB = 2**20
HOST = b"Host: x\r\n"
CHUNKED = HOST + b"Transfer-Encoding: chunked\r\n\r\n"
ONE_BYTE = b"1\r\na\r\n"


def send_all(url: str, requests: Sequence[bytes]) -> object:
    """Send all requests at once. Returns the statuses."""
    with ThreadPoolExecutor(len(requests)) as threads:
        return dict(Counter(status for status, _ in threads.map(lambda request: exchange(url, request), requests)))


def send_images(url: str, images: Sequence[bytes]) -> object:
    bodies = {image: gzip.compress(image, 1) for image in set(images)}
    headers = {"Content-Encoding": "gzip"}
    return send_all(url, [raw_request("/classify", bodies[image], headers) for image in images])


def repeat(
    url: str,
    first: bytes,
    then: bytes = b"",
    clients: int = CLIENTS,
    pause: float = 0.0,
    read: bool = True,
    seconds: float = SECONDS,
) -> object:
    """Send `first`, then `then` again and again. Returns the number of bytes sent and of connections open at the end."""
    stop = time.monotonic() + seconds

    def send(_: int) -> tuple[int, int]:
        sent = 0
        with socket.socket() as connection, suppress(OSError):
            if not read:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(5)
            connection.connect(address_of(url))
            connection.sendall(first)
            sent = len(first)
            while time.monotonic() < stop:
                if then:
                    connection.sendall(then)
                    sent += len(then)
                if pause or not then:
                    time.sleep(pause or 0.1)
                if read:
                    connection.settimeout(0)
                    with suppress(BlockingIOError):
                        if not connection.recv(2**16):
                            return sent, 0
                    connection.settimeout(5)
            return sent, 1
        return sent, 0

    with ThreadPoolExecutor(clients) as threads:
        sent, still_open = (sum(numbers) for numbers in zip(*threads.map(send, range(clients)), strict=True))
    return {"MB sent": sent // 10**6, "still open": still_open}


def flood(url: str, path: str, connections: int = 1300) -> object:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}", url + path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return " ".join(" ".join(line.split()) for line in lines if "requests in" in line or "Non-2xx" in line)


def unread(url: str, clients: int) -> object:
    """Requests whose responses are 9 MB each, from clients that do not read them."""
    body = json.dumps({"images": [SEVEN_TEXT] * 64, "features": "stage1"}).encode()
    request = raw_request("/classify/batch", body, AS_JSON).replace(b"Connection: close\r\n", b"")
    return repeat(url, request, clients=clients, read=False, seconds=12)


def everything(url: str) -> object:
    """What takes the most memory of each kind, all at once."""
    images = [jpeg_junk(UPLOAD - 3), gif_comments(80_000), png_bomb(7000, 7000), jpeg_scans(90, 7000), bmp_rle(7000)]
    names = ("base64 with an emoji", "a form that nearly repeats its boundary", "1,000,000 numbers", "20 MB of strings")
    bodies = [body.request() for body in BODIES if body.name in names]
    with ThreadPoolExecutor() as threads:
        parts = [
            threads.submit(unread, url, 16),
            threads.submit(send_images, url, images * 8),
            threads.submit(send_all, url, bodies * 8),
            threads.submit(flood, url, "/model"),
        ]
        return [part.result() for part in parts]


def post(body: bytes, count: int) -> bytes:
    return (b"POST /nope HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body) + body) * count


GET = b"GET /health/live HTTP/1.1\r\n"
POST = b"POST /classify HTTP/1.1\r\n"
CONNECTIONS: Mapping[str, Callable[[str], object]] = {
    "head of 128 MB x4": lambda url: repeat(url, GET + b"X: " + bytes(128 * MIB).replace(b"\0", b"a") + b"\r\n\r\n", clients=4),
    "URL of 128 MB x4": lambda url: repeat(url, b"GET /" + b"a" * 128 * MIB + b" HTTP/1.1\r\n\r\n", clients=4),
    "2,000,000 headers x4": lambda url: repeat(url, GET + b"X: 1\r\n" * 2_000_000 + b"\r\n", clients=4),
    "endless trailers": lambda url: repeat(url, POST + CHUNKED + ONE_BYTE + b"0\r\n", b"X: 1\r\n" * 10_000),
    "chunks of 1 byte": lambda url: repeat(url, POST + CHUNKED, ONE_BYTE * 40_000),
    "chunks of 1 byte after GET": lambda url: repeat(url, GET + CHUNKED, ONE_BYTE * 40_000),
    "pipelined GETs": lambda url: repeat(url, b"", (GET + HOST + b"\r\n") * 5000),
    "pipelined POSTs": lambda url: repeat(url, b"", post(b"a", 4000)),
    "byte by byte: head x200": lambda url: repeat(url, b"GET / HTTP/1.1\r\n", b"X", 200, 0.5),
    "byte by byte: body of a 404 x200": lambda url: repeat(url, post(b"", 1).replace(b": 0", b": 999"), b"X", 200, 0.5, False),
    "CRLF after responses x200": lambda url: repeat(url, GET + HOST + b"\r\n", b"\r\n", 200, 0.5, False),
    "silent x200": lambda url: repeat(url, b"", clients=200),
    "wrk -c1300 /model": lambda url: flood(url, "/model"),
    "wrk -c1300 /health/live": lambda url: flood(url, "/health/live"),
    "wrk -c64 /metrics": lambda url: flood(url, "/metrics", 64),
    "wrk -c1000 /metrics": lambda url: flood(url, "/metrics", 1000),
    "deflate without output": lambda url: send_all(
        url, [raw_request("/classify", deflate_without_output(4 * MIB), {"Content-Encoding": "deflate"})] * CLIENTS
    ),
    "unread responses x16": lambda url: unread(url, 16),
    "unread responses x64": lambda url: unread(url, 64),
    "unfinished gzip of 20 MB": lambda url: repeat(
        url, raw_request("/classify", gzip.compress(bytes(UPLOAD))[:-10] + b"a", {"Content-Encoding": "gzip"})[:-1]
    ),
}  # fmt: skip

IMAGES: Mapping[str, Callable[[], list[bytes]]] = {
    "JPEG of 60,000 scans x4": lambda: [jpeg_scans(60_000, 7000)] * 4,
    "JPEG of 60,000 scans": lambda: [jpeg_scans(60_000, 7000)] * CLIENTS,
    "JPEG of 90 scans": lambda: [jpeg_scans(90, 7000)] * CLIENTS,
    "20 MB of junk": lambda: [jpeg_junk(UPLOAD - 3)] * CLIENTS,
    "JPEG of 60,000 segments": lambda: [jpeg_segments(60_000)] * CLIENTS,
    "EXIF directories": lambda: [jpeg_segments(1, 0xE1, b"Exif\0\0" + exif_directory(4500, 11_000))] * CLIENTS,
    "PNG of 100,000 chunks": lambda: [png_chunks(100_000)] * CLIENTS,
    "PNG of 1,700,000 chunks": lambda: [png_chunks(1_700_000)] * CLIENTS,
    "WebP of 65,536 sets of Huffman tables": lambda: [webp_huffman_tables(1412)] * CLIENTS,
    "PNGs of one row": lambda: [narrow_png(999_900 - n) for n in range(CLIENTS)],
    "PNGs of 49 megapixels": lambda: [png_bomb(7000, 7000)] * CLIENTS,
    "GIF of 80,000 comments": lambda: [gif_comments(80_000)] * CLIENTS,
    "BMP decoded in Python": lambda: [bmp_rle(7000)] * CLIENTS,
    "TIFF of 20,000 tags": lambda: [tiff_directory(20_000, 1_000_000)] * CLIENTS,
}

ATTACKS: Mapping[str, Callable[[str], object]] = {
    **CONNECTIONS,
    "all kinds": everything,
    **{name: lambda url, make=make: send_images(url, make()) for name, make in IMAGES.items()},  # type: ignore[misc]
    **{body.name: lambda url, body=body: send_all(url, [body.request()] * CLIENTS) for body in BODIES},  # type: ignore[misc]
}


def attack_from_another_process(url: str, attack: Callable[[str], object]) -> object:
    """Run an attack where it does not take Python's lock from the observer."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    attacker = multiprocessing.Process(target=lambda: sending.send(attack(url)))
    attacker.start()
    sending.close()
    result = receiving.recv()
    attacker.join()
    return result


def main(names: Sequence[str]) -> None:
    print(f"{'attack':44s} {'RSS, MiB':>14s} {'live, s':>8s} {'honest, s':>9s}  responses")
    for name, attack in ATTACKS.items():
        if names and not any(part in name for part in names):
            continue
        with Server(upload_seconds=10, download_seconds=10) as server:
            for image in (SEVEN, encoded(noise(8, 8), "BMP")):  # every process has started
                httpx.post(f"{server.url}/classify", content=image).raise_for_status()
            with observed(server) as seen:
                result = attack_from_another_process(server.url, attack)
            honest = {status: count for status, count in seen.honest_statuses.items() if status != 200}
            live = {status: count for status, count in seen.live_statuses.items() if status != 200}
            memory = f"{seen.baseline_rss / MIB:.0f} -> {seen.peak_rss / MIB:.0f}"
            notes = f"{result}" + (f", honest client {honest}" if honest else "") + (f", /health/live {live}" if live else "")
            print(
                f"{name:44s} {memory:>14s} {seen.worst_live_seconds:8.3f} {seen.worst_honest_seconds:9.2f}  {notes}", flush=True
            )
            server.kill()


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    main(sys.argv[1:])
