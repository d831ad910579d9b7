"""A computation as CUDA graphs, fed by several threads at once: while one batch computes, the next uploads."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from dinat.model.capture_safe_cache import record_cached_values

LANES = 2
"""Batches on a card at once: one computes, the next uploads."""

Outputs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Graph:
    """One size. outputs: where every replay leaves them.  held: what else every replay reads."""

    graph: torch.cuda.CUDAGraph
    outputs: Outputs
    held: list[object]


@dataclass(frozen=True)
class Slot:
    """Where one batch passes: from pinned memory to the card on its own way there, and its outputs back to pinned memory."""

    pinned: Tensor
    uploaded: Tensor
    outputs: Outputs


class CapturedComputation:
    """compute(batch) as a graph for each power of two up to a largest batch: no launch waits for Python.

    All sizes share one input and one pool of memory, so that together they take what the largest takes; hence they run in turn.
    run may be called from LANES threads at once, each with the card made current.
    """

    def __init__(self, compute: Callable[[Tensor], Outputs], example: Tensor) -> None:
        """Capture for example's size, a power of two, and all below it. example: on the card, its first axis the batch.

        Raises what compute raises, or what CUDA says of an operation that cannot be captured; the caller's stream is then as
        it was before.
        """
        self._input = example.clone()
        self._uploads = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
        self._turn = threading.Lock()
        pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, Graph] = {}
        size = example.shape[0]
        while size:  # the largest first: the others fit into what it leaves free
            self._graphs[size] = self._capture(compute, self._input[:size], pool)
            size //= 2
        outputs = self._graphs[example.shape[0]].outputs
        self._slots: SimpleQueue[Slot] = SimpleQueue()
        for _ in range(LANES):
            first, second = (_pinned(output) for output in outputs)
            self._slots.put(Slot(_pinned(example), torch.empty_like(example), (first, second)))
        torch.cuda.synchronize(example.device)  # what is still under way may use memory that a slot was given

    @property
    def largest(self) -> int:
        """The most pictures that a call of run takes."""
        return self._input.shape[0]

    def takes(self, shape: torch.Size) -> bool:
        """Whether run takes a batch of this shape."""
        return shape[0] <= self.largest and shape[1:] == self._input.shape[1:]

    def _capture(self, compute: Callable[[Tensor], Outputs], given: Tensor, pool: Any) -> Graph:
        graph = torch.cuda.CUDAGraph()
        self._uploads.wait_stream(torch.cuda.current_stream(given.device))
        with torch.cuda.stream(self._uploads), record_cached_values() as held:
            compute(given)  # what is made or compiled when a size first comes cannot be while capturing
            # The outer context gives the stream back even where the capture's own end raises.
            with torch.cuda.graph(graph, pool=pool, stream=self._uploads, capture_error_mode="thread_local"):
                outputs = compute(given)
        return Graph(graph, outputs, held)

    def run(self, batch: Tensor) -> Outputs:
        """The outputs, on the host, for a batch on the host that `takes` is true of."""
        count = batch.shape[0]
        captured = self._graphs[1 << (count - 1).bit_length()]
        slot = self._slots.get()
        try:
            slot.pinned[:count].copy_(batch)
            with torch.cuda.stream(self._uploads):
                slot.uploaded[:count].copy_(slot.pinned[:count], non_blocking=True)
                uploaded = self._uploads.record_event()
            with self._turn:
                computing = torch.cuda.current_stream(self._input.device)
                computing.wait_event(uploaded)
                self._input[:count].copy_(slot.uploaded[:count])
                captured.graph.replay()
                for output, host in zip(captured.outputs, slot.outputs, strict=True):
                    host[:count].copy_(output[:count], non_blocking=True)
                done = computing.record_event()
            done.synchronize()
            first, second = slot.outputs
            return first[:count].clone(), second[:count].clone()
        finally:
            self._slots.put(slot)


def _pinned(like: Tensor) -> Tensor:
    """Memory of the host that a card reads and writes by itself."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
