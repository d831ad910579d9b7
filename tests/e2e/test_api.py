"""`make api-test`: schemathesis on every endpoint in the OpenAPI document, for a limited time; too slow for `make test`."""

import os
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.e2e.processes import Server, check_log, operations, successful_operations

SECONDS = 120

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.api,
    pytest.mark.timeout(900),
]


def test_schemathesis_finds_no_failure() -> None:
    config = Path(__file__).with_name("schemathesis.toml")
    with Server(runtime="torch") as server:
        described = operations(httpx.get(f"{server.url}/openapi.json").json())
        command = ["schemathesis", "--config-file", str(config), "run", f"{server.url}/openapi.json"]
        command += ["--max-time", str(SECONDS), "--phases", "examples,coverage,fuzzing", "--continue-on-failure"]
        done = subprocess.run(command, check=False, env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.e2e.schemathesis_hooks"})
        assert server.stop() == 0
    assert done.returncode == 0
    check_log(server)
    missing = described - successful_operations(server.events)
    assert not missing, f"only errors from {missing}"
