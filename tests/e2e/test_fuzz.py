"""`make fuzz`: mutated images, requests and connections, a limited number of each; too slow for `make test`."""

import base64
import gc
import gzip
import itertools
import json
import random
import re
import select
import socket
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from dinat.app.errors import ServiceError
from dinat.app.images import decode, formats
from tests.app.sample_images import encoded, noise
from tests.app.tiffs import tiff
from tests.e2e.processes import DIGITS, Server, check_log, operations, successful_operations

IMAGES = 200_000
REQUESTS = IMAGES // 10
CONNECTIONS = REQUESTS // 4
CLIENTS = 32
MAX_GROWTH = 64 * 2**20
"""Bytes that the resident memory may grow by."""

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.fuzz,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore"),
]


def seeds() -> list[bytes]:
    """Return small images of every format, in several modes."""
    smooth = noise(5, 7).resize((40, 30), Image.Resampling.BICUBIC)
    kinds = [(kind, smooth) for kind in formats()]
    kinds += [("PNG", smooth.convert(mode)) for mode in ("1", "L", "P", "LA", "RGBA")]
    kinds += [("GIF", smooth.convert("P")), ("TIFF", smooth.convert("CMYK")), ("WEBP", smooth.convert("RGBA"))]
    extra = [
        encoded(smooth, "JPEG", progressive=True),
        encoded(smooth.convert("CMYK"), "JPEG"),
        encoded(smooth, "TIFF", compression="tiff_lzw"),
        encoded(smooth, "WEBP", lossless=True),
        b"\xef\xbb\xbf\r\n" + encoded(smooth, "JPEG"),
        *(
            tiff(np.asarray(smooth.convert("CMYK")), photometric=2, order=order, big=big, tile=tile, tags=[(274, 3, [6])])
            for order, big, tile in (("<", False, 0), (">", False, 16), ("<", True, 0))
        ),
        tiff(np.asarray(smooth.convert("L"))[..., None] * 16, bits=12),
        encoded(smooth, "GIF", save_all=True, append_images=[noise(30, 40)]),
    ]
    return [*(encoded(image, kind) for kind, image in kinds), *extra]


def mutated(data: bytes, choose: random.Random) -> bytes:
    """Return the data with random bytes changed, removed, inserted or copied."""
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 1, 2, 4, 16))):
        if not changed:
            break
        at = choose.randrange(len(changed))
        match choose.randrange(7):
            case 0:
                changed[at] = choose.randrange(256)
            case 1:
                changed[at] ^= 1 << choose.randrange(8)
            case 2:
                del changed[at : at + choose.choice((1, 2, 4, 64))]
            case 3:
                changed[at:at] = choose.randbytes(choose.choice((1, 2, 4, 64)))
            case 4:
                changed[at : at + 4] = choose.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
            case 5:
                del changed[at:]
            case 6:
                length = choose.choice((1, 4, 32))
                source = choose.randrange(len(changed))
                changed[at : at + length] = changed[source : source + length]
    return bytes(changed)


def parts(data: bytes) -> list[bytes]:
    """Split a file into its segments (JPEG), chunks (PNG, WebP), directory entries (TIFF) or blocks of 16 bytes."""
    starts = [0, len(data)]
    if data.startswith(b"\xff\xd8"):
        starts += [found.start() for found in re.finditer(rb"\xff[\xc0-\xcf\xd8-\xfe]", data)]
    elif data.startswith(b"\x89PNG"):
        starts += [found.start() - 4 for found in re.finditer(rb"IHDR|PLTE|tRNS|IDAT|IEND", data)]
    elif data.startswith(b"RIFF"):
        starts += [found.start() for found in re.finditer(rb"VP8[ LX]|ANIM|ANMF|ALPH|EXIF", data)]
    elif data.startswith((b"II", b"MM")):
        first = int.from_bytes(data[4:8], "little" if data.startswith(b"II") else "big") + 2
        starts += range(first, len(data), 12)
    else:
        starts += range(16, len(data), 16)
    starts = sorted({start for start in starts if 0 <= start <= len(data)})
    return [data[start:end] for start, end in itertools.pairwise(starts)]


