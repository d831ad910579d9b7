"""Two instances behind a real nginx or Envoy with the configurations in deploy/: restart, crash and overload."""

import re
import shutil
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import MISSING, envoy
from tests.e2e.processes import DIGITS, Server, free_port, servers

pytestmark = pytest.mark.proxy

DEPLOY = Path(__file__).parents[2] / "deploy"
CLIENTS = 16


WITHOUT_RETRY = {
    "nginx": ("proxy_next_upstream error.*;", "proxy_next_upstream off;"),
    "envoy": ("num_retries: 1", "num_retries: 0"),
}


@contextmanager
def proxy(kind: str, ports: list[int], folder: Path, retry: bool = True) -> Iterator[str]:
    """Run a proxy that listens on the third port, for instances on the first two. Yields its address."""
    (file,) = DEPLOY.glob(f"{kind}.*")
    conf = file.read_text()
    if not retry:
        conf, changed = re.subn(*WITHOUT_RETRY[kind], conf)
        assert changed == 1
    with run_proxy(kind, conf, dict(zip((8001, 8002, 8080), ports, strict=True)), folder) as url:
        yield url


@contextmanager
def run_proxy(kind: str, conf: str, ports: dict[int, int], folder: Path, ready: str = "/health/ready") -> Iterator[str]:
    """Run a proxy until it answers 200 on the path `ready`. Yields its address.

    Args:
        kind: "nginx" or "envoy".
        conf: Its configuration.
        ports: Port to use in place of each port in the configuration; the proxy listens on that of 8080.
        folder: Folder for its files.
        ready: Path of the request.
    """
    for default, port in ports.items():
        conf, changed = re.subn(rf"(127\.0\.0\.1(?::|,?\s+port_value: )){default}\b", rf"\g<1>{port}", conf)
        assert changed
    file = folder / f"{kind}.conf"
    file.write_text(conf)
    if kind == "nginx":
        command = ["nginx", "-p", str(folder), "-c", str(file), "-e", "stderr"]
    else:
        command = [str(envoy()), "--config-yaml", conf, "--use-dynamic-base-id", "--log-level", "warn", "--concurrency", "1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
    url = f"http://127.0.0.1:{ports[8080]}"
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:  # retries connecting while the proxy starts
            while client.get(f"{url}{ready}").status_code != 200:  # until Envoy has checked its instances
                assert process.poll() is None, (folder / "log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(30)


class Load:
    """Clients that send requests without a pause, each on its own connection.

    Attributes:
        statuses: Status of each response so far; 0 for a lost connection.
    """

    def __init__(self, url: str, clients: int = CLIENTS) -> None:
        self.statuses: list[int] = []
        self._url, self._clients = url, clients
        self._stop = threading.Event()
        self._counted = threading.Condition()

    def __enter__(self) -> "Load":
        self._threads = ThreadPoolExecutor(self._clients)
        for _ in range(self._clients):
            self._threads.submit(self._send_requests)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._threads.shutdown()

    def _send_requests(self) -> None:
        image = (DIGITS / "2-1.png").read_bytes()
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.is_set():
                try:
                    status = client.post("/classify", content=image).status_code
                except httpx.TransportError:
                    status = 0
                with self._counted:
                    self.statuses.append(status)
                    self._counted.notify_all()

    def wait_for(self, responses: int) -> None:
        """Wait for this many more responses."""
        with self._counted:
            count = len(self.statuses) + responses
            assert self._counted.wait_for(lambda: len(self.statuses) >= count, 60)


def attempts(server: Server) -> Counter[int]:
    """Number of responses of a server, by status."""
    metrics = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r'dinat_requests_total\{route="/classify",status="(\d+)"\} (\S+)', metrics)
    return Counter({int(status): int(float(count)) for status, count in found})


@pytest.mark.slow
def test_rolling_restart_and_crash_lose_no_request(kind: str, tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        old = stack.enter_context(servers(ports[:2]))
        load = stack.enter_context(Load(stack.enter_context(proxy(kind, ports, tmp_path))))
        load.wait_for(50)
        new = []
        for server, port in zip(old, ports, strict=False):
            assert server.stop() == 0
            load.wait_for(50)
            new.append(stack.enter_context(Server(port)))
            while not attempts(new[-1])[200]:  # until the proxy routes to it again
                load.wait_for(1)
            # until requests that it rejected while loading, and that have no retry left, are answered
            load.wait_for(4 * CLIENTS)
        new[0].kill()
        load.wait_for(200)
        load.__exit__()
        assert set(load.statuses) == {200}, (Counter(load.statuses), (tmp_path / "log").read_text())


@pytest.mark.slow
def test_crash_without_retries_loses_requests(
    kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        first, _ = stack.enter_context(servers(ports[:2]))
        load = stack.enter_context(Load(stack.enter_context(proxy(kind, ports, tmp_path, retry=False))))
        load.wait_for(100)
        first.kill()
        load.wait_for(200)
        load.__exit__()
        lost = [status for status in load.statuses if status != 200]
        record_property("lost", len(lost))
        print(f"{kind}: {len(lost)} requests lost, {dict(Counter(lost))}")
        assert lost


def test_service_sees_the_client_and_its_request_id(kind: str, tmp_path: Path) -> None:
    """The client's address is in the log and its scheme and port are in redirects, whatever the client's own headers say."""
    ports = [free_port() for _ in range(3)]
    client_address = "127.0.0.2"
    claims = {"X-Request-ID": "mine", "X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    with Server(ports[0]) as server, proxy(kind, ports, tmp_path) as url:
        with httpx.Client(transport=httpx.HTTPTransport(local_address=client_address)) as client:
            response = client.get(f"{url}/docs/", headers=claims)
        assert (response.status_code, response.headers["location"]) == (307, f"{url}/docs")
        assert response.headers["x-request-id"] == "mine"
    (event,) = [event for event in server.events if event.get("request_id") == "mine"]
    assert event["client.address"] == client_address


@pytest.mark.skipif(MISSING["nginx"] is not None, reason=str(MISSING["nginx"]))
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_nginx_terminates_tls_as_documented(tmp_path: Path) -> None:
    ports = {8001: free_port(), 8002: free_port(), 8080: free_port(), 8443: free_port()}
    page = (DEPLOY.parent / "docs" / "deploy.md").read_text()
    (lines,) = re.findall(r"```nginx\n(listen 443 ssl;.*?)```", page, re.DOTALL)
    lines = lines.replace("443", "127.0.0.1:8443").replace("/etc/ssl/dinat/", f"{tmp_path}/")
    conf = (DEPLOY / "nginx.conf").read_text().replace("listen 127.0.0.1:8080;", f"listen 127.0.0.1:8080;\n{lines}")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "fullchain.pem"]
    names = ["-subj", "/CN=dinat.example.org", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names], cwd=tmp_path, check=True, capture_output=True)
    authority = ssl.create_default_context(cafile=str(tmp_path / "fullchain.pem"))
    url = f"https://127.0.0.1:{ports[8443]}"
    with Server(ports[8001]), run_proxy("nginx", conf, ports, tmp_path), httpx.Client(verify=authority) as client:
        response = client.post(f"{url}/classify", content=(DIGITS / "7-1.png").read_bytes())
        assert response.json()["predictions"][0]["label"] == "7"
        assert client.get(f"{url}/docs/").headers["location"] == f"{url}/docs"


def test_retries_do_not_amplify_overload(kind: str, tmp_path: Path) -> None:
    """If both instances are full, a request gets 503 after at most two attempts; accepted requests are answered."""
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        full = stack.enter_context(servers(ports[:2], queue_limit=1, max_batch=1))
        url = stack.enter_context(proxy(kind, ports, tmp_path))
        load = stack.enter_context(Load(url, clients=32))
        load.wait_for(600)
        load.__exit__()
        responses, upstream = Counter(load.statuses), attempts(full[0]) + attempts(full[1])
        print(f"{kind}: {dict(responses)} of {len(load.statuses)} requests, {dict(upstream)} attempts")
        assert responses.keys() == upstream.keys() == {200, 503}
        assert responses[200] == upstream[200]
        assert responses[503] <= upstream[503] <= 2 * len(load.statuses)
