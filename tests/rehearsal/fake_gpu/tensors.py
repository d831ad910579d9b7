"""Tensors on a fake GPU and in pinned host memory, and the operators on them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from tests.rehearsal.fake_gpu import devices
from tests.rehearsal.fake_gpu.capture import current_capture, forbid
from tests.rehearsal.fake_gpu.clocks import Memory, this_thread
from tests.rehearsal.fake_gpu.counts import count_download, count_launch
from tests.rehearsal.fake_gpu.devices import CudaError, with_index
from tests.rehearsal.fake_gpu.streams import current_stream, record_host_accesses, record_launch, synchronize_implicitly

aten = torch.ops.aten

_shapes_only = False


@contextmanager
def shapes_only() -> Iterator[None]:
    """Allocate GPU tensors without values, so that large networks run in no time."""
    global _shapes_only
    previous, _shapes_only = _shapes_only, True
    try:
        yield
    finally:
        _shapes_only = previous


class FakeGpuTensor(torch.Tensor):
    """A tensor on a fake GPU, or in pinned host memory.

    Attributes:
        backing: the CPU or meta tensor with its values.
        memory: its allocation, shared by all views of it.
    """

    backing: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(
        cls, backing: torch.Tensor, memory: Memory | None = None, device: torch.device | None = None
    ) -> "FakeGpuTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            backing.size(),
            strides=backing.stride(),
            storage_offset=backing.storage_offset(),
            dtype=backing.dtype,
            device=device or torch.device("cuda", devices.current()),
        )
        tensor.backing, tensor.memory = backing, memory or Memory()
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"FakeGpuTensor({self.backing!r}, device={self.device})"

    def data_ptr(self) -> int:
        return 0 if self.backing.is_meta else self.backing.data_ptr()

    def is_pinned(self, *_: Any) -> bool:
        return self.device.type == "cpu"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def is_on_gpu(x: object) -> bool:
    return isinstance(x, FakeGpuTensor) and x.device.type == "cuda"


def unwrap(x: Any) -> Any:
    """Return a FakeGpuTensor's backing tensor, and anything else as it is."""
    return x.backing if isinstance(x, FakeGpuTensor) else x


HOST_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
}
DATA_DEPENDENT_SHAPES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor}
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator that has at least one FakeGpuTensor among its operands."""
    if func.namespace == "dinat":
        return _project_operator(func)(*args, **kwargs)
    if func is aten._has_compatible_shallow_copy_type.default:
        return False
    if _is_composite(func):
        # In inference mode PyTorch dispatches it undecomposed. Not func.decompose: its dropout in eval mode is a clone.
        return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    operands = [x for x in tensors if isinstance(x, FakeGpuTensor)]
    if func is aten.copy_.default:
        return _copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
    if func is aten._to_copy.default and kwargs.get("device") is not None:
        device = with_index(torch.device(kwargs["device"]))
        if device != operands[0].device:
            return _to_device(args[0], device, kwargs)
    if func in HOST_READS or func in DATA_DEPENDENT_SHAPES or _has_mask(func, args):
        synchronize_implicitly(f"{func} reads a value from the GPU")
        if operands[0].backing.is_meta and func in HOST_READS:
            return 1.0
        return _wrap(func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)), operands, operands[0].device)
    if not any(is_on_gpu(x) for x in operands):
        return _run_on_host(func, args, kwargs, operands)
    _check_devices(func, tensors, next(x.device for x in operands if is_on_gpu(x)))
    return _run_on_gpu(func, args, kwargs, operands)


def _check_devices(func: Any, tensors: list[torch.Tensor], device: torch.device) -> None:
    """Raise unless all tensors are on the device, except for CPU scalars and for CPU indices, which are copied."""
    for x in tensors:
        if x.device != device and (x.dim() > 0 or isinstance(x, FakeGpuTensor)):
            if func not in INDEXING or x.device.type != "cpu":
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found {device} and {x.device} in {func}"
                )
            synchronize_implicitly(f"{func} copies an index from host to GPU")


def _run_on_gpu(func: Any, args: Any, kwargs: dict[str, Any], operands: list[FakeGpuTensor]) -> Any:
    """Run an operator on the backing tensors and record it as a launch."""
    device = next(x.device for x in operands if is_on_gpu(x))
    kwargs = {
        name: ("meta" if operands[0].backing.is_meta else "cpu") if name == "device" and value else value
        for name, value in kwargs.items()
    }
    call = _with_tf32(func)
    backing_args, backing_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    results = call(*backing_args, **backing_kwargs)
    written = _written_operands(func, args, kwargs)
    wrapped = _wrap(results, operands, device)
    new = [
        x
        for x in tree_flatten(wrapped)[0]
        if isinstance(x, FakeGpuTensor) and all(x.memory is not operand.memory for operand in operands)
    ]
    if new or written:
        outputs = [x for x in tree_flatten(results)[0] if isinstance(x, torch.Tensor)]

        def replay() -> None:
            if any(x.is_meta for x in outputs):
                return
            values = [x for x in tree_flatten(call(*backing_args, **backing_kwargs))[0] if isinstance(x, torch.Tensor)]
            for output, value in zip(outputs, values, strict=True):
                if output is not value:
                    output.copy_(value)

        writes = [*(x.memory for x in written), *(x.memory for x in new)]
        reads = [x.memory for x in operands if x.memory not in writes]
        record_launch(str(func), device, reads, writes, replay, new)
        count_launch([*operands, *new])
    return wrapped


@cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    """Return position and name of the arguments that an operator writes to, by its schema."""
    arguments = [(i, argument.name, argument.alias_info) for i, argument in enumerate(func._schema.arguments)]
    return [(i, name) for i, name, alias in arguments if alias is not None and alias.is_write]


def _written_operands(func: Any, args: Any, kwargs: Any) -> list[FakeGpuTensor]:
    operands = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)]
    return [x for x in tree_flatten(operands)[0] if isinstance(x, FakeGpuTensor)]


def _project_operator(func: Any) -> Callable[..., Any]:
    """Return the Python implementation of one of this project's operators."""
    from dinat.model.attention import tiled, triton_kernel

    def backward(*args: Any) -> Any:  # torch.func takes no FakeGpuTensors and cannot start within an operator: another thread
        with ThreadPoolExecutor(1) as thread:
            return [FakeGpuTensor(x) for x in thread.submit(func, *tree_map(unwrap, args)).result()]

    return {  # type: ignore[no-any-return]
        "neighborhood_attention": triton_kernel.fused_attention._init_fn,
        "tiled_attention": tiled.tiled_operator._init_fn,
        "attention_backward": backward,
    }[func._schema.name.partition("::")[2]]


