"""`make image-test`: build the Dockerfile's CPU variant, run it, scrape it with Prometheus, stop it. As root on Debian 12.

The GPU variant is built on Debian, without CUDA's base images and without compiling NATTEN.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.native import TARGETS
from tests.e2e.processes import DIGITS, free_port, load_until_rejected
from tests.image.buildah import Buildah
from tests.model.checkpoints.test_checkpoint import Hub

ROOT = Path(__file__).parents[2]
BASE, IMAGE = "localhost/debian:bookworm", "localhost/dinat-serve:cpu"
TOOLS = ("buildah", "debootstrap", "prometheus")
LOCKS = ("requirements-image.txt", "requirements-image-cpu.txt")
SBOM = ROOT / "build" / "image-sbom.cdx.json"
AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
"""CPU flags with which PyTorch with compiled attention is the default runtime."""

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.image,
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
    assert os.getuid() == 0, "building an image without a container engine requires root"
    assert sys.version_info[:2] == (3, 11), "the wheels must match Debian 12's Python 3.11"
    storage = Buildah(folder)
    yield storage
    storage.clear()


@pytest.fixture(scope="module")
def arguments(buildah: Buildah, folder: Path) -> list[str | Path]:
    """Arguments of `buildah build` for the CPU variant, on a Debian base image and with wheels that the host prepares."""
    root, wheels = folder / "debian", folder / "wheels"
    started = time.monotonic()
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], check=True, stdout=subprocess.DEVNULL)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, root, "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(root)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--wheel-dir", wheels, "--constraint", ROOT / "constraints.txt", "torch", "setuptools"], check=True
    )
    locks = [flag for name in LOCKS for flag in ("--requirement", ROOT / name)]
    subprocess.run([*pip, "download", "--no-deps", "--require-hashes", "--dest", wheels, *locks], check=True)
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
    print(f"{sum(size for size, _ in layers) / 1e6:8.1f} MB  in total")
    shutil.rmtree(folder / "pushed")
    return IMAGE


class Container:
    """The image's command, run as its user. The container's file system persists from one run to the next.

    settings: further environment variables.
    """

    def __init__(self, buildah: Buildah, image: str, **settings: str) -> None:
        self._buildah = buildah
        self._settings = settings
        self.name = buildah("from", image)
        self.config = buildah.config(image)["config"]

    def __enter__(self) -> "Container":
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {"DINAT_PORT": str(port), "DINAT_LOG_FORMAT": "json", **self._settings}
        started = time.monotonic()
        self.process = self._start((self.config["Entrypoint"] or []) + self.config["Cmd"])
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
        self.pid = _command_pid(self.process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        return self._buildah.start(self.name, self.environment, command, stderr=subprocess.PIPE)

    def healthy(self) -> bool:
        """Run the image's health check."""
        kind, *check = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        run = self._buildah.start(self.name, self.environment, check, stderr=subprocess.DEVNULL)
        return run.wait(60) == 0

    def stop(self) -> int:
        """Send SIGTERM to the command, as a container engine does, and return the exit status."""
        os.kill(self.pid, signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()


class RestrictedContainer(Container):
    """As OpenShift or `docker run --read-only --cap-drop ALL` restricts it: any user; only /cache and /tmp are writable."""

    UID = 54321
    _MOUNTS = """
mount --bind "$0" "$0"
mount --rbind /dev "$0/dev"
mount --rbind /proc "$0/proc"
mount -t tmpfs -o noexec,nosuid,nodev tmpfs "$0/tmp"
mount -t tmpfs -o gid=0,mode=775 tmpfs "$0/cache"
mount -o remount,bind,ro "$0"
exec chroot "$0" "$@"
"""

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        user = ["setpriv", f"--reuid={self.UID}", "--regid=0", "--clear-groups"]
        user += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        variables = self.config["Env"] + [f"{name}={value}" for name, value in self.environment.items()]
        environment = ["env", "--ignore-environment", f"--chdir={self.config['WorkingDir']}", *variables]
        namespace = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", self._MOUNTS]
        root = self._buildah("mount", self.name)
        return subprocess.Popen([*namespace, root, *user, *environment, *command], stderr=subprocess.PIPE, text=True)


def _command_pid(pid: int) -> int:
    """The process that `buildah run` started through further buildah processes. In a container it would be process 1."""
    while Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"buildah"):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        (pid,) = (int(child) for task in tasks for child in (task / "children").read_text().split())
    return pid


