"""Neighborhood attention by its definition: gather every query's keys. Slow, differentiable, any dtype, gives the weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.model.attention.geometry import neighbors
from dinat.model.capture_safe_cache import kept


def attention_weights(q: Tensor, k: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float) -> Tensor:
    """softmax(scale * q k^T + rpb) over each query's window.

    q, k: (B, H, W, heads, head_dim). Returns (B, H, W, heads, kernel_size**2), the window row-major.
    """
    scores = torch.einsum("bhwnd,bhwknd->bhwnk", q * scale, gather(k, kernel_size, dilation))
    if rpb is not None:
        scores = scores + window_bias(rpb, q.shape[1], q.shape[2], kernel_size, dilation).to(scores.dtype)
    return scores.softmax(dim=-1)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Neighborhood attention, DiNAT section 3. Returns (output, weights).

    q, k, v, output: (B, H, W, heads, head_dim);  weights: (B, heads, H, W, kernel_size**2), after dropout. The output is made
    of these weights, so that they have its gradient.
    """
    weights = F.dropout(attention_weights(q, k, rpb, kernel_size, dilation, scale), dropout).permute(0, 3, 1, 2, 4)
    return torch.einsum("bnhwk,bhwknd->bhwnd", weights, gather(v, kernel_size, dilation)), weights


def gather(x: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Each query's window of x: (B, H, W, heads, head_dim) -> (B, H, W, kernel_size**2, heads, head_dim)."""
    rows, _ = _neighbors(x.shape[1], kernel_size, dilation, x.device)
    columns, _ = _neighbors(x.shape[2], kernel_size, dilation, x.device)
    return x[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4)


def window_bias(rpb: Tensor, height: int, width: int, kernel_size: int, dilation: int) -> Tensor:
    """The bias of each query's window: (heads, 2k-1, 2k-1) -> (H, W, heads, kernel_size**2)."""
    _, rows = _neighbors(height, kernel_size, dilation, rpb.device)
    _, columns = _neighbors(width, kernel_size, dilation, rpb.device)
    return rpb[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).permute(1, 2, 0, 3)


@kept(256)
def _neighbors(length: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """geometry.neighbors, on a device."""
    keys, rpb_index = neighbors(length, kernel_size, dilation)
    return keys.to(device), rpb_index.to(device)
