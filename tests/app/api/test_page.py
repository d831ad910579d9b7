"""GET / and its files over HTTP."""

import pytest

from tests.app.conftest import Service, running

FILES = ["/", "/web/main.js", "/web/style.css", "/web/icon.svg"]


@pytest.mark.parametrize("path", FILES)
def test_every_file_has_a_strict_content_security_policy(service: Service, path: str) -> None:
    response = service.client.get(path)
    assert response.status_code == 200
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", FILES)
def test_cached_file_is_answered_with_304(service: Service, path: str) -> None:
    etag = service.client.get(path).headers["ETag"]
    response = service.client.get(path, headers={"If-None-Match": etag})
    assert response.status_code == 304
    assert not response.content


def test_missing_file_is_a_404_problem(service: Service) -> None:
    for path in ("/web/nothing.js", "/web/../main.py", "/web/%2e%2e/main.py"):
        response = service.client.get(path)
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"


def test_long_path_is_rejected_before_files_are_searched(service: Service) -> None:
    assert service.client.get("/web/" + "a/" * 500).status_code == 404
    for path in ("/web/" + "a/" * 600, "/static-offline-docs/" + "a/%2e%2e/" * 300, "/" + "a" * 1024):
        response = service.client.get(path)
        assert (response.status_code, response.json()["status"]) == (414, 414)
        assert "at most 1,024 are allowed" in response.json()["detail"]


def test_page_requires_no_api_key_but_its_requests_do() -> None:
    with running(api_keys=["secret"]) as service:
        assert [service.client.get(path).status_code for path in FILES] == [200] * len(FILES)
        assert service.client.get("/model").status_code == 401
        assert service.client.post("/", content=b"").status_code == 401  # the Hugging Face endpoint


def test_page_path_allows_get_and_post(service: Service) -> None:
    response = service.client.put("/")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, POST")
