"""The configurations in docs/traffic.md, in real proxies."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import MISSING
from tests.e2e.processes import DIGITS, Server, free_port
from tests.e2e.test_proxies import DEPLOY, run_proxy

pytestmark = pytest.mark.proxy

PAGE = (Path(__file__).parents[2] / "docs" / "traffic.md").read_text()
SHARE, RATE, BURST = 0.05, 20, 40


def blocks(language: str, section: str) -> list[str]:
    """The configurations of a section."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def nginx_conf() -> str:
    return (DEPLOY / "nginx.conf").read_text()


def envoy_conf() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "envoy.yaml").read_text())
    return loaded


def connection_manager(conf: dict[str, Any]) -> dict[str, Any]:
    manager: dict[str, Any] = conf["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


@contextmanager
def instance(name: str) -> Iterator[int]:
    """A server that answers every request with its name. Yields its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(name)))
            self.end_headers()
            self.wfile.write(name.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_canary_gets_its_share(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        stable, canary = (stack.enter_context(instance(name)) for name in ("stable", "canary"))
        ports = {8001: stable, 8002: stable, 8003: canary, 8080: free_port()}
        if kind == "nginx":
            (split,) = blocks("nginx", "Blue/green and canaries")
            text = nginx_conf().replace("upstream dinat {", split + "upstream dinat {")
            text = text.replace("proxy_pass http://dinat;", "proxy_pass http://$instances;")
        else:
            weights = yaml.safe_load(blocks("yaml", "Blue/green and canaries")[1])
            conf = envoy_conf()
            route = connection_manager(conf)["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
            del route["cluster"]
            route |= weights
            clusters = conf["static_resources"]["clusters"]
            second = yaml.safe_load(yaml.safe_dump(clusters[0]).replace("8001", "8003").replace("8002", "8003"))
            assert second["name"] == "dinat"
            clusters.append(second | {"name": "dinat-canary"})
            text = yaml.safe_dump(conf)
        url = stack.enter_context(run_proxy(kind, text, ports, tmp_path))
        with httpx.Client() as client:
            answers = Counter(client.get(f"{url}/model").text for _ in range(1500))
    assert answers.keys() == {"stable", "canary"}
    # Five standard deviations of 1,500 draws with a probability of 0.05 are 42.
    assert abs(answers["canary"] - 1500 * SHARE) < 42


def test_requests_above_the_rate_get_429(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(instance("dinat"))
        ports = {8001: port, 8002: port, 8080: free_port()}
        if kind == "nginx":
            zone, limit = blocks("nginx", "Rate limits")
            text = nginx_conf().replace("upstream dinat {", zone + "upstream dinat {")
            text = text.replace("proxy_pass http://dinat;", "proxy_pass http://dinat;\n" + limit)
        else:
            conf = envoy_conf()
            connection_manager(conf)["http_filters"].insert(0, yaml.safe_load(blocks("yaml", "Rate limits")[0]))
            text = yaml.safe_dump(conf)
        url = stack.enter_context(run_proxy(kind, text, ports, tmp_path))
        with httpx.Client(headers={"X-API-Key": "one"}) as client:
            answers = [client.get(f"{url}/model") for _ in range(400)]
            seconds = sum(answer.elapsed.total_seconds() for answer in answers)
            statuses = Counter(answer.status_code for answer in answers)
            assert statuses.keys() == {200, 429}
            assert statuses[200] >= BURST - 5  # the start of the proxy took some tokens of Envoy
            assert statuses[200] <= BURST + 1 + RATE * (2 * seconds + 2)
            if kind == "nginx":  # another client has a limit of its own
                assert client.get(f"{url}/model", headers={"X-API-Key": "two"}).status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(MISSING["nginx"] is not None, reason="nginx is not installed")
def test_each_path_is_a_model(tmp_path: Path) -> None:
    (locations,) = blocks("nginx", "Several models")
    text = re.sub(r"        location / \{.*?\n        \}\n", lambda _: locations, nginx_conf(), flags=re.DOTALL)
    image = (DIGITS / "7-1.png").read_bytes()
    with ExitStack() as stack:
        digits = stack.enter_context(Server(root_path="/digits", name="digits"))
        flowers = stack.enter_context(Server(root_path="/flowers", name="flowers"))
        ports = {8001: int(digits.url.rpartition(":")[2]), 8002: int(flowers.url.rpartition(":")[2]), 8080: free_port()}
        url = stack.enter_context(run_proxy("nginx", text, ports, tmp_path, ready="/digits/health/ready"))
        for name in ("digits", "flowers"):
            assert httpx.get(f"{url}/{name}/v2/models/{name}").status_code == 200
            assert httpx.get(f"{url}/{name}/openapi.json").status_code == 200
            answer = httpx.post(f"{url}/{name}/classify", content=image, timeout=60).json()
            assert answer["predictions"][0]["label"] == "7"
        assert httpx.get(f"{url}/digits/v2/models/flowers").status_code == 404
