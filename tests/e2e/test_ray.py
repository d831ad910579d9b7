"""A real Ray with a real Ray Serve on loopback, two replicas of the service on it."""

import io
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from dinat.app.client import Classification, DinatClient
from tests.e2e.processes import DIGITS, Server

pytest.importorskip("ray", reason="Ray is not installed")

ROOT = Path(__file__).parents[2]
CLIENTS = 8
KNOWN = {"runtime": "torch", "precision": "fp32"}


@pytest.fixture(scope="module")
def on_ray() -> Iterator[str]:
    words = [f"{name}={value}" for name, value in {"min_replicas": 2, **KNOWN}.items()]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.ray_service", *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        assert url, process.stderr.read()
        yield url
        process.stdin.close()
        assert process.wait(60) == 0, process.stderr.read()


def pictures(count: int) -> list[bytes]:
    """As many different ones, of the digits that come with the project."""
    found = []
    for n in range(count):
        paths = sorted(DIGITS.glob("*.png"))
        buffer = io.BytesIO()
        Image.open(paths[n % len(paths)]).convert("L").rotate(n // len(paths) * 3 - 15, fillcolor=0).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def ask(url: str, several: list[bytes]) -> list[Classification]:
    with DinatClient(url) as client, ThreadPoolExecutor(CLIENTS) as threads:
        return list(threads.map(client.classify, several))


@pytest.mark.timeout(180)
def test_it_answers_as_the_service_does(on_ray: str) -> None:
    asked = pictures(200)
    with Server(**KNOWN) as server:
        alone = ask(server.url, asked)
    for one, other in zip(ask(on_ray, asked), alone, strict=True):
        assert [each.class_id for each in one.predictions] == [each.class_id for each in other.predictions]
        assert [each.score for each in one.predictions] == pytest.approx(
            [each.score for each in other.predictions], rel=0, abs=1e-5
        )


def test_every_door_is_there_and_an_answer_has_one_id(on_ray: str) -> None:
    picture = pictures(1)[0]
    answer = httpx.post(f"{on_ray}/classify", content=picture, headers={"X-Request-ID": "mine"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine"
    assert "compute;dur=" in answer.headers["server-timing"]
    assert httpx.get(f"{on_ray}/v2/models/digits/ready").status_code == 200
    assert httpx.get(f"{on_ray}/health").json()["status"] == "ready"
    assert httpx.post(f"{on_ray}/features", content=picture, headers={"Accept": "application/x-npz"}).content[:2] == b"PK"
    refused = httpx.post(f"{on_ray}/classify", content=b"text")
    assert (refused.status_code, refused.headers["content-type"]) == (415, "application/problem+json")


def test_a_replica_is_killed_under_load_and_nothing_is_lost(on_ray: str) -> None:
    asked = pictures(400)
    with DinatClient(on_ray) as client, ThreadPoolExecutor(CLIENTS) as threads:
        asking = [threads.submit(client.classify, one) for one in asked]
        asking[50].result()
        replicas = [one for one in psutil.process_iter() if one.name().startswith("ray::ServeRepl")]
        assert len(replicas) == 2
        replicas[0].kill()
        answers = [one.result() for one in asking]
    assert [one.best.label for one in answers] == [one.best.label for one in ask(on_ray, asked)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, when it is imported
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"port": 80}, "port: that is Ray's own here"),
        ({"replica": 2}, "replica=2: Extra inputs are not permitted"),
        ({"queue_limit": 0}, "queue_limit=0: "),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas is 3, above max_replicas, 2"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], said: str) -> None:
    from dinat.app.ray.deployment import dinat

    with pytest.raises(ValueError, match=said):
        dinat(arguments)
