import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.processes import DIGITS, Server, free_port

CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx (Debian's package nginx-light) is not installed")


def test_a_rolling_restart_behind_nginx_loses_no_request(tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    conf = CONF.read_text()
    for port, own in zip((8001, 8002, 8080), ports, strict=True):
        conf = conf.replace(f"127.0.0.1:{port}", f"127.0.0.1:{own}")
    (tmp_path / "nginx.conf").write_text(conf)
    picture = (DIGITS / "2-1.png").read_bytes()
    first, second = Server(ports[0]).__enter__(), Server(ports[1]).__enter__()
    with (tmp_path / "log").open("w") as log:
        nginx = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr"], stderr=log)
    statuses: list[int] = []
    over = threading.Event()
    counted = threading.Condition()

    def ask(_: int) -> None:
        transport = httpx.HTTPTransport(retries=5)  # of connecting, while nginx starts
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[2]}", timeout=60, transport=transport) as client:
            while not over.is_set():
                status = client.post("/classify", content=picture).status_code
                with counted:
                    statuses.append(status)
                    counted.notify_all()

    def load(requests: int) -> None:
        """Wait until that many more requests are answered."""
        with counted:
            until = len(statuses) + requests
            assert counted.wait_for(lambda: len(statuses) >= until, 60)

    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask, n) for n in range(8)]
        try:
            load(50)
            for port in ports[:2]:
                old = first if port == ports[0] else second
                assert old.stop() == 0
                load(50)
                new = Server(port).__enter__()
                load(50)
                if port == ports[0]:
                    first = new
                else:
                    second = new
        finally:
            over.set()
            for server in (first, second):
                server.__exit__(None, None, None)
            nginx.terminate()
            nginx.wait(30)
        for asked in asking:
            asked.result()
    assert len(statuses) >= 250
    assert set(statuses) == {200}, (tmp_path / "log").read_text()
