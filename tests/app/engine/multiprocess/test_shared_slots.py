import multiprocessing
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from dinat.app.engine.multiprocess.shared_slots import Slots
from dinat.model import ConfigError

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def slots() -> Iterator[Slots]:
    slots = Slots.create(4, 12)
    yield slots
    slots.close()


def test_slots_are_taken_all_or_none_and_given_back(slots: Slots) -> None:
    assert slots.take(1, 3) == [0, 1, 2]
    assert slots.take(2, 2) is None
    assert slots.used == 3
    slots.free(1)
    assert slots.take(2, 2) == [1, 3]
    assert slots.owned(1) == [0, 2]
    assert slots.owned(2) == [1, 3]
    assert slots.take(3, 1) is None


def test_pixels_are_where_they_were_put_also_seen_from_elsewhere(slots: Slots) -> None:
    slots.view(2, (2, 2, 3))[:] = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    other = Slots(os.dup(slots.descriptor), 4, 12)
    assert other.view(2, (2, 2, 3)).ravel().tolist() == list(range(12))
    assert not other.view(1, (2, 2, 3)).any()
    assert not other.view(3, (2, 2, 3)).any()
    other.close()


def test_no_slot_is_ever_given_to_two_processes() -> None:
    slots = Slots.create(50, 1)

    def take(owner: int) -> None:
        taken: list[int] = []
        for _ in range(2000):
            got = slots.take(owner, 3)
            if got is not None:
                assert all(slots._memory[slot] == owner for slot in got)
                taken += got
            if len(taken) > 20:
                for slot in taken:
                    assert slots._memory[slot] == owner, "somebody else took it meanwhile"
                    slots.free(slot)
                taken = []
        for slot in taken:
            slots.free(slot)

    children = [FORK.Process(target=take, args=[owner]) for owner in range(1, 5)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert slots.used == 0
    slots.close()


def test_a_process_that_is_killed_while_it_looks_for_a_slot_stops_nobody(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    looking, never = FORK.Event(), threading.Event()

    def stuck() -> None:
        def owners() -> bytes:
            looking.set()
            never.wait()
            return b""

        monkeypatch.setattr(slots, "_owners", owners)
        slots.take(1, 1)

    child = FORK.Process(target=stuck)
    child.start()
    assert looking.wait(30)
    child.kill()
    assert slots.take(2, 1) == [0]
    child.join()


def test_more_memory_than_there_is_is_one_clear_line() -> None:
    with pytest.raises(
        ConfigError, match=r"QUEUE_LIMIT 1000000 pictures of 150,000,000 bytes want .* are free: lower QUEUE_LIMIT"
    ):
        Slots.create(1_000_000, 150_000_000)
