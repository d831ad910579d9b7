"""The engine with the real network behind it, held at a gate where a test needs it to be busy."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from PIL import Image

from dinat.app.engine.backend import State
from dinat.app.engine.engine import Engine
from dinat.app.engine.local_backend import LocalBackend
from dinat.app.engine.runtimes.runtime import InferenceOptions, InferenceResult, Runtime
from dinat.app.errors import DeadlinePassed, ServiceError, TooLarge, Unavailable
from dinat.app.images import decode
from dinat.app.settings import Settings
from dinat.model.cpu.resize import Pixels
from tests.app.conftest import DIGITS

SEVEN = (DIGITS / "7-1.png").read_bytes()
ONE = InferenceOptions(top_k=1)


class GatedBackend(LocalBackend):
    """A network that runs no batch unless it is let; records the labels of every batch, and may fail on purpose."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.entered, self.allowed = threading.Semaphore(0), threading.Semaphore(0)
        self.batches: list[list[int]] = []
        self.fault: Callable[[int], BaseException | None] = lambda size: None
        self.warmed = False
        self.may_warm = threading.Event()
        self.may_warm.set()

    def load(self) -> Sequence[Runtime]:
        (runtime,) = super().load()
        compute = runtime.run

        def run(pixels: Pixels, wanted: Sequence[InferenceOptions]) -> list[InferenceResult]:
            if not self.warmed:
                return compute(pixels, wanted)
            self.entered.release()
            assert self.allowed.acquire(timeout=30)
            fault = self.fault(len(pixels))
            if fault is not None:
                raise fault
            answers = compute(pixels, wanted)
            self.batches.append([int(answer.class_ids[0]) for answer in answers])
            return answers

        runtime.run = run  # type: ignore[method-assign]
        return [runtime]

    def warm(self, runtime: Runtime, max_batch: int) -> int:
        assert self.may_warm.wait(30)
        self.warmed = False
        largest = super().warm(runtime, max_batch)
        self.warmed = True
        return largest


class Gated(Engine):
    """An engine before a GatedBackend."""

    core: GatedBackend

    def __init__(
        self,
        fault: Callable[[int], BaseException | None] = lambda size: None,
        create_backend: type[GatedBackend] = GatedBackend,
        **changes: Any,
    ) -> None:
        super().__init__(Settings(_env_file=None, **({"runtime": "torch"} | changes)), create_backend)
        self.backend.fault = fault

    def ask(self, digit: int = 7, wanted: InferenceOptions = ONE, deadline_ms: int | None = None) -> "asyncio.Task[list[Any]]":
        picture = (DIGITS / f"{digit}-1.png").read_bytes()
        return asyncio.create_task(self.submit([picture], wanted, deadline_ms))

    async def busy(self) -> None:
        """Until a batch stands at the gate."""
        assert await asyncio.to_thread(self.backend.entered.acquire, timeout=30)

    def let(self, batches: int = 100) -> None:
        self.backend.allowed.release(batches)

    async def decoded(self, count: int) -> None:
        """Until that many pictures wait with their pixels."""
        batcher = self.backend._batcher
        assert batcher is not None

        def wait() -> bool:
            with batcher._changed:
                return batcher._changed.wait_for(lambda: len(batcher._waiting) >= count, 30)

        assert await asyncio.to_thread(wait)


def drive(engine: Gated, test: Callable[[], Awaitable[None]]) -> None:
    """Start an engine, run a test on its loop, and stop it."""

    async def main() -> None:
        await engine.start()
        assert engine.state is State.READY, engine.failure
        try:
            await test()
        finally:
            engine.let(1000)
            await engine.stop()

    asyncio.run(main())


