"""The engine with a real model, whose batches a test can hold back."""

import asyncio
import threading
import time
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
    """A backend whose batches wait for permission. It records the predicted classes of every batch and injects faults."""

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

        def run(pixels: Pixels, options: Sequence[InferenceOptions]) -> list[InferenceResult]:
            if not self.warmed:
                return compute(pixels, options)
            self.entered.release()
            assert self.allowed.acquire(timeout=30)
            fault = self.fault(len(pixels))
            if fault is not None:
                raise fault
            results = compute(pixels, options)
            self.batches.append([int(result.class_ids[0]) for result in results])
            return results

        runtime.run = run  # type: ignore[method-assign]
        return [runtime]

    def warm(self, runtime: Runtime, max_batch: int) -> int:
        assert self.may_warm.wait(30)
        self.warmed = False
        largest = super().warm(runtime, max_batch)
        self.warmed = True
        return largest


class GatedEngine(Engine):
    """An engine with a GatedBackend."""

    backend: GatedBackend

    def __init__(
        self,
        fault: Callable[[int], BaseException | None] = lambda size: None,
        create_backend: type[GatedBackend] = GatedBackend,
        **changes: Any,
    ) -> None:
        super().__init__(Settings(_env_file=None, **({"runtime": "torch"} | changes)), create_backend)
        self.backend.fault = fault

    def classify(
        self, digit: int = 7, options: InferenceOptions = ONE, deadline_ms: int | None = None
    ) -> "asyncio.Task[list[Any]]":
        """Submit an image of a digit."""
        image = (DIGITS / f"{digit}-1.png").read_bytes()
        return asyncio.create_task(self.submit([image], options, deadline_ms))

    async def wait_until_busy(self) -> None:
        """Wait until a batch waits for permission."""
        assert await asyncio.to_thread(self.backend.entered.acquire, timeout=30)

    def allow(self, batches: int = 100) -> None:
        """Let batches run."""
        self.backend.allowed.release(batches)

    async def wait_until_queued(self, count: int) -> None:
        """Wait until that many decoded images are queued."""
        batcher = self.backend._batcher
        assert batcher is not None

        def wait() -> bool:
            with batcher._changed:
                return batcher._changed.wait_for(lambda: len(batcher._waiting) >= count, 30)

        assert await asyncio.to_thread(wait)


def run_with(engine: GatedEngine, test: Callable[[], Awaitable[None]]) -> None:
    """Start an engine, run a test on its event loop, and stop it."""

    async def main() -> None:
        await engine.start()
        assert engine.state is State.READY, engine.failure
        try:
            await test()
        finally:
            engine.allow(1000)
            await engine.stop()

    asyncio.run(main())


def test_images_that_arrive_during_a_batch_form_the_next_batch() -> None:
    engine = GatedEngine(max_batch=3)

    async def test() -> None:
        first = engine.classify(0)
        await engine.wait_until_busy()
        rest = []
        for digit in (1, 2, 3, 4, 5):
            rest.append(engine.classify(digit))
            await engine.wait_until_queued(digit)
        engine.allow()
        results = await asyncio.gather(first, *rest)
        assert [int(result.class_ids[0]) for (result,) in results] == [0, 1, 2, 3, 4, 5]

    run_with(engine, test)
    assert engine.backend.batches == [[0], [1, 2, 3], [4, 5]]


def test_two_devices_share_one_queue() -> None:
    class Two(GatedBackend):
        def load(self) -> Sequence[Runtime]:
            return [*super().load(), *super().load()]

    engine = GatedEngine(create_backend=Two, max_batch=1)

    async def test() -> None:
        requests = [engine.classify(digit) for digit in (3, 4, 5)]
        await engine.wait_until_busy()
        await engine.wait_until_busy()
        await engine.wait_until_queued(1)  # the third waits for either device
        engine.allow()
        results = await asyncio.gather(*requests)
        assert [int(result.class_ids[0]) for (result,) in results] == [3, 4, 5]

    run_with(engine, test)
    assert sorted(engine.backend.batches) == [[3], [4], [5]]


def test_busy_device_starts_only_full_batches() -> None:
    class Overlapping(GatedBackend):
        def load(self) -> Sequence[Runtime]:
            (runtime,) = super().load()
            runtime.lanes = 2
            return [runtime]

    engine = GatedEngine(create_backend=Overlapping, max_batch=2)

    async def test() -> None:
        requests = [engine.classify(0)]
        await engine.wait_until_busy()
        requests.append(engine.classify(1))
        await engine.wait_until_queued(1)
        assert not engine.backend.entered.acquire(blocking=False)
        requests.append(engine.classify(2))
        await engine.wait_until_busy()
        engine.allow()
        await asyncio.gather(*requests)

    run_with(engine, test)
    assert sorted(engine.backend.batches) == [[0], [1, 2]]


