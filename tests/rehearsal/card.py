"""A stand-in for CUDA cards on a machine that has none: the code for them runs, with numbers, and fails as on a card.

install() makes PyTorch's CPU build believe that it has cards. A tensor on one is a CardTensor: it says that it is on cuda:0,
and holds a tensor of the processor (or, within shapes_only(), of "meta"), on which every operator is run. What is wrong on a
card raises here:

- operands on two devices, and arrays made of a card's tensor;
- while a CUDA graph is captured: copies between host and card, waits, values read on the host, pinned memory, another stream;
- after that: memory read before a replay has written it (it holds NaN), graphs that read memory which was freed;
- two accesses of one memory that no stream, event, lock or queue orders (tests/rehearsal/clocks.py);
- a Triton launch with another card than the tensors' made current;
- convolutions and products of float32 are rounded to TF32 where PyTorch's flags allow that.

The Triton kernel runs by Triton's interpreter, NATTEN's na2d is the definition. For a process of its own: nothing is undone.
"""

import ctypes
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map

from tests.rehearsal.clocks import Access, Memory, RecordedLock, RecordedQueue, Timeline, this_thread

NAME = "stand-in"
aten = torch.ops.aten


class CudaError(RuntimeError):
    """As PyTorch raises what CUDA says."""


_device = threading.local()
_cards = 1
_shapes_only = False


def current() -> int:
    return getattr(_device, "index", 0)


def installed() -> bool:
    return isinstance(torch.cuda.Stream, type) and torch.cuda.Stream is Stream


@contextmanager
def shapes_only() -> Iterator[None]:
    """What is allocated on a card within it has no numbers: large networks run in no time."""
    global _shapes_only
    before, _shapes_only = _shapes_only, True
    try:
        yield
    finally:
        _shapes_only = before


# Tensors


class CardTensor(torch.Tensor):
    """A tensor on a card, or in pinned memory of the host: `held` has its numbers."""

    held: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, held: torch.Tensor, memory: Memory | None = None, device: torch.device | None = None) -> "CardTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device or torch.device("cuda", current()),
        )
        tensor.held, tensor.memory = held, memory or Memory()
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"CardTensor({self.held!r}, device={self.device})"

    def data_ptr(self) -> int:
        return 0 if self.held.is_meta else self.held.data_ptr()

    def is_pinned(self, *_: Any) -> bool:
        return self.device.type == "cpu"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _on_gpu(x: object) -> bool:
    return isinstance(x, CardTensor) and x.device.type == "cuda"


def _held(x: Any) -> Any:
    return x.held if isinstance(x, CardTensor) else x


def _allocated(like: torch.Tensor) -> torch.Tensor:
    """What a new allocation of a card holds."""
    return like.to("meta") if _shapes_only and not like.is_meta else like


READ_ON_THE_HOST = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
}
SIZED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor}


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator with at least one tensor of ours among its operands."""
    if func.namespace == "dinat":
        return _ours(func)(*args, **kwargs)
    if func is aten._has_compatible_shallow_copy_type.default:
        return False
    if _is_composite(func):
        return func.decompose(*args, **kwargs)  # in inference mode it comes whole
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    mine = [x for x in flat if isinstance(x, CardTensor)]
    if func is aten.copy_.default:
        return _copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
    if func is aten._to_copy.default and kwargs.get("device") is not None:
        wanted = _indexed(torch.device(kwargs["device"]))
        if wanted != mine[0].device:
            return _moved(args[0], wanted, kwargs)
    if func in READ_ON_THE_HOST or func in SIZED_BY_VALUES or _has_mask(func, args):
        _wait_for_host(f"{func} reads a value of the card's")
        if mine[0].held.is_meta and func in READ_ON_THE_HOST:
            return 1.0
        return _wrapped(func(*tree_map(_held, args), **tree_map(_held, kwargs)), mine, mine[0].device)
    if not any(_on_gpu(x) for x in mine):
        return _on_host(func, args, kwargs, mine)
    _check_devices(func, flat, next(x.device for x in mine if _on_gpu(x)))
    return _compute(func, args, kwargs, mine)


INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


def _check_devices(func: Any, tensors: list[torch.Tensor], device: torch.device) -> None:
    """Raise unless all are on the device, but for numbers, and for an index of the host's, which is copied."""
    for x in tensors:
        if x.device != device and (x.dim() > 0 or isinstance(x, CardTensor)):
            if func not in INDEXING or x.device.type != "cpu":
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found {device} and {x.device} in {func}"
                )
            _wait_for_host(f"{func} copies an index of the host's to the card")