def rearranged(data: bytes, choose: random.Random) -> bytes:
    """Return a file with parts repeated, removed, exchanged or mutated; the checksums of a PNG are correct."""
    changed = parts(data)
    for _ in range(choose.choice((1, 1, 2, 4))):
        if not changed:
            break
        at = choose.randrange(len(changed))
        match choose.randrange(5):
            case 0:
                changed[at:at] = [changed[choose.randrange(len(changed))]] * choose.choice((1, 2, 20, 2000))
            case 1:
                del changed[at]
            case 2:
                other = choose.randrange(len(changed))
                changed[at], changed[other] = changed[other], changed[at]
            case 3:
                changed[at] = mutated(changed[at], choose)
            case 4:
                changed[at:at] = [choose.choice(METADATA)] * choose.choice((1, 20, 2000))
    if data.startswith(b"\x89PNG"):
        changed = [part[:-4] + crc32(part[4:-4]).to_bytes(4, "big") if len(part) >= 12 else part for part in changed]
    return b"".join(changed)


METADATA = (
    b"\xff\xe1\x00\x24Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
    b"\xff\xe2\x00\x10ICC_PROFILE\0\x01\x01",
    b"\xff\xed\x00\x1cPhotoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\0",
    b"\xff\xfe\x00\x04hi",
    b"\0\0\0\x04tEXtk\0vvx\xdb\x9c\x0f",
    b"\x21\xfe\x02hi\0",
)
"""Metadata of JPEG, PNG and GIF files."""


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def test_mutated_images_are_decoded_or_raise_client_errors() -> None:
    choose = random.Random(0)
    sources = seeds()
    slowest, early, outcomes = 0.0, 0, {"decoded": 0, "rejected": 0}
    for n in range(IMAGES):
        data = choose.choice((mutated, rearranged))(choose.choice(sources), choose)
        started = time.monotonic()
        try:
            assert decode(data, max_pixels=4_000_000).mode == "RGB"
            outcomes["decoded"] += 1
        except ServiceError as error:
            assert 400 <= error.status < 500
            outcomes["rejected"] += 1
        except BaseException:
            Path("fuzz-image").write_bytes(data)
            raise
        seconds = time.monotonic() - started
        if seconds > 2:
            Path("fuzz-image").write_bytes(data)
        slowest = max(slowest, seconds)
        if n == IMAGES // 5:
            early = resident()
    growth = resident() - early
    print(outcomes, f"slowest {slowest:.3f} s, memory {growth / 2**20:+.1f} MiB", flush=True)
    assert slowest < 2
    assert growth < MAX_GROWTH


