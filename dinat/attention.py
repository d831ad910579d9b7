"""Neighborhood attention with dilation and relative positional bias, as a function; see dinat.model.attention."""

from dinat.model.attention import (
    BACKENDS,
    check_backend,
    neighborhood_attention,
    neighborhood_attention_with_weights,
)

__all__ = ["BACKENDS", "check_backend", "neighborhood_attention", "neighborhood_attention_with_weights"]
