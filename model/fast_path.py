"""When a kernel that PyTorch cannot see may compute: one rule for every fast path.

A kernel reads memory by its address and ignores whatever observes or transforms operations. Where the rule says no, PyTorch's
own operations compute, exactly.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from dinat.model.errors import DinatError

PLAIN_TYPES = (Tensor, nn.Parameter)
_CPU_LAYOUT = torch.strided

# Called several times in each layer: each lookup counts.
_is_grad_enabled, _is_autocast_enabled, _is_tracing = (
    torch.is_grad_enabled,
    torch._C._is_any_autocast_enabled,
    torch._C._is_tracing,
)
_transform, _dispatch_modes = torch._C._functorch.peek_interpreter_stack, torch._C._len_torch_dispatch_stack
_hooks, _pre_hooks = module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether all tensors (None is ignored) have one dtype, and their numbers in the CPU's memory.

    Subclasses do not: quantized weights, fake tensors, tensors of torch.func.
    """
    dtype = None
    for x in tensors:
        if x is not None:
            if type(x) not in PLAIN_TYPES or not x.is_cpu or x.layout is not _CPU_LAYOUT:
                return False
            if dtype is None:
                dtype = x.dtype
            elif x.dtype is not dtype:
                return False
    return True


def is_plain_on_gpu(*tensors: Tensor) -> bool:
    """Return whether all tensors have one dtype, and their numbers in the memory of one CUDA device; see is_plain."""
    first = tensors[0]
    return first.is_cuda and all(
        type(x) in PLAIN_TYPES
        and (x.device == first.device and x.layout is torch.strided and x.dtype is first.dtype)
        and not (x.is_neg() or x.is_conj())
        for x in tensors
    )


def is_transformed() -> bool:
    """Return whether operations are recorded or transformed: torch.func, forward-mode AD, tracing, export, dispatch modes."""
    return torch.compiler.is_compiling() or _is_transformed()


def is_observed() -> bool:
    """Return whether anything must see every operation: autograd, autocast, hooks of all modules, or what transforms them."""
    return (
        torch.compiler.is_compiling()
        or _is_grad_enabled()
        or _is_autocast_enabled()
        or bool(_hooks or _pre_hooks)
        or _is_transformed()
    )


def _is_transformed() -> bool:
    return _transform() is not None or forward_ad._current_level >= 0 or _dispatch_modes() > 0 or bool(_is_tracing())


def is_autocast() -> bool:
    """Return whether torch.autocast selects the dtype of operations."""
    return _is_autocast_enabled()


def is_fake() -> bool:
    """Return whether tensors without memory are propagated (FakeTensorMode), outside torch.compile and torch.export."""
    return not torch.compiler.is_compiling() and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def is_symbolic(*sizes: int) -> bool:
    """Return whether one of these sizes is an input of the graph that torch.export writes, not a constant."""
    return torch.compiler.is_exporting() and any(isinstance(size, torch.SymInt) for size in sizes)


def check_packed_input(x: Tensor, dtype: torch.dtype) -> None:
    """Raise DinatError unless a packed module of this dtype can compute x: only kernels can read its weights."""
    if not is_plain(x) or is_transformed() or (x.requires_grad and torch.is_grad_enabled()):
        raise DinatError(
            "a packed network only infers plain CPU tensors, without gradients, torch.func, tracing or dispatch modes: "
            "use the network before pack()"
        )
    if x.dtype is not dtype:
        raise DinatError(f"the input is {x.dtype}, the packed network is {dtype}: convert the input with .to({dtype})")
