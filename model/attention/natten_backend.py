"""Neighborhood attention by the NATTEN library, with the relative positional bias that it no longer has.

NATTEN from 0.20 on takes no bias, so the bias rides in the product of queries and keys. A query's window holds kernel_size
consecutive members of its dilation group per axis, so a key's member number modulo kernel_size names it within the window.
Keys get kernel_size**2 more channels, a one-hot of that residue of both axes; queries get, in the channel of each residue, the
bias that the key there is due, over the scale. Then scale * q k^T gains exactly the bias. NATTEN 0.17 takes the bias itself.

Source: NATTEN, arXiv 2204.07143 and 2209.15001; the residues are this project's own.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.model.attention.bias_cache import made_from
from dinat.model.attention.geometry import neighbors
from dinat.model.capture_safe_cache import kept
from dinat.model.errors import AttentionError


def natten_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Neighborhood attention, DiNAT section 3. q, k, v, output: (B, H, W, heads, head_dim).

    Raises AttentionError where NATTEN has no kernel for the dtype and head_dim on the device, or with dropout.
    """
    if dropout:
        raise AttentionError(f"natten has no dropout of attention weights, asked for {dropout}: take attention tiled")
    if rpb is not None and _takes_rpb():
        attended: Tensor = _na2d()(q, k, v, kernel_size=kernel_size, dilation=dilation, rpb=rpb.to(q.dtype), scale=scale)
        return attended
    height, width, _, head_dim = q.shape[1:]
    extra = 0 if rpb is None else kernel_size**2
    call = choose(head_dim + extra, head_dim, q.dtype, q.device, torch.is_grad_enabled() and q.requires_grad)
    if rpb is not None:
        key = ("natten", height, width, dilation, scale, q.dtype)
        bias = made_from(rpb, key, lambda: query_channels(rpb, height, width, dilation, scale).to(q))
        hot = key_channels(height, width, kernel_size, dilation, q.dtype, q.device)
        q, k = _beside(q, bias, call.width), _beside(k, hot, call.width)
    else:
        q, k = (F.pad(x, (0, call.width - head_dim)) for x in (q, k))
    v = F.pad(v, (0, call.value_width - head_dim))
    attended = _na2d()(q, k, v, kernel_size=kernel_size, dilation=dilation, scale=scale, backend=call.backend)
    return attended[..., :head_dim]


def query_channels(rpb: Tensor, height: int, width: int, dilation: int, scale: float) -> Tensor:
    """The bias due to the key of each residue, over the scale: (heads, 2k-1, 2k-1) -> (H, W, heads, kernel_size**2)."""
    kernel_size = (rpb.shape[1] + 1) // 2
    rows, columns = (_rpb_index_of_residues(length, kernel_size, dilation).to(rpb.device) for length in (height, width))
    bias = rpb[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).permute(1, 2, 0, 3)
    return bias / scale


def _rpb_index_of_residues(length: int, kernel_size: int, dilation: int) -> Tensor:
    """(length, kernel_size) int64: the row of the bias table due to the key whose member number has each residue."""
    keys, rpb_index = neighbors(length, kernel_size, dilation)
    residues = keys // dilation % kernel_size
    return rpb_index.gather(1, residues.argsort(dim=1))


@kept(64)
def key_channels(height: int, width: int, kernel_size: int, dilation: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One-hot of the residues of each position's member numbers: (H, W, 1, kernel_size**2)."""
    rows, columns = (torch.arange(length) // dilation % kernel_size for length in (height, width))
    residues = rows[:, None] * kernel_size + columns
    return F.one_hot(residues, kernel_size**2)[:, :, None].to(device=device, dtype=dtype)


def _beside(x: Tensor, channels: Tensor, width: int) -> Tensor:
    """X and channels side by side, then zeros: (B, H, W, heads, C) and (H, W, heads or 1, E) -> (B, H, W, heads, width)."""
    padding = width - x.shape[-1] - channels.shape[-1]
    return torch.cat([x, F.pad(channels, (0, padding)).expand(*x.shape[:-1], -1)], dim=-1)


@dataclass(frozen=True)
class Call:
    """How NATTEN is to be called: its backend, and the head_dim of queries and keys, and of values, that it wants."""

    backend: str
    width: int
    value_width: int


@cache
def choose(width: int, value_width: int, dtype: torch.dtype, device: torch.device, gradients: bool) -> Call:
    """The first of NATTEN's backends, in its own order of preference, that takes such heads, widened as little as it wants.

    width: channels of queries and keys;  value_width: of values. Raises AttentionError where there is none.
    """
    from natten.backends import get_compatible_backends

    power = 1 << max(width - 1, 31).bit_length()
    eighth = -(-width // 8) * 8
    candidates = [
        Call("blackwell-fna", eighth, eighth),
        Call("hopper-fna", power, power),
        Call("cutlass-fna", eighth, -(-value_width // 8) * 8),
    ]
    if device.type != "cuda":  # on a card Flex as natten calls it holds every score, and is slower than the tiles
        candidates.append(Call("flex-fna", power, power))
    for call in candidates:
        q = torch.empty(1, 3, 3, 1, call.width, dtype=dtype, device=device, requires_grad=gradients)
        v = torch.empty(1, 3, 3, 1, call.value_width, dtype=dtype, device=device, requires_grad=gradients)
        if call.backend in get_compatible_backends(q, q, v, torch_compile=False):
            return call
    raise AttentionError(
        f"natten has no kernel for {dtype} heads of {width} channels (head_dim and the bias's) on {device}: take attention "
        "tiled, or install a natten that was built for this device"
    )


def _na2d() -> Any:
    from natten.functional import na2d

    return na2d


@cache
def _takes_rpb() -> bool:
    """Whether this is NATTEN 0.17, whose na2d has a bias of its own (forward only)."""
    return "rpb" in inspect.signature(_na2d()).parameters
