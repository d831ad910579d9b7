"""CapturedComputation on the fake GPU: each synchronization is necessary, and operations that cannot be captured raise."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from dinat.app.engine.runtimes import cuda_graphs
from dinat.app.engine.runtimes.cuda_graphs import CapturedComputation
from dinat.model.attention import bias_cache, neighborhood_attention, timing
from tests.rehearsal.fake_gpu.clocks import Race, Timeline, TrackedLock, TrackedQueue
from tests.rehearsal.fake_gpu.counts import counted
from tests.rehearsal.fake_gpu.streams import Event, Stream, current_stream

CUDA = torch.device("cuda", 0)
Outputs = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


def double(x: torch.Tensor) -> Outputs:
    return x * 2, x + 1


def example(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, device=CUDA)


def run_in_threads(count: int, call: Callable[[int], None]) -> None:
    """Run call(0), call(1), ..., each in a new thread, one after the other, and raise the first exception."""
    for n in range(count):
        exceptions: list[BaseException] = []

        def run(n: int = n, exceptions: list[BaseException] = exceptions) -> None:
            try:
                with torch.inference_mode():
                    call(n)
            except BaseException as error:
                exceptions.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if exceptions:
            raise exceptions[0]


def check_all_batch_sizes() -> None:
    """Capture, run batches of every size in several threads and check the outputs."""
    captured = CapturedComputation(double, example())

    def check(n: int) -> None:
        for count in (1, 2, 3, 4):
            batch = torch.randn(count, 3)
            first, second = captured.run(batch)
            torch.testing.assert_close(first, batch * 2)
            torch.testing.assert_close(second, batch + 1)

    run_in_threads(4, check)


def test_replays_of_every_batch_size_are_correct() -> None:
    check_all_batch_sizes()


def test_only_the_requested_columns_are_copied_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host sleeps meanwhile: an event that is not blocking spins."""
    captured = CapturedComputation(double, example())
    waits: list[bool] = []
    synchronize = Event.synchronize
    monkeypatch.setattr(Event, "synchronize", lambda event: waits.append(event.blocking) or synchronize(event))
    batch = torch.randn(3, 3)
    with counted() as counts:
        first, second = captured.run(batch, columns=2)
    torch.testing.assert_close(first, batch[:, :2] * 2)
    torch.testing.assert_close(second, batch[:, :2] + 1)
    assert waits == [True]
    assert counts.bytes_to_host == 2 * 3 * 2 * 4


def _recorded_early(record: Callable[..., None]) -> Callable[..., None]:
    """Return an Event.record that records the stream's previous state, before the work that the event should follow."""
    clocks: dict[object, dict[Timeline, int]] = {}

    def record_early(self: Event, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        record(self, stream)
        self.clock, clocks[stream] = clocks.get(stream, {}), dict(stream.timeline.clock)

    return record_early


def _unordered(queue: type) -> type:
    class UnorderedQueue(queue):  # type: ignore[misc]
        def get(self) -> object:
            return self._queue.get()[0]

    return UnorderedQueue


MISSING: dict[str, tuple[object, str, object]] = {
    "wait for the upload": (Stream, "wait_event", lambda self, event: None),
    "wait for the outputs": (Event, "synchronize", lambda self: None),
    "wait of the capture for its input": (Stream, "wait_stream", lambda self, other: None),
    "event recorded after the work": (Event, "record", _recorded_early(Event.record)),
    "lock around replays": (TrackedLock, "__exit__", lambda self, *_: self._lock.release()),
    "slots returned after use": (cuda_graphs, "SimpleQueue", _unordered(TrackedQueue)),
}


@pytest.mark.parametrize("missing", MISSING)
def test_every_synchronization_is_necessary(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, name, replacement = MISSING[missing]
    monkeypatch.setattr(target, name, replacement)
    with pytest.raises(Race):
        check_all_batch_sizes()


HOST_TENSOR = torch.randn(3)
NOT_PERMITTED: dict[str, Callable[[torch.Tensor], object]] = {
    "copy of a host tensor": lambda x: x * HOST_TENSOR.to(CUDA),
    "value read on the host": lambda x: x * float(x.sum()),
    "branch on a value": lambda x: x if x.sum() > 0 else -x,
    "boolean mask": lambda x: x[x > 0],
    "tensor made from host values": lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=CUDA),
    "index on the host": lambda x: x[:, torch.tensor([0, 2])],
    "synchronization": lambda x: torch.cuda.synchronize() or x,
    "pinned memory": lambda x: torch.empty(3, pin_memory=True),
    "copy to the host": lambda x: x.cpu(),
}


@pytest.mark.parametrize("operation", NOT_PERMITTED)
def test_operation_that_cannot_be_captured_raises_and_restores_the_stream(operation: str) -> None:
    def compute(x: torch.Tensor) -> Outputs:
        NOT_PERMITTED[operation](x)
        return double(x)

    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="operation failed due to a previous error during capture"):
        CapturedComputation(compute, example())
    assert torch.cuda.current_stream() is before
    assert not torch.cuda.is_current_stream_capturing()
    check_all_batch_sizes()


def test_graph_keeps_cached_tensors_that_it_reads_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    rpb = torch.randn(1, 5, 5, device=CUDA)

    def compute(x: torch.Tensor) -> Outputs:
        y = neighborhood_attention(*x.unbind(3), rpb, 3, 1, backend="tiled")
        return y, y

    x = torch.randn(1, 6, 6, 3, 1, 8, device=CUDA)
    captured = CapturedComputation(compute, x)
    bias_cache.clear()
    expected = neighborhood_attention(*x.unbind(3), rpb, 3, 1, backend="reference").cpu()
    torch.testing.assert_close(captured.run(x.cpu())[0], expected)
    monkeypatch.setattr(cuda_graphs, "record_cached_values", lambda: nullcontext([]))
    captured = CapturedComputation(compute, x)
    bias_cache.clear()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        captured.run(x.cpu())


def test_all_timings_use_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: set[Stream] = set()
    record = Event.record
    monkeypatch.setattr(Event, "record", lambda event, stream: streams.add(stream) or record(event, stream))
    for x in (example(), example()):
        timing.seconds_on_gpu(lambda: double(x), CUDA)  # noqa: B023
    assert len(streams) == 1


def test_another_thread_can_compute_during_capture() -> None:
    entered, resume = threading.Event(), threading.Event()
    passes: list[int] = []

    def compute(x: torch.Tensor) -> Outputs:
        passes.append(1)
        if torch.cuda.is_current_stream_capturing() and len(passes) == 2:
            entered.set()
            assert resume.wait(30)
        return double(x)

    captured: list[CapturedComputation] = []

    def capture() -> None:
        with torch.inference_mode():
            captured.append(CapturedComputation(compute, torch.randn(1, 3, device=CUDA)))

    thread = threading.Thread(target=capture)
    thread.start()
    assert entered.wait(30)
    try:
        assert float(torch.ones(3, device=CUDA).sum()) == 3
    finally:
        resume.set()
        thread.join(30)
    assert len(captured) == 1