@pytest.fixture(scope="module")
def container(buildah: Buildah, image: str) -> Container:
    return Container(buildah, image)


def default_runtime() -> str:
    """The runtime that the service selects on this CPU."""
    flags = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return "torch" if flags is not None and set(flags[1].split()) >= AVX512 else "openvino"


def test_image_has_the_kernels_for_every_cpu(buildah: Buildah, container: Container) -> None:
    native = Path(buildah("mount", container.name)) / "opt" / "dinat" / "dinat" / "model" / "native"
    names = {target.name for target in TARGETS[platform.machine()]}
    assert {path.name.split("-")[1] for path in native.glob("kernels-*.so")} == names


def test_sbom_lists_every_package(buildah: Buildah, container: Container) -> None:
    mount = buildah("mount", container.name)
    SBOM.parent.mkdir(exist_ok=True)
    syft = Path(sys.executable).with_name("syft")
    command = [
        syft,
        "scan",
        "--quiet",
        f"dir:{mount}",
        "--source-name",
        "dinat-serve:cpu",
        "--output",
        f"cyclonedx-json={SBOM}",
    ]
    subprocess.run(command, check=True, timeout=600, env={**os.environ, "SYFT_CHECK_FOR_APP_UPDATE": "false"})
    components = json.loads(SBOM.read_text())["components"]
    kinds = {purl[4:].partition("/")[0] for component in components if (purl := component.get("purl"))}
    found = {(component["name"].lower().replace("_", "-"), component.get("version")) for component in components}
    print(f"SBOM: {len(components)} components of {sorted(kinds)}, {SBOM.stat().st_size / 1e6:.1f} MB")
    assert {"deb", "pypi"} <= kinds
    assert {"torch", "dinat-serve", "libgomp1", "python3"} <= {name for name, _ in found}
    pinned = re.findall(r"^([\w.-]+)==([\w.]+) \\$", "".join((ROOT / name).read_text() for name in LOCKS), re.MULTILINE)
    assert len(pinned) > 40
    assert set(pinned) - found == set()


def test_image_runs_unprivileged_and_classifies(buildah: Buildah, container: Container) -> None:
    mount = Path(buildah("mount", container.name))
    before = time.time()
    with container:
        print(f"first start to ready: {container.seconds_to_ready:.1f} s")
        status = Path(f"/proc/{container.pid}/status").read_text()
        assert re.search(r"Uid:\s+10001\s+10001", status)
        assert Path(f"/proc/{container.pid}/cmdline").read_bytes().split(b"\0")[1] == b"/opt/dinat/bin/dinat"  # not a shell
        assert container.healthy()
        assert httpx.get(f"{container.url}/health").json()["status"] == "ready"
        response = httpx.post(f"{container.url}/classify", files={"image": (DIGITS / "7-1.png").read_bytes()}, timeout=60)
        assert response.json()["predictions"][0]["label"] == "7"
        model = httpx.get(f"{container.url}/model").json()
        assert (model["model"], model["runtime"], model["device"]) == ("digits", default_runtime(), "cpu")
        assert set(model["attention"].values()) == {"compiled" if model["runtime"] == "torch" else "tiled"}
        assert container.stop() == 0
    assert not container.healthy()
    written = [
        path
        for top in ("etc", "home", "models", "opt", "root", "usr", "var")
        for path in (mount / top).rglob("*")
        if path.lstat().st_mtime > before and not path.is_dir()
    ]
    assert written == []  # the root file system may be read-only


