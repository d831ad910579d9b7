import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dinat.app.healthcheck import PORT_VARIABLES
from tests.app.conftest import running
from tests.e2e.processes import free_port

DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"


def run(**environment: str) -> int:
    """Run the image's health check, in an environment with a proxy that does not answer."""
    (command,) = re.findall(r'CMD \["python", (.*?)\]', DOCKERFILE.read_text())
    inherited = {name: value for name, value in os.environ.items() if name not in PORT_VARIABLES}
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    arguments = [argument.strip('"') for argument in command.split(", ")]
    return subprocess.run([sys.executable, *arguments], env=inherited | proxies | environment, timeout=60).returncode


@pytest.mark.parametrize("variable", PORT_VARIABLES)
def test_port_is_the_one_that_is_served(variable: str) -> None:
    with running() as service:
        assert run(**{variable: str(service.client.base_url.port)}) == 0


def test_service_that_does_not_answer_is_unhealthy() -> None:
    assert run(DINAT_PORT=str(free_port())) == 1
    assert run(DINAT_PORT="tcp://10.0.0.1:80") == 1


def test_variables_are_those_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    from dinat.app.settings import Settings

    for number, variable in enumerate(PORT_VARIABLES, 1):
        for name in PORT_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(variable, str(number))
        assert Settings(_env_file=None).port == number
