"""torch.autograd.grad without PyTorch's autograd engine, which requires CUDA streams."""

from typing import Any

import torch


def grad(outputs: Any, inputs: Any) -> tuple[torch.Tensor, ...]:
    """Return the gradients of a scalar with respect to the inputs, by running the graph's nodes in topological order."""
    pending: dict[Any, list[Any]] = {outputs.grad_fn: [torch.ones_like(outputs.detach())]}
    order: list[Any] = []

    def visit(node: Any, seen: set[Any]) -> None:
        if node is None or node in seen:
            return
        seen.add(node)
        for next_node, _ in node.next_functions:
            visit(next_node, seen)
        order.append(node)

    visit(outputs.grad_fn, set())
    leaves: dict[int, torch.Tensor] = {}
    for node in reversed(order):
        output_gradients = pending.pop(node, None)
        if output_gradients is None:
            continue
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = output_gradients[0]
            continue
        call = node.apply if hasattr(node, "apply") else node  # a node defined in Python, or in C++
        results = call(*output_gradients)
        gradients = results if isinstance(results, tuple) else (results,)
        for (next_node, slot), gradient in zip(node.next_functions, gradients, strict=False):
            if next_node is None or gradient is None:
                continue
            gradient = gradient.sum_to_size(tuple(next_node._input_metadata[slot].shape))  # undo broadcasting
            slots = pending.setdefault(next_node, [])
            slots += [None] * (slot + 1 - len(slots))
            slots[slot] = gradient if slots[slot] is None else slots[slot] + gradient
    return tuple(leaves[id(x)] for x in inputs)
