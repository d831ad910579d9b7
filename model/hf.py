"""transformers' DiNAT on this project's network: Auto classes, pipelines, Trainer, AutoBackbone.

    import dinat.model.hf
    dinat.model.hf.register()

puts these classes behind transformers' names, whose own want a NATTEN that is no more. `python -m dinat.hf SCRIPT ARGS...` runs
a script so, and `python -m dinat.hf -m MODULE ARGS...` a module. Needs the extra `hf`.
"""

import runpy
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import transformers
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.activations import ACT2FN
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput

from dinat.model.config import DinatConfig as NetworkConfig
from dinat.model.cpu.fast_layers import LayerNorm
from dinat.model.dinat import Embeddings, Encoded, Encoder, Layer, NeighborhoodSelfAttention, PatchEmbeddings

try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # transformers 4
    from transformers.utils.backbone_utils import BackboneMixin  # type: ignore[attr-defined]

with patch("transformers.utils.is_natten_available", return_value=False):  # theirs fails at import where a NATTEN of today is
    from transformers.models.dinat import configuration_dinat, modeling_dinat

DinatConfig = configuration_dinat.DinatConfig

STRUCTURE = (
    "patch_size",
    "num_channels",
    "embed_dim",
    "depths",
    "num_heads",
    "kernel_size",
    "dilations",
    "mlp_ratio",
    "qkv_bias",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "layer_norm_eps",
    "layer_scale_init_value",
)
"""Fields that say what the network is made of."""


class NatConfig(DinatConfig):
    """The configuration of a NAT (arXiv 2204.07143), which is a DiNAT without dilation."""

    model_type = "nat"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("dilations") is None:
            kwargs["dilations"] = [[1] * depth for depth in kwargs.get("depths", (3, 4, 6, 5))]
        super().__init__(*args, **kwargs)


def network_config(config: Any) -> NetworkConfig:
    """What the modules here take, from transformers' configuration. Raises ConfigError (a ValueError)."""
    act = config.hidden_act
    if isinstance(act, str) and act != "gelu":
        act = ACT2FN[act]
    return NetworkConfig(hidden_act=act, **{name: getattr(config, name) for name in STRUCTURE})


class DinatLayer(GradientCheckpointingLayer, Layer):
    """A layer that transformers can compute again for its gradient, with query, key and value apart."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.attention.self.part()


class DinatPreTrainedModel(transformers.PreTrainedModel):
    """Loading, saving and initialising, by transformers."""

    config_class = DinatConfig
    base_model_prefix = "dinat"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["Embeddings", "DinatLayer", "Downsampler"]  # noqa: RUF012
    attention = "auto"
    """Backend, as dinat.model.attention.neighborhood_attention takes it; register() sets it."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, NeighborhoodSelfAttention):
            nn.init.zeros_(module.rpb)
        elif isinstance(module, Layer) and module.layer_scale_parameters is not None:
            nn.init.constant_(module.layer_scale_parameters, self.config.layer_scale_init_value)

    def get_input_embeddings(self) -> PatchEmbeddings:
        """The module that takes the pixels."""
        return getattr(self, self.base_model_prefix, self).embeddings.patch_embeddings

    def _build(self) -> None:
        """The embeddings and the encoder."""
        config = network_config(self.config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, self.attention, DinatLayer)

    def _encode(self, pixel_values: Tensor | None, output_attentions: bool) -> Encoded:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        return self.encoder(self.embeddings(pixel_values), output_attentions)

    def _choose(self, **asked: bool | None) -> list[bool]:
        """What was asked for, or else what the configuration says."""
        return [getattr(self.config, name) if value is None else value for name, value in asked.items()]


