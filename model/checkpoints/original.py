"""Files of the original repository (.pth) and of its training (.pth.tar), read as the Hub has them.

Classifiers, and the backbones within its detectors and segmenters. They hold weights alone: the configuration is read off
their shapes and the file's name.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dinat.model.checkpoints.files import StateDict, as_state_dict, read_pickle
from dinat.model.config import NAT_PRESETS, PRESETS, DinatConfig
from dinat.model.errors import CheckpointError

BACKBONE = "backbone."
"""What the weights of a detector's or segmenter's backbone begin with."""


def read_original(path: Path, config: DinatConfig | None = None) -> tuple[DinatConfig, StateDict]:
    """The configuration and the weights, under the Hub's names, of an original file.

    config: where it is known, and where it must be: for a backbone, and for sizes that were never published.
    Raises CheckpointError, saying how to tell, where weights and name fit none of the published networks, or several.
    """
    weights = _unwrap(path)
    is_backbone = any(key.startswith(BACKBONE) for key in weights)
    if is_backbone:
        weights = {key.removeprefix(BACKBONE): value for key, value in weights.items() if key.startswith(BACKBONE)}
    if "patch_embed.proj.0.weight" not in weights:
        raise CheckpointError(
            f"{path} is no original DiNAT or NAT: it has no patch_embed.proj.0.weight (DiNAT_s and the isotropic networks are "
            "of another make)"
        )
    if is_backbone and config is None:
        raise CheckpointError(
            f"{path} holds the backbone of a detector or segmenter, whose dilations go by the pictures it was made for and "
            "leave no trace in weights: give its configuration"
        )
    state_dict = convert_original(weights)
    return config or _config_of(state_dict, path), state_dict


def convert_original(weights: Mapping[str, Tensor]) -> StateDict:
    """The keys of the original repository to the Hub's, for DinatForImageClassification and DinatBackbone."""
    converted: StateDict = {}
    for key, value in weights.items():
        for pattern, replacement in _KEYS:
            key = re.sub(pattern, replacement, key)
        if norm := re.fullmatch(r"norm(\d)\.(weight|bias)", key):
            key = f"hidden_states_norms.stage{int(norm[1]) + 1}.{norm[2]}"
        if ".qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[key.replace(".qkv.", f".self.{name}.")] = part.contiguous()
        elif key.endswith(".gamma1"):
            gamma2 = weights.get(_twin(key))
            if gamma2 is None:
                raise CheckpointError(f"{key} has no gamma2 beside it")
            converted[key.replace("gamma1", "layer_scale_parameters")] = torch.stack([value, gamma2])
        elif not key.endswith(".gamma2"):
            converted[key] = value
    return converted


_KEYS = [
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


def _twin(key: str) -> str:
    """The original name of the gamma2 that goes with a converted gamma1."""
    return re.sub(r"^dinat\.encoder\.levels\.(\d+)\.layers\.(\d+)\.gamma1$", r"levels.\1.blocks.\2.gamma2", key)


def _unwrap(path: Path) -> StateDict:
    """The weights within a training checkpoint, the averaged ones first, without the prefix of data parallel training."""
    loaded = read_pickle(path)
    for name in ("state_dict_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    return {key.removeprefix("module."): value for key, value in as_state_dict(loaded, path).items()}


def _config_of(state_dict: StateDict, path: Path) -> DinatConfig:
    """Sizes are read off the weights; dilations, which leave no trace in them, off the only published network that fits.

    Where several fit, the file's name decides: dinat or nat, and 224 or 384.
    """
    found = _sizes(state_dict, path)
    labels = found.pop("num_labels")
    fitting = [
        name
        for name in (*PRESETS, *NAT_PRESETS)
        if all(getattr(DinatConfig.preset(name), field) == value for field, value in found.items())
    ]
    if not fitting:
        raise CheckpointError(
            f"{path} fits none of the published networks ({', '.join((*PRESETS, *NAT_PRESETS))}), and dilations leave no trace "
            f"in weights: give its configuration: dinat convert {path.name} FOLDER --config FILE, in Python "
            "config=DinatConfig(...)"
        )
    named = [name for name in fitting if _is_named(name, path.name.lower())] if len(fitting) > 1 else fitting
    if len(named) != 1:
        raise CheckpointError(
            f"{path} may be {' or '.join(fitting)}, which differ in dilations alone, and these leave no trace in weights: name "
            f"the file as it was published (dinat_..., nat_..., ..._224, ..._384), or say which: dinat convert {path.name} "
            f"FOLDER --preset {fitting[0]}, in Python config=DinatConfig.preset({fitting[0]!r})"
        )
    return DinatConfig.preset(named[0], num_labels=labels)


def _is_named(preset: str, file: str) -> bool:
    """Whether a published file of this name can hold this network."""
    family = re.search(r"(?<![a-z])(di)?nat(?![a-z])", file)
    if family is None or (family[1] is None) != (preset in NAT_PRESETS):
        return False
    return not preset.startswith("large") or ("384" if preset.endswith("384") else "224") in file


def _sizes(state_dict: StateDict, path: Path) -> dict[str, int | float | bool | list[int]]:
    """What the shapes say of the configuration."""
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
        raise CheckpointError(f"{path} is no original DiNAT or NAT: {error} is missing") from error
