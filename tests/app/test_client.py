import asyncio
import io
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from dinat.app.client import AsyncDinatClient, Classification, DinatClient, DinatServiceError, _image_bytes, _proxy
from dinat.app.images import decode
from tests.app.conftest import DIGITS, Service, running
from tests.app.sample_images import noise
from tests.app.server.test_overload import PausedBackend

IMAGES = [(DIGITS / f"{digit}-1.png").read_bytes() for digit in (7, 0, 3)]


def url(service: Service) -> str:
    return str(service.client.base_url)


def test_every_kind_of_image_input(service: Service, seven: bytes, tmp_path: Path) -> None:
    path = tmp_path / "seven.png"
    path.write_bytes(seven)
    image = Image.open(io.BytesIO(seven))
    with DinatClient(url(service)) as client:
        for image_input in (seven, path, str(path), image, np.asarray(image), np.asarray(image.convert("RGB"))):
            result = client.classify(image_input, top_k=3)
            assert (result.best.label, result.best.class_id, len(result.predictions)) == ("7", 7, 3)


def test_binary_inputs(service: Service, seven: bytes, tmp_path: Path) -> None:
    path = tmp_path / "seven.png"
    path.write_bytes(seven)
    written = io.BytesIO()
    written.write(seven)  # as after Image.save: the position is at the end
    with DinatClient(url(service)) as client, path.open("rb") as file:
        for image_input in (bytearray(seven), memoryview(seven), written, io.BytesIO(seven), file):
            assert client.classify(image_input).best.label == "7"
        with path.open(errors="replace") as text, pytest.raises(TypeError, match="open it with mode 'rb'"):
            client.classify(text)  # type: ignore[arg-type]


def test_file_that_was_just_written(service: Service, seven: bytes) -> None:
    with DinatClient(url(service)) as client, tempfile.TemporaryFile() as file, tempfile.SpooledTemporaryFile() as spooled:
        for written in (file, spooled):
            written.write(seven)
            assert client.classify(written).best.label == "7"  # type: ignore[arg-type]


def test_client_without_a_with_statement(service: Service, seven: bytes) -> None:
    client = DinatClient(f" {url(service).removeprefix('http://')}/ ")
    assert client.classify(seven).best.label == "7"
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.classify(seven)
    for _ in range(2):
        with client:
            assert client.classify(seven).best.label == "7"

    async def classify() -> None:
        client = AsyncDinatClient(url(service))
        assert (await client.classify(seven)).best.label == "7"
        await client.close()
        async with client:
            assert (await client.classify(seven)).best.label == "7"

    asyncio.run(classify())


def test_one_image_is_no_batch(service: Service, seven: bytes) -> None:
    with DinatClient(url(service)) as client, pytest.raises(TypeError, match="images must be a list, got bytes: use classify"):
        client.classify_batch(seven)  # type: ignore[arg-type]
    with DinatClient(url(service)) as client, pytest.raises(ValueError, match="images is empty"):
        client.classify_batch([])


def test_names_of_feature_maps_as_text(service: Service, seven: bytes) -> None:
    with DinatClient(url(service)) as client:
        assert client.features(seven, "stage1,pooled").keys() == client.features(seven, ["stage1", "pooled"]).keys()


