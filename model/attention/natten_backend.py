"""Neighborhood attention by the NATTEN library, with the relative positional bias (RPB) that recent releases lack.

NATTEN 0.20 and later accept no bias, so the bias is encoded in the product of queries and keys. A query's window contains
kernel_size consecutive members of its dilation group per axis, so a key's member index modulo kernel_size (its residue)
identifies it within the window. Keys get kernel_size**2 additional channels, a one-hot encoding of their residues on both axes.
Queries get, in the channel of each residue, the bias of the key with that residue, divided by the scale. Then scale * q k^T
includes exactly the bias. NATTEN 0.17 accepts the bias as an argument.

Source: NATTEN, arXiv 2204.07143 and 2209.15001; the encoding by residues is specific to this project.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.model.attention.bias_cache import cached_for_table
from dinat.model.attention.geometry import neighbors
from dinat.model.capture_safe_cache import capture_safe_cache
from dinat.model.errors import AttentionError


def natten_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
    dropout: float = 0.0,
    natten_backend: str = "",
) -> Tensor:
    """Compute neighborhood attention (arXiv 2209.15001, section 3) of q, k and v (B, H, W, heads, head_dim).

    natten_backend is one of `compatible_backends`, the first one if empty. If the window is the whole feature map, NATTEN calls
    a kernel of dense attention that it selects itself. The other arguments are those of neighborhood_attention; dropout must
    be 0.

    Raises:
        AttentionError: NATTEN has no kernel for the dtype and head_dim on the device, or dropout is not 0.
    """
    if dropout:
        raise AttentionError(f"natten does not support attention dropout, got {dropout}: use attention tiled")
    if rpb is not None and _accepts_rpb():
        attended: Tensor = _na2d()(q, k, v, kernel_size=kernel_size, dilation=dilation, rpb=rpb.to(q.dtype), scale=scale)
        return attended
    height, width, _, head_dim = q.shape[1:]
    bias_channels = 0 if rpb is None else kernel_size**2
    requires_grad = torch.is_grad_enabled() and q.requires_grad
    config = select_config(head_dim + bias_channels, head_dim, q.dtype, q.device, requires_grad, natten_backend)
    if rpb is not None:
        key = ("natten", height, width, dilation, scale, q.dtype)
        bias = cached_for_table(rpb, key, lambda: query_channels(rpb, height, width, dilation, scale).to(q))
        one_hot = key_channels(height, width, kernel_size, dilation, q.dtype, q.device)
        q, k = _append_channels(q, bias, config.head_dim), _append_channels(k, one_hot, config.head_dim)
    else:
        q, k = (F.pad(x, (0, config.head_dim - head_dim)) for x in (q, k))
    v = F.pad(v, (0, config.value_head_dim - head_dim))
    attended = _na2d()(q, k, v, kernel_size=kernel_size, dilation=dilation, scale=scale, backend=config.backend)
    return attended[..., :head_dim]


def query_channels(rpb: Tensor, height: int, width: int, dilation: int, scale: float) -> Tensor:
    """Return the bias of the key with each residue, divided by the scale.

    Args:
        rpb: (heads, 2 * kernel_size - 1, 2 * kernel_size - 1).
        height: Of the feature map.
        width: Of the feature map.
        dilation: Distance between neighboring keys of a window.
        scale: Factor of q k^T.

    Returns:
        (H, W, heads, kernel_size**2).
    """
    kernel_size = (rpb.shape[1] + 1) // 2
    rows, columns = (_rpb_index_of_residues(length, kernel_size, dilation).to(rpb.device) for length in (height, width))
    bias = rpb[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).permute(1, 2, 0, 3)
    return bias / scale


def _rpb_index_of_residues(length: int, kernel_size: int, dilation: int) -> Tensor:
    """Return the row of the bias table for the key with each residue, (length, kernel_size) int64."""
    keys, rpb_index = neighbors(length, kernel_size, dilation)
    residues = keys // dilation % kernel_size
    return rpb_index.gather(1, residues.argsort(dim=1))


@capture_safe_cache(64)
def key_channels(height: int, width: int, kernel_size: int, dilation: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the one-hot encoding of each position's residues, (H, W, 1, kernel_size**2)."""
    rows, columns = (torch.arange(length) // dilation % kernel_size for length in (height, width))
    residues = rows[:, None] * kernel_size + columns
    return F.one_hot(residues, kernel_size**2)[:, :, None].to(device=device, dtype=dtype)


def _append_channels(x: Tensor, channels: Tensor, total: int) -> Tensor:
    """Append channels, then zeros: (B, H, W, heads, C) and (H, W, heads or 1, E) -> (B, H, W, heads, total)."""
    padding = total - x.shape[-1] - channels.shape[-1]
    return torch.cat([x, F.pad(channels, (0, padding)).expand(*x.shape[:-1], -1)], dim=-1)


@dataclass(frozen=True)
class NattenConfig:
    """Arguments of a NATTEN call.

    Attributes:
        backend: Name of a NATTEN backend.
        head_dim: Channels of queries and keys that the backend supports.
        value_head_dim: Channels of values that the backend supports.
    """

    backend: str
    head_dim: int
    value_head_dim: int


@cache
def select_config(
    head_dim: int,
    value_head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    requires_grad: bool,
    natten_backend: str = "",
) -> NattenConfig:
    """Return a compatible NATTEN backend, the first one in its order of preference, with the least padding it requires.

    Args:
        head_dim: Channels of queries and keys.
        value_head_dim: Channels of values.
        dtype: Of the inputs.
        device: Of the inputs.
        requires_grad: Whether the inputs require gradients.
        natten_backend: If not empty, only this backend is considered.

    Raises:
        AttentionError: No backend is compatible.
    """
    configs = _compatible_configs(head_dim, value_head_dim, dtype, device, requires_grad)
    for config in configs:
        if natten_backend in ("", config.backend):
            return config
    raise AttentionError(
        f"natten has no {natten_backend or 'kernel'} for {dtype} heads of {head_dim} channels (head_dim and bias) on {device}: "
        "use attention tiled, or install a natten built for this device"
    )


@cache
def compatible_backends(head_dim: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Return the names of the NATTEN backends for heads without bias; with the channels of a bias, some may be unsupported.

    The only name is "" if NATTEN accepts a bias, as then it has no argument for a backend.
    """
    if _accepts_rpb():
        return [""]
    return [config.backend for config in _compatible_configs(head_dim, head_dim, dtype, device, requires_grad=False)]


def _compatible_configs(
    head_dim: int, value_head_dim: int, dtype: torch.dtype, device: torch.device, requires_grad: bool
) -> list[NattenConfig]:
    from natten.backends import get_compatible_backends

    power_of_two = 1 << max(head_dim - 1, 31).bit_length()
    multiple_of_8 = -(-head_dim // 8) * 8
    configs = [
        NattenConfig("blackwell-fna", multiple_of_8, multiple_of_8),
        NattenConfig("hopper-fna", power_of_two, power_of_two),
        NattenConfig("cutlass-fna", multiple_of_8, -(-value_head_dim // 8) * 8),
    ]
    if device.type != "cuda":  # on a GPU, Flex as NATTEN calls it materializes all scores and is slower than the tiled backend
        configs.append(NattenConfig("flex-fna", power_of_two, power_of_two))
    compatible = []
    for config in configs:
        q = torch.empty(1, 3, 3, 1, config.head_dim, dtype=dtype, device=device, requires_grad=requires_grad)
        v = torch.empty(1, 3, 3, 1, config.value_head_dim, dtype=dtype, device=device, requires_grad=requires_grad)
        if config.backend in get_compatible_backends(q, q, v, torch_compile=False):
            compatible.append(config)
    return compatible


def _na2d() -> Any:
    from natten.functional import na2d

    return na2d


@cache
def _accepts_rpb() -> bool:
    """Return whether na2d accepts an RPB, as in NATTEN 0.17 (forward only)."""
    return "rpb" in inspect.signature(_na2d()).parameters
