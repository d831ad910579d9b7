"""Neighborhood attention with dilation and relative positional bias (RPB), and the selection of a backend."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dinat.model.attention import autotune, compiled
from dinat.model.attention.autotune import LayerKey, candidates, select_backend
from dinat.model.attention.compiled import compiled_attention
from dinat.model.attention.geometry import check_geometry
from dinat.model.attention.reference import reference_attention
from dinat.model.attention.tiled import tiled_attention, tiled_operator
from dinat.model.errors import AttentionError
from dinat.model.fast_path import is_plain, is_symbolic, is_transformed

__all__ = ["BACKENDS", "check_backend", "neighborhood_attention", "neighborhood_attention_with_weights"]

Backend = Callable[..., Tensor]


def _reference(*arguments: Any) -> Tensor:
    return reference_attention(*arguments)[0]


def _natten(*arguments: Any, **options: Any) -> Tensor:
    from dinat.model.attention.natten_backend import natten_attention

    return natten_attention(*arguments, **options)


def _triton(*arguments: Any, **options: Any) -> Tensor:
    from dinat.model.attention.triton_kernel import triton_attention

    return triton_attention(*arguments, **options)


BACKENDS: dict[str, Backend] = {
    "reference": _reference,
    "tiled": tiled_attention,
    "compiled": compiled_attention,
    "natten": _natten,
    "triton": _triton,
}
"""Backends by name: functions of (q, k, v, rpb, kernel_size, dilation, scale, dropout), and of the option in VARIANTS. "auto"
selects the fastest available one (model/attention/autotune.py)."""
VARIANTS = {"triton": "tile_config", "natten": "natten_backend"}
"""Option of a backend that has several candidates."""


def check_backend(backend: str) -> None:
    """Raise AttentionError unless `backend` is "auto" or one of BACKENDS, and the package it requires is installed."""
    if backend != "auto" and backend not in BACKENDS:
        raise AttentionError(f"attention backend {backend!r} is not known: use one of auto, {', '.join(BACKENDS)}")
    if backend in ("natten", "triton") and find_spec(backend) is None:
        raise AttentionError(
            f"attention {backend} requires the package {backend}: pip install {backend}, or use attention auto"
        )


def run_candidate(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute neighborhood_attention by one of autotune.candidates.

    name: a backend, or a backend and the value of its option in VARIANTS, separated by a space. All other arguments and the
    returned tensor are those of neighborhood_attention.
    """
    backend, _, variant = name.partition(" ")
    options = {VARIANTS[backend]: variant} if variant else {}
    return BACKENDS[backend](q, k, v, rpb, kernel_size, dilation, scale, dropout, **options)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None = None,
    kernel_size: int = 7,
    dilation: int = 1,
    scale: float | None = None,
    backend: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(scale * q k^T + rpb) v over the kernel_size x kernel_size nearest keys of each query's dilation group.

    Source: DiNAT, arXiv 2209.15001, section 3. Windows at borders follow NATTEN (model/attention/geometry.py).

    Args:
        q: Queries (B, H, W, heads, head_dim), of a floating dtype; H and W at least kernel_size * dilation.
        k: Keys, of the same shape, dtype and device.
        v: Values, of the same shape, dtype and device.
        rpb: Relative positional bias (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), axis 1 is height, or None.
        kernel_size: Window size, odd and at least 3.
        dilation: Distance between neighboring keys of a window, at least 1.
        scale: Factor of q k^T, not of the bias; head_dim**-0.5 if None.
        backend: auto, reference, tiled, compiled, natten or triton.
        dropout: Dropout probability of the attention weights.

    Returns:
        Tensor (B, H, W, heads, head_dim).

    Raises:
        AttentionError: The arguments are invalid, or the backend does not support them.
    """
    _check(q, k, v, rpb, kernel_size, dilation)
    check_backend(backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not torch.compiler.is_compiling() and not v.numel():
        return v.clone()

    if is_symbolic(*q.shape[1:3]) and not dropout:
        attended: Tensor = tiled_operator(q, k, v, rpb, kernel_size, dilation, scale)
        return attended
    if torch.compiler.is_exporting():  # by standard operators, whatever the backend
        return tiled_attention(q, k, v, rpb, kernel_size, dilation, scale, dropout)

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        return run_candidate(name, q, k, v, rpb, kernel_size, dilation, scale, dropout)

    if dropout and backend == "auto":
        backend = "tiled"  # the only fast backend with dropout
    elif q.device.type == "cpu" and backend == "auto":
        backend = "compiled" if _is_inference(q, k, v, rpb) and compiled.supports(q, kernel_size) else "tiled"
    elif q.device.type == "cuda" and backend != "reference" and not torch.compiler.is_compiling():
        layer = LayerKey.of(q, kernel_size, dilation, scale, rpb is not None, backend)
        names = candidates(q.device, q.dtype, q.shape[-1], backend)
        backend = select_backend(layer, names, attend, q, k, v, rpb)
    elif backend == "auto":
        # torch.compile cannot trace find_spec. It generates Triton code for GPUs, so triton is installed.
        is_supported = q.dtype in autotune.MAX_ERROR and 8 <= q.shape[-1] <= 128
        is_supported = is_supported and q.device.type == "cuda" and autotune.has_kernels(q.device)
        backend = "triton" if is_supported else "tiled"
    return attend(backend, q, k, v, rpb)


def _is_inference(*inputs: Tensor | None) -> bool:
    """Return whether no input requires a gradient, and nothing transforms operations."""
    if is_transformed() or not is_plain(*inputs[:3]):
        return False
    return not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs)


def neighborhood_attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None = None,
    kernel_size: int = 7,
    dilation: int = 1,
    scale: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute neighborhood_attention by the reference backend, with the same arguments, and return the weights too.

    Returns:
        Output (B, H, W, heads, head_dim), and weights (B, heads, H, W, kernel_size**2) with the window in row-major order.

    Raises:
        AttentionError: The arguments are invalid.
    """
    _check(q, k, v, rpb, kernel_size, dilation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference_attention(q, k, v, rpb, kernel_size, dilation, scale, dropout)


def _check(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> None:
    if q.dim() != 5 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise AttentionError(f"q, k and v must share one shape (batch, height, width, heads, head_dim), got {shapes}")
    if not torch.is_floating_point(q) or not q.dtype == k.dtype == v.dtype:
        raise AttentionError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    devices = {x.device for x in (q, k, v, rpb) if x is not None}
    if len(devices) > 1:
        raise AttentionError(f"q, k, v and rpb must be on one device, got {', '.join(sorted(map(str, devices)))}")
    check_geometry(q.shape[1], q.shape[2], kernel_size, dilation)
    side = 2 * kernel_size - 1
    if rpb is not None and tuple(rpb.shape) != (q.shape[3], side, side):
        raise AttentionError(
            f"rpb must have shape {(q.shape[3], side, side)} for {q.shape[3]} heads and kernel_size {kernel_size}, "
            f"got {tuple(rpb.shape)}"
        )
