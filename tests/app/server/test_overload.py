"""Overload, timeouts and disconnected clients, over real sockets."""

import base64
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dinat.app.engine.job import Job
from dinat.app.engine.local_backend import LocalBackend
from dinat.app.engine.runtimes.runtime import InferenceOptions, InferenceResult, Runtime
from dinat.model.cpu.resize import Pixels
from tests.app.conftest import DIGITS, Service, running


class PausedBackend(LocalBackend):
    """A backend that pauses at each batch, after warm-up, until `resume` is set.

    Attributes:
        entered: Set when a batch pauses.
        released: Set when a job is released.
        computed: Number of images computed.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.entered, self.resume, self.released = threading.Event(), threading.Event(), threading.Event()
        self.computed = 0

    def load(self) -> list[Runtime]:
        (runtime,) = super().load()
        compute, warmed = runtime.run, threading.Event()

        def run(pixels: Pixels, options: Sequence[InferenceOptions]) -> list[InferenceResult]:
            if warmed.is_set():
                self.entered.set()
                assert self.resume.wait(60)
                self.computed += len(pixels)
            return compute(pixels, options)

        runtime.run = run  # type: ignore[method-assign]
        self.warm(runtime, 1)
        warmed.set()
        self.resume.set()
        return [runtime]

    async def start(self) -> None:
        await super().start()
        self.resume.clear()
        self.entered.clear()
        self.computed = 0

    def release(self, job: Job) -> None:
        super().release(job)
        self.released.set()


def send_head(service: Service, length: int) -> socket.socket:
    """Send the head of a POST /classify with a body of that many bytes."""
    url = service.client.base_url
    connection = socket.create_connection((url.host, url.port))
    connection.settimeout(30)
    connection.sendall(
        f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n".encode()
    )
    return connection


def test_disconnected_client_is_dropped_before_its_batch(seven: bytes) -> None:
    with running(PausedBackend) as service, ThreadPoolExecutor(1) as threads:
        backend: Any = service.engine.backend
        first = threads.submit(service.client.post, "/classify", content=seven)
        assert backend.entered.wait(30)
        second = send_head(service, len(seven))
        second.sendall(seven)
        while backend.waiting == 0:
            assert service.client.get("/health").status_code == 200
        second.close()
        assert backend.released.wait(30)
        backend.resume.set()
        assert first.result().status_code == 200
    assert backend.computed == 1


def test_full_queue_is_503_with_retry_after(seven: bytes) -> None:
    with running(PausedBackend, queue_limit=1, max_batch=1) as service, ThreadPoolExecutor(2) as threads:
        backend: Any = service.engine.backend
        accepted = [threads.submit(service.client.post, "/classify", content=seven)]
        assert backend.entered.wait(30)
        accepted.append(threads.submit(service.client.post, "/classify", content=seven))
        while backend.waiting == 0:
            assert service.client.get("/health").status_code == 200
        rejected = service.client.post("/classify", content=seven)
        assert rejected.status_code == 503
        assert int(rejected.headers["retry-after"]) >= 1
        assert "the queue is full (1 of 1 images)" in rejected.json()["detail"]
        assert service.client.get("/health/ready").status_code == 200
        backend.resume.set()
        assert [future.result().status_code for future in accepted] == [200, 200]


def test_deadline_of_a_request_is_enforced(seven: bytes) -> None:
    with running(PausedBackend) as service:
        late = service.client.post("/classify", content=seven, headers={"X-Deadline-Ms": "100"})
        assert late.status_code == 504
        assert "within the deadline" in late.json()["detail"]
        service.engine.backend.resume.set()  # type: ignore[attr-defined]
        assert service.client.post("/classify", content=seven).status_code == 200
        invalid = service.client.post("/classify", content=seven, headers={"X-Deadline-Ms": "soon"})
        assert invalid.status_code == 422
        assert "X-Deadline-Ms" in invalid.json()["detail"]


def test_slow_upload_times_out(seven: bytes) -> None:
    with running(upload_seconds=0.3) as service:
        connection = send_head(service, len(seven))
        connection.sendall(seven[:100])
        response = connection.recv(65536).decode()
        connection.close()
        assert response.startswith("HTTP/1.1 408")
        assert "the upload took longer than 0.3 s" in response
        assert service.client.post("/classify", content=seven).status_code == 200


def test_aborted_upload_does_not_affect_other_clients(service: Service, seven: bytes) -> None:
    connection = send_head(service, len(seven))
    connection.sendall(seven[:100])
    connection.close()
    assert service.client.post("/classify", content=seven).status_code == 200


def test_batch_results_are_in_order_with_errors_in_place(service: Service) -> None:
    images = [(DIGITS / f"{digit}-1.png").read_bytes() for digit in (3, 1, 4)]
    files = [("image", ("x", data)) for data in (images[0], b"nonsense", *images[1:])]
    body = service.client.post("/classify/batch", files=files, params={"top_k": 2, "features": "pooled"}).json()
    labels = [
        result["predictions"][0]["label"] if "predictions" in result else result["error"]["status"]
        for result in body["results"]
    ]
    assert labels == ["3", 415, "1", "4"]
    assert body["results"][0]["features"]["pooled"]["shape"] == [128]
    texts = [base64.b64encode(data).decode() for data in images]
    body = service.client.post("/classify/batch", json={"images": [*texts[:2], "?", 5, texts[2]]}).json()
    labels = [
        result["predictions"][0]["label"] if "predictions" in result else result["error"]["status"]
        for result in body["results"]
    ]
    assert labels == ["3", "1", 422, 400, "4"]


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"json": {"images": []}}, 400, "no list of images"),
        ({"json": {"image": "x"}}, 400, "no list of images"),
        ({"files": {"other": b"x"}}, 400, "no field image (fields: other)"),
        (
            {"content": b"x", "headers": {"content-type": "image/png"}},
            400,
            "image/png is not supported here",
        ),
        ({"json": {"images": ["AAAA"] * 129}}, 413, "has 129 images, at most 128 can be queued"),
    ],
)
def test_invalid_batch_request_is_rejected(service: Service, body: dict[str, Any], status: int, detail: str) -> None:
    response = service.client.post("/classify/batch", **body)
    assert (response.status_code, response.json()["status"]) == (status, status)
    assert detail in response.json()["detail"]


def test_concurrent_valid_and_invalid_requests_are_all_answered(service: Service, seven: bytes) -> None:
    bodies = [seven, b"", b"text", seven[:300], seven]

    def post(n: int) -> int:
        return service.client.post("/classify", content=bodies[n % len(bodies)]).status_code

    with ThreadPoolExecutor(16) as threads:
        statuses = list(threads.map(post, range(200)))
    assert {(n % len(bodies), status) for n, status in enumerate(statuses)} == {
        (0, 200),
        (1, 400),
        (2, 415),
        (3, 422),
        (4, 200),
    }
    assert service.engine.waiting == 0


def test_api_keys(seven: bytes) -> None:
    with running(api_keys="first, second") as service:
        for headers in ({}, {"X-API-Key": "third"}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}):
            rejected = service.client.post("/classify", content=seven, headers=headers)
            assert rejected.status_code == 401
            assert rejected.headers["www-authenticate"] == "Bearer"
            assert rejected.json()["request_id"] == rejected.headers["x-request-id"]
        for headers in ({"X-API-Key": "first"}, {"Authorization": "Bearer second"}, {"Authorization": "bearer second"}):
            assert service.client.post("/classify", content=seven, headers=headers).status_code == 200
        for headers in (
            {"X-API-Key": "first", "Authorization": "Bearer third"},
            {"X-API-Key": "third", "Authorization": "Bearer first"},
            {"X-API-Key": "first", "Authorization": "Basic dXNlcjpwYXNz"},
        ):
            assert service.client.post("/classify", content=seven, headers=headers).status_code == 200
        assert service.client.get("/model").status_code == 401
        assert service.client.get("/health/ready").status_code == 200
        assert service.client.get("/metrics").status_code == 200
    with running(api_keys="first", keyless="health") as service:
        assert service.client.get("/health").status_code == 200
        assert service.client.get("/metrics").status_code == 401
        assert service.client.get("/metrics", headers={"X-API-Key": "first"}).status_code == 200


def test_api_keys_of_a_file_are_rotated(seven: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinat.app.api.keys.CHECK_SECONDS", 0)
    file = tmp_path / "keys"
    file.write_text("# of Ann, Bob\nold, older\n\n")
    with running(api_keys="fixed", api_keys_file=file) as service:

        def status(key: str) -> int:
            return service.client.post("/classify", content=seven, headers={"X-API-Key": key}).status_code

        assert [status(key) for key in ("fixed", "old", "older", "new", "", "Bob")] == [200, 200, 200, 401, 401, 401]
        (tmp_path / "next").write_text("old\nnew\n")
        (tmp_path / "next").replace(file)
        assert [status(key) for key in ("fixed", "old", "new")] == [200, 200, 200]
        file.write_text("new")
        assert [status(key) for key in ("fixed", "old", "new")] == [200, 401, 200]
        file.write_text("")  # as an editor that truncates the file first
        assert [status(key) for key in ("fixed", "old", "new")] == [200, 401, 200]
        file.write_text("newest")
        assert [status(key) for key in ("fixed", "new", "newest")] == [200, 401, 200]
        file.unlink()
        assert [status(key) for key in ("fixed", "new", "newest")] == [200, 401, 200]


def test_every_key_is_required_before_the_file_is_read(seven: bytes, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key")
    with running(api_keys_file=file) as service:
        file.unlink()
        assert service.client.post("/classify", content=seven).status_code == 401


def test_cors_and_security_headers(seven: bytes) -> None:
    with running(cors_origins="https://page.example") as service:
        allowed = service.client.post("/classify", content=seven, headers={"Origin": "https://page.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = service.client.post("/classify", content=seven, headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        for response in (allowed, service.client.get("/nowhere")):
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["x-frame-options"] == "DENY"


def test_no_origin_is_allowed_by_default(service: Service, seven: bytes) -> None:
    response = service.client.post("/classify", content=seven, headers={"Origin": "https://page.example"})
    assert "access-control-allow-origin" not in response.headers