def encode_request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """Return a complete HTTP request; `_` in the name of a header means `-`."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def encode_json(path: str, body: object) -> bytes:
    return encode_request("POST", path, json.dumps(body).encode(), Content_Type="application/json")


def encode_form(path: str, *parts: tuple[str, bytes], preamble: bytes = b"") -> bytes:
    """Return a form with parts of these headers and contents."""
    body = b"".join(b"--b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (head.encode(), data) for head, data in parts)
    return encode_request("POST", path, preamble + body + b"--b--\r\n", Content_Type="multipart/form-data; boundary=b")


def encode_tensor(name: str, datatype: str, shape: list[int], blob: bytes) -> bytes:
    """Return a request of the Open Inference Protocol with a binary tensor."""
    tensor = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(blob)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return encode_request("POST", "/v2/models/digits/infer", head + blob, Inference_Header_Content_Length=str(len(head)))


def encode_chunked(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"%x\r\n%b\r\n0\r\nX: trailer\r\n\r\n" % (len(body), body)


def requests() -> list[bytes]:
    """Return complete HTTP requests to every endpoint."""
    image = (DIGITS / "7-1.png").read_bytes()
    text = base64.b64encode(image).decode()
    file = 'name="image"; filename="x.png"', image
    unnamed = 'name="image"\r\nContent-Type: image/png', image
    encoded_field = 'name="top_k"\r\nContent-Transfer-Encoding: base64', b"2"
    v2 = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}], "outputs": [{"name": "scores"}]}
    return [
        encode_chunked("/classify", image),
        encode_request("POST", "/classify", gzip.compress(image), Content_Encoding="gzip"),
        encode_form("/classify/batch?top_k=1", file, file),
        encode_request("POST", "/attention?y=0.25&x=0.75", image),
        encode_request("POST", "/models/digits?top_k=2", image),
        encode_request("POST", "/v2/repository/index"),
        encode_form("/classify", unnamed, encoded_field, preamble=b"preamble\r\n"),
        encode_request("POST", "/classify", b"\xef\xbb\xbf" + json.dumps({"image": text}).encode(), Content_Type="text/plain"),
        encode_request("POST", "/classify", f"image={text}&top_k=1".encode(), Content_Type="application/x-www-form-urlencoded"),
        encode_request("POST", "/?top_k=2&function_to_apply=none", b"\r\n" + image),
        encode_json("/", {"inputs": text.replace("+", " "), "options": {"use_cache": True}}),
        encode_json("/invocations", {"inputs": text}),
        encode_json("/predict", {"instances": [{"image_bytes": {"b64": text}}, {"content": text}]}),
        encode_json("/v2/models/digits/infer", v2 | {"parameters": {"content_type": "base64"}}),
        encode_request("POST", "/classify?top_k=3", image, X_Deadline_Ms="9000"),
        encode_form("/classify", file, ('name="top_k"', b"2")),
        encode_json("/classify", {"image": text, "top_k": 2, "features": ["pooled"]}),
        encode_json("/classify/batch", {"images": [text, text], "feature_format": "base64", "features": "stage3"}),
        encode_request("POST", "/features?features=stage2", image, Accept="application/x-npz"),
        encode_json("/", {"inputs": text, "parameters": {"top_k": 3, "function_to_apply": "sigmoid"}}),
        encode_json("/predict", {"instances": [{"b64": text}], "parameters": {"top_k": 1}}),
        encode_request("POST", "/invocations", image, Content_Type="image/png"),
        encode_json("/v2/models/digits/infer", v2),
        encode_tensor("image", "BYTES", [1], len(image).to_bytes(4, "little") + image),
        encode_tensor("pixel_values", "FP32", [1, 3, 64, 64], np.zeros((1, 3, 64, 64), np.float32).tobytes()),
        *(encode_request("GET", path) for path in READ),
    ]


READ = (
    *("/", "/web/main.js", "/docs", "/openapi.json", "/health", "/health/live", "/health/ready", "/ping", "/model", "/metrics"),
    *("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/digits", "/v2/models/digits/ready"),
)
"""Paths that are read with GET."""


def exchange(port: int, request: bytes) -> tuple[bytes, float]:
    """Send a request; return the status line, empty if the connection was closed without a response, and the seconds."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(30)
        started = time.monotonic()
        try:
            connection.sendall(request)
            line = connection.recv(64).split(b"\r\n")[0]
        except (ConnectionResetError, BrokenPipeError):
            line = b""
        return line, time.monotonic() - started


def mutated_request(choose: random.Random, sources: list[bytes]) -> bytes:
    """Return a random request with a mutated head, body, or both."""
    source = choose.choice(sources)
    head, separator, body = source.partition(b"\r\n\r\n")
    match choose.randrange(3):
        case 0:
            return mutated(head, choose) + separator + body
        case 1:
            return head + separator + mutated(body, choose)
    return mutated(source, choose)


