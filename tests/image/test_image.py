"""`make image-test`: the Dockerfile's CPU variant, built, run, asked, watched by Prometheus, stopped. As root on Debian 12.

Of the GPU variant what can be built without CUDA's own images: all but the compilation of NATTEN, on Debian.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from tests.e2e.processes import DIGITS, free_port, load_until_refused
from tests.image.buildah import Buildah
from tests.model.checkpoints.test_checkpoint import Hub

ROOT = Path(__file__).parents[2]
BASE, IMAGE = "localhost/debian:bookworm", "localhost/dinat-serve:cpu"
TOOLS = ("buildah", "debootstrap", "prometheus")

pytestmark = [
    pytest.mark.skipif("DINAT_IMAGE" not in os.environ, reason="set DINAT_IMAGE=1 (make image-test)"),
    pytest.mark.timeout(1500),
]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def buildah(folder: Path) -> Iterator[Buildah]:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"apt-get install {' '.join(missing)}"
    assert os.getuid() == 0, "building an image without an engine wants root"
    assert sys.version_info[:2] == (3, 11), "the wheels are for Debian 12's Python 3.11"
    storage = Buildah(folder)
    yield storage
    storage.clear()


@pytest.fixture(scope="module")
def arguments(buildah: Buildah, folder: Path) -> list[str | Path]:
    """Of `buildah build`, for the CPU variant on a Debian made here, with wheels fetched here by this machine's pip."""
    root, wheels = folder / "debian", folder / "wheels"
    started = time.monotonic()
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], check=True, stdout=subprocess.DEVNULL)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, root, "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(root)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", wheels, "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, f"{ROOT}[cpu,heif,tracing]", "setuptools>=77"], check=True)
    print(f"\nbase and wheels: {time.monotonic() - started:.0f} s")
    return [
        *("build", "--quiet", "--format", "docker", "--layers", "--skip-unused-stages", "--volume", f"{wheels}:/wheels:ro"),
        *("--build-arg", "VARIANT=cpu", "--build-arg", f"BASE_IMAGE={BASE}"),
        *("--build-arg", "PIP_NO_INDEX=1", "--build-arg", "PIP_FIND_LINKS=/wheels"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def image(buildah: Buildah, arguments: list[str | Path], folder: Path) -> str:
    started = time.monotonic()
    buildah(*arguments, "--tag", IMAGE, ROOT)
    print(f"image built: {time.monotonic() - started:.0f} s")
    layers = buildah.layers(IMAGE, folder / "pushed")
    for size, step in layers:
        print(f"{size / 1e6:8.1f} MB  {' '.join(step.split()).rpartition('/bin/sh -c ')[2][:110]}")
    print(f"{sum(size for size, _ in layers) / 1e6:8.1f} MB  in all")
    shutil.rmtree(folder / "pushed")
    return IMAGE


class Container:
    """The image's own command, run as its user, over a container's file system that outlives it."""

    def __init__(self, buildah: Buildah, image: str) -> None:
        self._buildah = buildah
        self.name = buildah("from", image)
        self.config = buildah.config(image)["config"]

    def __enter__(self) -> "Container":
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {"DINAT_PORT": str(port), "DINAT_LOG_FORMAT": "json"}
        started = time.monotonic()
        self.process = self._buildah.start(
            self.name, self.environment, self.config["Entrypoint"] + self.config["Cmd"], stderr=subprocess.PIPE
        )
        self.log: list[str] = []
        ready = threading.Event()

        def read() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                self.log.append(line)
                if '"ready"' in line:
                    ready.set()
            ready.set()

        self._reader = threading.Thread(target=read)
        self._reader.start()
        assert ready.wait(300), self.log
        assert self.process.poll() is None, self.log
        self.seconds_to_ready = time.monotonic() - started
        self.pid = _command_below(self.process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def healthy(self) -> bool:
        """What the image's health check says."""
        kind, *check = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        run = self._buildah.start(self.name, self.environment, check, stderr=subprocess.DEVNULL)
        return run.wait(60) == 0

    def stop(self) -> int:
        """SIGTERM to the command itself, as an engine sends it; the exit status."""
        os.kill(self.pid, signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()


def _command_below(pid: int) -> int:
    """The process that `buildah run` has started by way of others of its own: in a container it would be number 1."""
    while Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"buildah"):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        (pid,) = (int(child) for task in tasks for child in (task / "children").read_text().split())
    return pid


@pytest.fixture(scope="module")
def container(buildah: Buildah, image: str) -> Container:
    return Container(buildah, image)


def test_the_image_runs_as_its_user_and_answers(buildah: Buildah, container: Container) -> None:
    mount = Path(buildah("mount", container.name))
    before = time.time()
    with container:
        print(f"from start to ready, the first time: {container.seconds_to_ready:.1f} s")
        status = Path(f"/proc/{container.pid}/status").read_text()
        assert re.search(r"Uid:\s+10001\s+10001", status)
        assert Path(f"/proc/{container.pid}/cmdline").read_bytes().split(b"\0")[1] == b"/opt/dinat/bin/dinat"  # and no shell
        assert container.healthy()
        assert httpx.get(f"{container.url}/health").json()["status"] == "ready"
        answer = httpx.post(f"{container.url}/classify", files={"image": (DIGITS / "7-1.png").read_bytes()}, timeout=60)
        assert answer.json()["predictions"][0]["label"] == "7"
        card = httpx.get(f"{container.url}/model").json()
        assert (card["model"], card["runtime"], card["device"]) == ("digits", "openvino", "cpu")
        assert container.stop() == 0
    assert not container.healthy()
    written = [
        path
        for top in ("etc", "home", "models", "opt", "root", "usr", "var")
        for path in (mount / top).rglob("*")
        if path.lstat().st_mtime > before and not path.is_dir()
    ]
    assert written == []  # a read-only root does


def test_a_second_start_is_fast(container: Container) -> None:
    with container:
        print(f"from start to ready, with what the first left in /cache: {container.seconds_to_ready:.1f} s")
        assert container.stop() == 0
    assert not any("making the graph" in line for line in container.log)


def test_sigterm_under_load_answers_everything(container: Container) -> None:
    picture = (DIGITS / "2-1.png").read_bytes()
    with container, load_until_refused(container.url, picture, first=200) as statuses:
        started = time.monotonic()
        assert container.stop() == 0
        seconds = time.monotonic() - started
    assert set(statuses) <= {200, 503}
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    print(f"drained in {seconds:.1f} s, exit status 0; answers by status: {counts}, none lost")


def test_prometheus_reads_it_and_the_dashboard_asks_what_is_there(container: Container, folder: Path) -> None:
    home = folder / "prometheus"
    shutil.copytree(ROOT / "deploy" / "prometheus", home)
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "dinat.json").read_text())
    port = free_port()
    with container:
        text = (home / "prometheus.yml").read_text()
        text = text.replace("dinat:8000", container.url.removeprefix("http://")).replace(
            "scrape_interval: 5s", "scrape_interval: 1s"
        )
        (home / "prometheus.yml").write_text(text)
        prometheus = subprocess.Popen(
            [
                "prometheus",
                *("--config.file", home / "prometheus.yml", "--storage.tsdb.path", home / "data"),
                *("--web.listen-address", f"127.0.0.1:{port}", "--log.level=warn"),
            ]
        )
        try:
            transport = httpx.HTTPTransport(retries=20)  # of connecting, while it starts
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", transport=transport) as client:

                def query(expression: str) -> list[dict[str, Any]]:
                    answer = client.get("/query", params={"query": expression}).json()
                    assert answer["status"] == "success", (expression, answer)
                    return list(answer["data"]["result"])

                for n in range(20):
                    picture = (DIGITS / f"{n % 10}-1.png").read_bytes()
                    assert httpx.post(f"{container.url}/classify", content=picture, timeout=60).status_code == 200
                _until(lambda: query('rate(dinat_images_total{outcome="classified"}[1m]) >= 0'))
                (counted,) = _until(lambda: query('dinat_images_total{outcome="classified"} >= 20'))
                assert counted["value"][1] == "20"
                rules = client.get("/rules").json()["data"]["groups"][0]["rules"]
                assert {rule["name"] for rule in rules} >= {"DinatDown", "DinatErrors"}
                for panel in dashboard["panels"]:
                    for target in panel["targets"]:
                        expression = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")
                        found = query(expression)
                        assert found or panel["title"] == "Device memory", expression
        finally:
            prometheus.terminate()
            prometheus.wait(30)
        assert container.stop() == 0


def _until(ask: Any) -> Any:
    """What is asked for, once there is any of it: for a minute, ten times a second."""
    until = time.monotonic() + 60
    while not (found := ask()):
        assert time.monotonic() < until
        threading.Event().wait(0.1)
    return found


def test_a_model_can_be_baked_in(buildah: Buildah, image: str, arguments: list[str | Path], folder: Path) -> None:
    hub_folder = folder / "hub"
    config = DinatConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], dilations=[[1], [1]], kernel_size=3, num_labels=4)
    DinatForImageClassification(config).save_pretrained(hub_folder)
    DinatImageProcessor(size=32).save_pretrained(hub_folder)
    hub = Hub(hub_folder)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        baked = [
            *("--build-arg", "MODEL=someone/network", "--build-arg", f"HF_ENDPOINT=http://127.0.0.1:{hub.server_port}"),
            *("--tag", "localhost/dinat-serve:baked"),
        ]
        started = time.monotonic()
        buildah(*arguments, *baked, ROOT)
        print(f"image with a model, on the other's layers: {time.monotonic() - started:.0f} s")
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
    with Container(buildah, "localhost/dinat-serve:baked") as container:
        card = httpx.get(f"{container.url}/model").json()
        assert (card["model"], len(card["labels"])) == ("someone/network", 4)
        assert container.stop() == 0


