"""The service on a real Ray cluster with Ray Serve on loopback, with two replicas."""

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

from dinat.client import Classification, DinatClient
from tests.e2e.processes import DIGITS, Server

pytest.importorskip("ray", reason="Ray is not installed")

ROOT = Path(__file__).parents[2]
CLIENTS = 8
SETTINGS = {"runtime": "torch", "precision": "fp32"}


@pytest.fixture(scope="module")
def ray_url() -> Iterator[str]:
    """Address of a Ray cluster that serves two replicas."""
    arguments = [f"{name}={value}" for name, value in {"min_replicas": 2, **SETTINGS}.items()]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.ray_service", *arguments],
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


def distinct_images(count: int) -> list[bytes]:
    """Encode `count` different images: the digits of the project, rotated."""
    images = []
    for n in range(count):
        paths = sorted(DIGITS.glob("*.png"))
        buffer = io.BytesIO()
        Image.open(paths[n % len(paths)]).convert("L").rotate(n // len(paths) * 3 - 15, fillcolor=0).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return images


def classify_all(url: str, images: list[bytes]) -> list[Classification]:
    with DinatClient(url) as client, ThreadPoolExecutor(CLIENTS) as threads:
        return list(threads.map(client.classify, images))


@pytest.mark.timeout(180)
def test_predictions_match_dinat_serve(ray_url: str) -> None:
    images = distinct_images(200)
    with Server(**SETTINGS) as server:
        expected = classify_all(server.url, images)
    for one, other in zip(classify_all(ray_url, images), expected, strict=True):
        assert [each.class_id for each in one.predictions] == [each.class_id for each in other.predictions]
        assert [each.score for each in one.predictions] == pytest.approx(
            [each.score for each in other.predictions], rel=0, abs=1e-5
        )


def test_all_endpoints_and_one_request_id(ray_url: str) -> None:
    image = distinct_images(1)[0]
    response = httpx.post(f"{ray_url}/classify", content=image, headers={"X-Request-ID": "mine"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "mine"
    assert "compute;dur=" in response.headers["server-timing"]
    assert httpx.get(f"{ray_url}/v2/models/digits/ready").status_code == 200
    assert httpx.get(f"{ray_url}/health").json()["status"] == "ready"
    assert httpx.post(f"{ray_url}/features", content=image, headers={"Accept": "application/x-npz"}).content[:2] == b"PK"
    error = httpx.post(f"{ray_url}/classify", content=b"text")
    assert (error.status_code, error.headers["content-type"]) == (415, "application/problem+json")


def test_no_request_is_lost_when_a_replica_is_killed(ray_url: str) -> None:
    images = distinct_images(400)
    with DinatClient(ray_url) as client, ThreadPoolExecutor(CLIENTS) as threads:
        requests = [threads.submit(client.classify, image) for image in images]
        requests[50].result()
        replicas = [process for process in psutil.process_iter() if process.name().startswith("ray::ServeRepl")]
        assert len(replicas) == 2
        replicas[0].kill()
        results = [request.result() for request in requests]
    assert [one.best.label for one in results] == [one.best.label for one in classify_all(ray_url, images)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by importing Ray
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"port": 80}, "port: set by Ray"),
        ({"replica": 2}, "replica=2: Extra inputs are not permitted"),
        ({"queue_limit": 0}, "queue_limit=0: "),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas is 3, above max_replicas, 2"),
    ],
)
def test_invalid_argument_is_named(arguments: dict[str, object], message: str) -> None:
    from dinat.ray import dinat

    with pytest.raises(ValueError, match=message):
        dinat(arguments)
