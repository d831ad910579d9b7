"""Comparison of attention backends with the reference."""

import torch
from torch import Tensor

from dinat.model.attention import neighborhood_attention


def assert_matches_reference(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float | None = None,
) -> None:
    """Compare with the reference in float64: absolute 1e-5 in float32, 1e-2 of the norm in half precision."""
    exact = [None if x is None else x.double() for x in (q, k, v, rpb)]
    expected = neighborhood_attention(*exact, kernel_size, dilation, scale, backend="reference")
    assert output.dtype == q.dtype
    if output.dtype == torch.float32:
        assert (output.double() - expected).abs().max() <= 1e-5
    else:
        assert (output.double() - expected).norm() <= 1e-2 * expected.norm()
