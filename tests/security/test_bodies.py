"""Request bodies whose cost exceeds their size: what they get, and what the service and an honest client see meanwhile."""

import base64
import contextlib
import gzip
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest

from tests.app.conftest import running
from tests.e2e.processes import DIGITS, Server
from tests.security.observer import Observation, observed

pytestmark = pytest.mark.process

SEVEN = (DIGITS / "7-1.png").read_bytes()
SEVEN_TEXT = base64.b64encode(SEVEN).decode()
INFER = "/v2/models/digits/infer"
UPLOAD = 20 * 2**20
BOUNDARY = "-" * 20 + "boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
AS_JSON = {"Content-Type": "application/json"}
URLENCODED = {"Content-Type": "application/x-www-form-urlencoded"}

MAX_LIVE_SECONDS = 2.0
"""Bound beside other tests on two cores; the attacks took 4 to 86 s without the limits."""
MAX_GROWTH = 400 * 2**20
MAX_ANSWER_BYTES = 16 * 1024


@dataclass(frozen=True)
class Attack:
    """A request.

    Attributes:
        name: Name of the test.
        path: Path of the request.
        body: Its body.
        statuses: Statuses that it may get.
        headers: Its headers.
        gz: Whether the body is sent as gzip.
    """

    name: str
    path: str
    body: Callable[[], bytes]
    statuses: Sequence[int] = (413,)
    headers: dict[str, str] | None = None
    gz: bool = False

    def request(self) -> bytes:
        """Return the request as it is sent."""
        headers, body = {**AS_JSON, **(self.headers or {})}, self.body()
        if self.gz:
            headers["Content-Encoding"], body = "gzip", gzip.compress(body, 1)
        return raw_request(self.path, body, headers)


def raw_request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def exchange(url: str, request: bytes) -> tuple[int, bytes]:
    """Send a request; return the status and the response. It takes less of the observer's time than httpx."""
    with socket.create_connection(address_of(url)) as connection:
        connection.settimeout(120)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the response may come before the end of the body
            connection.sendall(request)
        response = b"".join(iter(lambda: connection.recv(2**16), b""))
        return int(response[9:12]), response


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


def infer_body(tensor: bytes, rest: bytes = b"") -> bytes:
    return b'{"inputs":[{"name":"image","datatype":"BYTES",' + tensor + b"}]" + rest + b"}"


def filled(head: bytes, unit: bytes, tail: bytes, size: int = UPLOAD - 200) -> bytes:
    return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


def form_of(parts: int, headers: bytes = b"") -> bytes:
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="x"\r\n'.encode() + headers + b"\r\ny\r\n"
    return part * parts + f"--{BOUNDARY}--\r\n".encode()


def near_boundaries(size: int = UPLOAD - 1000) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'.encode()
    return filled(head, f"\r\n--{BOUNDARY[:-1]}".encode(), f"\r\n--{BOUNDARY}--\r\n".encode(), size)


def many_feature_names() -> bytes:
    return b"".join(
        [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="features"\r\n\r\n'.encode(),
            b"a," * 9_500_000,
            f'\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'.encode(),
            SEVEN,
            f"\r\n--{BOUNDARY}--\r\n".encode(),
        ]
    )


def many_pixels() -> bytes:
    head = b'{"inputs":[{"name":"pixel_values","datatype":"UINT8","shape":[6000000,1,1,3],'
    head += b'"parameters":{"binary_data_size":18000000}}]}'
    assert len(head) == 122
    return head + bytes(18_000_000)


def long_column() -> bytes:
    head = b'{"inputs":[{"name":"pixel_values","datatype":"UINT8","shape":[1,1,6000000,3],'
    return head + b'"parameters":{"binary_data_size":18000000}}]}' + bytes(18_000_000)


LONG_CONTENT_TYPE = {"Content-Type": "multipart/form-data" + ";" * 60_000}
IMAGE_INPUT = b'"shape":[1],"data":["' + SEVEN_TEXT.encode() + b'"]'
OUTPUTS = b",".join([b'{"name":"hidden_states.0"}'] * 20_000)
FP32 = b'{"inputs":[{"name":"pixel_values","datatype":"FP32","shape":[1,3,64,64],"data":['
UINT8 = FP32.replace(b"FP32", b"UINT8")

