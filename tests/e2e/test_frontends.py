"""Several frontend processes and an engine process as one service."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dinat.model import DinatForImageClassification, DinatImageProcessor
from tests.app.conftest import server_timing
from tests.app.sample_images import encoded, noise
from tests.e2e.processes import DIGITS, Server, load_until_rejected

pytestmark = pytest.mark.process

EXACT = {"runtime": "torch", "precision": "fp32", "max_batch": 1}
"""Settings whose results do not depend on the batch, bit for bit."""
IMAGES = [path.read_bytes() for path in sorted(DIGITS.glob("*.png"))]


@pytest.fixture(scope="module")
def one() -> Iterator[Server]:
    with Server(**EXACT) as server:
        yield server


@pytest.fixture(scope="module")
def several() -> Iterator[Server]:
    with Server(frontends=2, **EXACT) as server:
        yield server
    assert server.wait() == 0


def processes(server: Server) -> dict[str, dict[str, Any]]:
    return {process["name"]: process for process in httpx.get(f"{server.url}/health").json()["processes"]}


def samples(server: Server) -> dict[tuple[str, ...], float]:
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def without_id(response: httpx.Response) -> Any:
    body = response.json()
    body.pop("request_id")
    return response.status_code, body


@pytest.mark.parametrize(
    "request_arguments",
    [
        {"content": IMAGES[3]},
        {"content": IMAGES[4], "params": {"top_k": 10}},
        {
            "files": {"image": IMAGES[5]},
            "params": {"features": "stem,stage1,stage3,pooled,hidden_states", "feature_format": "base64"},
        },
        {"content": b""},
        {"content": b"no image"},
        {"content": IMAGES[0][:200]},
        {"content": IMAGES[0], "params": {"top_k": 11}},
        {"content": encoded(noise(300, 500), "JPEG")},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_several_processes_respond_like_one(one: Server, several: Server, request_arguments: dict[str, Any]) -> None:
    expected = without_id(httpx.post(f"{one.url}/classify", **request_arguments))
    for _ in range(4):  # the kernel distributes connections
        assert without_id(httpx.post(f"{several.url}/classify", **request_arguments)) == expected


def test_several_processes_return_neighborhoods_like_one(one: Server, several: Server) -> None:
    responses = [httpx.post(f"{server.url}/attention?y=0.1&x=0.9", content=IMAGES[0]) for server in (one, several)]
    assert without_id(responses[0]) == without_id(responses[1])


@pytest.mark.parametrize("path", ["/classify", "/features", "/attention"])
def test_server_timing_with_several_processes(several: Server, path: str) -> None:
    parts = server_timing(httpx.post(f"{several.url}{path}", content=IMAGES[0]))
    total = parts.pop("total")
    assert 0 < parts["compute"] < total < 10_000
    assert 0 <= parts["queue"] < total


def test_several_processes_classify_a_batch_like_one(one: Server, several: Server) -> None:
    files = [("image", ("x", data)) for data in (*IMAGES[:5], b"nonsense", *IMAGES[5:])]
    responses = [
        httpx.post(f"{server.url}/classify/batch", files=files, params={"features": "pooled"}) for server in (one, several)
    ]
    expected, actual = (response.json()["results"] for response in responses)
    for result in (expected[5], actual[5]):
        del result["error"]["request_id"]
    assert actual == expected


def test_health_model_and_metrics_cover_all_processes(several: Server) -> None:
    statuses = processes(several)
    assert set(statuses) == {"supervisor", "engine", "frontend-1", "frontend-2"}
    assert {name: status["state"] for name, status in statuses.items()} == {
        "supervisor": "watching",
        "engine": "ready",
        "frontend-1": "ready",
        "frontend-2": "ready",
    }
    assert len({status["pid"] for status in statuses.values()}) == 4
    model = httpx.get(f"{several.url}/model").json()
    assert (model["labels"], model["runtime"], model["precision"]) == (list("0123456789"), "torch", "fp32")

    before = samples(several)
    for data in IMAGES * 2:
        assert httpx.post(f"{several.url}/classify", content=data).status_code == 200
    after = samples(several)
    for name in (
        ("dinat_images_total", "outcome=classified"),
        ("dinat_requests_total", "route=/classify", "status=200"),
        ("dinat_batch_size_images_sum",),
        ("dinat_part_duration_seconds_count", "part=decode"),
        ("dinat_part_duration_seconds_count", "part=queue"),
    ):
        assert after[name] - before.get(name, 0) == len(IMAGES) * 2, name
    for name in statuses:
        assert after["process_resident_memory_bytes", f"process={name}"] > 0
    assert after["dinat_queue_depth_images",] == 0


@pytest.mark.slow
def test_images_of_varying_size_are_sent_outside_the_slots(tmp_path: Path) -> None:
    DinatForImageClassification.from_pretrained("digits").save_pretrained(tmp_path)
    DinatImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path)
    images = {width: encoded(noise(64, width), "PNG") for width in (64, 100, 150)}
    with Server(frontends=2, model=tmp_path, **EXACT) as server:
        for width, data in images.items():
            response = httpx.post(f"{server.url}/classify", content=data, params={"features": "stage1", "top_k": 1})
            assert response.json()["features"]["stage1"]["shape"][1:] == [16, -(-width // 4)]
        assert samples(server)["dinat_queue_depth_images",] == 0
        assert server.stop() == 0


@pytest.mark.slow
def test_killed_frontend_is_restarted_and_its_slots_are_freed() -> None:
    with Server(frontends=2, queue_limit=8, **EXACT) as server:
        stop = threading.Event()
        wrong: list[Any] = []

        def client_loop(n: int) -> None:
            while not stop.is_set():
                try:
                    response = httpx.post(f"{server.url}/classify", content=IMAGES[n % len(IMAGES)], timeout=30)
                except httpx.TransportError:
                    continue  # the frontend process was killed
                expected = sorted(DIGITS.glob("*.png"))[n % len(IMAGES)].name[0]
                if response.status_code != 503 and response.json()["predictions"][0]["label"] != expected:
                    wrong.append(response.text)

        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(client_loop, n) for n in range(8)]
            for n in range(6):
                name = f"frontend-{n % 2 + 1}"
                pid = processes_of_one(server, name)
                os.kill(pid, signal.SIGKILL)
                while processes_of_one(server, name) == pid:
                    pass
            stop.set()
            for future in futures:
                future.result()
        assert not wrong
        statuses = processes(server)
        assert [statuses[name]["restarts"] for name in ("frontend-1", "frontend-2", "engine")] == [3, 3, 0]
        for _ in range(8):  # all slots are free
            assert httpx.post(f"{server.url}/classify", content=IMAGES[0]).status_code == 200
        assert samples(server)["dinat_queue_depth_images",] == 0
        assert server.stop() == 0
    exits = [event for event in server.events if event["event"] == "process exited"]
    assert [event["status"] for event in exits] == [-9] * 6


def processes_of_one(server: Server, name: str) -> int:
    """Wait until a process is ready, and return its pid."""
    while True:
        try:
            status = processes(server)[name]
        except httpx.TransportError:
            continue
        if status["state"] == "ready" and psutil.pid_exists(status["pid"]):
            return int(status["pid"])


@pytest.mark.slow
def test_killed_engine_is_restarted_once_then_the_service_exits() -> None:
    with Server(frontends=2, **EXACT) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        engine = psutil.Process(processes(server)["engine"]["pid"])
        engine.suspend()
        with ThreadPoolExecutor(4) as threads:
            waiting = [threads.submit(httpx.post, f"{server.url}/classify", content=IMAGES[7], timeout=60) for _ in range(4)]
            while samples(server)["dinat_queue_depth_images",] < 4:
                pass
            engine.kill()
            for future in waiting:
                response = future.result()
                assert response.status_code == 503
                assert "the engine process exited" in response.json()["detail"]
        while client.get("/health/ready").status_code != 200:
            pass
        assert client.post("/classify", content=IMAGES[7]).status_code == 200
        assert processes(server)["engine"]["restarts"] == 1
        os.kill(processes(server)["engine"]["pid"], signal.SIGKILL)
        assert server.wait() == 1
    assert "dinat: the engine process exited again, with status -9" in server.events[-1]["event"]


def test_sigterm_stops_all_processes_and_answers_all_requests() -> None:
    with Server(frontends=2, **EXACT) as server:
        pids = [status["pid"] for status in processes(server).values()]
        with load_until_rejected(server.url, IMAGES[5]) as statuses:
            assert server.stop() == 0
    assert set(statuses) <= {200, 503}
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.slow
def test_all_processes_exit_when_the_supervisor_is_killed() -> None:
    with Server(frontends=2, **EXACT) as server:
        children = [psutil.Process(status["pid"]) for name, status in processes(server).items() if name != "supervisor"]
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
        server.wait()


def test_model_that_cannot_be_loaded_is_a_one_line_error() -> None:
    completed = serve("--model", "/no/such/folder", "--port", "0")
    assert completed.returncode == 1
    assert completed.stderr.splitlines()[-1].startswith("dinat: /no/such/folder cannot be served: ")


@pytest.mark.slow
def test_sigterm_while_the_model_loads_exits_at_once() -> None:
    command = [sys.executable, "-m", "dinat", "serve", "--frontends=2", "--log-format=json", "--port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "listening on" not in process.stderr.readline():
            pass
        process.terminate()
        log = process.stderr.read()
    assert process.returncode == 0
    assert "killed" not in log


@pytest.mark.slow
@pytest.mark.parametrize("frontends", ["1", "2"])
def test_port_in_use_is_an_error_at_startup(frontends: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        completed = serve("--port", port, "--frontends", frontends)
    assert completed.returncode == 1
    expected = f"dinat: cannot listen on 127.0.0.1 port {port}: Address already in use; --port selects another port"
    assert completed.stderr.splitlines()[-1] == expected


@pytest.mark.slow
def test_queue_larger_than_memory_is_an_error_at_startup() -> None:
    completed = serve("--queue-limit", str(10**9), "--port", "0")
    assert completed.returncode == 1
    assert "bytes of shared memory" in completed.stderr.splitlines()[-1]


def serve(*flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "dinat", "serve", "--frontends=2", "--log-format=json", "--runtime=torch", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