def _compute(func: Any, args: Any, kwargs: dict[str, Any], mine: list[CardTensor]) -> Any:
    """An operator on a card: on what its operands hold, and noted as launched."""
    device = next(x.device for x in mine if _on_gpu(x))
    kwargs = {
        name: ("meta" if mine[0].held.is_meta else "cpu") if name == "device" and value else value
        for name, value in kwargs.items()
    }
    call = _tf32(func)
    held_args, held_kwargs = tree_map(_held, args), tree_map(_held, kwargs)
    out = call(*held_args, **held_kwargs)
    written = _written(func, args, kwargs)
    wrapped = _wrapped(out, mine, device)
    made = [x for x in tree_flatten(wrapped)[0] if isinstance(x, CardTensor) and all(x.memory is not y.memory for y in mine)]
    if made or written:
        outs = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]

        def again() -> None:
            if any(x.is_meta for x in outs):
                return
            new = [x for x in tree_flatten(call(*held_args, **held_kwargs))[0] if isinstance(x, torch.Tensor)]
            for x, y in zip(outs, new, strict=True):
                if x is not y:
                    x.copy_(y)

        writes = [*(x.memory for x in written), *(x.memory for x in made)]
        reads = [x.memory for x in mine if x.memory not in writes]
        launched(str(func), device, reads, writes, again, made)
    return wrapped


@cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@cache
def _writes_to(func: Any) -> list[tuple[int, str]]:
    """The operands that an operator writes to, by its schema: their place and their name."""
    alias = [(i, one.name, one.alias_info) for i, one in enumerate(func._schema.arguments)]
    return [(i, name) for i, name, info in alias if info is not None and info.is_write]


def _ours(func: Any) -> Callable[..., Any]:
    """What one of this project's operators does, in the open."""
    from dinat.model.attention import tiled, triton_kernel

    def backward(*args: Any) -> Any:  # by torch.func, which takes no tensors of ours, and cannot begin within an operator
        with ThreadPoolExecutor(1) as thread:
            return [CardTensor(x) for x in thread.submit(func, *tree_map(_held, args)).result()]

    return {  # type: ignore[no-any-return]
        "neighborhood_attention": triton_kernel.fused_attention._init_fn,
        "tiled_attention": tiled.tiled_operator._init_fn,
        "attention_backward": backward,
    }[func._schema.name.partition("::")[2]]


def _written(func: Any, args: Any, kwargs: Any) -> list[CardTensor]:
    operands = [args[i] if i < len(args) else kwargs.get(name) for i, name in _writes_to(func)]
    return [x for x in tree_flatten(operands)[0] if isinstance(x, CardTensor)]


def _wrapped(out: Any, mine: list[CardTensor], device: torch.device | None) -> Any:
    """Results as tensors of ours: a view shares its base's memory, what is new is on the device, or plain if that is None."""

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        where = x.untyped_storage()._cdata
        base = next((one for one in mine if one.held.untyped_storage()._cdata == where), None)
        if base is None:
            return x if device is None else CardTensor(x, None, device)
        if x is base.held:
            return base
        with torch.inference_mode(base.is_inference()):  # a view is as its base is
            return CardTensor(x, base.memory, base.device)

    return tree_map(wrap, out)