BODIES = [
    Attack(
        "shape of 80,000 large sides",
        INFER,
        lambda: infer_body(b'"shape":[' + b",".join([b"9223372036854775807"] * 80_000) + b'],"data":["eA=="]'),
        (400,),
    ),
    Attack("an output named 20,000 times", INFER, lambda: infer_body(IMAGE_INPUT, b',"outputs":[' + OUTPUTS + b"]")),
    Attack("1,000,000 images that are numbers", "/classify/batch", lambda: b'{"images":[' + b"0," * 999_999 + b"0]}"),
    Attack("500,000 empty images", "/classify/batch", lambda: b'{"images":[' + b'"",' * 499_999 + b'""]}'),
    Attack("100,000 instances that are numbers", "/predict", lambda: b'{"instances":[' + b"0," * 99_999 + b"0]}"),
    Attack("1,000 instances that are numbers", "/predict", lambda: b'{"instances":[' + b"0," * 999 + b"0]}", (422,)),
    Attack("instances with many unknown fields", "/predict", lambda: b'{"instances":[{' + many_keys(300_000) + b"}]}"),
    Attack("unknown parameters", "/classify", lambda: b'{"image":"eA==",' + many_keys(300_000) + b"}"),
    Attack("parameters of the task", "/", lambda: b'{"inputs":"eA==","parameters":{' + many_keys(300_000) + b"}}"),
    Attack("a parameter with a name of 19 MB", "/classify", lambda: b'{"image":"eA==","' + b"a" * 19_000_000 + b'":1}', (422,)),
    Attack("20 MB of empty lists", INFER, lambda: filled(b'{"inputs":[', b"[],", b"0]}"), gz=True),
    Attack("20 MB of objects", INFER, lambda: filled(b'{"inputs":[', b'{"":0},', b"0]}"), gz=True),
    Attack("20 MB of nested lists", INFER, lambda: filled(b"[", b"[" * 900 + b"]" * 900 + b",", b"0]"), gz=True),
    Attack("20 MB of numbers", INFER, lambda: filled(FP32, b"0,", b"0]}]}"), gz=True),
    Attack("20 MB of long numbers", INFER, lambda: filled(FP32, b"-1.2345678,", b"0]}]}"), (413,), gz=True),
    Attack("1,000,000 numbers", INFER, lambda: filled(FP32, b"-1.2345678,", b"0]}]}", 11_000_000), (400,), gz=True),
    Attack("20 MB of strings", INFER, lambda: filled(UINT8, b'"a",', b"0]}]}"), gz=True),
    Attack("BYTES nested 900 deep", INFER, lambda: infer_body(b'"shape":[1],"data":' + b"[" * 900 + b"]" * 900), (400,)),
    Attack("BYTES of 300,000", INFER, lambda: infer_body(b'"shape":[300000],"data":[' + b'"",' * 299_999 + b'""]')),
    Attack("a shape of 300 sides", INFER, lambda: infer_body(b'"shape":[' + b"99," * 299 + b'9],"data":[""]'), (400,)),
    Attack("a tensor of 6,000,000 images", INFER, many_pixels, headers={"Inference-Header-Content-Length": "122"}, gz=True),
    Attack("base64 of 20 MB of spaces", "/classify", lambda: filled(b'{"image":"', b"a ", b'"}'), (415, 422), gz=True),
    Attack("base64 with an emoji", "/classify", lambda: filled(b'{"image":"\xf0\x9f\x98\x80', b"a", b'"}'), (422,)),
    Attack("a tensor of one long column", INFER, long_column, (422,), {"Inference-Header-Content-Length": "122"}, gz=True),
    Attack("a Content-Type of 60 kB", "/classify", lambda: b"x", (400,), LONG_CONTENT_TYPE),
    Attack("a form of 300,000 parts", "/classify", lambda: form_of(200_000), headers=FORM, gz=True),
    Attack("a form of long headers", "/classify", lambda: form_of(190, b"x: " + b"y" * 4000 + b"\r\n"), headers=FORM),
    Attack("a form that nearly repeats its boundary", "/classify", near_boundaries, (415,), headers=FORM, gz=True),
    Attack("an escaped form", "/classify", lambda: filled(b"image=", b"%41", b""), headers=URLENCODED, gz=True),
    Attack("5,000,000 URL-encoded fields", "/classify", lambda: filled(b"image=", b"&a=b", b""), headers=URLENCODED, gz=True),
    Attack("19 MB of feature names", "/classify", many_feature_names, (422,), headers=FORM),
]  # fmt: skip


