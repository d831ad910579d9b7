"""Two operators of NATTEN 0.14, with the index rules of NATTEN 0.14.6 (get_window_start and get_pb_start) for each position.

This implementation is independent of the project's (model/attention/geometry.py), so that an error in either is detected.
"""

import torch
from torch import Tensor


def window_start(index: int, length: int, kernel_size: int, dilation: int) -> int:
    radius = kernel_size // 2
    if dilation <= 1:
        return max(index - radius, 0) + (index + radius >= length) * (length - index - radius - 1)
    if index - radius * dilation < 0:
        return index % dilation
    if index + radius * dilation >= length:
        member = index % dilation
        whole = (length // dilation) * dilation
        rest = length - whole
        if member < rest:
            return length - rest + member - 2 * radius * dilation
        return whole + member - kernel_size * dilation
    return index - radius * dilation


def pb_start(index: int, length: int, kernel_size: int, dilation: int) -> int:
    radius = kernel_size // 2
    if dilation <= 1:
        return radius + (index < radius) * (radius - index) + (index + radius >= length) * (length - index - 1 - radius)
    if index - radius * dilation < 0:
        return kernel_size - 1 - index // dilation
    if index + radius * dilation >= length:
        return (length - index - 1) // dilation
    return radius


def tables(length: int, kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    assert length >= kernel_size * dilation, "Input resolution must be greater than or equal to kernel size x dilation."
    steps = torch.arange(kernel_size)
    starts = torch.tensor([window_start(i, length, kernel_size, dilation) for i in range(length)])
    biases = torch.tensor([pb_start(i, length, kernel_size, dilation) for i in range(length)])
    return starts[:, None] + steps * dilation, biases[:, None] + steps


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor, kernel_size: int, dilation: int) -> Tensor:
    (rows, row_bias), (columns, column_bias) = (tables(n, kernel_size, dilation) for n in query.shape[2:4])
    scores = torch.empty(*query.shape[:4], kernel_size**2, dtype=query.dtype)
    for a in range(kernel_size):
        for c in range(kernel_size):
            keys = key[:, :, rows[:, a]][:, :, :, columns[:, c]]
            bias = rpb[:, row_bias[:, a]][:, :, column_bias[:, c]]
            scores[..., a * kernel_size + c] = (query * keys).sum(-1) + bias
    return scores


def natten2dav(attention: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    (rows, _), (columns, _) = (tables(n, kernel_size, dilation) for n in value.shape[2:4])
    output = torch.zeros_like(value)
    for a in range(kernel_size):
        for c in range(kernel_size):
            values = value[:, :, rows[:, a]][:, :, :, columns[:, c]]
            output += attention[..., a * kernel_size + c, None] * values
    return output