def test_what_comes_while_the_engine_is_busy_forms_the_next_batch() -> None:
    engine = Gated(max_batch=3)

    async def test() -> None:
        first = engine.ask(0)
        await engine.busy()
        rest = []
        for digit in (1, 2, 3, 4, 5):
            rest.append(engine.ask(digit))
            await engine.decoded(digit)
        engine.let()
        answers = await asyncio.gather(first, *rest)
        assert [int(answer.class_ids[0]) for (answer,) in answers] == [0, 1, 2, 3, 4, 5]

    drive(engine, test)
    assert engine.backend.batches == [[0], [1, 2, 3], [4, 5]]


def test_two_devices_compute_at_once_from_one_queue() -> None:
    class Two(GatedBackend):
        def load(self) -> Sequence[Runtime]:
            return [*super().load(), *super().load()]

    engine = Gated(create_backend=Two, max_batch=1)

    async def test() -> None:
        asked = [engine.ask(digit) for digit in (3, 4, 5)]
        await engine.busy()
        await engine.busy()
        await engine.decoded(1)  # the third waits for either
        engine.let()
        answers = await asyncio.gather(*asked)
        assert [int(answer.class_ids[0]) for (answer,) in answers] == [3, 4, 5]

    drive(engine, test)
    assert sorted(engine.backend.batches) == [[3], [4], [5]]


def test_beside_a_running_batch_a_device_takes_only_a_full_one() -> None:
    class Overlapping(GatedBackend):
        def load(self) -> Sequence[Runtime]:
            (runtime,) = super().load()
            runtime.lanes = 2
            return [runtime]

    engine = Gated(create_backend=Overlapping, max_batch=2)

    async def test() -> None:
        asked = [engine.ask(0)]
        await engine.busy()
        asked.append(engine.ask(1))
        await engine.decoded(1)
        assert not engine.backend.entered.acquire(blocking=False)
        asked.append(engine.ask(2))
        await engine.busy()
        engine.let()
        await asyncio.gather(*asked)

    drive(engine, test)
    assert sorted(engine.backend.batches) == [[0], [1, 2]]


def test_an_idle_engine_waits_for_nobody_unless_told_to() -> None:
    for max_wait_ms, batches in ((0, [[7], [7]]), (30_000, [[7, 7]])):
        engine = Gated(max_batch=2, max_wait_ms=max_wait_ms)

        async def test(engine: Gated = engine, together: bool = max_wait_ms > 0) -> None:
            engine.let()
            first = engine.ask()
            if not together:
                await first
            await engine.ask()
            await first

        drive(engine, test)
        assert engine.backend.batches == batches


def test_requests_with_different_needs_share_a_batch() -> None:
    engine = Gated()

    async def test() -> None:
        first = engine.ask()
        await engine.busy()
        plain, maps = engine.ask(1, InferenceOptions(2)), engine.ask(2, InferenceOptions(4, frozenset({"stage2", "pooled"})))
        await engine.decoded(2)
        engine.let()
        await first
        (few,), (many,) = await plain, await maps
        assert (len(few.scores), few.features) == (2, {})
        assert len(many.scores) == 4
        assert many.features["stage2"].shape == (64, 8, 8)
        assert many.features["pooled"].shape == (128,)

    drive(engine, test)
    assert [len(batch) for batch in engine.backend.batches] == [1, 2]


def test_a_cancelled_request_is_not_computed() -> None:
    engine = Gated()

    async def test() -> None:
        first = engine.ask(0)
        await engine.busy()
        gone, kept = engine.ask(1), engine.ask(2)
        await engine.decoded(2)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert engine.waiting == 1
        engine.let()
        await first
        await kept

    drive(engine, test)
    assert engine.backend.batches == [[0], [2]]


def test_a_passed_deadline_is_an_error_and_no_work_is_done_for_it() -> None:
    engine = Gated()

    async def test() -> None:
        first = engine.ask(0)
        await engine.busy()
        late, patient = engine.ask(1, deadline_ms=200), engine.ask(2, deadline_ms=60_000)
        await engine.decoded(2)
        (answer,) = await late
        assert isinstance(answer, DeadlinePassed)
        engine.let()
        await first
        (answer,) = await patient
        assert isinstance(answer, InferenceResult)

    drive(engine, test)
    assert engine.backend.batches == [[0], [2]]
    assert engine.waiting == 0


