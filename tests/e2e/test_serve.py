import httpx

from tests.e2e.processes import DIGITS, Server, load_until_refused


def test_every_request_is_one_line_of_json_with_its_id() -> None:
    with Server() as server:
        answer = httpx.post(
            f"{server.url}/classify?top_k=1",
            files={"image": (DIGITS / "5-2.png").read_bytes()},
            headers={"X-Request-ID": "mine", "X-API-Key": "never-logged"},
        )
        assert answer.json()["predictions"][0]["label"] == "5"
        assert server.stop() == 0
    (line,) = [event for event in server.events if event["event"] == "request"]
    assert (line["method"], line["path"], line["status"], line["request_id"]) == ("POST", "/classify", 200, "mine")
    assert line["milliseconds"] > 0
    assert line["level"] == "info"
    assert "never-logged" not in str(server.events)


def test_sigterm_under_load_answers_everything_and_exits_with_0() -> None:
    picture = (DIGITS / "5-2.png").read_bytes()
    with Server() as server, load_until_refused(server.url, picture) as statuses:
        assert server.stop() == 0
    assert set(statuses) <= {200, 503}
    answered = [event["status"] for event in server.events if event["event"] == "request"]
    assert sorted(answered) == sorted(statuses)