class DinatModel(DinatPreTrainedModel):
    """DiNAT without a head: pixel_values (B, num_channels, H, W) -> DinatModelOutput."""

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self._build()
        self.num_levels = len(config.depths)
        self.num_features = int(config.embed_dim * 2 ** (self.num_levels - 1))
        self.layernorm = LayerNorm(self.num_features, eps=config.layer_norm_eps)
        self.add_pooling_layer = add_pooling_layer
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """See model.DinatModel; a transformers DinatModelOutput, or its tuple without reshaped_hidden_states."""
        with_weights, with_states, as_dict = self._choose(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        encoded = self._encode(pixel_values, with_weights)
        last = self.layernorm(encoded.after[-1])
        pooled = last.mean(dim=(1, 2)) if self.add_pooling_layer else None
        states = tuple(encoded.after) if with_states else None
        if not as_dict:
            return (last, pooled, *(part for part in (states, encoded.attentions) if part is not None))
        return modeling_dinat.DinatModelOutput(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=states,
            attentions=encoded.attentions,
            reshaped_hidden_states=None if states is None else tuple(state.permute(0, 3, 1, 2) for state in states),
        )


class DinatForImageClassification(DinatPreTrainedModel):
    """DiNAT with a linear classifier over the pooled map: pixel_values (B, num_channels, H, W) -> logits (B, num_labels)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dinat = DinatModel(config)
        width = self.dinat.num_features
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """See model.DinatForImageClassification; a transformers DinatImageClassifierOutput, or its tuple."""
        (as_dict,) = self._choose(return_dict=return_dict)
        outputs = self.dinat(
            pixel_values, output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        if not as_dict:
            parts = (loss, logits, outputs.hidden_states, outputs.attentions)
            return tuple(part for part in parts if part is not None)
        return modeling_dinat.DinatImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class DinatBackbone(BackboneMixin, DinatPreTrainedModel):
    """Feature maps for a detector or segmenter: pixel_values (B, num_channels, H, W) -> BackboneOutput."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers 4
            self._init_backbone(config)  # type: ignore[operator]
        self._build()
        self.num_features = [config.embed_dim, *(int(config.embed_dim * 2**i) for i in range(len(config.depths)))]
        self.hidden_states_norms = nn.ModuleDict(
            {stage: LayerNorm(width) for stage, width in zip(self.out_features, self.channels, strict=True)}
        )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """See model.DinatBackbone; a transformers BackboneOutput, or its tuple."""
        with_weights, with_states, as_dict = self._choose(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        encoded = self._encode(pixel_values, with_weights)
        maps = dict(zip(self.stage_names, encoded.before, strict=True))
        feature_maps = tuple(
            norm(maps[stage]).permute(0, 3, 1, 2).contiguous() for stage, norm in self.hidden_states_norms.items()
        )
        states = tuple(encoded.before) if with_states else None
        if not as_dict:
            return (feature_maps,) if states is None else (feature_maps, states)
        return BackboneOutput(feature_maps=feature_maps, hidden_states=states, attentions=encoded.attentions)


class NatModel(DinatModel):
    """The same, of a NAT."""

    config_class = NatConfig


class NatForImageClassification(DinatForImageClassification):
    """The same, of a NAT."""

    config_class = NatConfig


class NatBackbone(DinatBackbone):
    """The same, of a NAT."""

    config_class = NatConfig


def register(attention: str = "auto") -> None:
    """Put these classes behind transformers' names for the model types dinat and nat. Once is enough, twice does no harm.

    attention: backend, as neighborhood_attention takes it.  AutoImageProcessor then takes Pillow for these
    model types, which the published numbers stand on: torchvision, its first choice, is up to one level of 255 off.
    """
    DinatPreTrainedModel.attention = attention
    AutoConfig.register("nat", NatConfig, exist_ok=True)
    for auto, dinat, nat in (
        (AutoModel, DinatModel, NatModel),
        (AutoModelForImageClassification, DinatForImageClassification, NatForImageClassification),
        (AutoBackbone, DinatBackbone, NatBackbone),
    ):
        auto.register(DinatConfig, dinat, exist_ok=True)
        auto.register(NatConfig, nat, exist_ok=True)
    for name in ("DinatPreTrainedModel", "DinatModel", "DinatForImageClassification", "DinatBackbone"):
        for module in (modeling_dinat, transformers.models.dinat, transformers):
            setattr(module, name, globals()[name])
    theirs = vars(AutoImageProcessor)["from_pretrained"].__func__
    if not getattr(theirs, "takes_pillow", False):
        setattr(AutoImageProcessor, "from_pretrained", classmethod(_by_pillow(theirs)))  # noqa: B010


def _by_pillow(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """AutoImageProcessor.from_pretrained, which takes Pillow for DiNAT unless it is told what to take."""
    pillow = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}

    @wraps(from_pretrained)
    def take(cls: type, source: Any, *inputs: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") is None and kwargs.get("use_fast") is None and _model_type(source, kwargs) in ("dinat", "nat"):
            kwargs |= pillow
        return from_pretrained(cls, source, *inputs, **kwargs)

    take.takes_pillow = True  # type: ignore[attr-defined]
    return take


def _model_type(source: Any, kwargs: dict[str, Any]) -> str | None:
    config = kwargs.get("config")
    if config is not None:
        return getattr(config, "model_type", None)
    where = {
        name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if name in kwargs
    }
    try:
        values, _ = PretrainedConfig.get_config_dict(source, **where)
    except OSError:  # a processor alone: whose it is cannot be told
        return None
    found = values.get("model_type")
    return found if isinstance(found, str) else None


def main() -> None:
    """Run a script, or after -m a module, with these classes registered."""
    words = sys.argv[1:]
    is_module = words[:1] == ["-m"]
    words = words[1:] if is_module else words
    if not words:
        sys.exit("usage: python -m dinat.hf SCRIPT ARGS..., or python -m dinat.hf -m MODULE ARGS...")
    register()
    sys.argv = words
    if is_module:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")
