"""torch.cuda's graphs. During capture operations also run, so that Python sees shapes; then their results are set to NaN."""

from typing import Any

from tests.rehearsal.fake_gpu import capture
from tests.rehearsal.fake_gpu.capture import Capture, Step, forbid
from tests.rehearsal.fake_gpu.clocks import Memory
from tests.rehearsal.fake_gpu.devices import CudaError
from tests.rehearsal.fake_gpu.streams import (
    Stream,
    current_stream,
    default_stream,
    record_accesses,
    stream_context,
    synchronize,
)
from tests.rehearsal.fake_gpu.tensors import unwrap

_pools: dict[Any, Memory] = {}


class CUDAGraph:
    """torch.cuda.CUDAGraph. Replays of graphs that share a pool conflict with each other, since they share memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._capture: Capture | None = None
        self._stream: Stream | None = None
        self._steps: list[Step] | None = None
        self._allocated: list[Memory] = []
        self._pool = Memory("a graph's memory pool")

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if self._steps is not None:
            raise RuntimeError("This CUDAGraph instance already owns a captured graph.")
        stream = current_stream()
        if stream is default_stream(stream.device):
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if pool:
            self._pool = _pools[pool if not isinstance(pool, tuple) or len(pool) != 1 else pool[0]]
        self._stream, self._capture = stream, capture.begin(stream.timeline, capture_error_mode)

    def capture_end(self) -> None:
        if self._capture is None or self._stream is None:
            raise RuntimeError("capture_end() called before capture_begin().")
        if current_stream(self._stream.device) is not self._stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        capture.end(self._capture)
        for backing in map(unwrap, self._capture.results):  # on a GPU nothing has run yet
            if not backing.is_meta and backing.is_floating_point():
                backing.fill_(float("nan"))
        self._steps, self._allocated = self._capture.steps, list(self._capture.allocated)

    def replay(self) -> None:
        if self._steps is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        forbid("CUDAGraph.replay")
        reads, writes = [], [self._pool]
        for step in self._steps:
            if any(memory() is None for memory in step.external):
                raise CudaError(f"CUDA error: an illegal memory access was encountered ({step.operation} reads freed memory)")
            reads += [memory for ref in step.reads if (memory := ref()) is not None]
            writes += [memory for ref in step.writes if (memory := ref()) is not None]
        record_accesses(
            "CUDAGraph.replay", current_stream(), [x for x in reads if x not in writes], list(dict.fromkeys(writes))
        )
        for step in self._steps:
            step.replay()

    def pool(self) -> Any:
        return graph_pool_handle()

    def reset(self) -> None:
        self._steps = None


def graph_pool_handle() -> tuple[int, int]:
    handle = (0, len(_pools) + 1)
    _pools[handle] = Memory("a graph's memory pool")
    return handle


class graph:
    """torch.cuda.graph. As in PyTorch, the default capture stream is one per process, created on the first device used."""

    default_capture_stream: Stream | None = None

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        if stream is None and graph.default_capture_stream is None:
            graph.default_capture_stream = Stream()
        self._graph, self._pool, self._mode = cuda_graph, pool, capture_error_mode
        self._context = stream_context(stream or graph.default_capture_stream)

    def __enter__(self) -> None:
        synchronize()
        self._context.__enter__()
        self._graph.capture_begin(self._pool, self._mode)

    def __exit__(self, *error: Any) -> None:
        self._graph.capture_end()  # if it raises, the stream remains current, as in PyTorch
        self._context.__exit__(None, None, None)
