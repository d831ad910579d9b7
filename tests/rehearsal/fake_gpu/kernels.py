"""Kernels that are not PyTorch's: Triton kernels and NATTEN, on the backing tensors."""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tests.rehearsal.fake_gpu import devices
from tests.rehearsal.fake_gpu.capture import current_capture
from tests.rehearsal.fake_gpu.counts import count_launch
from tests.rehearsal.fake_gpu.streams import record_launch
from tests.rehearsal.fake_gpu.tensors import FakeGpuTensor, is_on_gpu, unwrap

MAX_INTERPRETED_PROGRAMS = {"attend": 8, "linear": 2, "mlp": 2, "look_up": 2}
"""Triton's interpreter takes milliseconds per program: larger launches, and those of graphs, are computed by PyTorch from the
kernel's arguments."""

_interpreter = threading.Lock()
"""Held while a kernel is interpreted: the interpreter replaces functions of Triton for all threads."""


class TritonKernel:
    """Wraps a Triton kernel so that it accepts FakeGpuTensors, which must be on the current device.

    compute: computes the same by PyTorch, from the same arguments. The output is the last tensor among them.
    """

    def __init__(self, kernel: Any, compute: Callable[..., None]) -> None:
        self._kernel, self._compute = kernel, compute
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            if not any(isinstance(x, FakeGpuTensor) for x in tensors):
                self._kernel[grid](*args, **kwargs)
                return
            for x in tensors:
                if not is_on_gpu(x) or x.device.index != devices.current():
                    raise ValueError(
                        f"Pointer argument cannot be accessed from Triton: {x.device}, current is {devices.current()}"
                    )
            backing = [unwrap(x) for x in args]

            def replay() -> None:
                if not backing[0].is_meta:
                    self._compute(*backing, **kwargs)

            is_small = grid[0] * grid[1] * grid[2] <= MAX_INTERPRETED_PROGRAMS[self._kernel.__name__]
            if is_small and not backing[0].is_meta and current_capture() is None:
                with _interpreter:
                    self._kernel[grid](*backing, **kwargs)
            else:
                replay()
            *inputs, out = tensors
            record_launch(
                f"the Triton kernel {self._kernel.__name__}", out.device, [x.memory for x in inputs], [out.memory], replay, []
            )
            count_launch(tensors)

        return launch


def attend(
    q: Any, k: Any, v: Any, bias: Any, query_table: Any, key_table: Any, bias_table: Any, out: Any, *numbers: Any, **_: Any
) -> None:
    """Compute what dinat.model.attention.triton_kernel.attend computes."""
    scale = numbers[-1]
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    queries = q[:, query_table.clamp(min=0).long()]
    keys, values = k[:, key_table.long()], v[:, key_table.long()]
    scores = torch.einsum("btqhc,btkhc->bthqk", queries.float(), keys.float()) * scale + bias[bias_table.long()].float()
    attended = torch.einsum("bthqk,btkhc->btqhc", scores.softmax(-1), values.float())
    valid = query_table >= 0
    out.flatten(1, 2)[:, query_table[valid].long()] = attended[:, valid].to(out.dtype)


def linear(
    x: Any, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any, scale: Any, add: Any, out: Any,
    rows: int, inputs: int, outputs: int, eps: float, GELU: bool, **_: Any,
) -> None:  # fmt: skip
    """Compute what dinat.model.gpu.linear_kernel.linear computes."""
    y = x.float()
    if norm_weight is not None:
        y = F.layer_norm(y, (inputs,), norm_weight.float(), norm_bias.float(), eps)
    y = F.linear(y.to(x.dtype).float(), weight.float(), None if bias is None else bias.float())
    y = F.gelu(y) if GELU else y
    y = y if scale is None else scale.float() * y
    out.copy_(y if add is None else add.float() + y)


def mlp(
    x: Any, norm_weight: Any, norm_bias: Any, up: Any, up_bias: Any, down: Any, down_bias: Any, scale: Any, out: Any,
    rows: int, hidden: int, eps: float, **_: Any,
) -> None:  # fmt: skip
    """Compute what dinat.model.gpu.mlp_kernel.mlp computes."""
    features = x.new_empty(*x.shape[:-1], hidden)
    linear(x, norm_weight, norm_bias, up, up_bias, None, None, features, rows, x.shape[-1], hidden, eps, GELU=True)
    linear(features, None, None, down, down_bias, scale, x, out, rows, hidden, x.shape[-1], eps, GELU=False)


def look_up(pixels: Any, table: Any, out: Any, count: int, **_: Any) -> None:
    """Compute what dinat.model.gpu.pixels_kernel.look_up computes."""
    out.copy_(table[torch.arange(3), pixels.long()])


def na2d(query: Any, key: Any, value: Any, kernel_size: int, dilation: int = 1, scale: Any = None, backend: Any = None) -> Any:
    """natten.functional.na2d by the reference implementation, with NATTEN's own checks of its kernels."""
    from natten.backends import get_compatible_backends, get_compatible_fmha_backends

    from dinat.model.attention.reference import reference_attention

    if query.shape[1:3] == (kernel_size, kernel_size):  # NATTEN ignores `backend` and selects a kernel of dense attention
        dense = [x.flatten(1, 2) for x in (query, key, value)]
        compatible = get_compatible_fmha_backends(*dense, is_causal=False, is_varlen=False, torch_compile=False)
        backend = compatible[0] if compatible else backend
    else:
        compatible = get_compatible_backends(query, key, value, torch_compile=False)
    if backend not in compatible:
        raise NotImplementedError(f"NATTEN has no {backend} for these tensors, only {compatible}")
    backing = [unwrap(x) for x in (query, key, value)]

    def compute() -> torch.Tensor:
        if backing[0].is_meta:
            return torch.empty_like(backing[2])
        attended = reference_attention(*(x.float() for x in backing), None, kernel_size, dilation, scale)[0]
        return attended.to(backing[0].dtype)

    output = compute()
    result = FakeGpuTensor(output, None, query.device)

    def replay() -> None:
        if not output.is_meta:
            output.copy_(compute())

    reads = [x.memory for x in (query, key, value)]
    record_launch("NATTEN's kernel", query.device, reads, [result.memory], replay, [result])
    count_launch([query, key, value, result])
    return result
