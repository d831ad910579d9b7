"""Neighborhood attention by its definition: gather the keys of every query.

Slow, differentiable, for any floating dtype. The only backend that returns the attention weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.model.attention.geometry import neighbors
from dinat.model.capture_safe_cache import capture_safe_cache


def attention_weights(q: Tensor, k: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float) -> Tensor:
    """Compute softmax(scale * q k^T + rpb) over each query's window.

    Args:
        q: Queries (B, H, W, heads, head_dim).
        k: Keys, of the same shape.
        rpb: Relative positional bias (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), or None.
        kernel_size: Odd window size.
        dilation: Distance between neighboring keys of a window.
        scale: Factor of q k^T.

    Returns:
        Weights (B, H, W, heads, kernel_size**2), the window in row-major order.
    """
    scores = torch.einsum("bhwnd,bhwknd->bhwnk", q * scale, gather(k, kernel_size, dilation))
    if rpb is not None:
        scores = scores + window_bias(rpb, q.shape[1], q.shape[2], kernel_size, dilation).to(scores.dtype)
    return scores.softmax(dim=-1)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute neighborhood attention (arXiv 2209.15001, section 3) and its weights.

    The arguments are those of attention_weights, the values v (B, H, W, heads, head_dim), and the dropout probability of the
    attention weights.

    Returns:
        Output (B, H, W, heads, head_dim), and the weights after dropout (B, heads, H, W, kernel_size**2). The output is
        computed from the returned weights, so they receive its gradient.
    """
    weights = F.dropout(attention_weights(q, k, rpb, kernel_size, dilation, scale), dropout).permute(0, 3, 1, 2, 4)
    return torch.einsum("bnhwk,bhwknd->bhwnd", weights, gather(v, kernel_size, dilation)), weights


def gather(x: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Gather the window of each query: (B, H, W, heads, head_dim) -> (B, H, W, kernel_size**2, heads, head_dim)."""
    rows, _ = _neighbors(int(x.shape[1]), kernel_size, dilation, x.device)
    columns, _ = _neighbors(int(x.shape[2]), kernel_size, dilation, x.device)
    return x[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4)


def window_bias(rpb: Tensor, height: int, width: int, kernel_size: int, dilation: int) -> Tensor:
    """Gather the bias of each query's window: (heads, 2k-1, 2k-1) -> (H, W, heads, kernel_size**2)."""
    _, rows = _neighbors(int(height), kernel_size, dilation, rpb.device)
    _, columns = _neighbors(int(width), kernel_size, dilation, rpb.device)
    return rpb[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).permute(1, 2, 0, 3)


@capture_safe_cache(maxsize=256)
def _neighbors(length: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return geometry.neighbors on a device."""
    keys, rpb_index = neighbors(length, kernel_size, dilation)
    return keys.to(device), rpb_index.to(device)