def test_image_runs_as_any_user_on_a_read_only_root_without_capabilities(buildah: Buildah, image: str) -> None:
    with RestrictedContainer(buildah, image) as container:
        print(f"start to ready, restricted: {container.seconds_to_ready:.1f} s")
        status = Path(f"/proc/{container.pid}/status").read_text()
        assert re.search(rf"Uid:\s+{container.UID}\s+{container.UID}", status)
        assert all(int(mask, 16) == 0 for mask in re.findall(r"^Cap(?:Inh|Prm|Eff|Bnd):\s+(\w+)", status, re.MULTILINE))
        (root,) = re.findall(r" / / (\S+) ", Path(f"/proc/{container.pid}/mountinfo").read_text())
        assert "ro" in root.split(",")
        response = httpx.post(f"{container.url}/classify", content=(DIGITS / "7-1.png").read_bytes(), timeout=60)
        assert response.json()["predictions"][0]["label"] == "7"
        model = httpx.get(f"{container.url}/model").json()
        assert (model["runtime"], model["disabled"]) == (default_runtime(), [])
        assert container.stop() == 0


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_second_start_uses_the_cached_graph(runtime: str, buildah: Buildah, image: str) -> None:
    container = Container(buildah, image, DINAT_RUNTIME=runtime)
    for is_first in (True, False):
        with container:
            print(f"start to ready, {runtime}, {'empty' if is_first else 'warm'} cache: {container.seconds_to_ready:.1f} s")
            assert container.stop() == 0
        assert any("exporting graph" in line for line in container.log) is (is_first and runtime == "openvino")


def test_sigterm_under_load_answers_every_request(container: Container) -> None:
    image = (DIGITS / "2-1.png").read_bytes()
    with container, load_until_rejected(container.url, image, min_responses=200) as statuses:
        started = time.monotonic()
        assert container.stop() == 0
        seconds = time.monotonic() - started
    assert set(statuses) <= {200, 503}
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    print(f"drained in {seconds:.1f} s, exit status 0; responses by status: {counts}, none lost")


def test_prometheus_scrapes_it_and_dashboard_queries_return_data(container: Container, folder: Path) -> None:
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
            transport = httpx.HTTPTransport(retries=20)  # of the connection, while Prometheus starts
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", transport=transport) as client:

                def query(expression: str) -> list[dict[str, Any]]:
                    response = client.get("/query", params={"query": expression}).json()
                    assert response["status"] == "success", (expression, response)
                    return list(response["data"]["result"])

                for n in range(20):
                    image = (DIGITS / f"{n % 10}-1.png").read_bytes()
                    assert httpx.post(f"{container.url}/classify", content=image, timeout=60).status_code == 200
                _wait_for(lambda: query('rate(dinat_images_total{outcome="classified"}[1m]) >= 0'))
                (counted,) = _wait_for(lambda: query('dinat_images_total{outcome="classified"} >= 20'))
                assert counted["value"][1] == "20"
                rules = client.get("/rules").json()["data"]["groups"][0]["rules"]
                assert {rule["name"] for rule in rules} >= {"DinatDown", "DinatErrors"}
                for panel in dashboard["panels"]:
                    for target in panel["targets"]:
                        expression = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")
                        assert query(expression) or panel["title"] == "Device memory", expression
        finally:
            prometheus.terminate()
            prometheus.wait(30)
        assert container.stop() == 0


def _wait_for(query: Callable[[], Any], seconds: float = 60) -> Any:
    """Repeat a query every 0.1 s until its result is not empty, for at most `seconds`."""
    until = time.monotonic() + seconds
    while not (result := query()):
        assert time.monotonic() < until
        threading.Event().wait(0.1)
    return result


def test_model_can_be_included_in_the_image(buildah: Buildah, image: str, arguments: list[str | Path], folder: Path) -> None:
    hub_folder = folder / "hub"
    config = DinatConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], dilations=[[1], [1]], kernel_size=3, num_labels=4)
    DinatForImageClassification(config).save_pretrained(hub_folder)
    DinatImageProcessor(size=32).save_pretrained(hub_folder)
    hub = Hub(hub_folder)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        flags = [
            *("--build-arg", "MODEL=someone/network", "--build-arg", f"HF_ENDPOINT=http://127.0.0.1:{hub.server_port}"),
            *("--tag", "localhost/dinat-serve:with-model"),
        ]
        started = time.monotonic()
        buildah(*arguments, *flags, ROOT)
        print(f"image with a model, on cached layers: {time.monotonic() - started:.0f} s")
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
    with Container(buildah, "localhost/dinat-serve:with-model") as container:
        model = httpx.get(f"{container.url}/model").json()
        assert (model["model"], len(model["labels"])) == ("someone/network", 4)
        assert container.stop() == 0