def test_idle_engine_waits_for_more_images_only_with_max_wait() -> None:
    for max_wait_ms, batches in ((0, [[7], [7]]), (30_000, [[7, 7]])):
        engine = GatedEngine(max_batch=2, max_wait_ms=max_wait_ms)

        async def test(engine: GatedEngine = engine, together: bool = max_wait_ms > 0) -> None:
            engine.allow()
            first = engine.classify()
            if not together:
                await first
            await engine.classify()
            await first

        run_with(engine, test)
        assert engine.backend.batches == batches


def test_requests_with_different_options_share_a_batch() -> None:
    engine = GatedEngine()

    async def test() -> None:
        first = engine.classify()
        await engine.wait_until_busy()
        plain = engine.classify(1, InferenceOptions(2))
        maps = engine.classify(2, InferenceOptions(4, frozenset({"stage2", "pooled"})))
        await engine.wait_until_queued(2)
        engine.allow()
        await first
        (few,), (many,) = await plain, await maps
        assert (len(few.scores), few.features) == (2, {})
        assert len(many.scores) == 4
        assert many.features["stage2"].shape == (64, 8, 8)
        assert many.features["pooled"].shape == (128,)

    run_with(engine, test)
    assert [len(batch) for batch in engine.backend.batches] == [1, 2]


def test_cancelled_request_is_not_computed() -> None:
    engine = GatedEngine()

    async def test() -> None:
        first = engine.classify(0)
        await engine.wait_until_busy()
        cancelled, other = engine.classify(1), engine.classify(2)
        await engine.wait_until_queued(2)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert engine.waiting == 1
        engine.allow()
        await first
        await other

    run_with(engine, test)
    assert engine.backend.batches == [[0], [2]]


def test_request_past_its_deadline_fails_and_is_not_computed() -> None:
    engine = GatedEngine()

    async def test() -> None:
        first = engine.classify(0)
        await engine.wait_until_busy()
        late, other = engine.classify(1, deadline_ms=200), engine.classify(2, deadline_ms=60_000)
        await engine.wait_until_queued(2)
        (result,) = await late
        assert isinstance(result, DeadlinePassed)
        engine.allow()
        await first
        (result,) = await other
        assert isinstance(result, InferenceResult)

    run_with(engine, test)
    assert engine.backend.batches == [[0], [2]]
    assert engine.waiting == 0


def test_request_deadline_is_limited_by_the_setting() -> None:
    engine = GatedEngine(deadline_ms=100)

    async def test() -> None:
        (result,) = await engine.classify(deadline_ms=10**9)
        assert isinstance(result, DeadlinePassed)

    run_with(engine, test)


def test_full_queue_rejects_images_with_retry_after() -> None:
    engine = GatedEngine(queue_limit=3, max_batch=1)

    async def test() -> None:
        first = engine.classify(0)
        await engine.wait_until_busy()
        waiting = asyncio.create_task(engine.submit([SEVEN, SEVEN], ONE))
        await engine.wait_until_queued(2)
        with pytest.raises(Unavailable, match=r"the queue is full \(2 of 3 images\)") as rejected:
            await engine.submit([SEVEN, SEVEN], ONE)
        assert rejected.value.headers is not None
        assert int(rejected.value.headers["Retry-After"]) >= 1
        last = engine.classify(3)
        await engine.wait_until_queued(3)
        with pytest.raises(Unavailable):
            await engine.submit([SEVEN], ONE)
        with pytest.raises(TooLarge, match="has 4 images, at most 3 can be queued"):
            await engine.submit([SEVEN] * 4, ONE)
        engine.allow()
        await asyncio.gather(first, waiting, last)
        assert len(await engine.submit([SEVEN] * 3, ONE)) == 3

    run_with(engine, test)


def test_bad_image_does_not_fail_the_others() -> None:
    engine = GatedEngine()

    async def test() -> None:
        engine.allow()
        good, bad, empty, again = await engine.submit([SEVEN, b"nonsense", b"", SEVEN], ONE)
        assert isinstance(good, InferenceResult)
        assert isinstance(again, InferenceResult)
        assert isinstance(bad, ServiceError)
        assert isinstance(empty, ServiceError)
        assert (bad.status, empty.status) == (415, 400)

    run_with(engine, test)


