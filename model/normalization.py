"""Rescale and normalize pixels on their device. Apart from the image processor, whose other steps do not require PyTorch."""

import numpy as np
import torch
from torch import Tensor

from dinat.model.capture_safe_cache import capture_safe_cache
from dinat.model.gpu import steps


def normalize(
    pixels: Tensor,
    rescale: float | None,
    mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rescale and normalize: (B, H, W, 3) uint8 -> (B, 3, H, W), with channels last in memory.

    The result of each of the 256 values per channel is computed once, in transformers' order and precision, and looked up.

    Args:
        pixels: (B, H, W, 3) uint8.
        rescale: Factor, or None.
        mean_and_std: Mean and standard deviation per channel, after rescaling, or None.
        dtype: Dtype of the result.
    """
    table = value_table(rescale, mean_and_std, pixels.device)

    def look_up() -> Tensor:
        channels = [table[c].index_select(0, pixels[..., c].flatten().int()) for c in range(3)]
        return torch.stack(channels, dim=-1).view(pixels.shape).to(dtype)

    normalized = steps.normalize(pixels, table, dtype, look_up) if pixels.is_cuda else look_up()
    return normalized.permute(0, 3, 1, 2)


@capture_safe_cache(64)
def value_table(
    rescale: float | None, mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None, device: torch.device
) -> Tensor:
    """Return the result of each value of each channel, (3, 256) float32. Cached per device: a CUDA graph cannot copy it."""
    values = np.arange(256, dtype=np.float64)
    if rescale is not None:
        values = values * rescale
    table = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if mean_and_std is not None:
        mean, std = (np.asarray(numbers, dtype=np.float32)[:, None] for numbers in mean_and_std)
        table = (table - mean) / std
    return torch.from_numpy(table).to(device)
