"""Downloads through a proxy from a Hub with its own certificate authority, as docs/network.md describes."""

import os
import select
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dinat.model import DinatConfig, DinatImageProcessor
from tests.model.checkpoints.originals import random_network
from tests.model.checkpoints.test_checkpoint import Hub

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")]

HOST = "hub.example"
CONFIG = DinatConfig(embed_dim=8, depths=[1], num_heads=[1], dilations=[[1]], kernel_size=3, num_labels=4)


class ProxyHandler(BaseHTTPRequestHandler):
    """A proxy that connects every tunnel to the server's target."""

    server: "Proxy"

    def do_CONNECT(self) -> None:
        self.server.tunnels.append(self.path)
        with socket.create_connection(self.server.target) as target:
            self.send_response(200)
            self.end_headers()
            peers = {self.connection: target, target: self.connection}
            while True:
                for ready in select.select(list(peers), [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        self.close_connection = True
                        return
                    peers[ready].sendall(data)

    def log_message(self, *_: Any) -> None:
        pass


class Proxy(ThreadingHTTPServer):
    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.target = target
        self.tunnels: list[str] = []


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the authority's certificate, ca.crt, and a certificate for the Hub with its key, hub.crt and hub.key."""
    folder = tmp_path_factory.mktemp("authority")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", "req", "-x509", *key, *arguments], cwd=folder, check=True, capture_output=True)

    openssl("-subj", "/CN=Example authority", "-keyout", "ca.key", "-out", "ca.crt", "-addext", "keyUsage=critical,keyCertSign")
    signed = [
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.key",
        "-addext",
        f"subjectAltName=DNS:{HOST}",
        "-addext",
        "basicConstraints=CA:FALSE",
    ]
    openssl("-subj", f"/CN={HOST}", "-keyout", "hub.key", "-out", "hub.crt", *signed)
    return folder


@pytest.fixture
def proxy(authority: Path, tmp_path: Path) -> Iterator[Proxy]:
    """A proxy to a Hub that speaks TLS."""
    folder = tmp_path / "folder"
    random_network(CONFIG).save_pretrained(folder)
    DinatImageProcessor(size=32, resample=3).save_pretrained(folder)
    hub = Hub(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "hub.crt", authority / "hub.key")
    hub.socket = context.wrap_socket(hub.socket, server_side=True, do_handshake_on_connect=False)
    hub.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that reject the certificate
    proxy = Proxy(("127.0.0.1", hub.server_port))
    threads = [threading.Thread(target=server.serve_forever) for server in (hub, proxy)]
    for thread in threads:
        thread.start()
    yield proxy
    for server in (hub, proxy):
        server.shutdown()
        server.server_close()
    for thread in threads:
        thread.join()


def dinat_info(proxy: Proxy, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    dropped = {"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NO_PROXY", "no_proxy"}
    base = {name: value for name, value in os.environ.items() if name not in dropped}
    base |= {"HF_ENDPOINT": f"https://{HOST}", "HTTPS_PROXY": f"http://127.0.0.1:{proxy.server_port}", "HF_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, "-m", "dinat", "info", "someone/network"],
        env=base | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_weights_come_through_the_proxy_with_its_authority(proxy: Proxy, authority: Path, tmp_path: Path) -> None:
    done = dinat_info(proxy, tmp_path / "cache", SSL_CERT_FILE=str(authority / "ca.crt"))
    assert done.returncode == 0, done.stderr
    assert '"labels": 4' in done.stdout
    assert set(proxy.tunnels) == {f"{HOST}:443"}
    offline = dinat_info(proxy, tmp_path / "cache", HF_HUB_OFFLINE="1", HTTPS_PROXY="http://127.0.0.1:9")
    assert offline.stdout == done.stdout


def test_unknown_authority_is_one_line(proxy: Proxy, tmp_path: Path) -> None:
    done = dinat_info(proxy, tmp_path / "cache")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dinat: ")]
    assert "CERTIFICATE_VERIFY_FAILED" in line
    assert "SSL_CERT_FILE" in line
