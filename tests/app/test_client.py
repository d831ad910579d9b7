import asyncio
import io
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from dinat.app.client import AsyncDinatClient, Classification, DinatClient, DinatServiceError
from tests.app.conftest import DIGITS, Service, running
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
            pytest.raises(DinatServiceError, match="503: 1 images are queued"),
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
