"""A computation as CUDA graphs, called by several threads: one batch uploads while another computes."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from dinat.model.capture_safe_cache import record_cached_values

LANES = 2
"""Batches in flight on a GPU: one computes while the next uploads."""

Outputs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Graph:
    """The graph of one batch size.

    Attributes:
        outputs: Tensors that every replay writes.
        held: Other tensors that every replay reads; they must outlive the graph.
    """

    graph: torch.cuda.CUDAGraph
    outputs: Outputs
    held: list[object]


@dataclass(frozen=True)
class Slot:
    """Buffers of one batch in flight: pinned input on the host, input on the GPU, pinned outputs on the host."""

    pinned: Tensor
    uploaded: Tensor
    outputs: Outputs


class CapturedComputation:
    """compute(batch), captured as one CUDA graph for each power of two up to a largest batch size.

    All graphs share one input and one memory pool, so that together they use the memory of the largest; therefore they replay
    one at a time. `run` may be called from LANES threads at once, each with this GPU as its current device.
    """

    def __init__(self, compute: Callable[[Tensor], Outputs], example: Tensor) -> None:
        """Capture the computation. On an error the caller's stream is left as it was.

        Args:
            compute: Maps a batch on the GPU to two tensors on the GPU. It must support CUDA graph capture.
            example: The largest batch, on the GPU; its size, the first dimension, is a power of two.

        Raises:
            RuntimeError: An operation cannot be captured; or any other exception that `compute` raises.
        """
        self._input = example.clone()
        self._uploads = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
        self._turn = threading.Lock()
        pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, Graph] = {}
        size = example.shape[0]
        while size:  # the largest first: the others fit into the memory that it leaves free
            self._graphs[size] = self._capture(compute, self._input[:size], pool)
            size //= 2
        outputs = self._graphs[example.shape[0]].outputs
        self._slots: SimpleQueue[Slot] = SimpleQueue()
        for _ in range(LANES):
            first, second = (_pinned_like(output) for output in outputs)
            self._slots.put(Slot(_pinned_like(example), torch.empty_like(example), (first, second)))
        torch.cuda.synchronize(example.device)  # kernels in flight may use memory that a slot was allocated from

    @property
    def largest(self) -> int:
        """The largest batch size."""
        return self._input.shape[0]

    def accepts(self, shape: torch.Size) -> bool:
        """Whether run supports a batch of this shape."""
        return shape[0] <= self.largest and shape[1:] == self._input.shape[1:]

    def _capture(self, compute: Callable[[Tensor], Outputs], batch: Tensor, pool: Any) -> Graph:
        graph = torch.cuda.CUDAGraph()
        self._uploads.wait_stream(torch.cuda.current_stream(batch.device))
        with torch.cuda.stream(self._uploads), record_cached_values() as held:
            compute(batch)  # creates and compiles what cannot be created during capture
            # The outer context restores the stream even if the end of the capture raises.
            with torch.cuda.graph(graph, pool=pool, stream=self._uploads, capture_error_mode="thread_local"):
                outputs = compute(batch)
        return Graph(graph, outputs, held)

    def run(self, batch: Tensor, columns: int | None = None) -> Outputs:
        """Compute a batch on the host of a shape that `accepts` allows.

        Args:
            batch: The batch.
            columns: How many of the outputs' columns, their second dimension, to copy to the host: the first ones. All if None.

        Returns:
            The outputs on the host.
        """
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
                downloads = []
                for output, host in zip(captured.outputs, slot.outputs, strict=True):
                    selected = output[:count, :columns].contiguous()  # a copy on the GPU: downloads are of contiguous memory
                    downloads.append(host.flatten()[: selected.numel()].view(selected.shape))
                    downloads[-1].copy_(selected, non_blocking=True)
                done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # to sleep, not spin, meanwhile
                done.record(computing)
            done.synchronize()
            first, second = downloads
            return first.clone(), second.clone()
        finally:
            self._slots.put(slot)


def _pinned_like(tensor: Tensor) -> Tensor:
    """Page-locked host memory, which a GPU copies asynchronously."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
