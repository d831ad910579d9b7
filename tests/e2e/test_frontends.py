"""Several processes as one service."""

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
from tests.e2e.processes import DIGITS, Server, load_until_refused

EXACT = {"runtime": "torch", "precision": "fp32", "max_batch": 1}
"""Equal to the bit, whatever arrives together."""
PICTURES = [path.read_bytes() for path in sorted(DIGITS.glob("*.png"))]


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
    return {told["name"]: told for told in httpx.get(f"{server.url}/health").json()["processes"]}


def samples(server: Server) -> dict[tuple[str, ...], float]:
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def without_id(answer: httpx.Response) -> Any:
    body = answer.json()
    body.pop("request_id")
    return answer.status_code, body


@pytest.mark.parametrize(
    "asked",
    [
        {"content": PICTURES[3]},
        {"content": PICTURES[4], "params": {"top_k": 10}},
        {
            "files": {"image": PICTURES[5]},
            "params": {"features": "stem,stage1,stage3,pooled,hidden_states", "feature_format": "base64"},
        },
        {"content": b""},
        {"content": b"no picture"},
        {"content": PICTURES[0][:200]},
        {"content": PICTURES[0], "params": {"top_k": 11}},
        {"content": encoded(noise(300, 500), "JPEG")},
    ],
    ids=lambda asked: " ".join(asked),
)
def test_several_processes_answer_as_one_does(one: Server, several: Server, asked: dict[str, Any]) -> None:
    expected = without_id(httpx.post(f"{one.url}/classify", **asked))
    for _ in range(4):  # the kernel spreads connections
        assert without_id(httpx.post(f"{several.url}/classify", **asked)) == expected


def test_neighborhoods_through_several_processes(one: Server, several: Server) -> None:
    answers = [httpx.post(f"{server.url}/attention?y=0.1&x=0.9", content=PICTURES[0]) for server in (one, several)]
    assert without_id(answers[0]) == without_id(answers[1])


@pytest.mark.parametrize("path", ["/classify", "/features", "/attention"])
def test_what_each_part_took_is_told_by_several_processes(several: Server, path: str) -> None:
    parts = server_timing(httpx.post(f"{several.url}{path}", content=PICTURES[0]))
    total = parts.pop("total")
    assert 0 < parts["compute"] < total < 10_000
    assert 0 <= parts["queue"] < total


def test_a_batch_through_several_processes(one: Server, several: Server) -> None:
    files = [("image", ("x", data)) for data in (*PICTURES[:5], b"nonsense", *PICTURES[5:])]
    answers = [
        httpx.post(f"{server.url}/classify/batch", files=files, params={"features": "pooled"}) for server in (one, several)
    ]
    expected, got = (answer.json()["results"] for answer in answers)
    for result in (expected[5], got[5]):
        del result["error"]["request_id"]
    assert got == expected


def test_the_whole_service_is_in_health_in_the_model_card_and_in_one_scrape(several: Server) -> None:
    told = processes(several)
    assert set(told) == {"supervisor", "engine", "frontend-1", "frontend-2"}
    assert {name: one["state"] for name, one in told.items()} == {
        "supervisor": "watching",
        "engine": "ready",
        "frontend-1": "ready",
        "frontend-2": "ready",
    }
    assert len({one["pid"] for one in told.values()}) == 4
    card = httpx.get(f"{several.url}/model").json()
    assert (card["labels"], card["runtime"], card["precision"]) == (list("0123456789"), "torch", "fp32")

    before = samples(several)
    for data in PICTURES * 2:
        assert httpx.post(f"{several.url}/classify", content=data).status_code == 200
    after = samples(several)
    for name in (
        ("dinat_images_total", "outcome=classified"),
        ("dinat_requests_total", "route=/classify", "status=200"),
        ("dinat_batch_size_images_sum",),
        ("dinat_part_duration_seconds_count", "part=decode"),
        ("dinat_part_duration_seconds_count", "part=queue"),
    ):
        assert after[name] - before.get(name, 0) == len(PICTURES) * 2, name
    for name in told:
        assert after["process_resident_memory_bytes", f"process={name}"] > 0
    assert after["dinat_queue_depth_images",] == 0


