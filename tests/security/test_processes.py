"""Processes that do not respond, signals, and limits of the operating system."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from dinat.app.cli.serve import fit_connections
from dinat.app.server import supervisor
from dinat.app.server.supervisor import KILL_CHECKS, LOADING_CHECKS, NOT_RESPONDING, SILENT_CHECKS, Supervisor
from dinat.app.settings import Settings
from tests.e2e.processes import DIGITS, Server, load_until_rejected

IMAGE = (DIGITS / "7-1.png").read_bytes()


@pytest.mark.process
@pytest.mark.parametrize("frontends", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm_while_the_hub_does_not_answer_ends_the_service(frontends: int, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_ETAG_TIMEOUT": "600",
            "HF_HUB_OFFLINE": "0",
        }
        command = [sys.executable, "-m", "dinat", "serve", "--port=0", "--model=some/model", f"--frontends={frontends}"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process, ExitStack() as stack:
            stack.callback(process.kill)
            hub.settimeout(60)
            connection, _ = hub.accept()
            with connection:
                process.terminate()
                assert process.wait(10) == 0


@pytest.mark.slow
@pytest.mark.process
def test_second_sigterm_ends_the_service_at_once() -> None:
    with Server(lame_duck_seconds=60) as server:
        server.process.terminate()
        while httpx.get(f"{server.url}/health/ready").status_code == 200:
            pass
        server.process.terminate()
        assert server.process.wait(5) == 0
        server.wait()


@pytest.mark.slow
@pytest.mark.process
def test_processes_that_do_not_stop_are_killed_once() -> None:
    with Server(frontends=2) as server:
        running = processes(server)
        for name in running.keys() - {"supervisor"}:
            os.kill(running[name]["pid"], signal.SIGSTOP)
        server.process.terminate()
        while server.process.poll() is None:
            server.process.terminate()
            time.sleep(0.1)
        server.wait()
    killed = [event["process"] for event in server.events if event["event"] == "process killed after timeout"]
    assert sorted(killed) == ["engine", "frontend-1", "frontend-2"]


@pytest.mark.process
@pytest.mark.parametrize("frontends", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sighup_answers_all_requests(frontends: int) -> None:
    with Server(frontends=frontends) as server, load_until_rejected(server.url, IMAGE) as statuses:
        server.process.send_signal(signal.SIGHUP)
        server.process.send_signal(signal.SIGHUP)  # a shell and the kernel both send it when a terminal is closed
        assert server.wait() == 0
    assert set(statuses) <= {200, 503}


@pytest.mark.slow
@pytest.mark.process
def test_sighup_does_not_stop_a_service_that_nohup_started() -> None:
    with Server(prefix=["nohup"], frontends=2) as server:
        for process in (child := psutil.Process(server.process.pid), *child.children()):
            process.send_signal(signal.SIGHUP)
        for _ in range(4):
            assert httpx.post(f"{server.url}/classify", content=IMAGE).status_code == 200
        assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.process
def test_nothing_remains_when_the_supervisor_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        with Server(frontends=2) as server:
            children = psutil.Process(server.process.pid).children()
            assert list(Path(folder).glob("dinat-supervisor-*"))
            server.process.kill()
            _, alive = psutil.wait_procs(children, timeout=30)
            assert not alive
            server.wait()
        assert not list(Path(folder).glob("dinat-supervisor-*"))  # caches stay where there is no home


@pytest.mark.slow
@pytest.mark.process
def test_connections_over_a_low_limit_of_open_files_are_rejected_with_503() -> None:
    with Server(prefix=["sh", "-c", 'ulimit -n 64; exec "$@"', "sh"]) as server, ExitStack() as stack:
        (warning,) = [event for event in server.events if "MAX_CONNECTIONS lowered" in event["event"]]
        assert (warning["max_connections"], warning["open_files"]) == (10, 64)
        statuses = []
        for _ in range(20):
            client = stack.enter_context(httpx.Client(base_url=server.url, timeout=30))
            statuses.append(client.post("/classify", content=IMAGE).status_code)
        assert statuses == [200] * 10 + [503] * 10
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("configured", "frontends", "descriptors", "expected"),
    [
        (1024, 1, None, 1024),
        (1024, 1, 4096, 1024),
        (1024, 1, 1024, 330),
        (1024, 4, 1024, 1024),
        (1024, 2, 64, 20),
        (5, 1, 8, 1),
    ],
)
def test_max_connections_fits_the_limit_of_open_files(
    configured: int, frontends: int, descriptors: int | None, expected: int
) -> None:
    settings = Settings(_env_file=None, max_connections=configured)
    assert fit_connections(settings, frontends, descriptors).max_connections == expected


@pytest.fixture
def watching() -> Iterator[Supervisor]:
    """A supervisor with one child, which never reports."""
    assert supervisor.FORK is not None
    watching = Supervisor(Settings(_env_file=None, port=0), frontends=1)
    child = supervisor.FORK.Process(target=time.sleep, args=[60])
    child.start()
    watching._children["frontend-1"] = child
    yield watching
    child.kill()
    child.join()
    watching._stop(0)


def check(watching: Supervisor, count: int, before: Any = lambda: None) -> None:
    """Check `count` times, and call `before` each time."""
    for _ in range(count):
        before()
        watching._next_check = 0
        watching._check_processes()


def test_silent_process_is_not_responding_then_killed(watching: Supervisor) -> None:
    board, child = watching._board, watching._children["frontend-1"]
    board.report("frontend-1", "ready")
    check(watching, 1 + SILENT_CHECKS - 1)
    assert board.get("frontend-1").state == "ready"
    check(watching, 1)
    assert board.get("frontend-1").state == NOT_RESPONDING
    check(watching, KILL_CHECKS - SILENT_CHECKS - 1)
    assert child.is_alive()
    check(watching, 1)
    child.join(10)
    assert child.exitcode == -signal.SIGKILL


def test_process_that_reports_is_not_killed(watching: Supervisor) -> None:
    board, child = watching._board, watching._children["frontend-1"]
    board.report("frontend-1", "ready")
    check(watching, KILL_CHECKS)
    check(watching, 3 * KILL_CHECKS, before=lambda: board.report("frontend-1", "ready"))
    assert board.get("frontend-1").state == "ready"
    assert child.is_alive()


@pytest.mark.parametrize("state", ["starting", "loading"])
def test_process_that_loads_may_be_silent_for_longer(watching: Supervisor, state: str) -> None:
    board, child = watching._board, watching._children["frontend-1"]
    board.report("frontend-1", state)
    check(watching, LOADING_CHECKS)
    assert (board.get("frontend-1").state, child.is_alive()) == (state, True)
    check(watching, 1)
    child.join(10)
    assert child.exitcode == -signal.SIGKILL


def test_time_in_which_the_supervisor_itself_was_suspended_counts_as_one_check(
    watching: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching._board.report("frontend-1", "ready")
    check(watching, 2)
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + 3600)
    for _ in range(3 * KILL_CHECKS):
        watching._check_processes()
    assert watching._board.get("frontend-1").state == "ready"
    assert watching._children["frontend-1"].is_alive()


def processes(server: Server) -> dict[str, dict[str, Any]]:
    return {process["name"]: process for process in httpx.get(f"{server.url}/health", timeout=60).json()["processes"]}


@pytest.mark.process
@pytest.mark.slow
def test_stopped_engine_process_is_restarted_once_then_the_service_exits() -> None:
    with Server(frontends=2) as server:
        os.kill(processes(server)["engine"]["pid"], signal.SIGSTOP)
        stopped = time.monotonic()
        while httpx.get(f"{server.url}/health/live").status_code == 200:
            assert time.monotonic() < stopped + 9
        assert "does not respond" in httpx.post(f"{server.url}/classify", content=IMAGE).json()["detail"]
        while processes(server)["engine"]["restarts"] == 0:
            assert time.monotonic() < stopped + 30
        while httpx.get(f"{server.url}/health/ready").status_code != 200:
            pass
        assert httpx.post(f"{server.url}/classify", content=IMAGE).status_code == 200
        os.kill(processes(server)["engine"]["pid"], signal.SIGSTOP)
        assert server.wait() == 1
    assert "dinat: the engine process exited again, with status -9" in server.events[-1]["event"]


@pytest.mark.process
@pytest.mark.slow
def test_stopped_frontend_process_is_replaced_and_the_connections_that_wait_for_it_are_answered() -> None:
    with Server(frontends=2) as server, ThreadPoolExecutor(16) as threads:
        os.kill(processes(server)["frontend-1"]["pid"], signal.SIGSTOP)

        def classify(_: int) -> int:  # the kernel gives about half of the connections to the stopped process
            return httpx.post(f"{server.url}/classify", content=IMAGE, timeout=60).status_code

        assert set(threads.map(classify, range(16))) <= {200, 503}  # 503 until the replacement is connected to the engine
        assert processes(server)["frontend-1"]["restarts"] == 1
        assert server.stop() == 0