def test_failing_batch_is_split_until_only_the_cause_fails() -> None:
    engine = GatedEngine()

    async def test() -> None:
        (runtime,) = engine.backend.runtimes
        poison = runtime.processor.resize(Image.open(DIGITS / "3-1.png"))
        compute = runtime.run

        def run(pixels: Pixels, options: Sequence[InferenceOptions]) -> list[InferenceResult]:
            if any((image == poison).all() for image in pixels):
                raise ValueError("this image breaks the network")
            return compute(pixels, options)

        runtime.run = run  # type: ignore[method-assign]
        first = engine.classify(0)
        await engine.wait_until_busy()
        rest = [engine.classify(digit) for digit in (1, 2, 3, 4, 5)]
        await engine.wait_until_queued(5)
        engine.allow()
        await first
        results = [result for (result,) in await asyncio.gather(*rest)]
        assert [isinstance(result, InferenceResult) for result in results] == [True, True, False, True, True]
        assert isinstance(results[2], ServiceError)
        assert results[2].status == 500
        assert "see the log of the service" in results[2].detail

    run_with(engine, test)
    assert sorted(label for batch in engine.backend.batches for label in batch) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_reduces_the_largest_batch(error: Exception) -> None:
    engine = GatedEngine(fault=lambda size: error if size > 2 else None, max_batch=8)

    async def test() -> None:
        for _ in range(2):
            first = engine.classify(0)
            await engine.wait_until_busy()
            rest = [engine.classify(digit) for digit in range(1, 9)]
            await engine.wait_until_queued(8)
            engine.allow()
            results = [result for (result,) in await asyncio.gather(first, *rest)]
            assert [int(result.class_ids[0]) for result in results] == list(range(9))
            while engine.backend.allowed.acquire(blocking=False):
                pass
            while engine.backend.entered.acquire(blocking=False):
                pass

    run_with(engine, test)
    assert engine.backend._batcher is not None
    assert engine.backend._batcher.max_batch == 2
    assert all(len(batch) <= 2 for batch in engine.backend.batches)


def test_out_of_memory_for_a_single_image_is_an_error() -> None:
    engine = GatedEngine(fault=lambda size: MemoryError())

    async def test() -> None:
        engine.allow()
        (result,) = await engine.classify()
        assert isinstance(result, ServiceError)
        engine.backend.fault = lambda size: None
        (result,) = await engine.classify()
        assert isinstance(result, InferenceResult)

    run_with(engine, test)


def test_crashed_thread_restarts_once_and_every_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GatedEngine(fault=lambda size: SystemExit("killed"))

    async def test() -> None:
        first = engine.classify(0)
        await engine.wait_until_busy()
        waiting = engine.classify(1)
        await engine.wait_until_queued(1)
        engine.backend.may_warm.clear()
        engine.allow(1)
        (result,) = await first
        assert isinstance(result, Unavailable)
        assert "the engine thread crashed: SystemExit: killed" in result.detail
        assert engine.state is State.FAILED
        assert "killed" in engine.status_detail()

        engine.backend.fault = lambda size: None
        engine.allow(1)
        engine.backend.may_warm.set()
        await engine.wait_until_busy()
        (result,) = await waiting
        assert int(result.class_ids[0]) == 1
        assert engine.state is State.READY

        engine.backend.fault = lambda size: SystemExit("killed again")
        running = engine.classify(2)
        await engine.wait_until_busy()
        queued = engine.classify(3)
        await engine.wait_until_queued(1)
        decoding, may_decode = threading.Event(), threading.Event()

        def slowly(data: bytes, max_pixels: int, draft: tuple[int, int] | None) -> Image.Image:
            decoding.set()
            assert may_decode.wait(30)
            return decode(data, max_pixels, draft)

        monkeypatch.setattr("dinat.app.engine.engine.decode", slowly)
        late = engine.classify(4)
        assert await asyncio.to_thread(decoding.wait, 30)
        engine.allow(1)
        (result,) = await running
        assert isinstance(result, Unavailable)
        may_decode.set()
        for task in (queued, late):
            (result,) = await task
            assert isinstance(result, Unavailable)
        assert engine.state is State.FAILED
        with pytest.raises(Unavailable, match="killed again"):
            await engine.submit([SEVEN], ONE)

    run_with(engine, test)


def test_decoder_error_fails_only_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GatedEngine()

    async def test() -> None:
        engine.allow()
        with monkeypatch.context() as patched:
            patched.setattr("dinat.app.engine.engine.decode", lambda *_: 1 / 0)
            (result,) = await engine.classify()
        assert isinstance(result, ServiceError)
        assert result.status == 500
        (result,) = await engine.classify()
        assert isinstance(result, InferenceResult)

    run_with(engine, test)


def test_drain_completes_accepted_work_and_rejects_new_work() -> None:
    engine = GatedEngine()

    async def test() -> None:
        first = engine.classify(0)
        await engine.wait_until_busy()
        second = engine.classify(1)
        await engine.wait_until_queued(1)
        draining = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)  # the drain starts
        with pytest.raises(Unavailable, match="the service is stopping"):
            await engine.submit([SEVEN], ONE)
        assert not draining.done()
        engine.allow()
        await draining
        assert first.done()
        assert second.done()

    run_with(engine, test)
    assert engine.backend.batches == [[0], [1]]


def test_drain_ends_at_its_timeout_and_remaining_work_fails() -> None:
    engine = GatedEngine(drain_seconds=0.05, max_batch=1)

    async def test() -> None:
        first = engine.classify(0)
        await engine.wait_until_busy()
        second = engine.classify(1)
        await engine.wait_until_queued(1)
        await engine.drain()
        for result in await asyncio.gather(first, second):
            assert isinstance(result[0], Unavailable)
        with pytest.raises(Unavailable, match="the service is stopping"):
            await engine.submit([SEVEN], ONE, arrived=time.monotonic() - 1)  # received before the drain
        engine.allow()

    run_with(engine, test)
