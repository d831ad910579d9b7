"""PyTorch's dtypes that the kernels support. Apart from the loader, which does not import PyTorch."""

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of the kernels, and the value of their `is_half` argument."""