def _wrap(results: Any, operands: list[FakeGpuTensor], device: torch.device | None) -> Any:
    """Wrap results in FakeGpuTensors.

    Views share the memory of their base. Other tensors are new allocations on `device`, or plain CPU tensors if it is None.
    """

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        storage = x.untyped_storage()._cdata
        base = next((operand for operand in operands if operand.backing.untyped_storage()._cdata == storage), None)
        if base is None:
            return x if device is None else FakeGpuTensor(x, None, device)
        if x is base.backing:
            return base
        with torch.inference_mode(base.is_inference()):  # a view is an inference tensor if its base is
            return FakeGpuTensor(x, base.memory, base.device)

    return tree_map(wrap, results)


def _has_mask(func: Any, args: Any) -> bool:
    if func not in INDEXING:
        return False
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _with_tf32(func: Any) -> Callable[..., Any]:
    """Round float32 operands of convolutions and matrix products to TF32 where PyTorch's flags allow it, as a GPU does."""
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


def _run_on_host(func: Any, args: Any, kwargs: Any, operands: list[FakeGpuTensor]) -> Any:
    """Run an operator on pinned memory, on the host. Results in new memory are plain tensors."""
    written = _written_operands(func, args, kwargs)
    results = _wrap(func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)), operands, None)
    is_view = any(isinstance(x, FakeGpuTensor) for x in tree_flatten(results)[0])
    if written or not is_view:
        record_host_accesses(str(func), [x.memory for x in operands if x not in written], [x.memory for x in written])
    return results


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    """target.copy_(source), between GPU, pinned and pageable memory."""
    to_gpu, from_gpu = is_on_gpu(target), is_on_gpu(source)
    reads = [source.memory] if isinstance(source, FakeGpuTensor) else []
    writes = [target.memory] if isinstance(target, FakeGpuTensor) else []
    target_backing, source_backing = unwrap(target), unwrap(source)

    def replay() -> None:
        if not target_backing.is_meta and not source_backing.is_meta:
            target_backing.copy_(source_backing)

    if not to_gpu and not from_gpu:
        replay()
        record_host_accesses("copy_", reads, writes)
        return target
    if to_gpu != from_gpu:
        forbid("a copy between host and GPU")
    device = target.device if to_gpu else source.device
    replay()
    record_launch("copy_", device, reads, writes, replay, [])
    count_launch([x for x in (source, target) if is_on_gpu(x)])
    if from_gpu and not to_gpu:
        count_download(source)
    asynchronous = non_blocking and all(isinstance(x, FakeGpuTensor) for x in (target, source))
    if to_gpu != from_gpu and not asynchronous:
        this_thread().merge(current_stream(device).timeline.clock)
    return target


def _to_device(source: torch.Tensor, device: torch.device, kwargs: dict[str, Any]) -> torch.Tensor:
    """Copy a tensor to another device, and to kwargs["dtype"] if that is set."""
    dtype = kwargs.get("dtype") or source.dtype
    backing = unwrap(source)
    if device.type == "cuda":
        backing = backing.to(dtype, copy=True)
        target: torch.Tensor = FakeGpuTensor(backing.to("meta") if _shapes_only else backing, None, device)
    else:
        target = torch.zeros(backing.shape, dtype=dtype) if backing.is_meta else backing.to(dtype, copy=True)
    return _copy(target, source, non_blocking=False)


def allocate(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a factory operator on a GPU: empty and empty_strided, which PyTorch's other factories call and then fill."""
    device = with_index(torch.device(kwargs.get("device") or "cuda"))
    if device.index >= devices.count():
        raise CudaError("CUDA error: invalid device ordinal")
    kwargs = {**kwargs, "device": "meta" if _shapes_only else "cpu", "pin_memory": False}
    backing = func(*args, **kwargs)
    if not backing.is_meta and backing.is_floating_point():
        backing.fill_(float("nan"))  # uninitialized
    tensor = FakeGpuTensor(backing, None, device)
    capture = current_capture()
    if capture is not None:
        capture.allocated.add(tensor.memory)
    return tensor


_torch_empty = torch.empty


def empty(*size: Any, **kwargs: Any) -> torch.Tensor:
    """torch.empty with pin_memory, which the CPU build does not support."""
    if not kwargs.pop("pin_memory", False):
        return _torch_empty(*size, **kwargs)  # type: ignore[no-any-return]
    forbid("an allocation of pinned memory")
    return FakeGpuTensor(_torch_empty(*size, **kwargs), Memory("pinned memory"), torch.device("cpu"))
