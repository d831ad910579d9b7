"""timm's registry with this project's network: `timm.create_model("dinat_mini")`.

`import dinat.timm` registers dinat_mini, ..., dinat_large_11x11_384 and nat_mini, ..., nat_base. Requires the extra `timm`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import Format, SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from dinat.model.checkpoints.original import convert_original
from dinat.model.config import FIELDS as CONFIG_FIELDS
from dinat.model.config import HUB_IDS, NAT_PRESETS, PRESETS, DinatConfig
from dinat.model.cpu.fast_layers import LayerNorm
from dinat.model.dinat import DinatForImageClassification, Downsampler, Embeddings, Layer, Stage
from dinat.model.image_processor import DinatImageProcessor

FIELDS = {
    "in_chans": "num_channels",
    "num_classes": "num_labels",
    "img_size": "image_size",
    "proj_drop_rate": "hidden_dropout_prob",
    "attn_drop_rate": "attention_probs_dropout_prob",
}
"""timm's names of configuration fields."""


FORMATS = ("NCHW", "NHWC")
"""Formats of feature maps."""


class TimmDinat(DinatForImageClassification):
    """DiNAT with the interface of timm's models: pixel_values (B, in_chans, H, W) -> logits (B, num_classes). Any H and W.

    Weights have the Hub's names, and save_pretrained writes a checkpoint that every `dinat` command reads.

    Args:
        preset: A name of PRESETS or NAT_PRESETS.
        global_pool: timm's pooling type; "" returns feature maps.
        drop_rate: Dropout probability before the classifier.
        attention: Backend, see neighborhood_attention.
        device: Where the weights are created; PyTorch's default if None.
        dtype: Of the weights; PyTorch's default if None.
        fields: Fields of the configuration to replace, also by timm's names (FIELDS).
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        preset: str,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attention: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        changes = {FIELDS.get(name, name): value for name, value in fields.items()}
        unknown = sorted(changes.keys() - CONFIG_FIELDS - {"image_size"})
        if unknown:
            raise TypeError(f"unknown argument {unknown[0]!r} of create_model for this network")
        with nullcontext() if device is None else torch.device(device):
            super().__init__(DinatConfig.preset(preset, **changes), attention)
        self.to(dtype=dtype)
        self.in_chans = self.config.num_channels
        self.num_features = self.head_hidden_size = self.config.hidden_size
        self.feature_info = [
            {"num_chs": self.config.channels_of(i), "reduction": 4 * 2**i, "module": f"dinat.encoder.levels.{i}"}
            for i in range(self.config.num_layers)
        ]
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)
        self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool), input_fmt=self.output_fmt)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without a classifier."""
        return self.config.num_labels

    @property
    def global_pool(self) -> str:
        """Name of the pooling type."""
        return str(self.pool.pool_type)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """See the class."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalized feature map of the last stage, (B, h, w, C)."""
        last: Tensor = self.dinat.layernorm(self._stages(x)[-1])
        return last

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a feature map (B, h, w, C) and classify it. pre_logits: return the classifier's input instead."""
        pooled: Tensor = self.head_drop(self.pool(x))
        return pooled if pre_logits else self.classifier(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return feature maps of stages before their downsamplers, and unless intermediates_only forward_features(x) too.

        Args:
            x: Pixel values (B, in_chans, H, W).
            indices: Stages from 0, the last n, or None for all.
            norm: Whether to normalize the last stage's feature map.
            stop_early: Whether to stop after the last of the stages; the other result is then not normalized.
            output_fmt: NCHW or NHWC.
            intermediates_only: Whether to return the feature maps alone.
        """
        _check_format(output_fmt)
        last = len(self.dinat.encoder.levels) - 1
        selected, deepest = feature_take_indices(last + 1, indices)
        stages = self._stages(x, deepest + 1 if stop_early else None)
        maps = [self.dinat.layernorm(stages[i]) if norm and i == last else stages[i] for i in selected]
        if output_fmt == Format.NCHW:
            maps = [value.permute(0, 3, 1, 2).contiguous() for value in maps]
        if intermediates_only:
            return maps
        return (self.dinat.layernorm(stages[last]) if len(stages) > last else stages[-1]), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the feature maps of these stages do not require. Returns the indices of the stages."""
        backbone: Any = self.dinat
        selected, deepest = feature_take_indices(len(backbone.encoder.levels), indices)
        is_shorter = deepest < len(backbone.encoder.levels) - 1
        backbone.encoder.levels = backbone.encoder.levels[: deepest + 1]
        backbone.encoder.levels[-1].downsample = None
        if prune_norm or is_shorter:
            backbone.layernorm = nn.Identity()
        if is_shorter:
            self.num_features = self.head_hidden_size = self.config.channels_of(deepest)
        if prune_head or is_shorter:
            self.reset_classifier(0, "")
        return list(selected)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, or remove it (0), and set the pooling type unless it is None."""
        self.config = DinatConfig.from_dict(
            {name: value for name, value in self.config.to_dict().items() if name not in ("id2label", "label2id", "num_labels")}
            | {"num_labels": num_classes}
        )
        if global_pool is not None:
            self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool), input_fmt=self.output_fmt)
        weight = self.dinat.embeddings.norm.weight
        self.classifier = nn.Identity()
        if num_classes > 0:
            self.classifier = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            nn.init.normal_(self.classifier.weight, std=self.config.initializer_range)
            nn.init.zeros_(self.classifier.bias)
        for module in (self.classifier, self.pool):
            module.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regular expressions that group parameters by depth, for layer-wise learning rates."""
        levels = r"^dinat\.encoder\.levels\.(\d+)"
        blocks = [
            (rf"{levels}\.layers\.(\d+)", None),
            (rf"{levels}\.downsample", (9999,)),
            (r"^dinat\.layernorm", (9999, 9999)),
        ]
        return {"stem": r"^dinat\.embeddings", "blocks": levels if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Return the names of the relative positional biases and layer scales."""
        return {name for name, _ in self.named_parameters() if name.endswith((".rpb", ".layer_scale_parameters"))}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer's activations in the backward pass, or not."""
        self.grad_checkpointing = enable

    def _stages(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        """Return the outputs of the first stages, all if None, before their downsamplers, NHWC."""
        backbone: Any = self.dinat
        x = backbone.embeddings(x)
        outputs: list[Tensor] = []
        for stage in backbone.encoder.levels[:count]:
            for layer in stage.layers:
                is_recomputed = self.grad_checkpointing and is_grad_enabled()
                x = (checkpoint(layer, x, use_reentrant=False) if is_recomputed else layer(x))[0]
            outputs.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs


for _module in (Embeddings, Layer, Downsampler, LayerNorm, Stage):
    register_notrace_module(_module)  # their control flow depends on shapes


def _pretrained_cfg(preset: str, hub_id: str) -> dict[str, Any]:
    """Return timm's description of a published checkpoint, with the transform of the published accuracies."""
    size = PRESETS.get(preset, {}).get("image_size", 224)
    processor = DinatImageProcessor.original(size)
    return {
        "hf_hub_id": hub_id,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": processor.crop_pct,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": processor.image_mean,
        "std": processor.image_std,
        "first_conv": "dinat.embeddings.patch_embeddings.projection.0",
        "classifier": "classifier",
        "license": "mit",
        "paper_ids": "arXiv:2204.07143" if preset in NAT_PRESETS else "arXiv:2209.15001",
    }


def _hub_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Convert weights of the original repository to the Hub's keys."""
    return convert_original(state_dict) if "patch_embed.proj.0.weight" in state_dict else state_dict


def _create(name: str, preset: str, pretrained: bool = False, **kwargs: Any) -> Any:
    indices = tuple(range(len(DinatConfig.preset(preset).depths)))
    feature_cfg = {"out_indices": indices, "feature_cls": FeatureGetterNet}
    if kwargs.get("features_only"):
        _check_feature_arguments(kwargs)
        feature_cfg |= {key: kwargs.pop(key) for key in FEATURE_ARGUMENTS if key in kwargs}
    return build_model_with_cfg(
        partial(TimmDinat, preset),
        name,
        pretrained,
        pretrained_filter_fn=_hub_state_dict,
        feature_cfg=feature_cfg,
        **kwargs,
    )


FEATURE_ARGUMENTS = ("output_fmt", "norm")
"""Arguments of create_model(features_only=True) that timm does not pass on to FeatureGetterNet."""


def _check_format(output_fmt: str) -> None:
    if output_fmt not in FORMATS:
        raise ValueError(f"output_fmt {output_fmt!r} is not supported by this network: use {' or '.join(FORMATS)}")


def _check_feature_arguments(kwargs: dict[str, Any]) -> None:
    """Remove arguments of features_only that change nothing here. Raises ValueError for those that cannot be honored."""
    stride = kwargs.pop("output_stride", 32)
    if stride != 32:
        raise ValueError(
            f"output_stride {stride!r} is not supported: the strides of this network's stages are 4, 8, 16 and 32; select "
            "stages by out_indices"
        )
    extractor = kwargs.pop("feature_cls", "getter")
    if extractor not in ("getter", FeatureGetterNet):
        raise ValueError(f"feature_cls {extractor!r} is not supported by this network: omit it, or use 'getter'")
    _check_format(kwargs.get("output_fmt", "NCHW"))
    if kwargs.get("out_indices", 1) in ((), []):
        raise ValueError("out_indices is empty: select at least one stage, from 0")


MODELS = {f"dinat_{preset.replace('-', '_')}": (preset, hub_id) for preset, hub_id in HUB_IDS.items()} | {
    preset.replace("-", "_"): (preset, f"shi-labs/{preset}-in1k-224") for preset in NAT_PRESETS
}
"""Preset and Hub repository of each registered model."""

default_cfgs = generate_default_cfgs(
    {
        f"{name}.{'in22k_ft_in1k' if 'large' in name else 'in1k'}": _pretrained_cfg(preset, hub_id)
        for name, (preset, hub_id) in MODELS.items()
    }
)
"""Read by timm's register_model."""

__all__ = ["MODELS", "TimmDinat", "default_cfgs"]


def _register(name: str, preset: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        return _create(name, preset, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"DiNAT or NAT {preset}."
    globals()[name] = register_model(create)


for _name, (_preset, _) in MODELS.items():
    _register(_name, _preset)