def json_value(choose: random.Random, depth: int = 0) -> str:
    """Return JSON, or nearly JSON, of an unusual shape: large, deep, or with extreme numbers."""
    image = base64.b64encode((DIGITS / "7-1.png").read_bytes()).decode()
    size = choose.choice((0, 1, 2, 100, 3000, 100_000))
    scalars = ("null", "true", "0", "-1", "1.5", "NaN", "-Infinity", "1e400", "9" * size, '""', f'"{"a" * size}"', f'"{image}"')
    match choose.randrange(6) if depth < 3 else 0:
        case 0 | 1:
            return choose.choice(scalars) or "0"
        case 2:
            return f"[{','.join([choose.choice(scalars[:7])] * size)}]"
        case 3:
            return "[" * size + json_value(choose, depth + 1) + "]" * size
        case 4:
            return "{" + ",".join(f'"{n}":0' for n in range(size)) + "}"
    return f"[{','.join(json_value(choose, depth + 1) for _ in range(choose.randrange(4)))}]"


JSON_FIELDS = {
    "/classify": ("image", "images", "top_k", "features", "feature_format"),
    "/classify/batch": ("images", "top_k", "features", "feature_format"),
    "/features": ("image", "features", "feature_format", "feature_dtype"),
    "/attention": ("image", "y", "x"),
    "/invocations": ("image", "inputs", "top_k", "parameters"),
    "/": ("inputs", "parameters"),
    "/predict": ("instances", "parameters"),
    "/v2/models/digits/infer": ("inputs", "outputs", "parameters", "id"),
}


def json_request(choose: random.Random) -> bytes:
    """Return a request whose JSON has fields of unusual shapes."""
    path = choose.choice(list(JSON_FIELDS))
    fields = choose.sample(JSON_FIELDS[path], choose.randint(1, min(3, len(JSON_FIELDS[path]))))
    body = "{" + ",".join(f'"{field}":{json_value(choose)}' for field in fields) + "}"
    if path.startswith("/v2") and choose.random() < 0.7:
        keys = ("name", "datatype", "shape", "data", "parameters")
        usual = ('"image"', choose.choice(('"BYTES"', '"UINT8"')), "[1]", '["eA=="]', "{}")
        unusual = choose.sample(range(5), 2)
        members = (f'"{keys[n]}":{json_value(choose) if n in unusual else usual[n]}' for n in range(5))
        body = f'{{"inputs":[{{{",".join(members)}}}],"outputs":{choose.choice(("[]", json_value(choose)))}}}'
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def test_mutated_requests_never_get_500() -> None:
    sources = requests()
    statuses: Counter[str] = Counter()
    slowest, early = 0.0, 0
    with Server(runtime="torch", upload_seconds=0.5, queue_limit=64) as server, ThreadPoolExecutor(CLIENTS) as threads:
        port = int(server.url.rpartition(":")[2])
        for request in sources:
            line, _ = exchange(port, request)
            assert line == b"HTTP/1.1 200 OK", (line, request[:80])
        described = operations(httpx.get(f"{server.url}/openapi.json").json())
        process = psutil.Process(server.process.pid)

        def send(seed: int) -> tuple[str, float]:
            choose = random.Random(seed)
            request = json_request(choose) if seed % 4 == 0 else mutated_request(choose, sources)
            line, seconds = exchange(port, request)
            status = line[9:12].decode("latin-1") or "closed"
            assert line or not request.strip(), request[:300]  # only what begins no request gets no response
            if status == "500" or seconds > 2:
                Path("fuzz-request").write_bytes(request)
            assert status != "500", request[:300]
            return status, seconds

        for n, (status, seconds) in enumerate(threads.map(send, range(REQUESTS))):
            statuses[status] += 1
            slowest = max(slowest, seconds)
            if n == REQUESTS // 5:
                early = process.memory_info().rss
        growth = process.memory_info().rss - early
        print(dict(statuses), f"slowest {slowest:.3f} s, memory {growth / 2**20:+.1f} MiB", flush=True)
        assert slowest < 2
        assert growth < MAX_GROWTH
        assert server.stop() == 0
    assert not described - successful_operations(server.events)
    check_log(server)


