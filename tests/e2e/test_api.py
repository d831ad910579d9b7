"""`make api-test`: schemathesis on every endpoint in the OpenAPI document, for a limited time; too slow for `make test`."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.processes import Server

SECONDS = os.environ.get("DINAT_API_TEST", "")

pytestmark = [
    pytest.mark.skipif(not SECONDS, reason="set DINAT_API_TEST to seconds (make api-test)"),
    pytest.mark.timeout(900),
]


def test_schemathesis_finds_no_failure() -> None:
    config = Path(__file__).with_name("schemathesis.toml")
    with Server(runtime="torch") as server:
        command = ["schemathesis", "--config-file", str(config), "run", f"{server.url}/openapi.json", "--max-time", SECONDS]
        done = subprocess.run([*command, "--phases", "examples,coverage,fuzzing", "--continue-on-failure"], check=False)
        assert server.stop() == 0
    assert done.returncode == 0
    statuses = {event["status"] for event in server.events if event["event"] == "request"}
    assert 200 in statuses
    assert 500 not in statuses