def test_a_callers_deadline_cannot_pass_the_services() -> None:
    engine = Gated(deadline_ms=100)

    async def test() -> None:
        (answer,) = await engine.ask(deadline_ms=10**9)
        assert isinstance(answer, DeadlinePassed)

    drive(engine, test)


def test_beyond_the_queue_limit_work_is_refused_with_a_time_to_come_back() -> None:
    engine = Gated(queue_limit=3, max_batch=1)

    async def test() -> None:
        first = engine.ask(0)
        await engine.busy()
        waiting = asyncio.create_task(engine.submit([SEVEN, SEVEN], ONE))
        await engine.decoded(2)
        with pytest.raises(Unavailable, match="2 pictures wait already, at most 3 may") as refused:
            await engine.submit([SEVEN, SEVEN], ONE)
        assert refused.value.headers is not None
        assert int(refused.value.headers["Retry-After"]) >= 1
        last = engine.ask(3)
        await engine.decoded(3)
        with pytest.raises(Unavailable):
            await engine.submit([SEVEN], ONE)
        with pytest.raises(TooLarge, match="has 4 pictures, at most 3 can wait at once"):
            await engine.submit([SEVEN] * 4, ONE)
        engine.let()
        await asyncio.gather(first, waiting, last)
        assert len(await engine.submit([SEVEN] * 3, ONE)) == 3

    drive(engine, test)


def test_one_bad_picture_does_not_spoil_the_others() -> None:
    engine = Gated()

    async def test() -> None:
        engine.let()
        good, bad, empty, again = await engine.submit([SEVEN, b"nonsense", b"", SEVEN], ONE)
        assert isinstance(good, InferenceResult)
        assert isinstance(again, InferenceResult)
        assert isinstance(bad, ServiceError)
        assert isinstance(empty, ServiceError)
        assert (bad.status, empty.status) == (415, 400)

    drive(engine, test)


def test_a_batch_that_fails_is_split_until_the_cause_is_alone() -> None:
    engine = Gated()

    async def test() -> None:
        (runtime,) = engine.backend.runtimes
        poison = runtime.processor.resize(Image.open(DIGITS / "3-1.png"))
        compute = runtime.run

        def run(pixels: Pixels, wanted: Sequence[InferenceOptions]) -> list[InferenceResult]:
            if any((one == poison).all() for one in pixels):
                raise ValueError("this picture breaks the network")
            return compute(pixels, wanted)

        runtime.run = run  # type: ignore[method-assign]
        first = engine.ask(0)
        await engine.busy()
        rest = [engine.ask(digit) for digit in (1, 2, 3, 4, 5)]
        await engine.decoded(5)
        engine.let()
        await first
        answers = [answer for (answer,) in await asyncio.gather(*rest)]
        assert [isinstance(answer, InferenceResult) for answer in answers] == [True, True, False, True, True]
        assert isinstance(answers[2], ServiceError)
        assert answers[2].status == 500
        assert "the log has it" in answers[2].detail

    drive(engine, test)
    assert sorted(label for batch in engine.backend.batches for label in batch) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_halves_the_batch_and_the_size_that_fits_is_kept(error: Exception) -> None:
    engine = Gated(fault=lambda size: error if size > 2 else None, max_batch=8)

    async def test() -> None:
        for _ in range(2):
            first = engine.ask(0)
            await engine.busy()
            rest = [engine.ask(digit) for digit in range(1, 9)]
            await engine.decoded(8)
            engine.let()
            answers = [answer for (answer,) in await asyncio.gather(first, *rest)]
            assert [int(answer.class_ids[0]) for answer in answers] == list(range(9))
            while engine.backend.allowed.acquire(blocking=False):
                pass
            while engine.backend.entered.acquire(blocking=False):
                pass

    drive(engine, test)
    assert engine.backend._batcher is not None
    assert engine.backend._batcher.max_batch == 2
    assert all(len(batch) <= 2 for batch in engine.backend.batches)


