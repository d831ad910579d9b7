"""The service on a real Ray cluster with Ray Serve on loopback, with two replicas."""

import io
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from PIL import Image

from dinat.client import Classification, DinatClient
from tests.e2e.processes import DIGITS, Server, free_port

pytestmark = pytest.mark.ray

pytest.importorskip("ray", reason="Ray is not installed")

ROOT = Path(__file__).parents[2]
CLIENTS = 8
SETTINGS = {"runtime": "torch", "precision": "fp32"}


@contextmanager
def serve_run(folder: Path, *arguments: str, port: int = 8000) -> Iterator[str]:
    """Run `serve run` in a folder, as documented: from a shell, where nothing of Ray runs. Yields the address."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            pytest.skip(f"port {port} is in use, and `serve run` has no flag for another")
    command = [str(Path(sys.executable).with_name("serve")), "run", *arguments]
    url = f"http://127.0.0.1:{port}"
    with (
        (folder / "log").open("w+") as log,
        subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process,
    ):
        try:
            while not _is_ready(url):
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def hidden_clusters(**environment: str) -> Iterator[None]:
    """Hide clusters that run on this host: Ray records them in its temporary folder. A socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_TMPDIR": folder, **environment}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def ray_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of two replicas on a cluster that `serve run` has started."""
    arguments = [f"{name}={value}" for name, value in {"model": "digits", "min_replicas": 2, **SETTINGS}.items()]
    with hidden_clusters(), serve_run(tmp_path_factory.mktemp("ray"), "dinat.ray:dinat", *arguments) as url:
        yield url


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_serve_run_on_a_cluster_that_runs(tmp_path: Path) -> None:
    """The documented command, and the application of the KubeRay manifest."""
    port, gcs_port = free_port(), free_port()
    manifest = yaml.safe_load((ROOT / "deploy" / "ray" / "rayservice.yaml").read_text())
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] |= {"model": "digits", "device": "cpu", "max_replicas": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    head = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--port",
        str(gcs_port),
        "--num-cpus",
        "2",
    ]
    with (
        hidden_clusters(RAY_AUTH_MODE="disabled", RAY_ADDRESS=f"127.0.0.1:{gcs_port}"),
        subprocess.Popen(head, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as cluster,
    ):
        try:
            wait_for_port(gcs_port)
            for arguments, http_port in ((["dinat.ray:dinat", "model=digits"], 8000), (["config.yaml"], port)):
                with serve_run(tmp_path, *arguments, port=http_port) as url:
                    response = httpx.post(f"{url}/classify", content=(DIGITS / "7-1.png").read_bytes())
                    assert response.json()["predictions"][0]["label"] == "7"
            assert cluster.poll() is None
        finally:
            cluster.terminate()


def wait_for_port(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.2)
        else:
            return


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


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_predictions_match_dinat_serve(ray_url: str) -> None:
    images = distinct_images(200)
    with Server(**SETTINGS) as server:
        expected = classify_all(server.url, images)
    for result, other in zip(classify_all(ray_url, images), expected, strict=True):
        assert [each.class_id for each in result.predictions] == [each.class_id for each in other.predictions]
        assert [each.score for each in result.predictions] == pytest.approx(
            [each.score for each in other.predictions], rel=0, abs=1e-5
        )


@pytest.mark.slow
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


@pytest.mark.slow
def test_no_request_is_lost_when_a_replica_is_killed(ray_url: str) -> None:
    images = distinct_images(400)
    with DinatClient(ray_url) as client, ThreadPoolExecutor(CLIENTS) as threads:
        requests = [threads.submit(client.classify, image) for image in images]
        requests[50].result()
        replicas = [process for process in psutil.process_iter() if process.name().startswith("ray::ServeRepl")]
        assert len(replicas) == 2
        replicas[0].kill()
        results = [request.result() for request in requests]
    assert [result.best.label for result in results] == [result.best.label for result in classify_all(ray_url, images)]


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
