"""Read files of the original repository (.pth) and of its training script (.pth.tar), and convert them to the Hub's keys.

Supported are classifiers, and the backbones of detectors and segmenters. The files contain only weights: the configuration is
inferred from their shapes and the file name.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dinat.model.checkpoints.files import StateDict, read_weights
from dinat.model.config import NAT_PRESETS, PRESETS, DinatConfig
from dinat.model.errors import CheckpointError

BACKBONE = "backbone."
"""Key prefix of the backbone in a detector or segmenter."""


def read_original(path: Path, config: DinatConfig | None = None) -> tuple[DinatConfig, StateDict]:
    """Read the configuration and the weights, with the keys of the Hub, of an original file.

    Args:
        path: The file.
        config: Configuration of the network. Required for a backbone, and for sizes that were not published.

    Raises:
        CheckpointError: The file cannot be read, or weights and file name match none or several of the published networks; the
            message says how to select one.
    """
    weights = read_weights(path)
    is_backbone = any(key.startswith(BACKBONE) for key in weights)
    if is_backbone:
        weights = {key.removeprefix(BACKBONE): value for key, value in weights.items() if key.startswith(BACKBONE)}
    if "patch_embed.proj.0.weight" not in weights:
        raise CheckpointError(
            f"{path} is not an original DiNAT or NAT: it has no patch_embed.proj.0.weight (DiNAT_s and the isotropic networks "
            "have another architecture and are not supported)"
        )
    if is_backbone and config is None:
        raise CheckpointError(
            f"{path} is a detector or segmenter. The dilations of its backbone cannot be inferred from weights: pass its "
            "configuration"
        )
    state_dict = convert_original(weights)
    return config or _infer_config(state_dict, path), state_dict


def convert_original(weights: Mapping[str, Tensor]) -> StateDict:
    """Convert the keys of the original repository to the Hub's, for DinatForImageClassification and DinatBackbone.

    Raises:
        CheckpointError: A gamma1 (layer scale of the attention branch) has no gamma2 (layer scale of the MLP branch).
    """
    converted: StateDict = {}
    for key, value in weights.items():
        for pattern, replacement in _KEY_PATTERNS:
            key = re.sub(pattern, replacement, key)
        if norm := re.fullmatch(r"norm(\d)\.(weight|bias)", key):
            key = f"hidden_states_norms.stage{int(norm[1]) + 1}.{norm[2]}"
        if ".qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[key.replace(".qkv.", f".self.{name}.")] = part.contiguous()
        elif key.endswith(".gamma1"):
            gamma2 = weights.get(_gamma2_key(key))
            if gamma2 is None:
                raise CheckpointError(f"{key} has no corresponding gamma2")
            converted[key.replace("gamma1", "layer_scale_parameters")] = torch.stack([value, gamma2])
        elif not key.endswith(".gamma2"):
            converted[key] = value
    return converted


_KEY_PATTERNS = [
    (r"^patch_embed\.proj\.", "dinat.embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "dinat.embeddings.norm."),
    (r"^levels\.(\d+)\.blocks\.(\d+)\.", r"dinat.encoder.levels.\1.layers.\2."),
    (r"^levels\.(\d+)\.downsample\.", r"dinat.encoder.levels.\1.downsample."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.rpb$", ".attention.self.rpb"),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "dinat.layernorm."),
    (r"^head\.", "classifier."),
]


def _gamma2_key(key: str) -> str:
    """Return the original key of the gamma2 that corresponds to a converted gamma1 key."""
    return re.sub(r"^dinat\.encoder\.levels\.(\d+)\.layers\.(\d+)\.gamma1$", r"levels.\1.blocks.\2.gamma2", key)


def _infer_config(state_dict: StateDict, path: Path) -> DinatConfig:
    """Infer the configuration: sizes from the weights, dilations from the only published network with these sizes.

    If several published networks have these sizes, the file name decides: dinat or nat, and 224 or 384.
    """
    sizes = _infer_sizes(state_dict, path)
    num_labels = sizes.pop("num_labels")
    matching = [
        name
        for name in (*PRESETS, *NAT_PRESETS)
        if all(getattr(DinatConfig.preset(name), field) == value for field, value in sizes.items())
    ]
    if not matching:
        raise CheckpointError(
            f"{path} matches none of the published networks ({', '.join((*PRESETS, *NAT_PRESETS))}), and dilations cannot be "
            f"inferred from weights: pass the configuration: dinat convert {path.name} FOLDER --config FILE, or in Python "
            "config=DinatConfig(...)"
        )
    named = [name for name in matching if _matches_file_name(name, path.name.lower())] if len(matching) > 1 else matching
    if len(named) != 1:
        raise CheckpointError(
            f"{path} may be {' or '.join(matching)}, which differ only in dilations, which cannot be inferred from weights: "
            f"use the published file name (dinat_..., nat_..., ..._224, ..._384), or select one: dinat convert {path.name} "
            f"FOLDER --preset {matching[0]}, or in Python config=DinatConfig.preset({matching[0]!r})"
        )
    return DinatConfig.preset(named[0], num_labels=num_labels)


def _matches_file_name(preset: str, file: str) -> bool:
    """Return whether a published file of this name (lower case) can contain this preset."""
    family = re.search(r"(?<![a-z])(di)?nat(?![a-z])", file)
    if family is None or (family[1] is None) != (preset in NAT_PRESETS):
        return False
    return not preset.startswith("large") or ("384" if preset.endswith("384") else "224") in file


def _infer_sizes(state_dict: StateDict, path: Path) -> dict[str, int | float | bool | list[int]]:
    """Return the configuration fields that the shapes of the weights determine."""
    layer = "dinat.encoder.levels.{}.layers.{}.{}"
    depths: list[int] = []
    while layer.format(len(depths), 0, "attention.self.rpb") in state_dict:
        stage, depth = len(depths), 0
        while layer.format(stage, depth, "attention.self.rpb") in state_dict:
            depth += 1
        depths.append(depth)
    try:
        rpbs = [state_dict[layer.format(stage, 0, "attention.self.rpb")] for stage in range(len(depths))]
        embed_dim = state_dict["dinat.embeddings.norm.weight"].shape[0]
        return {
            "embed_dim": embed_dim,
            "depths": depths,
            "num_heads": [rpb.shape[0] for rpb in rpbs],
            "kernel_size": (rpbs[0].shape[1] + 1) // 2,
            "mlp_ratio": state_dict[layer.format(0, 0, "intermediate.dense.weight")].shape[0] / embed_dim,
            "qkv_bias": layer.format(0, 0, "attention.self.query.bias") in state_dict,
            "layer_scale_init_value": 1e-5 if layer.format(0, 0, "layer_scale_parameters") in state_dict else 0.0,
            "num_labels": state_dict["classifier.weight"].shape[0] if "classifier.weight" in state_dict else 0,
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is not an original DiNAT or NAT: {error} is missing") from error
