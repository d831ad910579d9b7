"""Fast paths on a CPU: fused layers, packed weights, resizing."""