def write_wheel(folder: Path, release: str) -> None:
    """A stand-in for one of NATTEN's wheels, which pip takes for it."""
    about = f"natten-{release}.dist-info"
    files = {
        "natten/__init__.py": f'__version__ = "{release}"\n',
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: natten\nVersion: {release}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(folder / f"natten-{release}-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{about}/RECORD": record}.items():
            wheel.writestr(name, text)


@pytest.mark.parametrize("published", ["0.21.7+torch2130cu130", None])
def test_the_gpu_variant_takes_the_wheel_for_its_pytorch_where_there_is_one(
    published: str | None, buildah: Buildah, arguments: list[str | Path], folder: Path
) -> None:
    page = folder / f"page-{published}"
    page.mkdir()
    write_wheel(page, "0.21.6+torch2110cu130")  # for another PyTorch
    if published is not None:
        write_wheel(page, published)
    name = f"localhost/dinat-serve:gpu-{'with' if published else 'without'}"
    words: list[str | Path] = [word for word in arguments if word != "--quiet"]
    words += ["--build-arg", "VARIANT=gpu", "--build-arg", "NATTEN_CUDA=cu130", "--build-arg", f"NATTEN_WHEELS={page}"]
    started = time.monotonic()
    said = buildah(*words, "--volume", f"{page}:{page}:ro", "--tag", name, ROOT, stderr=subprocess.STDOUT)
    print(f"\nGPU variant, {published or 'no wheel'}: {time.monotonic() - started:.0f} s")
    wanted = "natten==0.21.7+torch2130cu130"
    assert (
        f"NATTEN: {wanted} " + (f"from {page}" if published else f"is not at {page}; attention uses triton and tiled") in said
    )
    container = buildah("from", name)
    code = "import importlib.util as u, shutil; print(u.find_spec('natten') is not None, shutil.which('gcc') is not None)"
    ran = buildah.start(container, {}, ["python", "-c", code], stdout=subprocess.PIPE)
    assert ran.communicate(timeout=60)[0].split() == [str(published is not None), "True"]
    refused = buildah.start(container, {}, ["dinat", "serve", "--device", "cuda"], stderr=subprocess.PIPE)
    assert "dinat: digits cannot be served: device 'cuda' is not there" in refused.communicate(timeout=60)[1]
    assert refused.returncode == 1
