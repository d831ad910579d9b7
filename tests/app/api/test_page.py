"""GET / and its files, as HTTP has them."""

import pytest

from tests.app.conftest import Service, running

FILES = ["/", "/web/main.js", "/web/style.css", "/web/icon.svg"]


@pytest.mark.parametrize("path", FILES)
def test_every_file_comes_with_a_strict_policy(service: Service, path: str) -> None:
    answer = service.client.get(path)
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", FILES)
def test_what_a_browser_has_is_not_sent_again(service: Service, path: str) -> None:
    etag = service.client.get(path).headers["ETag"]
    answer = service.client.get(path, headers={"If-None-Match": etag})
    assert answer.status_code == 304
    assert not answer.content


def test_what_is_no_file_is_a_problem(service: Service) -> None:
    for path in ("/web/nothing.js", "/web/../main.py", "/web/%2e%2e/main.py"):
        answer = service.client.get(path)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


def test_the_page_wants_no_key_and_what_it_asks_does() -> None:
    with running(api_keys=["secret"]) as service:
        assert [service.client.get(path).status_code for path in FILES] == [200] * len(FILES)
        assert service.client.get("/model").status_code == 401
        assert service.client.post("/", content=b"").status_code == 401  # a door of its own


def test_the_path_of_the_page_takes_two_methods(service: Service) -> None:
    answer = service.client.put("/")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
