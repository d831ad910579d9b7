"""Layers of a network by depth: which are frozen, and the learning rate of each."""

from typing import Any

from torch import nn

from dinat.model.errors import ConfigError

BACKBONE = "backbone"


def freeze(network: nn.Module, part: str) -> list[str]:
    """Freeze the weights of a DinatForImageClassification.

    Args:
        network: The network.
        part: "none"; "backbone", all but the head; or "stem" or "stageN": the stem and all stages up to this one, the
            downsampler after it excluded.

    Returns:
        A description of the change, or nothing.

    Raises:
        ConfigError: The network has no such part.
    """
    if part == "none":
        return []
    backbone: Any = network.dinat
    stages = ["stem", *(f"stage{i + 1}" for i in range(len(backbone.encoder.levels)))]
    if part != BACKBONE and part not in stages:
        raise ConfigError(f"--freeze {part!r} is not a part of the network: use none, {BACKBONE}, {', '.join(stages)}")
    frozen: list[nn.Module] = [backbone]
    if part != BACKBONE:
        count = stages.index(part)
        frozen = [backbone.embeddings, *(level.layers for level in backbone.encoder.levels[:count])]
        frozen += [level.downsample for level in backbone.encoder.levels[: max(0, count - 1)]]
    for module in frozen:
        module.requires_grad_(False)
    trained = sum(value.numel() for value in network.parameters() if value.requires_grad)
    return [f"{trained:,} of {sum(value.numel() for value in network.parameters()):,} weights are trained"]


def depth_of_parameters(network: nn.Module) -> dict[str, int]:
    """Return the depth of each parameter of a DinatForImageClassification: 0 is the head, the stem the largest."""
    backbone: Any = network.dinat
    levels = backbone.encoder.levels
    starts = [sum(len(level.layers) for level in levels[:i]) for i in range(len(levels))]
    total = sum(len(level.layers) for level in levels)

    def depth(name: str) -> int:
        parts = name.split(".")
        if name.startswith("dinat.embeddings."):
            return total + 1
        if not name.startswith("dinat.encoder.levels."):
            return 0
        stage = int(parts[3])
        layer = int(parts[5]) if parts[4] == "layers" else len(levels[stage].layers) - 1
        return total - starts[stage] - layer

    return {name: depth(name) for name, _ in network.named_parameters()}
