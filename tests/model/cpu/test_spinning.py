"""OpenMP threads that spin or sleep, in a process with real competitors for its CPU."""

import ctypes
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TextIO

import psutil
import pytest

from benchmarks.timing import busy_programs
from dinat.model.cpu import spinning
from dinat.model.cpu.spinning import check_spinning, thread_times

pytestmark = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not report waiting times")

COMPUTE = """
import json, os, sys, time, torch
from dinat.model.attention import neighborhood_attention
from dinat.model.cpu import spinning

q = torch.randn(1, 28, 28, 2, 32)
seen = set()
end = time.monotonic() + float(sys.argv[2])
with torch.inference_mode():
    while time.monotonic() < end and sys.argv[1] not in seen:
        neighborhood_attention(q, q, q, torch.randn(2, 13, 13), 7, 1)
        torch.randn(300, 300) @ torch.randn(300, 300)
        state = spinning._spinning(os.getpid())
        seen.add("user decides" if state is None else "sleeps" if state.is_short else "spins" if "sleeps" in seen else "")
print(json.dumps(sorted(seen)))
"""


def states(until: str, seconds: float, **environment: str) -> list[str]:
    """Compute in a process of its own until a state is seen, and return the states that were."""
    command = [sys.executable, "-c", COMPUTE, until, str(seconds)]
    inherited = {name: value for name, value in psutil.Process().environ().items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=inherited | environment, check=True, capture_output=True, text=True)
    return [state for state in json.loads(done.stdout) if state]


@pytest.mark.slow
def test_threads_sleep_beside_busy_programs() -> None:
    with busy_programs(psutil.cpu_count() or 1):
        assert states("sleeps", 30) == ["sleeps"]


@pytest.mark.parametrize(
    ("variable", "value"), [("OMP_WAIT_POLICY", "passive"), pytest.param("GOMP_SPINCOUNT", "1000", marks=pytest.mark.slow)]
)
def test_users_choice_is_left_alone(variable: str, value: str) -> None:
    assert states("user decides", 30, **{variable: value}) == ["user decides"]


WAIT = """
import ctypes, os, threading, time, torch
from dinat.model.cpu.spinning import Spinning

torch.set_num_threads(2)
torch.ones(2**20).add_(1)
(path,) = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
gomp = ctypes.CDLL(path)
spinning = Spinning(gomp)
work = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)

def computed_while_waiting():
    before = time.process_time()
    for _ in range(100):
        gomp.GOMP_parallel(work, None, ctypes.c_uint(2), ctypes.c_uint(0))
        time.sleep(0.002)
    return time.process_time() - before

def decide(computed, waited):
    spinning._decide(spinning._computed + computed, spinning._waited + waited)

spins = computed_while_waiting()
threads = len(os.listdir("/proc/self/task"))
decide(0.001, 0.001)
assert not spinning.is_short  # too little to tell
decide(1, 0.2)
assert spinning.is_short
sleeps = computed_while_waiting()
decide(0.5, 0)
assert spinning.is_short  # too early
decide(2, 0.01)
assert not spinning.is_short
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(10)
while len(os.listdir("/proc/self/task")) > threads:  # libgomp ends the team
    time.sleep(0.01)
print(spins, sleeps, computed_while_waiting())
"""


def test_waiting_threads_compute_only_while_they_spin() -> None:
    command = [sys.executable, "-c", WAIT]
    spins, sleeps, again = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert sleeps < min(spins, again) / 2


def test_nothing_is_started_where_no_thread_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """libgomp would end the process."""

    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    maps = Path("/proc/self/maps").read_text().splitlines()
    state = spinning.Spinning(ctypes.CDLL(next(line.split()[-1] for line in maps if "libgomp" in line)))
    monkeypatch.setattr("threading.Thread.start", start)
    state._decide(state._computed + 1, state._waited + 1)
    assert not state.is_short


def test_thread_that_ends_while_its_times_are_read_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    can_end = threading.Event()
    thread = threading.Thread(target=can_end.wait)
    thread.start()

    def open_until_the_thread_ends(path: Path) -> TextIO:
        file = open(path)  # noqa: SIM115  # closed by thread_times
        if path.parent.name == str(thread.native_id):
            can_end.set()
            thread.join()
            while path.exists():  # the kernel ends it a little later
                pass
        return file

    monkeypatch.setattr(spinning, "open", open_until_the_thread_ends, raising=False)
    assert thread_times() > (0, 0)
    assert can_end.is_set()


def test_times_of_threads_grow() -> None:
    computed, waited = thread_times()
    sum(range(10**6))
    later = thread_times()
    assert later[0] > computed and later[1] >= waited
    check_spinning()