def sent(image: Any) -> Image.Image:
    """What the service decodes of an input of the client."""
    return decode(_image_bytes(image), 10**7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pillow_image_is_turned_as_its_file(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(24, 31).save(tmp_path / "x.png", exif=exif)
    expected = decode((tmp_path / "x.png").read_bytes(), 10**6)
    assert sent(Image.open(tmp_path / "x.png")).tobytes() == expected.tobytes()
    assert sent(ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "F", "I", "I;16", "PA", "RGBX"]
)
def test_pillow_image_of_every_mode_is_converted(mode: str) -> None:
    image = Image.linear_gradient("L").resize((64, 64))
    if mode in ("YCbCr", "HSV", "LAB"):
        other = (
            ImageCms.applyTransform(image.convert("RGB"), _to_lab()) if mode == "LAB" else image.convert("RGB").convert(mode)
        )
    elif mode == "I;16":
        other = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    else:
        other = image.convert("RGBA").convert(mode) if mode == "PA" else image.convert(mode)
    expected = image.convert(mode).convert("RGB") if mode == "1" else image.convert("RGB")
    difference = np.abs(np.asarray(sent(other)).astype(int) - np.asarray(expected))
    assert difference.max() <= (32 if mode in ("P", "PA") else 3)  # a palette of 6 levels of each color


def _to_lab() -> Any:
    return ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")


def test_arrays_of_other_types() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(np.asarray(sent(levels.astype(np.uint16) * 257))[..., 0], levels)
    assert np.array_equal(np.asarray(sent(levels[..., None]))[..., 0], levels)
    assert np.array_equal(np.asarray(sent(levels > 100))[..., 0], np.where(levels > 100, 255, 0))
    rgba = np.dstack([levels, levels, levels, np.full_like(levels, 255)])
    assert np.array_equal(np.asarray(sent(rgba))[..., 0], levels)
    for array in (levels.astype(np.float32), levels[None], np.zeros((3, 16, 16), np.uint8)):
        with pytest.raises(ValueError, match=r"an array must be uint8 of shape .*, got (float32|uint8) "):
            sent(array)
    with pytest.raises(ValueError, match=r"float image of values up to 1 is black: scale it to 0..255"):
        sent(Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)))


