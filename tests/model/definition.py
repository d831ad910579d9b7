"""What every attention backend is held to."""

import torch
from torch import Tensor

from dinat.model.attention import neighborhood_attention


def assert_equals_the_definition(
    got: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float | None = None,
) -> None:
    """By the gather form in float64: to 1e-5 in float32, to a hundredth of the norm in half precision."""
    exact = [None if x is None else x.double() for x in (q, k, v, rpb)]
    expected = neighborhood_attention(*exact, kernel_size, dilation, scale, backend="reference")
    assert got.dtype == q.dtype
    if got.dtype == torch.float32:
        assert (got.double() - expected).abs().max() <= 1e-5
    else:
        assert (got.double() - expected).norm() <= 1e-2 * expected.norm()
