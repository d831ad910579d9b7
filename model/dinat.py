"""The Dilated Neighborhood Attention Transformer (DiNAT, arXiv 2209.15001).

Outputs and module names are those of transformers 4.53.3, so the state_dict keys match the published checkpoints.
Feature maps are NHWC inside the network and NCHW at its interface (pixel_values, reshaped_hidden_states, feature_maps).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinat.model.attention import neighborhood_attention, neighborhood_attention_with_weights
from dinat.model.attention.tiled import padded_operator
from dinat.model.checkpoints.pretrained import PreTrainedModel
from dinat.model.config import DinatConfig
from dinat.model.cpu.fast_layers import LayerNorm, fused_linear, is_unmodified, parameters_of
from dinat.model.errors import ConfigError, DinatError
from dinat.model.fast_path import is_autocast, is_symbolic, is_transformed
from dinat.model.field_rules import shown
from dinat.model.loss import classification_loss
from dinat.model.outputs import BackboneOutput, DinatImageClassifierOutput, DinatModelOutput

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),  # no lambda: it could not be pickled
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""Activation functions by the names allowed in config.hidden_act; "gelu" is the exact GELU, by erf."""


class DropPath(nn.Module):
    """Drop a residual branch per image with a given probability, in training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], *[1] * (x.dim() - 1)), self.probability)


class PatchEmbeddings(nn.Module):
    """Two overlapping 3x3 convolutions of stride 2: (B, C, H, W) -> (B, H/4, W/4, embed_dim), sizes rounded up."""

    def __init__(self, config: DinatConfig) -> None:
        super().__init__()
        if config.patch_size not in (4, [4, 4], (4, 4)):
            raise ConfigError(f"Dinat only supports patch size of 4 at the moment, got {shown(config.patch_size)}")
        self.num_channels = config.num_channels
        half = config.embed_dim // 2
        self.projection = nn.Sequential(
            nn.Conv2d(config.num_channels, half, 3, stride=2, padding=1),
            nn.Conv2d(half, config.embed_dim, 3, stride=2, padding=1),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise DinatError(
                "Make sure that the channel dimension of the pixel values match with the one set in the configuration: "
                f"expected (batch, {self.num_channels}, height, width), got {tuple(pixel_values.shape)}"
            )
        self._check_dtype(pixel_values.dtype)
        if torch.compiler.is_compiling() or not is_transformed():  # vmap does not implement memory formats
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return self.projection(pixel_values).permute(0, 2, 3, 1)

    def _check_dtype(self, dtype: torch.dtype) -> None:
        weight, _ = parameters_of(self.projection[0])
        if not dtype.is_floating_point:
            raise DinatError(f"pixel_values must be floating-point numbers, got {dtype}: use DinatImageProcessor")
        if weight is not None and dtype != weight.dtype and not is_autocast():
            raise DinatError(f"pixel_values are {dtype}, the network is {weight.dtype}: convert one of them with .to(dtype)")


class Embeddings(nn.Module):
    """Patch embeddings, layer norm and dropout."""

    def __init__(self, config: DinatConfig) -> None:
        super().__init__()
        self.patch_embeddings = PatchEmbeddings(config)
        self.norm = LayerNorm(config.embed_dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.dropout(self.norm(self.patch_embeddings(pixel_values)))


class Downsampler(nn.Module):
    """Halve height and width (rounded up) and double the channels: (B, H, W, C) -> (B, H/2, W/2, 2 * C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NeighborhoodSelfAttention(nn.Module):
    """QKV projection, and attention within the dilated neighborhood of each position (section 3)."""

    def __init__(self, config: DinatConfig, channels: int, heads: int, dilation: int, backend: str) -> None:
        super().__init__()
        if channels % heads:
            raise ConfigError(f"The hidden size ({channels}) is not a multiple of the number of attention heads ({heads})")
        self.heads, self.kernel_size, self.dilation = heads, config.kernel_size, dilation
        self.backend = backend
        self.dropout = config.attention_probs_dropout_prob
        side = 2 * config.kernel_size - 1
        self.rpb = nn.Parameter(torch.zeros(heads, side, side))
        self.qkv: nn.Linear | None = nn.Linear(channels, 3 * channels, bias=config.qkv_bias)

    def forward(self, x: Tensor, with_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Attend over x (B, H, W, C). Returns (B, H, W, C), and the weights (B, heads, H, W, kernel_size**2) or None."""
        q, k, v = self._heads_of(x)
        dropout = self.dropout if self.training else 0.0
        if is_symbolic(*x.shape[1:3]):
            if with_weights or dropout:
                raise DinatError(
                    "a graph with a dynamic height or width has neither attention weights nor their dropout: call eval() and "
                    "disable output_attentions, or export a fixed size"
                )
            _, *padding = self._heads_of(x.new_zeros(1, 1, 1, x.shape[-1]))
            attended = padded_operator(q, k, v, self.rpb, *padding, self.kernel_size, self.dilation, q.shape[-1] ** -0.5)
            return attended.flatten(-2), None
        weights = None
        if with_weights:
            attended, weights = neighborhood_attention_with_weights(
                q, k, v, self.rpb, self.kernel_size, self.dilation, dropout=dropout
            )
        else:
            attended = neighborhood_attention(
                q, k, v, self.rpb, self.kernel_size, self.dilation, backend=self.backend, dropout=dropout
            )
        return attended.flatten(-2), weights

    def _heads_of(self, x: Tensor) -> list[Tensor]:
        """Return the query, key and value of x (B, H, W, C), each (B, H, W, heads, head_dim)."""
        return [y.view(*x.shape[:-1], self.heads, y.shape[-1] // self.heads) for y in self.project(x)]

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the query, key and value of x (B, H, W, C), each of the same shape."""
        if self.qkv is None:
            return fused_linear(x, self.query), fused_linear(x, self.key), fused_linear(x, self.value)
        return fused_linear(x, self.qkv).chunk(3, dim=-1)

    def split_qkv(self) -> None:
        """Replace qkv by separate modules query, key and value, as adapters and quantizers expect, with new weights."""
        if self.qkv is None:
            return
        channels, bias = self.qkv.in_features, self.qkv.bias is not None
        self.qkv = None
        self.query, self.key, self.value = (nn.Linear(channels, channels, bias=bias) for _ in range(3))

    def _fqn_modifiers(self) -> dict[str, str]:
        """Return attributes that have modules which only state dicts name; asked by torch.distributed.checkpoint."""
        return {} if self.qkv is None else dict.fromkeys(("query", "key", "value"), "_named_in_state_dicts")

    @property
    def _named_in_state_dicts(self) -> SimpleNamespace:
        return SimpleNamespace(query=self.qkv, key=self.qkv, value=self.qkv)


def project_and_add(x: Tensor, dense: nn.Module, dropout: nn.Dropout, add: Tensor | None) -> Tensor:
    """Compute dropout(dense(x)), plus `add` if given. Dropout may be active while the layer is in eval mode (MC dropout)."""
    if not dropout.training:
        return fused_linear(x, dense, add=add)
    projected: Tensor = dropout(fused_linear(x, dense))
    return projected if add is None else add + projected


class AttentionOutput(nn.Module):
    """Output projection of the attention."""

    def __init__(self, config: DinatConfig, channels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return project_and_add(x, self.dense, self.dropout, add)


class Attention(nn.Module):
    """Neighborhood attention and its output projection. A feature map smaller than kernel_size * dilation is padded.

    The padding is zeros at the right and bottom, before the QKV projection and without a mask, as in the original network.
    """

    def __init__(self, config: DinatConfig, channels: int, heads: int, dilation: int, backend: str) -> None:
        super().__init__()
        self.self = NeighborhoodSelfAttention(config, channels, heads, dilation, backend)
        self.output = AttentionOutput(config, channels)
        self.window = config.kernel_size * dilation

    def forward(self, x: Tensor, with_weights: bool, add: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        height, width = x.shape[1:3]
        if not is_symbolic(height, width):  # then the operator pads
            below, right = max(0, self.window - height), max(0, self.window - width)
            if below or right:
                x = F.pad(x, (0, 0, 0, right, 0, below))
        attended, weights = self.self(x, with_weights)
        return self.output(attended[:, :height, :width], add), weights


class Intermediate(nn.Module):
    """First linear layer of the MLP, and its activation."""

    def __init__(self, config: DinatConfig, channels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, int(config.mlp_ratio * channels))
        if callable(config.hidden_act):
            self.activation = config.hidden_act
        elif config.hidden_act in ACTIVATIONS:
            self.activation = ACTIVATIONS[config.hidden_act]
        else:
            raise ConfigError(f"hidden_act {config.hidden_act!r} is not known: use one of {', '.join(ACTIVATIONS)}")

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is F.gelu:
            return fused_linear(x, self.dense, gelu=True)
        return self.activation(fused_linear(x, self.dense))


class Output(nn.Module):
    """Second linear layer of the MLP."""

    def __init__(self, config: DinatConfig, channels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(int(config.mlp_ratio * channels), channels)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return project_and_add(x, self.dense, self.dropout, add)


class Layer(nn.Module):
    """Attention and MLP, each with a layer norm before it and a residual connection, NHWC."""

    def __init__(self, config: DinatConfig, channels: int, heads: int, dilation: int, drop_path: float, backend: str) -> None:
        super().__init__()
        self.layernorm_before = LayerNorm(channels, eps=config.layer_norm_eps)
        self.attention = Attention(config, channels, heads, dilation, backend)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.layernorm_after = LayerNorm(channels, eps=config.layer_norm_eps)
        self.intermediate = Intermediate(config, channels)
        self.output = Output(config, channels)
        self.layer_scale_parameters = None
        if config.layer_scale_init_value > 0:
            self.layer_scale_parameters = nn.Parameter(torch.full((2, channels), float(config.layer_scale_init_value)))

    def forward(self, x: Tensor, with_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        if self.layer_scale_parameters is None and not self.drop_path.training:  # the sum can be fused into the projection
            x, weights = self.attention(self.layernorm_before(x), with_weights, add=x)
            return self.output(self.intermediate(self.layernorm_after(x)), add=x), weights
        attended, weights = self.attention(self.layernorm_before(x), with_weights)
        if self.layer_scale_parameters is not None:
            attended = self.layer_scale_parameters[0] * attended
        x = x + self.drop_path(attended)
        transformed = self.output(self.intermediate(self.layernorm_after(x)))
        if self.layer_scale_parameters is not None:
            transformed = self.layer_scale_parameters[1] * transformed
        return x + self.drop_path(transformed), weights


LAYER_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "layernorm_before": (LayerNorm,),
    "attention": (Attention,),
    "attention.self": (NeighborhoodSelfAttention,),
    "attention.self.qkv": (nn.Linear,),
    "attention.output": (AttentionOutput,),
    "attention.output.dense": (nn.Linear,),
    "attention.output.dropout": (nn.Dropout,),
    "drop_path": (DropPath, nn.Identity),
    "layernorm_after": (LayerNorm,),
    "intermediate": (Intermediate,),
    "intermediate.dense": (nn.Linear,),
    "output": (Output,),
    "output.dense": (nn.Linear,),
    "output.dropout": (nn.Dropout,),
}
"""Classes of all modules of an unmodified layer, by name."""


def has_unmodified_modules(layer: Layer) -> bool:
    """Return whether a layer has the modules that it was created with, without hooks or a replaced forward."""
    modules = {name: module for name, module in layer.named_modules(remove_duplicate=False) if name}
    return modules.keys() == LAYER_MODULES.keys() and all(
        is_unmodified(module, *LAYER_MODULES[name]) for name, module in modules.items()
    )


class Stage(nn.Module):
    """The layers of one resolution, and the downsampler to the next stage."""

    def __init__(
        self, config: DinatConfig, index: int, drop_paths: list[float], backend: str, layer: type[Layer] = Layer
    ) -> None:
        super().__init__()
        channels, heads = config.channels_of(index), config.num_heads[index]
        self.layers = nn.ModuleList(
            layer(config, channels, heads, dilation, drop_path, backend)
            for dilation, drop_path in zip(config.dilations[index], drop_paths, strict=True)
        )
        self.downsample = Downsampler(channels) if index < config.num_layers - 1 else None

    def forward(self, x: Tensor, with_weights: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the feature map before and after the downsampler, and the last layer's attention weights or None."""
        weights = None
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x, weights = layer(x, with_weights and i == last)
        return x, x if self.downsample is None else self.downsample(x), weights


@dataclass
class EncoderOutput:
    """Feature maps of the encoder, NHWC. Both lists start with the embeddings.

    Attributes:
        before_downsampling: Output of each stage before its downsampler.
        after_downsampling: Output of each stage after its downsampler; the last stage has none.
        attentions: Weights of each stage's last layer, or None.
    """

    before_downsampling: list[Tensor]
    after_downsampling: list[Tensor]
    attentions: tuple[Tensor, ...] | None


class Encoder(nn.Module):
    """All stages. The parameter `layer` is the class of their layers."""

    def __init__(self, config: DinatConfig, backend: str, layer: type[Layer] = Layer) -> None:
        super().__init__()
        total = sum(config.depths)
        rates = [config.drop_path_rate * i / max(1, total - 1) for i in range(total)]
        starts = [sum(config.depths[:i]) for i in range(config.num_layers)]
        self.levels = nn.ModuleList(
            Stage(config, i, rates[start : start + depth], backend, layer)
            for i, (start, depth) in enumerate(zip(starts, config.depths, strict=True))
        )

    def forward(self, x: Tensor, with_weights: bool = False) -> EncoderOutput:
        before, after, attentions = [x], [x], []
        for stage in self.levels:
            stage_output, x, weights = stage(x, with_weights)
            before.append(stage_output)
            after.append(x)
            attentions.append(weights)
        return EncoderOutput(before, after, tuple(attentions) if with_weights else None)


class DinatModel(PreTrainedModel):
    """DiNAT without a head: pixel_values (B, num_channels, H, W) -> DinatModelOutput. Any H and W."""

    ignored_prefixes = ("classifier.",)

    def __init__(self, config: DinatConfig, add_pooling_layer: bool = True, attention: str = "auto") -> None:
        super().__init__(config, attention)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, attention)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.add_pooling_layer = add_pooling_layer
        self._initialize()

    def get_input_embeddings(self) -> PatchEmbeddings:
        """Return the patch embeddings."""
        return self.embeddings.patch_embeddings

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DinatModelOutput | tuple[Any, ...]:
        """See the class. Arguments default to the configuration's values; return_dict=False returns a tuple."""
        output = self.run(
            pixel_values,
            _or_default(output_attentions, self.config.output_attentions),
            _or_default(output_hidden_states, self.config.output_hidden_states),
        )
        return output if _or_default(return_dict, self.config.return_dict) else output.to_tuple()

    def encode(self, pixel_values: Tensor, output_attentions: bool = False) -> EncoderOutput:
        """Return all feature maps of the network, before the final layer norm."""
        return self.encoder(self.embeddings(pixel_values), output_attentions)

    def run(self, pixel_values: Tensor | None, output_attentions: bool, output_hidden_states: bool) -> DinatModelOutput:
        """Run the forward pass, ignoring the configuration's defaults for outputs."""
        encoded = self.encode(_require_pixel_values(pixel_values), output_attentions)
        last = self.layernorm(encoded.after_downsampling[-1])
        states = tuple(encoded.after_downsampling) if output_hidden_states else None
        return DinatModelOutput(
            last_hidden_state=last,
            pooler_output=last.mean(dim=(1, 2)) if self.add_pooling_layer else None,
            hidden_states=states,
            attentions=encoded.attentions,
            reshaped_hidden_states=None if states is None else tuple(state.permute(0, 3, 1, 2) for state in states),
        )


class DinatForImageClassification(PreTrainedModel):
    """DiNAT with a linear classifier on pooled features: pixel_values (B, num_channels, H, W) -> logits (B, num_labels)."""

    def __init__(self, config: DinatConfig, attention: str = "auto") -> None:
        super().__init__(config, attention)
        self.dinat = DinatModel(config, attention=attention)
        width = config.hidden_size
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self._initialize()

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return self.config.num_labels

    def get_input_embeddings(self) -> PatchEmbeddings:
        """Return the patch embeddings."""
        return self.dinat.get_input_embeddings()

    def classify(self, pixel_values: Tensor, features: Collection[str] = ()) -> tuple[Tensor, dict[str, Tensor | list[Tensor]]]:
        """Compute logits, and the requested features.

        Everything after the last stage runs in float32: the cost is negligible, and logits are more precise than in bf16 or
        fp16.

        Args:
            pixel_values: (B, num_channels, H, W).
            features: Names of features to return, from config.feature_names.

        Returns:
            Logits (B, num_labels), and the features by name. stem and stageN: (B, C, h, w), the output of a DinatBackbone with
            newly initialized norms. pooled: (B, C), the input of the classifier. hidden_states: a list of (B, C, h, w), the
            reshaped_hidden_states.
        """
        encoded = self.dinat.encode(pixel_values)
        last = encoded.after_downsampling[-1]
        pooled = _norm_in_float32(self.dinat.layernorm, last).mean(dim=(1, 2))
        outputs: dict[str, Tensor | list[Tensor]] = {}
        for name in features:
            if name == "pooled":
                outputs[name] = pooled
            elif name == "hidden_states":
                outputs[name] = [state.permute(0, 3, 1, 2) for state in encoded.after_downsampling]
            else:
                stage = encoded.before_downsampling[self.config.stage_names.index(name)]
                outputs[name] = F.layer_norm(stage, stage.shape[-1:]).permute(0, 3, 1, 2)
        return _linear_in_float32(self.classifier, pooled, last.dtype), outputs

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DinatImageClassifierOutput | tuple[Any, ...]:
        """See the class. labels: (B,) int64 classes, or (B, num_labels) or (B,) float, for a loss by config.problem_type.

        Other arguments default to the configuration's values; return_dict=False returns a tuple.
        """
        base = self.dinat.run(
            pixel_values,
            _or_default(output_attentions, self.config.output_attentions),
            _or_default(output_hidden_states, self.config.output_hidden_states),
        )
        logits = self.classifier(base.pooler_output)
        output = DinatImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
            reshaped_hidden_states=base.reshaped_hidden_states,
        )
        return output if _or_default(return_dict, self.config.return_dict) else output.to_tuple()


def _norm_in_float32(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Compute the norm in float32. A modified or replaced norm is called as a module, in its own dtype."""
    weight, bias = parameters_of(norm)
    if weight is None or bias is None or not is_unmodified(norm, LayerNorm):
        normalized: Tensor = norm(x)
        return normalized.float()
    return F.layer_norm(x.float(), norm.normalized_shape, weight.float(), bias.float(), norm.eps)


def _linear_in_float32(linear: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the linear layer of x in float32. A modified or replaced layer is called as a module, with inputs of a dtype."""
    if isinstance(linear, nn.Identity):
        return x
    weight, bias = parameters_of(linear)
    if weight is None or bias is None or not is_unmodified(linear, nn.Linear):
        y: Tensor = linear(x.to(dtype))
        return y.float()
    return F.linear(x, weight.float(), bias.float())


class DinatBackbone(PreTrainedModel):
    """Feature maps for a detector or segmenter: pixel_values (B, num_channels, H, W) -> BackboneOutput.

    The stages of config.out_features, each before its downsampler and after its own layer norm, as NCHW.
    """

    ignored_prefixes = ("classifier.", "layernorm.", "hidden_states_norms.")
    optional_prefixes = ("hidden_states_norms.",)

    def __init__(self, config: DinatConfig, attention: str = "auto") -> None:
        super().__init__(config, attention)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, attention)
        self.hidden_states_norms = nn.ModuleDict(
            {stage: LayerNorm(width) for stage, width in zip(self.out_features, self.channels, strict=True)}
        )
        self._initialize()

    @property
    def out_features(self) -> list[str]:
        """Names of the returned stages."""
        return self.config.out_features

    @property
    def num_features(self) -> list[int]:
        """Channels of the stem and of every stage."""
        stages = range(self.config.num_layers)
        return [self.config.embed_dim, *(self.config.channels_of(stage) for stage in stages)]

    @property
    def channels(self) -> list[int]:
        """Channels of the returned stages."""
        names = self.config.stage_names
        return [self.num_features[names.index(stage)] for stage in self.out_features]

    def get_input_embeddings(self) -> PatchEmbeddings:
        """Return the patch embeddings."""
        return self.embeddings.patch_embeddings

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """See the class. Arguments default to the configuration's values; return_dict=False returns a tuple."""
        with_weights = _or_default(output_attentions, self.config.output_attentions)
        with_states = _or_default(output_hidden_states, self.config.output_hidden_states)
        encoded = self.encoder(self.embeddings(_require_pixel_values(pixel_values)), with_weights)
        stages = dict(zip(self.config.stage_names, encoded.before_downsampling, strict=True))
        output = BackboneOutput(
            feature_maps=tuple(
                norm(stages[stage]).permute(0, 3, 1, 2).contiguous() for stage, norm in self.hidden_states_norms.items()
            ),
            hidden_states=tuple(encoded.before_downsampling) if with_states else None,
            attentions=encoded.attentions,
        )
        if _or_default(return_dict, self.config.return_dict):
            return output
        return (output.feature_maps,) if output.hidden_states is None else (output.feature_maps, output.hidden_states)


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _require_pixel_values(pixel_values: Tensor | None) -> Tensor:
    if pixel_values is None:
        raise DinatError("You have to specify pixel_values")
    return pixel_values