def test_out_of_memory_for_a_single_picture_is_an_error() -> None:
    engine = Gated(fault=lambda size: MemoryError())

    async def test() -> None:
        engine.let()
        (answer,) = await engine.ask()
        assert isinstance(answer, ServiceError)
        engine.backend.fault = lambda size: None
        (answer,) = await engine.ask()
        assert isinstance(answer, InferenceResult)

    drive(engine, test)


def test_a_dead_thread_is_started_again_once_and_nothing_stays_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Gated(fault=lambda size: SystemExit("killed"))

    async def test() -> None:
        first = engine.ask(0)
        await engine.busy()
        waiting = engine.ask(1)
        await engine.decoded(1)
        engine.backend.may_warm.clear()
        engine.let(1)
        (answer,) = await first
        assert isinstance(answer, Unavailable)
        assert "the engine's thread died: SystemExit: killed" in answer.detail
        assert engine.state is State.FAILED
        assert "killed" in engine.why_not_ready()

        engine.backend.fault = lambda size: None
        engine.let(1)
        engine.backend.may_warm.set()
        await engine.busy()
        (answer,) = await waiting
        assert int(answer.class_ids[0]) == 1
        assert engine.state is State.READY

        engine.backend.fault = lambda size: SystemExit("killed again")
        running = engine.ask(2)
        await engine.busy()
        queued = engine.ask(3)
        await engine.decoded(1)
        decoding, may_decode = threading.Event(), threading.Event()

        def slowly(data: bytes, max_pixels: int, draft: tuple[int, int] | None) -> Image.Image:
            decoding.set()
            assert may_decode.wait(30)
            return decode(data, max_pixels, draft)

        monkeypatch.setattr("dinat.app.engine.engine.decode", slowly)
        late = engine.ask(4)
        assert await asyncio.to_thread(decoding.wait, 30)
        engine.let(1)
        (answer,) = await running
        assert isinstance(answer, Unavailable)
        may_decode.set()
        for task in (queued, late):
            (answer,) = await task
            assert isinstance(answer, Unavailable)
        assert engine.state is State.FAILED
        with pytest.raises(Unavailable, match="killed again"):
            await engine.submit([SEVEN], ONE)

    drive(engine, test)


def test_an_error_of_the_decoder_is_answered_and_the_next_picture_works(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Gated()

    async def test() -> None:
        engine.let()
        with monkeypatch.context() as patched:
            patched.setattr("dinat.app.engine.engine.decode", lambda *_: 1 / 0)
            (answer,) = await engine.ask()
        assert isinstance(answer, ServiceError)
        assert answer.status == 500
        (answer,) = await engine.ask()
        assert isinstance(answer, InferenceResult)

    drive(engine, test)


def test_draining_finishes_what_was_taken_and_refuses_the_rest() -> None:
    engine = Gated()

    async def test() -> None:
        first = engine.ask(0)
        await engine.busy()
        second = engine.ask(1)
        await engine.decoded(1)
        draining = asyncio.create_task(engine.drain())
        for _ in range(2):  # it begins, and its lame duck of no seconds ends
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="the service is stopping"):
            await engine.submit([SEVEN], ONE)
        assert not draining.done()
        engine.let()
        await draining
        assert first.done()
        assert second.done()

    drive(engine, test)
    assert engine.backend.batches == [[0], [1]]


def test_draining_ends_when_its_time_is_over_and_what_is_left_gets_an_error() -> None:
    engine = Gated(drain_seconds=0.05, max_batch=1)

    async def test() -> None:
        first = engine.ask(0)
        await engine.busy()
        second = engine.ask(1)
        await engine.decoded(1)
        await engine.drain()
        assert not second.done()
        stopping = asyncio.create_task(engine.stop())
        (answer,) = await second
        assert isinstance(answer, Unavailable)
        engine.let()
        await stopping
        await first

    drive(engine, test)
