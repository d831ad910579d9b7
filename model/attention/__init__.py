"""Neighborhood attention with dilation and relative positional bias, and the choice of who computes it."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dinat.model.attention import autotune, compiled
from dinat.model.attention.autotune import LayerKey, candidates, choose
from dinat.model.attention.compiled import compiled_attention
from dinat.model.attention.geometry import check_geometry
from dinat.model.attention.reference import reference_attention
from dinat.model.attention.tiled import tiled_attention
from dinat.model.errors import AttentionError

__all__ = ["BACKENDS", "check_backend", "neighborhood_attention", "neighborhood_attention_with_weights"]

Backend = Callable[..., Tensor]


def _reference(*arguments: Any) -> Tensor:
    return reference_attention(*arguments)[0]


def _natten(*arguments: Any) -> Tensor:
    from dinat.model.attention.natten_backend import natten_attention

    return natten_attention(*arguments)


def _triton(*arguments: Any, **settings: Any) -> Tensor:
    from dinat.model.attention.triton_kernel import triton_attention

    return triton_attention(*arguments, **settings)


BACKENDS: dict[str, Backend] = {
    "reference": _reference,
    "tiled": tiled_attention,
    "compiled": compiled_attention,
    "natten": _natten,
    "triton": _triton,
}
"""Every backend by name: (q, k, v, rpb, kernel_size, dilation, scale, dropout) to the output; triton takes a `cut` besides.
"auto" takes the fastest that is there (model/attention/autotune.py)."""


def check_backend(backend: str) -> None:
    """Raise AttentionError unless `backend` is "auto" or one of BACKENDS, and the package it needs is installed."""
    if backend != "auto" and backend not in BACKENDS:
        raise AttentionError(f"attention backend {backend!r} is not known: take one of auto, {', '.join(BACKENDS)}")
    if backend in ("natten", "triton") and find_spec(backend) is None:
        raise AttentionError(f"attention {backend} needs the package {backend}: pip install {backend}, or take attention auto")


def by_name(
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
    """What neighborhood_attention gives, by one of autotune.candidates: a backend, or "triton" and the name of a cut."""
    kind, _, cut = name.partition(" ")
    settings = {"cut": cut} if cut else {}
    return BACKENDS[kind](q, k, v, rpb, kernel_size, dilation, scale, dropout, **settings)


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
    """softmax(scale * q k^T + rpb) v, over the kernel_size x kernel_size keys nearest to each query in its dilation group.

    q, k, v: (B, H, W, heads, head_dim), one floating dtype and device; H and W at least kernel_size * dilation.
    rpb: (heads, 2 * kernel_size - 1, 2 * kernel_size - 1) relative positional bias, axis 1 is height, or None.
    scale: of q k^T, head_dim**-0.5 if None (the bias is not scaled);  dropout: probability, on the attention weights.
    backend: auto, reference, tiled, compiled, natten or triton.  Returns (B, H, W, heads, head_dim).
    Raises AttentionError for shapes, kernels, dilations or a backend that cannot be.
    Source: DiNAT, arXiv 2209.15001, section 3; the rule at borders is NATTEN's (model/attention/geometry.py).
    """
    _check(q, k, v, rpb, kernel_size, dilation)
    check_backend(backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        return by_name(name, q, k, v, rpb, kernel_size, dilation, scale, dropout)

    if dropout and backend == "auto":
        backend = "tiled"  # which alone has it
    elif q.device.type == "cpu" and backend == "auto":
        backend = "compiled" if _is_inference(q, k, v, rpb) and compiled.takes(q, kernel_size) else "tiled"
    elif q.device.type == "cuda" and backend != "reference" and not torch.compiler.is_compiling():
        layer = LayerKey.of(q, kernel_size, dilation, scale, rpb is not None, backend)
        names = candidates(q.device, q.dtype, q.shape[-1], backend)
        backend = choose(layer, names, attend, q, k, v, rpb)
    elif backend == "auto":
        # A compiler cannot look for what is installed; its own code for a card is Triton's, so that is there.
        fits = q.device.type == "cuda" and q.dtype in autotune.LIMITS and 8 <= q.shape[-1] <= 128
        backend = "triton" if fits else "tiled"
    return attend(backend, q, k, v, rpb)


def _is_inference(*inputs: Tensor | None) -> bool:
    """Whether neither a gradient is wanted nor a compiler looks on."""
    if torch.compiler.is_compiling():
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
    """The same as neighborhood_attention by its definition, and the weights: (B, heads, H, W, kernel_size**2), row-major."""
    _check(q, k, v, rpb, kernel_size, dilation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference_attention(q, k, v, rpb, kernel_size, dilation, scale, dropout)


def _check(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> None:
    if q.dim() != 5 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise AttentionError(f"q, k and v must share one shape (batch, height, width, heads, head_dim), got {shapes}")
    if not torch.is_floating_point(q) or not q.dtype == k.dtype == v.dtype:
        raise AttentionError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    check_geometry(q.shape[1], q.shape[2], kernel_size, dilation)
    side = 2 * kernel_size - 1
    if rpb is not None and tuple(rpb.shape) != (q.shape[3], side, side):
        raise AttentionError(
            f"rpb for {q.shape[3]} heads and kernel {kernel_size} is {(q.shape[3], side, side)}, got {tuple(rpb.shape)}"
        )
