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


def test_acquire_returns_all_slots_or_none(slots: Slots) -> None:
    assert slots.acquire(1, 3) == [0, 1, 2]
    assert slots.acquire(2, 2) is None
    assert slots.used == 3
    slots.release(1)
    assert slots.acquire(2, 2) == [1, 3]
    assert slots.owned(1) == [0, 2]
    assert slots.owned(2) == [1, 3]
    assert slots.acquire(3, 1) is None


def test_pixels_are_visible_through_another_mapping(slots: Slots) -> None:
    slots.view(2, (2, 2, 3))[:] = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    other = Slots(os.dup(slots.descriptor), 4, 12)
    assert other.view(2, (2, 2, 3)).ravel().tolist() == list(range(12))
    assert not other.view(1, (2, 2, 3)).any()
    assert not other.view(3, (2, 2, 3)).any()
    other.close()


def test_no_slot_has_two_owners() -> None:
    slots = Slots.create(50, 1)

    def acquire(owner: int) -> None:
        owned: list[int] = []
        for _ in range(2000):
            acquired = slots.acquire(owner, 3)
            if acquired is not None:
                assert all(slots._memory[slot] == owner for slot in acquired)
                owned += acquired
            if len(owned) > 20:
                for slot in owned:
                    assert slots._memory[slot] == owner, "another process acquired it"
                    slots.release(slot)
                owned = []
        for slot in owned:
            slots.release(slot)

    children = [FORK.Process(target=acquire, args=[owner]) for owner in range(1, 5)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert slots.used == 0
    slots.close()


def test_process_killed_while_it_holds_the_lock_blocks_no_other(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, never = FORK.Event(), threading.Event()

    def hold_lock() -> None:
        def owners() -> bytes:
            locked.set()
            never.wait()
            return b""

        monkeypatch.setattr(slots, "_owners", owners)
        slots.acquire(1, 1)

    child = FORK.Process(target=hold_lock)
    child.start()
    assert locked.wait(30)
    child.kill()
    assert slots.acquire(2, 1) == [0]
    child.join()


def test_too_large_a_queue_is_a_config_error() -> None:
    with pytest.raises(
        ConfigError, match=r"QUEUE_LIMIT 1000000 images of 150,000,000 bytes require .* are free: lower QUEUE_LIMIT"
    ):
        Slots.create(1_000_000, 150_000_000)
