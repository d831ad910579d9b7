"""transformers' DiNAT on this project's network: Auto classes, pipelines, Trainer, AutoBackbone.

    import dinat.hf
    dinat.hf.register()

registers these classes under transformers' names, because its own DiNAT requires a NATTEN release that current PyTorch cannot
use. `python -m dinat.hf SCRIPT ARGS...` runs a script with the classes registered, `python -m dinat.hf -m MODULE ARGS...` a
module. Requires the extra `hf`.
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
from dinat.model.config import without_dilation
from dinat.model.cpu.fast_layers import LayerNorm
from dinat.model.dinat import Embeddings, Encoder, EncoderOutput, Layer, NeighborhoodSelfAttention, PatchEmbeddings

try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # transformers 4
    from transformers.utils.backbone_utils import BackboneMixin  # type: ignore[attr-defined]

with patch("transformers.utils.is_natten_available", return_value=False):  # its import fails with a current NATTEN
    from transformers.models.dinat import configuration_dinat, modeling_dinat

DinatConfig = configuration_dinat.DinatConfig

NETWORK_FIELDS = (
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
"""Configuration fields that define the network, except hidden_act."""


class NatConfig(DinatConfig):
    """Configuration of a NAT (arXiv 2204.07143), which is a DiNAT without dilation."""

    model_type = "nat"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("dilations") is None:
            kwargs["dilations"] = without_dilation(kwargs)
        super().__init__(*args, **kwargs)


def network_config(config: Any) -> NetworkConfig:
    """Convert a transformers configuration to dinat.model.DinatConfig. Raises ConfigError (a ValueError)."""
    hidden_act = config.hidden_act
    if isinstance(hidden_act, str) and hidden_act != "gelu":
        hidden_act = ACT2FN[hidden_act]
    return NetworkConfig(hidden_act=hidden_act, **{name: getattr(config, name) for name in NETWORK_FIELDS})


class DinatLayer(GradientCheckpointingLayer, Layer):
    """A layer with gradient checkpointing by transformers, and separate query, key and value modules."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.attention.self.split_qkv()


class DinatPreTrainedModel(transformers.PreTrainedModel):
    """Base class of all networks: loading, saving and initialization by transformers."""

    config_class = DinatConfig
    base_model_prefix = "dinat"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["Embeddings", "DinatLayer", "Downsampler"]  # noqa: RUF012
    attention = "auto"
    """Attention backend, see dinat.model.attention.neighborhood_attention; set by register()."""

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
        """Return the patch embeddings."""
        return getattr(self, self.base_model_prefix, self).embeddings.patch_embeddings

    def _build(self) -> None:
        """Create the embeddings and the encoder."""
        config = network_config(self.config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, self.attention, DinatLayer)

    def _encode(self, pixel_values: Tensor | None, output_attentions: bool) -> EncoderOutput:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        return self.encoder(self.embeddings(pixel_values), output_attentions)

    def _or_defaults(self, **flags: bool | None) -> list[bool]:
        """Return the values of these flags, with the configuration's for None."""
        return [getattr(self.config, name) if value is None else value for name, value in flags.items()]


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
        """Return a transformers DinatModelOutput, or a tuple without reshaped_hidden_states; see dinat.model.DinatModel."""
        with_weights, with_states, as_dict = self._or_defaults(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        encoded = self._encode(pixel_values, with_weights)
        last = self.layernorm(encoded.after_downsampling[-1])
        pooled = last.mean(dim=(1, 2)) if self.add_pooling_layer else None
        states = tuple(encoded.after_downsampling) if with_states else None
        if not as_dict:
            return (last, pooled, *(value for value in (states, encoded.attentions) if value is not None))
        return modeling_dinat.DinatModelOutput(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=states,
            attentions=encoded.attentions,
            reshaped_hidden_states=None if states is None else tuple(state.permute(0, 3, 1, 2) for state in states),
        )


class DinatForImageClassification(DinatPreTrainedModel):
    """DiNAT with a linear classifier on pooled features: pixel_values (B, num_channels, H, W) -> logits (B, num_labels)."""

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
        """Return a transformers DinatImageClassifierOutput, or a tuple; see dinat.model.DinatForImageClassification."""
        (as_dict,) = self._or_defaults(return_dict=return_dict)
        outputs = self.dinat(
            pixel_values, output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        if not as_dict:
            values = (loss, logits, outputs.hidden_states, outputs.attentions)
            return tuple(value for value in values if value is not None)
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
        """Return a transformers BackboneOutput, or a tuple; see dinat.model.DinatBackbone."""
        with_weights, with_states, as_dict = self._or_defaults(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        encoded = self._encode(pixel_values, with_weights)
        stages = dict(zip(self.stage_names, encoded.before_downsampling, strict=True))
        feature_maps = tuple(
            norm(stages[stage]).permute(0, 3, 1, 2).contiguous() for stage, norm in self.hidden_states_norms.items()
        )
        states = tuple(encoded.before_downsampling) if with_states else None
        if not as_dict:
            return (feature_maps,) if states is None else (feature_maps, states)
        return BackboneOutput(feature_maps=feature_maps, hidden_states=states, attentions=encoded.attentions)


class NatModel(DinatModel):
    """DinatModel for a NAT configuration."""

    config_class = NatConfig


class NatForImageClassification(DinatForImageClassification):
    """DinatForImageClassification for a NAT configuration."""

    config_class = NatConfig


class NatBackbone(DinatBackbone):
    """DinatBackbone for a NAT configuration."""

    config_class = NatConfig


def register(attention: str = "auto") -> None:
    """Register these classes under transformers' names for the model types dinat and nat. Idempotent.

    AutoImageProcessor then uses Pillow for these model types, as the published results do. Its default, torchvision, differs by
    up to 1 of 255.

    Args:
        attention: Attention backend, see neighborhood_attention.
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
    original = vars(AutoImageProcessor)["from_pretrained"].__func__
    if not getattr(original, "prefers_pillow", False):
        setattr(AutoImageProcessor, "from_pretrained", classmethod(_prefer_pillow(original)))  # noqa: B010


def _prefer_pillow(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap AutoImageProcessor.from_pretrained to use Pillow for DiNAT unless the caller selects a backend."""
    pillow = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}

    @wraps(from_pretrained)
    def wrapper(cls: type, source: Any, *inputs: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") is None and kwargs.get("use_fast") is None and _model_type(source, kwargs) in ("dinat", "nat"):
            kwargs |= pillow
        return from_pretrained(cls, source, *inputs, **kwargs)

    wrapper.prefers_pillow = True  # type: ignore[attr-defined]
    return wrapper


def _model_type(source: Any, kwargs: dict[str, Any]) -> str | None:
    config = kwargs.get("config")
    if config is not None:
        return getattr(config, "model_type", None)
    options = {
        name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if name in kwargs
    }
    try:
        values, _ = PretrainedConfig.get_config_dict(source, **options)
    except OSError:  # an image processor without a config.json: its model type is unknown
        return None
    model_type = values.get("model_type")
    return model_type if isinstance(model_type, str) else None


def main() -> None:
    """Run a script, or a module after -m, with these classes registered."""
    arguments = sys.argv[1:]
    is_module = arguments[:1] == ["-m"]
    arguments = arguments[1:] if is_module else arguments
    if not arguments:
        sys.exit("usage: python -m dinat.hf SCRIPT ARGS..., or python -m dinat.hf -m MODULE ARGS...")
    register()
    sys.argv = arguments
    if is_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