def test_pictures_of_no_fixed_size_pass_beside_the_slots(tmp_path: Path) -> None:
    DinatForImageClassification.from_pretrained("digits").save_pretrained(tmp_path)
    DinatImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path)
    pictures = {width: encoded(noise(64, width), "PNG") for width in (64, 100, 150)}
    with Server(frontends=2, model=tmp_path, **EXACT) as server:
        for width, data in pictures.items():
            answer = httpx.post(f"{server.url}/classify", content=data, params={"features": "stage1", "top_k": 1})
            assert answer.json()["features"]["stage1"]["shape"][1:] == [16, -(-width // 4)]
        assert samples(server)["dinat_queue_depth_images",] == 0
        assert server.stop() == 0


def test_a_frontend_that_dies_is_replaced_and_keeps_no_place() -> None:
    with Server(frontends=2, queue_limit=8, **EXACT) as server:
        over = threading.Event()
        wrong: list[Any] = []

        def ask(n: int) -> None:
            while not over.is_set():
                try:
                    answer = httpx.post(f"{server.url}/classify", content=PICTURES[n % len(PICTURES)], timeout=30)
                except httpx.TransportError:
                    continue  # it went with its front end
                expected = sorted(DIGITS.glob("*.png"))[n % len(PICTURES)].name[0]
                if answer.status_code != 503 and answer.json()["predictions"][0]["label"] != expected:
                    wrong.append(answer.text)

        with ThreadPoolExecutor(8) as threads:
            asking = [threads.submit(ask, n) for n in range(8)]
            for n in range(6):
                name = f"frontend-{n % 2 + 1}"
                pid = processes_of_one(server, name)
                os.kill(pid, signal.SIGKILL)
                while processes_of_one(server, name) == pid:
                    pass
            over.set()
            for asked in asking:
                asked.result()
        assert not wrong
        told = processes(server)
        assert (told["frontend-1"]["restarts"], told["frontend-2"]["restarts"], told["engine"]["restarts"]) == (3, 3, 0)
        for _ in range(8):  # all places are free
            assert httpx.post(f"{server.url}/classify", content=PICTURES[0]).status_code == 200
        assert samples(server)["dinat_queue_depth_images",] == 0
        assert server.stop() == 0
    died = [event for event in server.events if event["event"] == "a process died"]
    assert [event["status"] for event in died] == [-9] * 6


def processes_of_one(server: Server, name: str) -> int:
    """The pid of a process that is ready, and not that of one that just died."""
    while True:
        try:
            told = processes(server)[name]
        except httpx.TransportError:
            continue
        if told["state"] == "ready" and psutil.pid_exists(told["pid"]):
            return int(told["pid"])


def test_an_engine_that_dies_is_started_once_more_and_then_the_service_ends() -> None:
    with Server(frontends=2, **EXACT) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        engine = psutil.Process(processes(server)["engine"]["pid"])
        engine.suspend()
        with ThreadPoolExecutor(4) as threads:
            waiting = [threads.submit(httpx.post, f"{server.url}/classify", content=PICTURES[7], timeout=60) for _ in range(4)]
            while samples(server)["dinat_queue_depth_images",] < 4:
                pass
            engine.kill()
            for one in waiting:
                answer = one.result()
                assert answer.status_code == 503
                assert "the engine process died" in answer.json()["detail"]
        while client.get("/health/ready").status_code != 200:
            pass
        assert client.post("/classify", content=PICTURES[7]).status_code == 200
        assert processes(server)["engine"]["restarts"] == 1
        os.kill(processes(server)["engine"]["pid"], signal.SIGKILL)
        assert server.wait() == 1
    assert "dinat: the engine process died again, with status -9" in server.events[-1]["event"]


def test_sigterm_ends_all_processes_in_order_and_loses_nothing() -> None:
    with Server(frontends=2, **EXACT) as server:
        pids = [told["pid"] for told in processes(server).values()]
        with load_until_refused(server.url, PICTURES[5]) as statuses:
            assert server.stop() == 0
    assert set(statuses) <= {200, 503}
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_others_end_when_the_supervisor_is_killed() -> None:
    with Server(frontends=2, **EXACT) as server:
        children = [psutil.Process(told["pid"]) for name, told in processes(server).items() if name != "supervisor"]
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
        server.wait()


def test_a_model_that_does_not_load_ends_the_service_with_one_line() -> None:
    done = serve("--model", "/no/such/folder", "--port", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("dinat: /no/such/folder cannot be served: ")


def test_sigterm_while_the_model_loads_ends_the_service_at_once() -> None:
    words = [sys.executable, "-m", "dinat", "serve", "--frontends=2", "--log-format=json", "--port=0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "listening on" not in process.stderr.readline():
            pass
        process.terminate()
        log = process.stderr.read()
    assert process.returncode == 0
    assert "killed" not in log


def test_a_port_that_is_taken_is_named_at_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = serve("--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "Address already in use" in done.stderr.splitlines()[-1]


def test_a_queue_that_memory_does_not_hold_is_named_at_start() -> None:
    done = serve("--queue-limit", str(10**9), "--port", "0")
    assert done.returncode == 1
    assert "bytes of shared memory" in done.stderr.splitlines()[-1]


def serve(*flags: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "dinat", "serve", "--frontends=2", "--log-format=json", "--runtime=torch", *flags]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