def many_keys(count: int) -> bytes:
    return b",".join(b'"%06d":0' % i for i in range(count))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(runtime="torch", precision="fp32") as running_server:
        httpx.post(f"{running_server.url}/classify", content=SEVEN).raise_for_status()
        yield running_server


def check(observation: Observation, max_growth: int = MAX_GROWTH) -> None:
    print(observation)
    assert observation.worst_live_seconds < MAX_LIVE_SECONDS, observation
    assert set(observation.live_statuses) == {200}, observation
    assert set(observation.honest_statuses) == {200}, observation
    assert observation.growth < max_growth, observation


@pytest.mark.parametrize("attack", BODIES, ids=lambda attack: attack.name)
def test_body_is_rejected_at_little_cost(server: Server, attack: Attack) -> None:
    request = attack.request()
    with observed(server) as observation:
        status, response = exchange(server.url, request)
        wait_for_probes(observation)
    assert status in attack.statuses, response[:1000]
    assert len(response) < MAX_ANSWER_BYTES
    check(observation)


def wait_for_probes(observation: Observation) -> None:
    """Wait until the observer has made some requests, however short the attack was."""
    deadline = time.monotonic() + 30
    while min(observation.live_statuses.total(), observation.honest_statuses.total()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_64_large_bodies_at_once_do_not_stop_others(server: Server) -> None:
    body = gzip.compress(filled(FP32, b"-1.2345678,", b"0]}]}", 11_000_000) + b" " * 9_000_000, 1)
    request = raw_request(INFER, body, {**AS_JSON, "Content-Encoding": "gzip"})
    with observed(server) as observation, ThreadPoolExecutor(64) as threads:
        statuses = Counter(status for status, _ in threads.map(lambda _: exchange(server.url, request), range(64)))
    print(statuses)
    assert set(statuses) <= {400, 503, 504}
    check(observation, 2 * MAX_GROWTH)


def test_unfinished_compressed_bodies_occupy_only_what_was_sent(server: Server) -> None:
    """64 clients that each send a gzip of 20 MB but for its end, and then wait."""
    compressed = gzip.compress(bytes(UPLOAD))[:-10]
    head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: {len(compressed) + 10}\r\n\r\n"
    with contextlib.ExitStack() as stack, observed(server) as observation:
        for _ in range(64):
            stack.enter_context(socket.create_connection(address_of(server.url))).sendall(head.encode() + compressed)
        wait_for_probes(observation)
    check(observation, 64 * 2**20)


def test_bodies_in_flight_share_a_budget() -> None:
    image = SEVEN + bytes(2**20)  # Pillow ignores what follows a PNG
    with running(max_body_bytes_in_flight=2**21, max_upload_bytes=2**21, upload_seconds=10) as service:
        url = service.client.base_url
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n\r\n".encode()
        with contextlib.ExitStack() as stack:
            for _ in range(2):  # each without its last byte
                client = stack.enter_context(socket.create_connection((url.host, url.port)))
                client.sendall(head + image[:-1])
            wait_for(lambda: 'dinat_in_flight_bytes{kind="request_bodies"} 1.9' in service.client.get("/metrics").text)
            rejected = service.client.post("/classify", content=image)
            assert rejected.status_code == 503
            assert rejected.headers["retry-after"] == "1"
            assert "request bodies in flight" in rejected.json()["detail"]
            compressed = service.client.post("/classify", content=gzip.compress(image), headers={"Content-Encoding": "gzip"})
            assert compressed.status_code == 503
            assert service.client.post("/classify", content=SEVEN).status_code == 200  # small ones do not count
        wait_for(lambda: service.client.post("/classify", content=image).status_code == 200)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds: the server handles other connections at its own pace."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline


RELEASED = [
    ("/classify", SEVEN + bytes(300_000), {}, 200),
    ("/classify", b"text" * 80_000, {}, 415),
    ("/classify", b"[" * 300_000, AS_JSON, 413),
    ("/classify", gzip.compress(bytes(2**24)), {"Content-Encoding": "gzip"}, 413),
    ("/classify", gzip.compress(bytes(2**20))[:-9], {"Content-Encoding": "gzip"}, 400),
    ("/classify", gzip.compress(SEVEN + bytes(2**20)), {"Content-Encoding": "gzip"}, 200),
    ("/classify/batch?features=hidden_states", json.dumps({"images": [SEVEN_TEXT] * 2}).encode(), AS_JSON, 200),
]


@pytest.mark.parametrize(("path", "content", "headers", "status"), RELEASED, ids=[f"{case[0]} {case[3]}" for case in RELEASED])
def test_reservations_are_released(path: str, content: bytes, headers: dict[str, str], status: int) -> None:
    limits = {"max_upload_bytes": 2**21, "max_body_bytes_in_flight": 2**21}
    with running(max_response_bytes=2**20, max_response_bytes_in_flight=2**20, **limits) as service:
        for _ in range(16):
            assert service.client.post(path, content=content, headers=headers).status_code == status


def test_reservation_of_a_client_that_disconnects_is_released() -> None:
    image = SEVEN + bytes(2**20)
    with running(max_body_bytes_in_flight=2**21, max_upload_bytes=2**21) as service:
        url = service.client.base_url
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n\r\n".encode()
        for _ in range(8):
            with socket.create_connection((url.host, url.port)) as client:
                client.sendall(head + image[:-1])
        wait_for(lambda: service.client.post("/classify", content=image).status_code == 200)


def test_responses_in_flight_share_a_budget() -> None:
    """Clients that do not read: each gets only as much as their connection buffers, and holds its share of the budget."""
    batch = json.dumps({"images": [SEVEN_TEXT] * 64, "features": "hidden_states"}).encode()
    with running(max_response_bytes_in_flight=20_000_000, max_response_bytes=20_000_000) as service:
        url = service.client.base_url
        head = "POST /classify/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(batch)}\r\n\r\n"
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(socket.create_connection((url.host, url.port)))
            client.sendall(head.encode() + batch)
            assert client.recv(12) == b"HTTP/1.1 200"
            rejected = service.client.post("/classify/batch", content=batch, headers=AS_JSON)
            assert rejected.status_code == 503
            assert "responses in flight" in rejected.json()["detail"]
            assert rejected.headers["retry-after"] == "1"
            assert service.client.post("/classify", content=SEVEN).status_code == 200
        deadline = time.monotonic() + 10
        while service.client.post("/classify/batch", content=batch, headers=AS_JSON).status_code != 200:
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify?features=hidden_states", {"image": SEVEN_TEXT}),
        ("/classify/batch", {"images": [SEVEN_TEXT] * 2, "features": "stage1"}),
        ("/features?features=stage1", {"image": SEVEN_TEXT}),
        ("/predict", {"instances": [{"b64": SEVEN_TEXT}] * 9, "parameters": {"features": "pooled"}}),
        (INFER, json.loads(infer_body(IMAGE_INPUT)) | {"outputs": [{"name": "stage1"}]}),
    ],
)
def test_response_over_the_limit_is_rejected_before_inference(path: str, body: dict[str, object]) -> None:
    with running(max_response_bytes=20_000) as service:
        response = service.client.post(path, json=body)
        assert response.status_code == 413
        assert "the maximum is 20,000: request fewer" in response.json()["detail"]
        assert "dinat_batch_size_images_count 0.0" in service.client.get("/metrics").text


def test_binary_responses_fit_where_json_does_not() -> None:
    with running(max_response_bytes=2**16) as service:  # 8,192 values in stem
        path = "/features?features=stem"
        assert service.client.post(path, content=SEVEN).status_code == 413
        assert service.client.post(path + "&feature_format=base64", content=SEVEN).status_code == 200
        assert service.client.post(path, content=SEVEN, headers={"Accept": "application/x-npy"}).status_code == 200