@pytest.mark.parametrize(
    "environment",
    [
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "[::1]"},
        {"http_proxy": "127.0.0.1:9", "no_proxy": "10.0.0.0/8, [::1]:80, *.internal"},
    ],
)
def test_service_on_this_host_requires_no_proxy(
    service: Service, seven: bytes, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with DinatClient(url(service)) as client:
        assert client.classify(seven).best.label == "7"

    async def classify() -> str:
        async with AsyncDinatClient(url(service)) as client:
            return (await client.classify(seven)).best.label

    assert asyncio.run(classify()) == "7"


@pytest.mark.parametrize(
    ("address", "no_proxy", "proxy"),
    [
        ("http://gpu.example:8000", "", "http://proxy:3128"),
        ("http://gpu.example:8000", "example", None),
        ("http://gpu.example:8000", ".example", None),
        ("http://gpu.example:8000", "*.example", None),
        ("http://gpu.example:8000", "gpu.example:8000", None),
        ("http://gpu.example:8000", "gpu.example:9000", "http://proxy:3128"),
        ("http://gpu.example:8000", "other, *", None),
        ("http://notexample:8000", "example", "http://proxy:3128"),
        ("http://10.1.2.3", "10.0.0.0/8", None),
        ("http://11.1.2.3", "10.0.0.0/8", "http://proxy:3128"),
        ("http://[fd00::1]:8000", "[fd00::1]", None),
        ("http://[fd00::1]:8000", "fd00::/8", None),
        ("http://[::1]:8000", "", None),
        ("http://127.0.0.2:8000", "", None),
        ("http://dinat.localhost", "", None),
        ("https://gpu.example", "", None),
    ],
)
def test_proxy_of_the_environment(address: str, no_proxy: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "proxy:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    for name in ("https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert _proxy(address) == proxy


def test_all_methods(service: Service, seven: bytes) -> None:
    with DinatClient(url(service)) as client:
        assert client.health().ready
        model = client.model()
        assert (model.model, list(model.labels), model.more["device"]) == ("digits", list("0123456789"), "cpu")
        first, second, third = client.classify_batch([IMAGES[0], b"text", IMAGES[2]], top_k=1)
        assert isinstance(first, Classification)
        assert isinstance(second, DinatServiceError)
        assert isinstance(third, Classification)
        assert (first.best.label, second.status, third.best.label) == ("7", 415, "3")
        assert set(client.features(seven)) == {"stage1", "stage2", "stage3"}
        feature_maps = client.features(seven, ["pooled", "hidden_states"])
        assert feature_maps["pooled"].shape == (128,)
        assert set(feature_maps) == {"pooled", *(f"hidden_states.{i}" for i in range(4))}


def test_asynchronous_client(service: Service) -> None:
    async def classify_all() -> list[str]:
        async with AsyncDinatClient(url(service)) as client:
            assert (await client.health()).ready
            assert (await client.model()).model == "digits"
            assert set(await client.features(IMAGES[0], ["pooled"])) == {"pooled"}
            assert len(await client.classify_batch(IMAGES)) == 3
            results = await asyncio.gather(*map(client.classify, IMAGES))
            return [result.best.label for result in results]

    assert asyncio.run(classify_all()) == ["7", "0", "3"]


def test_error_responses_are_raised(service: Service, seven: bytes) -> None:
    with DinatClient(url(service)) as client, pytest.raises(DinatServiceError, match="415: the image is text") as raised:
        client.classify(b"text")
    assert len(raised.value.request_id) == 32
    with DinatClient(f"{url(service)}/elsewhere") as client, pytest.raises(DinatServiceError, match="404"):
        client.classify(seven)


def test_api_key(seven: bytes) -> None:
    with running(api_keys="open") as service:
        with DinatClient(url(service), api_key="open") as client:
            assert client.classify(seven).best.label == "7"
        with DinatClient(url(service)) as client, pytest.raises(DinatServiceError, match="401"):
            client.classify(seven)


def test_busy_service_is_retried_after_its_retry_after(seven: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(PausedBackend, queue_limit=1, max_batch=1) as service, ThreadPoolExecutor(2) as threads:
        backend: Any = service.engine.backend
        accepted = [threads.submit(service.client.post, "/classify", content=seven)]
        assert backend.entered.wait(30)
        accepted.append(threads.submit(service.client.post, "/classify", content=seven))
        while backend.waiting == 0:
            assert service.client.get("/health").status_code == 200
        with (
            DinatClient(url(service), retry_seconds=0) as client,
            pytest.raises(DinatServiceError, match="503: the queue is full"),
        ):
            client.classify(seven)
        delays: list[float] = []

        def sleep(seconds: float) -> None:
            delays.append(seconds)
            backend.resume.set()
            for request in accepted:
                request.result()

        monkeypatch.setattr("dinat.app.client.time.sleep", sleep)
        with DinatClient(url(service)) as client:
            assert client.classify(seven).best.label == "7"
        assert delays == [1.0]


@contextmanager
def scripted_server(*responses: bytes) -> Iterator[str]:
    """Serve one of these responses per connection, in order; an empty one closes the connection. Yields the URL."""
    remaining = list(responses)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.rfile.read(length)
            self.wfile.write(remaining.pop(0))

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
    assert remaining == []


def http_response(status: str, body: bytes, content_type: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


def test_request_is_retried_after_an_instance_crash(seven: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    good = b'{"predictions": [{"label": "7", "class_id": 7, "score": 1.0}]}'
    delays: list[float] = []
    monkeypatch.setattr("dinat.app.client.time.sleep", delays.append)
    from_proxy = http_response("502 Bad Gateway", b"<html>no upstream</html>", "text/html")
    from_ray = http_response("500 Internal Server Error", b"Internal Server Error", "text/plain")
    responses = (b"", from_proxy, from_ray, http_response("200 OK", good, "application/json"))
    with scripted_server(*responses) as address, DinatClient(address) as client:
        assert client.classify(seven).best.label == "7"
    assert delays == [0.1, 0.2, 0.4]


def test_problem_responses_are_final_and_retries_end(seven: bytes) -> None:
    problem = b'{"status": 500, "detail": "something went wrong on this side", "request_id": "a"}'
    own = http_response("500 Internal Server Error", problem, "application/problem+json")
    with (
        scripted_server(own) as address,
        DinatClient(address) as client,
        pytest.raises(DinatServiceError, match="500: something"),
    ):
        client.classify(seven)
    with (
        scripted_server(b"") as address,
        DinatClient(address, retry_seconds=0) as client,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        client.classify(seven)
