"""The service at a path of a proxy, which removes that path from requests or not."""

import pytest

from dinat.app.errors import Unavailable
from tests.app.conftest import running

PREFIXED = "/dinat"


def reject() -> None:
    raise Unavailable("the queue is full")


@pytest.mark.parametrize("prefix", ["", PREFIXED])
def test_every_endpoint_is_found(prefix: str, seven: bytes) -> None:
    with running(root_path=PREFIXED) as service:
        for path in (
            "/",
            "/docs",
            "/openapi.json",
            "/static-offline-docs/swagger-ui.css",
            "/web/main.js",
            "/health",
            "/metrics",
        ):
            assert service.client.get(prefix + path).status_code == 200, path
        assert service.client.post(f"{prefix}/classify", content=seven).status_code == 200
        assert service.client.get(f"{prefix}/nowhere").status_code == 404
        counted = service.client.get("/metrics").text
        assert 'dinat_requests_total{route="/classify",status="200"} 1.0' in counted
        document = service.client.get(f"{prefix}/openapi.json").json()
        assert document["servers"] == [{"url": PREFIXED}]
        assert f'url: "{PREFIXED}/openapi.json"' in service.client.get(f"{prefix}/docs").text.replace("'", '"')


@pytest.mark.parametrize("prefix", ["", PREFIXED])
def test_keys_are_required(prefix: str, seven: bytes) -> None:
    with running(root_path=PREFIXED, api_keys="secret") as service:
        assert service.client.get(f"{prefix}/health").status_code == 200
        assert service.client.get(f"{prefix}/").status_code == 200
        assert service.client.get(f"{prefix}/model").status_code == 401
        assert service.client.post(f"{prefix}/classify", content=seven).status_code == 401
        assert service.client.get(f"{PREFIXED}{PREFIXED}/health").status_code == 401  # only one prefix is removed
        authorized = service.client.post(f"{prefix}/classify", content=seven, headers={"X-API-Key": "secret"})
        assert authorized.status_code == 200


@pytest.mark.parametrize("prefix", ["", PREFIXED])
def test_full_queue_rejects_before_the_body_is_read(prefix: str, seven: bytes) -> None:
    with running(root_path=PREFIXED, queue_limit=1) as service:
        service.engine.check_capacity = reject  # type: ignore[method-assign]
        assert service.client.post(f"{prefix}/classify", content=b"no image").status_code == 503


@pytest.mark.parametrize(
    ("sent", "root"), [(b"/other/path/", "/other/path"), (b"//evil.example", ""), (b'/"<script>', ""), (b"/", "")]
)
def test_forwarded_prefix(sent: bytes, root: str) -> None:
    with running() as service:
        document = service.client.get("/openapi.json", headers=[(b"X-Forwarded-Prefix", sent)]).json()
        assert document.get("servers", [{"url": ""}])[0]["url"] == root


def test_forwarded_prefix_of_others_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "192.0.2.1")
    with running() as service:
        assert "servers" not in service.client.get("/openapi.json", headers={"X-Forwarded-Prefix": "/other"}).json()
