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

PICTURES = [(DIGITS / f"{digit}-1.png").read_bytes() for digit in (7, 0, 3)]


def url(service: Service) -> str:
    return str(service.client.base_url)


def test_every_kind_of_picture(service: Service, seven: bytes, tmp_path: Path) -> None:
    path = tmp_path / "seven.png"
    path.write_bytes(seven)
    image = Image.open(io.BytesIO(seven))
    with DinatClient(url(service)) as client:
        for picture in (seven, path, str(path), image, np.asarray(image), np.asarray(image.convert("RGB"))):
            said = client.classify(picture, top_k=3)
            assert (said.best.label, said.best.class_id, len(said.predictions)) == ("7", 7, 3)


def test_all_that_can_be_asked(service: Service, seven: bytes) -> None:
    with DinatClient(url(service)) as client:
        assert client.health().ready
        card = client.model()
        assert (card.model, list(card.labels), card.more["device"]) == ("digits", list("0123456789"), "cpu")
        first, second, third = client.classify_batch([PICTURES[0], b"text", PICTURES[2]], top_k=1)
        assert isinstance(first, Classification)
        assert isinstance(second, DinatServiceError)
        assert isinstance(third, Classification)
        assert (first.best.label, second.status, third.best.label) == ("7", 415, "3")
        assert set(client.features(seven)) == {"stage1", "stage2", "stage3"}
        maps = client.features(seven, ["pooled", "hidden_states"])
        assert maps["pooled"].shape == (128,)
        assert set(maps) == {"pooled", *(f"hidden_states.{i}" for i in range(4))}


def test_the_asynchronous_twin(service: Service) -> None:
    async def ask() -> list[str]:
        async with AsyncDinatClient(url(service)) as client:
            assert (await client.health()).ready
            assert (await client.model()).model == "digits"
            assert set(await client.features(PICTURES[0], ["pooled"])) == {"pooled"}
            assert len(await client.classify_batch(PICTURES)) == 3
            return [one.best.label for one in await asyncio.gather(*map(client.classify, PICTURES))]

    assert asyncio.run(ask()) == ["7", "0", "3"]


def test_what_the_service_refuses_is_raised(service: Service, seven: bytes) -> None:
    with DinatClient(url(service)) as client, pytest.raises(DinatServiceError, match="415: the image is text") as raised:
        client.classify(b"text")
    assert len(raised.value.request_id) == 32
    with DinatClient(f"{url(service)}/elsewhere") as client, pytest.raises(DinatServiceError, match="404"):
        client.classify(seven)


def test_a_key(seven: bytes) -> None:
    with running(api_keys="open") as service:
        with DinatClient(url(service), api_key="open") as client:
            assert client.classify(seven).best.label == "7"
        with DinatClient(url(service)) as client, pytest.raises(DinatServiceError, match="401"):
            client.classify(seven)


def test_a_busy_service_is_asked_again_when_it_says_so(seven: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(PausedBackend, queue_limit=1, max_batch=1) as service, ThreadPoolExecutor(2) as threads:
        core: Any = service.engine.backend
        taken = [threads.submit(service.client.post, "/classify", content=seven)]
        assert core.entered.wait(30)
        taken.append(threads.submit(service.client.post, "/classify", content=seven))
        while core.waiting == 0:
            assert service.client.get("/health").status_code == 200
        with (
            DinatClient(url(service), patience=0) as client,
            pytest.raises(DinatServiceError, match="503: 1 images are queued"),
        ):
            client.classify(seven)
        waited, asleep = [], threading.Event()

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            asleep.set()
            core.resume.set()
            for one in taken:
                one.result()

        monkeypatch.setattr("dinat.app.client.time.sleep", sleep)
        with DinatClient(url(service)) as client:
            assert client.classify(seven).best.label == "7"
        assert waited == [1.0]


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """Listens, and gives each connection in turn one of these answers to its request; an empty one is a connection cut."""
    left = list(answers)

    class Door(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.rfile.read(length)
            self.wfile.write(left.pop(0))

    with socketserver.TCPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
    assert left == []


def answer(status: str, body: bytes, kind: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


def test_a_request_under_which_an_instance_died_is_made_again(seven: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    good = b'{"predictions": [{"label": "7", "class_id": 7, "score": 1.0}]}'
    waited: list[float] = []
    monkeypatch.setattr("dinat.app.client.time.sleep", waited.append)
    proxys = answer("502 Bad Gateway", b"<html>no upstream</html>", "text/html")
    rays = answer("500 Internal Server Error", b"Internal Server Error", "text/plain")
    with answering(b"", proxys, rays, answer("200 OK", good, "application/json")) as there, DinatClient(there) as client:
        assert client.classify(seven).best.label == "7"
    assert waited == [0.1, 0.2, 0.4]


def test_what_the_service_itself_says_is_final_and_patience_ends(seven: bytes) -> None:
    problem = b'{"status": 500, "detail": "something went wrong on this side", "request_id": "a"}'
    own = answer("500 Internal Server Error", problem, "application/problem+json")
    with answering(own) as there, DinatClient(there) as client, pytest.raises(DinatServiceError, match="500: something"):
        client.classify(seven)
    with answering(b"") as there, DinatClient(there, patience=0) as client, pytest.raises(httpx.RemoteProtocolError):
        client.classify(seven)