def test_ray_image_serves_the_application_of_the_kuberay_manifest(buildah: Buildah, image: str, folder: Path) -> None:
    wheels = folder / "ray-wheels"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--quiet", "download", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "--dest", wheels, "ray[data,serve]", "pyarrow"], check=True)
    flags = [
        *("build", "--quiet", "--format", "docker", "--volume", f"{wheels}:/wheels:ro", "--build-arg", f"BASE_IMAGE={image}"),
        *("--build-arg", "PIP_NO_INDEX=1", "--build-arg", "PIP_FIND_LINKS=/wheels", "--tag", "localhost/dinat-serve-ray"),
    ]
    started = time.monotonic()
    buildah(*flags, ROOT / "deploy" / "ray")
    print(f"\nimage with Ray: {time.monotonic() - started:.0f} s")
    container = buildah("from", "localhost/dinat-serve-ray")
    config = buildah.config("localhost/dinat-serve-ray")["config"]
    assert (config["User"], config["Cmd"]) == ("10001", ["serve", "run", "dinat.ray:dinat"])
    manifest = yaml.safe_load((ROOT / "deploy" / "ray" / "rayservice.yaml").read_text())
    application = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    port = free_port()
    application["http_options"] |= {"host": "127.0.0.1", "port": port}
    application["applications"][0]["args"] |= {"model": "digits", "device": "cpu", "max_replicas": 1}
    (Path(buildah("mount", container)) / "models" / "config.yaml").write_text(yaml.safe_dump(application))
    command = ["sh", "-c", "command -v wget > /dev/null && exec serve run config.yaml"]
    process = buildah.start(container, {}, command)
    try:
        started = time.monotonic()
        _wait_for(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{port}"), seconds=240)
        assert process.poll() is None
        print(f"start to ready: {time.monotonic() - started:.1f} s")
        response = httpx.post(f"http://127.0.0.1:{port}/classify", content=(DIGITS / "7-1.png").read_bytes(), timeout=60)
        assert response.json()["predictions"][0]["label"] == "7"
    finally:
        if process.poll() is None:
            os.kill(_command_pid(process.pid), signal.SIGINT)
            process.wait(60)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


def write_wheel(folder: Path, release: str) -> None:
    """Write an empty wheel of NATTEN that pip can install."""
    dist_info = f"natten-{release}.dist-info"
    files = {
        "natten/__init__.py": f'__version__ = "{release}"\n',
        f"{dist_info}/METADATA": f"Metadata-Version: 2.1\nName: natten\nVersion: {release}\n",
        f"{dist_info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{dist_info}/RECORD"])
    with zipfile.ZipFile(folder / f"natten-{release}-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{dist_info}/RECORD": record}.items():
            wheel.writestr(name, text)


@pytest.mark.parametrize("published", ["0.21.7+torch2130cu130", None])
def test_gpu_variant_installs_the_natten_wheel_for_its_pytorch(
    published: str | None, buildah: Buildah, arguments: list[str | Path], folder: Path
) -> None:
    page = folder / f"page-{published}"
    page.mkdir()
    write_wheel(page, "0.21.6+torch2110cu130")  # for another PyTorch
    if published is not None:
        write_wheel(page, published)
    name = f"localhost/dinat-serve:gpu-{'with' if published else 'without'}"
    flags: list[str | Path] = [flag for flag in arguments if flag != "--quiet"]
    flags += ["--build-arg", "VARIANT=gpu", "--build-arg", f"NATTEN_WHEELS={page}"]
    started = time.monotonic()
    log = buildah(*flags, "--volume", f"{page}:{page}:ro", "--tag", name, ROOT, stderr=subprocess.STDOUT)
    print(f"\nGPU variant, {published or 'no wheel'}: {time.monotonic() - started:.0f} s")
    requirement = "natten==0.21.7+torch2130cu130"
    outcome = f"from {page}" if published else f"is not at {page}; attention uses triton and tiled"
    assert f"NATTEN: {requirement} {outcome}" in log
    container = buildah("from", name)
    code = "import importlib.util as u, shutil; print(u.find_spec('natten') is not None, shutil.which('gcc') is not None)"
    check = buildah.start(container, {}, ["python", "-c", code], stdout=subprocess.PIPE)
    assert check.communicate(timeout=60)[0].split() == [str(published is not None), "True"]
    serve = buildah.start(container, {}, ["dinat", "serve", "--device", "cuda"], stderr=subprocess.PIPE)
    assert "dinat: digits cannot be served: device 'cuda' is not available" in serve.communicate(timeout=60)[1]
    assert serve.returncode == 1
