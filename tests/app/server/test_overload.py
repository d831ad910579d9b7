"""What a busy or careless world does to the service, over real sockets."""

import base64
import gzip
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dinat.app.engine.batcher import Job
from dinat.app.engine.local_backend import LocalBackend
from dinat.app.engine.runtimes.runtime import InferenceOptions, InferenceResult, Runtime
from dinat.model.cpu.resize import Pixels
from tests.app.conftest import DIGITS, Service, running


class Held(LocalBackend):
    """A network that waits, once warm, until it is let go; says when a picture was given up."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.entered, self.let_go, self.given_up = threading.Event(), threading.Event(), threading.Event()
        self.computed = 0

    def load(self) -> list[Runtime]:
        (runtime,) = super().load()
        compute, warmed = runtime.run, threading.Event()

        def run(pixels: Pixels, wanted: Sequence[InferenceOptions]) -> list[InferenceResult]:
            if warmed.is_set():
                self.entered.set()
                assert self.let_go.wait(60)
                self.computed += len(pixels)
            return compute(pixels, wanted)

        runtime.run = run  # type: ignore[method-assign]
        self.warm(runtime, 1)
        warmed.set()
        self.let_go.set()
        return [runtime]

    async def start(self) -> None:
        await super().start()
        self.let_go.clear()
        self.entered.clear()
        self.computed = 0

    def withdraw(self, job: Job) -> None:
        super().withdraw(job)
        self.given_up.set()


def send_head(service: Service, length: int) -> socket.socket:
    """Begin a POST /classify of that many bytes."""
    url = service.client.base_url
    connection = socket.create_connection((url.host, url.port))
    connection.settimeout(30)
    connection.sendall(
        f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n".encode()
    )
    return connection


def test_a_client_that_hangs_up_is_dropped_before_its_batch(seven: bytes) -> None:
    with running(Held) as service, ThreadPoolExecutor(1) as threads:
        core: Any = service.engine.backend
        first = threads.submit(service.client.post, "/classify", content=seven)
        assert core.entered.wait(30)
        gone = send_head(service, len(seven))
        gone.sendall(seven)
        while core.waiting == 0:
            assert service.client.get("/health").status_code == 200
        gone.close()
        assert core.given_up.wait(30)
        core.let_go.set()
        assert first.result().status_code == 200
    assert core.computed == 1


def test_beyond_the_queue_limit_the_answer_is_503_with_retry_after(seven: bytes) -> None:
    with running(Held, queue_limit=1, max_batch=1) as service, ThreadPoolExecutor(2) as threads:
        core: Any = service.engine.backend
        taken = [threads.submit(service.client.post, "/classify", content=seven)]
        assert core.entered.wait(30)
        taken.append(threads.submit(service.client.post, "/classify", content=seven))
        while core.waiting == 0:
            assert service.client.get("/health").status_code == 200
        refused = service.client.post("/classify", content=seven)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "1 pictures wait already, at most 1 may" in refused.json()["detail"]
        assert service.client.get("/health/ready").status_code == 200
        core.let_go.set()
        assert [answer.result().status_code for answer in taken] == [200, 200]


def test_a_deadline_in_the_request_is_kept(seven: bytes) -> None:
    with running(Held) as service:
        late = service.client.post("/classify", content=seven, headers={"X-Deadline-Ms": "100"})
        assert late.status_code == 504
        assert "within the deadline" in late.json()["detail"]
        service.engine.backend.let_go.set()  # type: ignore[attr-defined]
        assert service.client.post("/classify", content=seven).status_code == 200
        wrong = service.client.post("/classify", content=seven, headers={"X-Deadline-Ms": "soon"})
        assert wrong.status_code == 422
        assert "X-Deadline-Ms" in wrong.json()["detail"]


def test_a_slow_upload_times_out(seven: bytes) -> None:
    with running(upload_seconds=0.3) as service:
        connection = send_head(service, len(seven))
        connection.sendall(seven[:100])
        answer = connection.recv(65536).decode()
        connection.close()
        assert answer.startswith("HTTP/1.1 408")
        assert "the upload took longer than 0.3 s" in answer
        assert service.client.post("/classify", content=seven).status_code == 200


def test_a_client_that_stops_in_the_middle_of_its_upload_harms_nobody(service: Service, seven: bytes) -> None:
    connection = send_head(service, len(seven))
    connection.sendall(seven[:100])
    connection.close()
    assert service.client.post("/classify", content=seven).status_code == 200


def test_a_batch_request_answers_in_order_with_errors_in_place(service: Service) -> None:
    pictures = [(DIGITS / f"{digit}-1.png").read_bytes() for digit in (3, 1, 4)]
    files = [("image", ("x", data)) for data in (pictures[0], b"nonsense", *pictures[1:])]
    answer = service.client.post("/classify/batch", files=files, params={"top_k": 2, "features": "pooled"}).json()
    labels = [
        result["predictions"][0]["label"] if "predictions" in result else result["error"]["status"]
        for result in answer["results"]
    ]
    assert labels == ["3", 415, "1", "4"]
    assert answer["results"][0]["features"]["pooled"]["shape"] == [128]
    texts = [base64.b64encode(data).decode() for data in pictures]
    answer = service.client.post("/classify/batch", json={"images": [*texts[:2], "?", 5, texts[2]]}).json()
    labels = [
        result["predictions"][0]["label"] if "predictions" in result else result["error"]["status"]
        for result in answer["results"]
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
        ({"json": {"images": ["AAAA"] * 129}}, 413, "has 129 pictures, at most 128 can wait"),
    ],
)
def test_broken_batch_requests_are_named(service: Service, body: dict[str, Any], status: int, detail: str) -> None:
    answer = service.client.post("/classify/batch", **body)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert detail in answer.json()["detail"]


def test_many_mixed_requests_at_once_are_all_answered(service: Service, seven: bytes) -> None:
    bodies = [seven, b"", b"text", seven[:300], seven]

    def ask(n: int) -> int:
        return service.client.post("/classify", content=bodies[n % len(bodies)]).status_code

    with ThreadPoolExecutor(16) as threads:
        statuses = list(threads.map(ask, range(200)))
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
            refused = service.client.post("/classify", content=seven, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["request_id"] == refused.headers["x-request-id"]
        for headers in ({"X-API-Key": "first"}, {"Authorization": "Bearer second"}, {"Authorization": "bearer second"}):
            assert service.client.post("/classify", content=seven, headers=headers).status_code == 200
        assert service.client.get("/model").status_code == 401
        assert service.client.get("/health/ready").status_code == 200
        assert service.client.get("/metrics").status_code == 200
    with running(api_keys="first", keyless="health") as service:
        assert service.client.get("/health").status_code == 200
        assert service.client.get("/metrics").status_code == 401
        assert service.client.get("/metrics", headers={"X-API-Key": "first"}).status_code == 200


def test_cors_and_security_headers(seven: bytes) -> None:
    with running(cors_origins="https://page.example") as service:
        allowed = service.client.post("/classify", content=seven, headers={"Origin": "https://page.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = service.client.post("/classify", content=seven, headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        for answer in (allowed, service.client.get("/nowhere")):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"


def test_without_cors_origins_no_page_may_call(service: Service, seven: bytes) -> None:
    answer = service.client.post("/classify", content=seven, headers={"Origin": "https://page.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_traces_reach_their_endpoint_and_health_is_left_out(seven: bytes) -> None:
    received: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def collect() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            length = 0
            while (line := stream.readline().strip()) != b"":
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            received.append(stream.read(length))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    collector = threading.Thread(target=collect)
    collector.start()
    with running(otlp_endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces") as service:
        assert service.client.get("/health").status_code == 200
        assert service.client.post("/classify", content=seven).status_code == 200
    collector.join(30)
    listener.close()
    assert len(received) == 1

    body = gzip.decompress(received[0]) if received[0][:2] == b"\x1f\x8b" else received[0]
    assert b"/classify" in body
    assert b"dinat-serve" in body
    assert b"/health" not in body