def _has_mask(func: Any, args: Any) -> bool:
    if func not in INDEXING:
        return False
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _tf32(func: Any) -> Callable[..., Any]:
    """An operator as a card computes it: float32 operands of convolutions and products in TF32 where the flags allow it."""
    name = func._schema.name
    convolution, product = "convolution" in name, name in {f"aten::{x}" for x in ("mm", "bmm", "addmm", "baddbmm", "linear")}
    allowed = (convolution and torch.backends.cudnn.allow_tf32) or (product and torch.backends.cuda.matmul.allow_tf32)
    if not allowed:
        return func  # type: ignore[no-any-return]

    def rounded(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32 or x.is_meta:
            return x
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return lambda *args, **kwargs: func(*tree_map(rounded, args), **tree_map(rounded, kwargs))


def _on_host(func: Any, args: Any, kwargs: Any, mine: list[CardTensor]) -> Any:
    """An operator on pinned memory: the host's own doing. Copies are plain."""
    written = _written(func, args, kwargs)
    out = _wrapped(func(*tree_map(_held, args), **tree_map(_held, kwargs)), mine, None)
    is_view = any(isinstance(x, CardTensor) for x in tree_flatten(out)[0])
    if written or not is_view:
        _host_access(str(func), [x.memory for x in mine if x not in written], [x.memory for x in written])
    return out


def _host_access(what: str, reads: list[Memory], writes: list[Memory]) -> None:
    thread = this_thread()
    tick = thread.tick()
    access = Access(what, thread, tick, thread, tick)
    for memory in writes:
        memory.touch(access, write=True)
    for memory in reads:
        memory.touch(access, write=False)


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    """target.copy_(source), between any two of a card, pinned memory and plain memory of the host."""
    to_card, from_card = _on_gpu(target), _on_gpu(source)
    reads = [source.memory] if isinstance(source, CardTensor) else []
    writes = [target.memory] if isinstance(target, CardTensor) else []
    into, out_of = _held(target), _held(source)

    def again() -> None:
        if not into.is_meta and not out_of.is_meta:
            into.copy_(out_of)

    if not to_card and not from_card:
        again()
        _host_access("copy_", reads, writes)
        return target
    if to_card != from_card:
        _forbidden("a copy between host and card")
    device = target.device if to_card else source.device
    again()
    launched("copy_", device, reads, writes, again, [])
    asynchronous = non_blocking and all(isinstance(x, CardTensor) for x in (target, source))
    if to_card != from_card and not asynchronous:
        this_thread().learn(current_stream(device).timeline.knows)
    return target


def _moved(source: torch.Tensor, wanted: torch.device, kwargs: dict[str, Any]) -> torch.Tensor:
    """source on another device."""
    dtype = kwargs.get("dtype") or source.dtype
    if wanted.type == "cuda":
        held = _allocated(_held(source).to(dtype, copy=True))
        target: torch.Tensor = CardTensor(held, None, wanted)
        return _copied(target, source)
    held = _held(source)
    values = torch.zeros(held.shape, dtype=dtype) if held.is_meta else held.to(dtype, copy=True)
    return _copied(values, source)


def _copied(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    _copy(target, source, non_blocking=False)
    return target


def _indexed(device: Any) -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device("cuda" if device is None else device)
    return torch.device("cuda", current()) if device.type == "cuda" and device.index is None else device


def _make(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator that makes a tensor on a card out of nothing; PyTorch's other factories fill what it gives."""
    device = _indexed(torch.device(kwargs.get("device") or "cuda"))
    if device.index >= _cards:
        raise CudaError("CUDA error: invalid device ordinal")
    kwargs = {**kwargs, "device": "meta" if _shapes_only else "cpu", "pin_memory": False}
    held = func(*args, **kwargs)
    if not held.is_meta and held.is_floating_point():
        held.fill_(float("nan"))  # nobody has written it yet
    made = CardTensor(held, None, device)
    for capture in _captures:
        if capture.is_here():
            capture.made.add(made.memory)
    return made


# Streams, events and graphs


@dataclass(eq=False)
class Event:
    enable_timing: bool = False
    blocking: bool = False
    interprocess: bool = False
    known: dict[Timeline, int] | None = None
    at: float = 0.0
    over: bool = False

    def record(self, stream: "Stream | None" = None) -> None:
        where = stream or current_stream()
        _capturing_on(where, "an event of another stream's")
        where.timeline.learn(this_thread().knows)
        where.timeline.tick()
        self.known, self.at, self.over = dict(where.timeline.knows), time.perf_counter(), False

    def wait(self, stream: "Stream | None" = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        _forbidden("a wait for an event")
        if self.known is not None:
            this_thread().learn(self.known)
        self.over = True

    def query(self) -> bool:
        return self.over

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds."""
        if not (self.enable_timing and end.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.known is None or not end.over:
            raise CudaError("CUDA error: device not ready")
        return max(1e-3, 1e3 * (end.at - self.at))


_all_streams: "weakref.WeakSet[Stream]" = weakref.WeakSet()


class Stream:
    """A stream of a card; by default a new one."""

    _numbers = itertools.count(1)

    def __init__(self, device: Any = None, priority: int = 0, number: int | None = None) -> None:
        self.device = _indexed(device)
        self.number = next(self._numbers) if number is None else number
        self.timeline = Timeline(f"stream {self.number} of {self.device}")
        _all_streams.add(self)

    def wait_event(self, event: Event) -> None:
        self.timeline.learn(this_thread().knows)
        if event.known is not None:
            self.timeline.learn(event.known)

    def wait_stream(self, other: "Stream") -> None:
        _capturing_on(other, "a wait for another stream")
        self.timeline.learn(this_thread().knows)
        self.timeline.learn(other.timeline.knows)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _forbidden("a wait for a stream")
        this_thread().learn(self.timeline.knows)

    def query(self) -> bool:
        return True


_default_streams: dict[int, Stream] = {}


def default_stream(device: Any = None) -> Stream:
    index = _indexed(device).index
    if index not in _default_streams:
        _default_streams[index] = Stream(torch.device("cuda", index), number=0)
    return _default_streams[index]


def current_stream(device: Any = None) -> Stream:
    index = _indexed(device).index
    streams: dict[int, Stream] = getattr(_device, "streams", {})
    return streams.get(index) or default_stream(torch.device("cuda", index))


def _set_stream(stream: Stream) -> None:
    _device.streams = {**getattr(_device, "streams", {}), stream.device.index: stream}


class stream_context:
    """torch.cuda.stream: the stream and its card are current within it."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        if self._stream is not None:
            self._before = current(), current_stream(self._stream.device)
            _device.index = self._stream.device.index
            _set_stream(self._stream)

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            _device.index, before = self._before
            _set_stream(before)


@dataclass
class Capture:
    """A capture under way. made: memory of the graph's own.  broken: something was done that cannot be captured."""

    stream: Stream
    mode: str
    thread: int
    steps: "list[Step]" = field(default_factory=list)
    made: "weakref.WeakSet[Memory]" = field(default_factory=weakref.WeakSet)
    results: "weakref.WeakSet[CardTensor]" = field(default_factory=weakref.WeakSet)
    broken: str = ""

    def is_here(self) -> bool:
        """Whether the calling thread captures."""
        return self.thread == threading.get_ident()


@dataclass
class Step:
    """One operator of a graph. What it touches is known weakly: a graph keeps nothing alive but its own memory."""

    what: str
    again: Callable[[], None]
    reads: "list[weakref.ref[Memory]]"
    writes: "list[weakref.ref[Memory]]"
    outside: "list[weakref.ref[Memory]]"


_captures: list[Capture] = []


def _forbidden(what: str) -> None:
    """Raise if what a thread is about to do cannot be done while a graph is captured, and break the capture, as CUDA does."""
    for capture in _captures:
        if capture.is_here() or capture.mode == "global":
            capture.broken = what
            raise CudaError(f"CUDA error: operation not permitted when stream is capturing ({what})")


def _wait_for_host(what: str) -> None:
    _forbidden(what)
    this_thread().learn(current_stream().timeline.knows)


def _capturing_on(stream: Stream, what: str) -> None:
    """Raise if the calling thread captures, and on another stream than this."""
    for capture in _captures:
        if capture.is_here() and capture.stream is not stream:
            capture.broken = what
            raise CudaError(f"CUDA error: dependency created on uncaptured work in another stream ({what})")


def launched(
    what: str,
    device: torch.device,
    reads: list[Memory],
    writes: list[Memory],
    again: Callable[[], None],
    made: list[CardTensor],
) -> None:
    """An operator was run, on the current stream: note it in the graph that is being captured, or who touched what."""
    stream = current_stream(device)
    capture = next((capture for capture in _captures if capture.is_here()), None)
    if capture is None:
        _touch(what, stream, reads, writes)
        return
    _capturing_on(stream, f"{what} on a stream that is not captured")
    capture.made.update(x.memory for x in made)
    capture.results.update(x for x in made)
    outside = [memory for memory in (*reads, *writes) if memory not in capture.made]
    weak = [[weakref.ref(memory) for memory in some] for some in (reads, writes, outside)]
    capture.steps.append(Step(what, again, *weak))


def _touch(what: str, stream: Stream, reads: list[Memory], writes: list[Memory]) -> None:
    thread = this_thread()
    host_tick = thread.tick()
    stream.timeline.learn(thread.knows)
    access = Access(what, stream.timeline, stream.timeline.tick(), thread, host_tick)
    for memory in writes:
        memory.touch(access, write=True)
    for memory in reads:
        memory.touch(access, write=False)


_pools: dict[Any, Memory] = {}


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self._capture: Capture | None = None
        self._steps: list[Step] | None = None
        self._own: list[Memory] = []
        self._pool = Memory("a pool")

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if self._steps is not None:
            raise RuntimeError("This CUDAGraph instance already owns a captured graph.")
        stream = current_stream()
        if stream is default_stream(stream.device):
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if pool:
            self._pool = _pools[pool if not isinstance(pool, tuple) or len(pool) != 1 else pool[0]]
        self._capture = Capture(stream, capture_error_mode, threading.get_ident())
        _captures.append(self._capture)

    def capture_end(self) -> None:
        capture = self._capture
        if capture is None:
            raise RuntimeError("capture_end() called before capture_begin().")
        if current_stream(capture.stream.device) is not capture.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        _captures.remove(capture)
        if capture.broken:
            raise CudaError(f"CUDA error: operation failed due to a previous error during capture ({capture.broken})")
        for tensor in capture.results:  # nothing has run yet
            if not tensor.held.is_meta and tensor.held.is_floating_point():
                tensor.held.fill_(float("nan"))
        self._steps, self._own = capture.steps, list(capture.made)

    def replay(self) -> None:
        if self._steps is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        _forbidden("a replay")
        reads, writes = [], [self._pool]
        for step in self._steps:
            if any(memory() is None for memory in step.outside):
                raise CudaError(f"CUDA error: an illegal memory access was encountered ({step.what} reads freed memory)")
            reads += [memory for ref in step.reads if (memory := ref()) is not None]
            writes += [memory for ref in step.writes if (memory := ref()) is not None]
        _touch("a replay", current_stream(), [x for x in reads if x not in writes], list(dict.fromkeys(writes)))
        for step in self._steps:
            step.again()

    def pool(self) -> Any:
        return graph_pool_handle()

    def reset(self) -> None:
        self._steps = None


def graph_pool_handle() -> tuple[int, int]:
    handle = (0, len(_pools) + 1)
    _pools[handle] = Memory("a pool")
    return handle


class graph:
    """torch.cuda.graph. As in PyTorch, the default stream for captures is one for the process, made on the first card used."""

    default_capture_stream: Stream | None = None

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        if stream is None and graph.default_capture_stream is None:
            graph.default_capture_stream = Stream()
        self._stream = stream or graph.default_capture_stream
        self._graph, self._pool, self._mode = cuda_graph, pool, capture_error_mode
        self._context = stream_context(self._stream)

    def __enter__(self) -> None:
        synchronize()
        self._context.__enter__()
        self._graph.capture_begin(self._pool, self._mode)

    def __exit__(self, *error: Any) -> None:
        self._graph.capture_end()  # if this raises, the stream stays as it is: so does PyTorch's
        self._context.__exit__(None, None, None)


def synchronize(device: Any = None) -> None:
    _forbidden("a wait for the card")
    thread = this_thread()
    for stream in list(_all_streams):
        thread.learn(stream.timeline.knows)


def _pinned_empty(*size: Any, **kwargs: Any) -> torch.Tensor:
    """torch.empty, which in the CPU build has no pinned memory."""
    if not kwargs.pop("pin_memory", False):
        return _plain_empty(*size, **kwargs)  # type: ignore[no-any-return]
    _forbidden("pinned memory")
    return CardTensor(_plain_empty(*size, **kwargs), Memory("pinned memory"), torch.device("cpu"))


_plain_empty = torch.empty


# Programs that are not PyTorch's


INTERPRETED_PROGRAMS = 8
"""The most that a launch may have to be run by Triton's interpreter, which takes milliseconds for each."""


class _Launched:
    """The Triton kernel, given a card's tensors: run on what they hold."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            if not any(isinstance(x, CardTensor) for x in tensors):
                self._kernel[grid](*args, **kwargs)
                return
            for x in tensors:
                if not _on_gpu(x) or x.device.index != current():
                    raise ValueError(f"Pointer argument cannot be accessed from Triton: {x.device}, current is {current()}")
            held = [_held(x) for x in args]

            def again() -> None:
                if held[0].is_meta:
                    return
                if grid[0] * grid[1] * grid[2] <= INTERPRETED_PROGRAMS:
                    self._kernel[grid](*held, **kwargs)
                else:
                    _attend(*held[:8], scale=args[-1])

            again()
            out = tensors[-1]
            launched("the Triton kernel", out.device, [x.memory for x in tensors[:-1]], [out.memory], again, [])

        return launch


def _attend(q: Any, k: Any, v: Any, bias: Any, queries: Any, keys: Any, kinds: Any, out: Any, scale: float) -> None:
    """What the kernel does, from the tables that it is given, by PyTorch."""
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    asked, found, values = q[:, queries.clamp(min=0).long()], k[:, keys.long()], v[:, keys.long()]
    scores = torch.einsum("btqhc,btkhc->bthqk", asked.float(), found.float()) * scale + bias[kinds.long()].float()
    attended = torch.einsum("bthqk,btkhc->btqhc", scores.softmax(-1), values.float())
    there = queries >= 0
    out.flatten(1, 2)[:, queries[there].long()] = attended[:, there].to(out.dtype)


def _na2d(query: Any, key: Any, value: Any, kernel_size: int, dilation: int = 1, scale: Any = None, backend: Any = None) -> Any:
    from dinat.model.attention.reference import reference_attention

    for x in (query, key, value):
        if x.shape[-1] % 8:
            raise ValueError(f"NATTEN's kernels want heads of a multiple of 8 channels, got {x.shape[-1]}")
    held = [_held(x) for x in (query, key, value)]

    def compute() -> torch.Tensor:
        if held[0].is_meta:
            return torch.empty_like(held[2])
        return reference_attention(*(x.float() for x in held), None, kernel_size, dilation, scale)[0].to(held[0].dtype)

    out = compute()
    made = CardTensor(out, None, query.device)

    def again() -> None:
        if not out.is_meta:
            out.copy_(compute())

    launched("NATTEN's kernel", query.device, [x.memory for x in (query, key, value)], [made.memory], again, [made])
    return made


def _gradients(outputs: Any, inputs: Any, **_: Any) -> tuple[torch.Tensor, ...]:
    """torch.autograd.grad of a scalar, node by node: PyTorch's own engine wants a card's streams."""
    pending: dict[Any, list[Any]] = {outputs.grad_fn: [torch.ones_like(outputs.detach())]}
    order: list[Any] = []

    def visit(node: Any, seen: set[Any]) -> None:
        if node is None or node in seen:
            return
        seen.add(node)
        for following, _ in node.next_functions:
            visit(following, seen)
        order.append(node)

    visit(outputs.grad_fn, set())
    found: dict[int, torch.Tensor] = {}
    for node in reversed(order):
        given = pending.pop(node, None)
        if given is None:
            continue
        if hasattr(node, "variable"):
            found[id(node.variable)] = given[0]
            continue
        results = node.apply(*given) if hasattr(node, "apply") else node(*given)  # of Python, or of C++
        gradients = results if isinstance(results, tuple) else (results,)
        for (following, slot), gradient in zip(node.next_functions, gradients, strict=False):
            if following is None or gradient is None:
                continue
            gradient = gradient.sum_to_size(tuple(following._input_metadata[slot].shape))  # of what was broadcast
            slots = pending.setdefault(following, [])
            slots += [None] * (slot + 1 - len(slots))
            slots[slot] = gradient if slots[slot] is None else slots[slot] + gradient
    return tuple(found[id(x)] for x in inputs)


def _let_there_be_a_guard() -> None:
    """Give c10 a guard for CUDA devices, which does nothing: indexing and autograd ask for one, and the CPU build has none."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    registry[1] = registry[0]  # of the CPU, which does nothing


_fallback = torch.library.Library("_", "IMPL")


def install(cards: int = 1) -> None:
    """Make torch see that many cards, in this process, from now on."""
    global _cards
    _cards = cards
    _let_there_be_a_guard()
    _device_constructors()  # for `with torch.device("meta")`: a list of what is replaced below
    _fallback.fallback(_make, "CUDA")
    this_thread()
    to, tensor, grad = torch.Tensor.to, torch.tensor, torch.autograd.grad

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(_indexed(torch.device(x)) if isinstance(x, str | torch.device) else x for x in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = _indexed(torch.device(kwargs["device"]))
        return to(self, *args, **kwargs)

    def of_values(values: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = tensor(values, **kwargs)
        return made if device is None else made.to(device)

    def gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return _gradients(outputs, inputs) if _on_gpu(outputs) else grad(outputs, inputs, *args, **kwargs)

    torch.Tensor.to, torch.tensor, torch.autograd.grad, torch.empty = moved, of_values, gradients, _pinned_empty  # type: ignore
    torch.Tensor.cuda = lambda self, device=None, **_: self.to(_indexed(device))  # type: ignore
    torch.compile = lambda call=None, **_: call if call is not None else lambda call: call  # type: ignore
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.version.cuda = "13.0"
    here = SimpleNamespace(name=f"{NAME} card", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132)
    here.L2_cache_size = 50 * 2**20
    doubles: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: _cards,
        "current_device": current,
        "set_device": lambda device: setattr(_device, "index", _indexed(device).index),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: here.name,
        "get_device_properties": lambda device=None: here,
        "mem_get_info": lambda device=None: (70 * 2**30, here.total_memory),
        "memory_allocated": lambda device=None: 2**20,
        "max_memory_allocated": lambda device=None: 2**20,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: any(capture.is_here() for capture in _captures),
        "synchronize": synchronize,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "stream": stream_context,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": graph_pool_handle,
    }
    for name, double in doubles.items():
        setattr(torch.cuda, name, double)

    from dinat.app.engine.runtimes import cuda_graphs
    from dinat.model.attention import triton_kernel

    cuda_graphs.SimpleQueue, cuda_graphs.threading = RecordedQueue, SimpleNamespace(Lock=RecordedLock)  # type: ignore
    triton_kernel.attend = _Launched(triton_kernel.attend)
    import natten.backends
    import natten.functional

    natten.functional.na2d = _na2d
    natten.backends.get_compatible_backends = lambda *_, **__: ["cutlass-fna"]
