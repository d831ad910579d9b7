import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from dinat.app.engine.engine import BackendFactory, Engine
from dinat.app.engine.local_backend import LocalBackend
from dinat.app.main import create_app
from dinat.app.server.server import Server
from dinat.app.settings import Settings

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(autouse=True)
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that a test runs in this process configures the logs of that test alone."""
    configure = structlog.configure
    monkeypatch.setattr(structlog, "configure", lambda **settings: configure(**settings | {"cache_logger_on_first_use": False}))
    yield
    structlog.reset_defaults()


@dataclass
class Service:
    """A running server, its engine, and a client that is connected to it over loopback."""

    client: httpx.Client
    engine: Engine


@contextmanager
def running(create_backend: BackendFactory = LocalBackend, wait: bool = True, **changes: Any) -> Iterator[Service]:
    """Serve on a free port in another thread, in fp32 by default; `wait` until the model is loaded or has failed to load."""
    settings = Settings(_env_file=None, **({"precision": "fp32"} | changes))
    engine = Engine(settings, create_backend)
    started = threading.Event()
    server = Server(create_app(settings, engine), engine)
    engine.on_started = started.set
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            if wait:
                assert started.wait(60)
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
                yield Service(client, engine)
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


def server_timing(response: httpx.Response) -> dict[str, float]:
    """Return the time of each stage in milliseconds."""
    metrics = (metric.split(";dur=") for metric in response.headers["Server-Timing"].split(", "))
    return {stage: float(duration) for stage, duration in metrics}


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """A server of the embedded model, shared by the tests that do not change its state."""
    with running(max_upload_bytes=4 * 2**20) as service:
        yield service


@pytest.fixture(scope="session")
def seven() -> bytes:
    """An image of a 7."""
    return (DIGITS / "7-1.png").read_bytes()
