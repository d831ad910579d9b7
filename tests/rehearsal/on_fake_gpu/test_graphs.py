"""CapturedComputation on the stand-in: each of its waits is needed, and what cannot be captured is seen."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from dinat.app.engine.runtimes import cuda_graphs
from dinat.app.engine.runtimes.cuda_graphs import CapturedComputation
from dinat.model.attention import bias_cache, neighborhood_attention
from tests.rehearsal import card, clocks
from tests.rehearsal.clocks import Race

CUDA = torch.device("cuda", 0)
Outputs = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def double(x: torch.Tensor) -> Outputs:
    return x * 2, x + 1


def example(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, device=CUDA)


def in_threads(count: int, call: Callable[[int], None]) -> None:
    """call(n) in one thread after the other. What raises there is raised here."""
    for n in range(count):
        raised: list[BaseException] = []

        def run(n: int = n, raised: list[BaseException] = raised) -> None:
            try:
                with torch.inference_mode():
                    call(n)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]


def run_some() -> None:
    """Capture, and run batches of every size from several threads in turn, with the outcome checked."""
    captured = CapturedComputation(double, example())

    def check(n: int) -> None:
        for count in (1, 2, 3, 4):
            batch = torch.randn(count, 3)
            first, second = captured.run(batch)
            torch.testing.assert_close(first, batch * 2)
            torch.testing.assert_close(second, batch + 1)

    in_threads(4, check)


def test_what_is_replayed_is_what_was_captured_of_every_size() -> None:
    run_some()


def _early(record: Callable[..., None]) -> Callable[..., None]:
    """An event that is recorded before the work that it should follow."""
    known: dict[object, dict[clocks.Timeline, int]] = {}

    def early(self: card.Event, stream: card.Stream | None = None) -> None:
        where = stream or card.current_stream()
        record(self, stream)
        self.known, known[where] = known.get(where, {}), dict(where.timeline.knows)

    return early


def _without_order(queue: type) -> type:
    class Queue(queue):  # type: ignore[misc]
        def get(self) -> object:
            return self._queue.get()[0]

    return Queue


MISSING: dict[str, tuple[object, str, object]] = {
    "the wait for an upload": (card.Stream, "wait_event", lambda self, event: None),
    "the wait for the outputs": (card.Event, "synchronize", lambda self: None),
    "the wait of a capture for its input": (card.Stream, "wait_stream", lambda self, other: None),
    "an event that comes after what it tells of": (card.Event, "record", _early(card.Event.record)),
    "turns": (clocks.RecordedLock, "__exit__", lambda self, *_: self._lock.release()),
    "slots given back after their use": (cuda_graphs, "SimpleQueue", _without_order(clocks.RecordedQueue)),
}


@pytest.mark.parametrize("missing", MISSING)
def test_every_wait_is_needed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, name, without = MISSING[missing]
    monkeypatch.setattr(target, name, without)
    with pytest.raises(Race):
        run_some()


KEPT = torch.randn(3)
UNCAPTURABLE: dict[str, Callable[[torch.Tensor], object]] = {
    "a table of the host's": lambda x: x * KEPT.to(CUDA),
    "a number read": lambda x: x * float(x.sum()),
    "a choice by value": lambda x: x if x.sum() > 0 else -x,
    "a mask": lambda x: x[x > 0],
    "values made into a tensor": lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=CUDA),
    "an index of the host's": lambda x: x[:, torch.tensor([0, 2])],
    "a wait": lambda x: torch.cuda.synchronize() or x,
    "pinned memory": lambda x: torch.empty(3, pin_memory=True),
    "a copy back": lambda x: x.cpu(),
}


@pytest.mark.parametrize("what", UNCAPTURABLE)
def test_what_cannot_be_captured_is_seen_and_leaves_no_stream_behind(what: str) -> None:
    def compute(x: torch.Tensor) -> Outputs:
        UNCAPTURABLE[what](x)
        return double(x)

    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="operation failed due to a previous error during capture"):
        CapturedComputation(compute, example())
    assert torch.cuda.current_stream() is before
    assert not torch.cuda.is_current_stream_capturing()
    run_some()


def test_what_a_graph_reads_lives_as_long_as_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_another_thread_may_compute_while_a_graph_is_captured() -> None:
    entered, go_on = threading.Event(), threading.Event()
    passes: list[int] = []

    def compute(x: torch.Tensor) -> Outputs:
        passes.append(1)
        if torch.cuda.is_current_stream_capturing() and len(passes) == 2:
            entered.set()
            assert go_on.wait(30)
        return double(x)

    done: list[CapturedComputation] = []

    def capture() -> None:
        with torch.inference_mode():
            done.append(CapturedComputation(compute, torch.randn(1, 3, device=CUDA)))

    thread = threading.Thread(target=capture)
    thread.start()
    assert entered.wait(30)
    try:
        assert float(torch.ones(3, device=CUDA).sum()) == 3
    finally:
        go_on.set()
        thread.join(30)
    assert len(done) == 1