FIELDS = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
    b"Connection: close",
    b"Connection: keep-alive",
    b"Expect: 100-continue",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Content-Encoding: gzip",
    b"Content-Length: 0",
    b"Content-Length: 7",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: " + b"0" * 5000 + b"2",
    b"X: " + b"a" * 70_000,
    b"X: 1\r\n" * 100 + b"X: 1",
    b"X: \xff\x00",
    b" folded",
    b"no colon",
]


def mutated_head(choose: random.Random, source: bytes) -> bytes:
    """Return the request with another method or version, header fields that matter to the connection, or all of these."""
    head, separator, body = source.partition(b"\r\n\r\n")
    first, *fields = head.split(b"\r\n")
    for old, new in ((b"POST", b"HEAD"), (b"POST", b"CONNECT"), (b"HTTP/1.1", b"HTTP/1.0"), (b"HTTP/1.1", b"HTTP/2.0")):
        if choose.random() < 0.1:
            first = first.replace(old, new)
    for _ in range(choose.choice((0, 1, 1, 2))):
        fields.insert(choose.randint(0, len(fields)), choose.choice(FIELDS))
    return b"\r\n".join([first, *fields]) + separator + body


def converse(port: int, choose: random.Random, data: bytes) -> tuple[list[int], float]:
    """Send data in parts, with pauses, and end the connection in one of several ways.

    Returns:
        The statuses of the responses, and how long the server had the connection open after the last part.
    """
    cuts = sorted(choose.randrange(len(data) + 1) for _ in range(choose.randrange(5)))
    received = b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(30)
        try:
            for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                connection.sendall(data[start:end])
                if select.select([connection], [], [], choose.choice((0, 0, 0.01, 0.1)))[0]:
                    received += connection.recv(2**20)
            match choose.randrange(4):
                case 0:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return [], 0
                case 1 | 2:
                    with suppress(OSError):  # the server has closed the connection
                        connection.shutdown(socket.SHUT_WR)
            started = time.monotonic()
            while part := connection.recv(2**20):
                received += part
        except (ConnectionResetError, BrokenPipeError):
            started = time.monotonic()
        return [int(status) for status in re.findall(rb"HTTP/1\.1 ([2-5]\d\d) ", received)], time.monotonic() - started


def test_mutated_connections_end_by_their_deadline() -> None:
    sources = requests()
    answered: Counter[int] = Counter()
    slowest, early = 0.0, 0
    with Server(runtime="torch", upload_seconds=0.5, queue_limit=64) as server, ThreadPoolExecutor(CLIENTS) as threads:
        port = int(server.url.rpartition(":")[2])
        process = psutil.Process(server.process.pid)

        def run(seed: int) -> tuple[list[int], float]:
            choose = random.Random(seed)
            data = b"".join(mutated_head(choose, choose.choice(sources)) for _ in range(choose.choice((1, 1, 2, 4))))
            if choose.random() < 0.5:
                data = mutated(data, choose)
            statuses, seconds = converse(port, choose, data)
            if 500 in statuses or seconds > 10:
                Path("fuzz-connection").write_bytes(data)
            assert 500 not in statuses, data[:300]
            return statuses, seconds

        for n, (statuses, seconds) in enumerate(threads.map(run, range(CONNECTIONS))):
            answered.update(statuses)
            slowest = max(slowest, seconds)
            if n == CONNECTIONS // 5:
                early = process.memory_info().rss
        growth = process.memory_info().rss - early
        print(dict(answered), f"slowest {slowest:.3f} s, memory {growth / 2**20:+.1f} MiB", flush=True)
        assert slowest < 10  # UPLOAD_SECONDS, KEEP_ALIVE_SECONDS, LINGER_SECONDS and the work for four requests
        assert growth < MAX_GROWTH
        assert exchange(port, sources[0])[0] == b"HTTP/1.1 200 OK"
        assert server.stop() == 0
    check_log(server)
