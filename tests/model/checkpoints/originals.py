"""Networks written as the original repository writes them."""

import torch

from dinat.model import DinatConfig, DinatForImageClassification


def random_network(config: DinatConfig) -> DinatForImageClassification:
    """A network none of whose weights is at its initial zero or one."""
    network = DinatForImageClassification(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def to_original(network: DinatForImageClassification) -> dict[str, torch.Tensor]:
    """A network's weights under the original repository's names, one name at a time."""
    state = network.state_dict()
    original = {}
    for i, level in enumerate(network.dinat.encoder.levels):
        for j, layer in enumerate(level.layers):
            to, attention = f"levels.{i}.blocks.{j}", layer.attention
            names = {
                "norm1": layer.layernorm_before,
                "norm2": layer.layernorm_after,
                "attn.proj": attention.output.dense,
                "mlp.fc1": layer.intermediate.dense,
                "mlp.fc2": layer.output.dense,
            }
            original |= {
                f"{to}.{name}.{key}": value for name, part in names.items() for key, value in part.state_dict().items()
            }
            attend = getattr(attention, "self")  # noqa: B009
            original[f"{to}.attn.qkv.weight"], original[f"{to}.attn.qkv.bias"] = attend.qkv.weight, attend.qkv.bias
            original[f"{to}.attn.rpb"] = attend.rpb
            if layer.layer_scale_parameters is not None:
                original[f"{to}.gamma1"], original[f"{to}.gamma2"] = layer.layer_scale_parameters
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
