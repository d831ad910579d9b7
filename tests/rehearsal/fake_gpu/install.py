"""Make PyTorch's CPU build report fake GPUs, in this process and until it ends."""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from tests.rehearsal.fake_gpu import autograd, capture, devices, graphs, kernels, streams, tensors
from tests.rehearsal.fake_gpu.clocks import TrackedLock, TrackedQueue, this_thread
from tests.rehearsal.fake_gpu.devices import PROPERTIES, with_index

CUDA_FUNCTIONS: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *_: True,
    "device_count": devices.count,
    "current_device": devices.current,
    "set_device": devices.set_current,
    "_exchange_device": devices.exchange_current,
    "_maybe_exchange_device": devices.exchange_current,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "mem_get_info": lambda device=None: (70 * 2**30, PROPERTIES.total_memory),
    "memory_allocated": lambda device=None: 2**20,
    "max_memory_allocated": lambda device=None: 2**20,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "is_current_stream_capturing": capture.is_capturing,
    "synchronize": streams.synchronize,
    "current_stream": streams.current_stream,
    "default_stream": streams.default_stream,
    "stream": streams.stream_context,
    "Stream": streams.Stream,
    "Event": streams.Event,
    "CUDAGraph": graphs.CUDAGraph,
    "graph": graphs.graph,
    "graph_pool_handle": graphs.graph_pool_handle,
}
"""What replaces the functions and classes of these names in torch.cuda."""

_library: torch.library.Library | None = None


def is_installed() -> bool:
    return isinstance(torch.cuda.Stream, type) and torch.cuda.Stream is streams.Stream


def install(gpus: int = 1) -> None:
    """Make PyTorch report this many GPUs."""
    global _library
    devices.set_count(gpus)
    _register_device_guard()
    _device_constructors()  # cached before the functions in it are replaced: `with torch.device("meta")` requires the originals
    _library = torch.library.Library("_", "IMPL")  # unregisters when deleted
    _library.fallback(tensors.allocate, "CUDA")
    this_thread()
    _patch_torch()
    for name, replacement in CUDA_FUNCTIONS.items():
        setattr(torch.cuda, name, replacement)
    _patch_kernels()


def _register_device_guard() -> None:
    """Register a device guard for CUDA in c10: indexing and autograd require one, and the CPU build has none."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    registry[1] = registry[0]  # the CPU's guard, which does nothing


class Generator(torch.Generator):
    """torch.Generator for a GPU too, which the CPU build does not support."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")


def _patch_torch() -> None:
    torch_to, torch_tensor, torch_grad = torch.Tensor.to, torch.tensor, torch.autograd.grad

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(with_index(torch.device(x)) if isinstance(x, str | torch.device) else x for x in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = with_index(torch.device(kwargs["device"]))
        return torch_to(self, *args, **kwargs)

    def tensor(values: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        created = torch_tensor(values, **kwargs)
        return created if device is None else created.to(device)

    def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return autograd.grad(outputs, inputs) if tensors.is_on_gpu(outputs) else torch_grad(outputs, inputs, *args, **kwargs)

    torch.Tensor.to, torch.tensor, torch.autograd.grad, torch.empty = to, tensor, grad, tensors.empty  # type: ignore
    torch.Tensor.cuda = lambda self, device=None, **_: self.to(with_index(device))  # type: ignore
    torch.Generator = Generator  # type: ignore[misc]
    torch.compile = lambda call=None, **_: call if call is not None else lambda call: call  # type: ignore
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.version.cuda = "13.0"


def _patch_kernels() -> None:
    """Track locks and queues of the CUDA graph runtime, and replace the Triton kernels and NATTEN."""
    from dinat.app.engine.runtimes import cuda_graphs
    from dinat.model import fast_path
    from dinat.model.attention import triton_kernel
    from dinat.model.gpu import linear_kernel, mlp_kernel, pixels_kernel

    cuda_graphs.SimpleQueue, cuda_graphs.threading = TrackedQueue, SimpleNamespace(Lock=TrackedLock)  # type: ignore
    fast_path.PLAIN_TYPES += (tensors.FakeGpuTensor,)  # type: ignore
    for module, name in ((triton_kernel, "attend"), (linear_kernel, "linear"), (mlp_kernel, "mlp"), (pixels_kernel, "look_up")):
        setattr(module, name, kernels.TritonKernel(getattr(module, name), getattr(kernels, name)))
    import natten.functional
    from natten.backends.configs import checks

    natten.functional.na2d = kernels.na2d
    checks.HAS_LIBNATTEN = True  # its checks of GPU, dtype and head_dim are real
