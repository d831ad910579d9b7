"""Checkpoints with the keys of the original repository."""

import torch

from dinat.model import DinatConfig, DinatForImageClassification


def random_network(config: DinatConfig) -> DinatForImageClassification:
    """A network with random values in all parameters, also in those initialized to zero or one."""
    network = DinatForImageClassification(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def to_original(network: DinatForImageClassification) -> dict[str, torch.Tensor]:
    """The weights of a network with the keys of the original repository."""
    state = network.state_dict()
    original = {}
    for i, level in enumerate(network.dinat.encoder.levels):
        for j, layer in enumerate(level.layers):
            block, attention = f"levels.{i}.blocks.{j}", layer.attention
            names = {
                "norm1": layer.layernorm_before,
                "norm2": layer.layernorm_after,
                "attn.proj": attention.output.dense,
                "mlp.fc1": layer.intermediate.dense,
                "mlp.fc2": layer.output.dense,
            }
            original |= {
                f"{block}.{name}.{key}": value for name, module in names.items() for key, value in module.state_dict().items()
            }
            self_attention = getattr(attention, "self")  # noqa: B009
            original[f"{block}.attn.qkv.weight"] = self_attention.qkv.weight
            original[f"{block}.attn.qkv.bias"] = self_attention.qkv.bias
            original[f"{block}.attn.rpb"] = self_attention.rpb
            if layer.layer_scale_parameters is not None:
                original[f"{block}.gamma1"], original[f"{block}.gamma2"] = layer.layer_scale_parameters
        if level.downsample is not None:
            original |= {f"levels.{i}.downsample.{key}": value for key, value in level.downsample.state_dict().items()}
    for n in range(2):
        for kind in ("weight", "bias"):
            original[f"patch_embed.proj.{n}.{kind}"] = state[f"dinat.embeddings.patch_embeddings.projection.{n}.{kind}"]
    for kind in ("weight", "bias"):
        original[f"patch_embed.norm.{kind}"] = state[f"dinat.embeddings.norm.{kind}"]
        original[f"norm.{kind}"] = state[f"dinat.layernorm.{kind}"]
        original[f"head.{kind}"] = state[f"classifier.{kind}"]
    return {name: value.detach().clone() for name, value in original.items()}
