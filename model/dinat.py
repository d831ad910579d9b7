"""The Dilated Neighborhood Attention Transformer (DiNAT, arXiv 2209.15001).

Behaves as transformers 4.53.3 does, with its module names, so that state_dict keys are those of the published checkpoints.
Maps are NHWC inside and NCHW at the doors (pixel_values, reshaped_hidden_states, feature_maps).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinat.model.attention import neighborhood_attention, neighborhood_attention_with_weights
from dinat.model.checkpoints.pretrained import PreTrainedModel
from dinat.model.config import DinatConfig
from dinat.model.cpu.fast_layers import LayerNorm, product
from dinat.model.errors import ConfigError, DinatError
from dinat.model.loss import classification_loss
from dinat.model.outputs import BackboneOutput, DinatImageClassifierOutput, DinatModelOutput

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""The functions that config.hidden_act may name; "gelu" is the exact one, by erf."""


class DropPath(nn.Module):
    """Drop a residual branch for a picture with a probability, in training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.probability)
        return x * kept / (1 - self.probability)


class PatchEmbeddings(nn.Module):
    """Two overlapping convolutions of stride 2: (B, C, H, W) -> (B, H/4, W/4, embed_dim), sizes rounded up."""

    def __init__(self, config: DinatConfig) -> None:
        super().__init__()
        if config.patch_size not in (4, [4, 4], (4, 4)):
            raise ConfigError(f"Dinat only supports patch size of 4 at the moment, got {config.patch_size}")
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
        return self.projection(pixel_values.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


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
    """Halve height and width (rounded up) and double the channels between two stages, NHWC."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NeighborhoodSelfAttention(nn.Module):
    """Query, key and value products, and attention within each position's dilated neighborhood (section 3)."""

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
        """(B, H, W, C) -> the same shape, and (B, heads, H, W, kernel_size**2) if the weights are wanted."""
        q, k, v = (part.view(*x.shape[:-1], self.heads, -1) for part in self.project(x))
        settings: dict[str, Any] = {"dropout": self.dropout if self.training else 0.0}
        weights = None
        if with_weights:
            attended, weights = neighborhood_attention_with_weights(
                q, k, v, self.rpb, self.kernel_size, self.dilation, **settings
            )
        else:
            attended = neighborhood_attention(
                q, k, v, self.rpb, self.kernel_size, self.dilation, backend=self.backend, **settings
            )
        return attended.flatten(-2), weights

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, H, W, C) -> query, key and value, each of the same shape."""
        if self.qkv is None:
            return product(x, self.query), product(x, self.key), product(x, self.value)
        return product(x, self.qkv).chunk(3, dim=-1)

    def part(self) -> None:
        """Have query, key and value as modules of their own, as adapters and quantizers look for them, with fresh weights."""
        if self.qkv is None:
            return
        channels, bias = self.qkv.in_features, self.qkv.bias is not None
        self.qkv = None
        self.query, self.key, self.value = (nn.Linear(channels, channels, bias=bias) for _ in range(3))


class AttentionOutput(nn.Module):
    """The projection after attention."""

    def __init__(self, config: DinatConfig, channels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return self.dropout(product(x, self.dense, add=add))


class Attention(nn.Module):
    """Neighborhood attention and its projection. A map smaller than kernel_size * dilation is padded first.

    The padding is zeros to the right and below, before the query, key and value products and without a mask, as published.
    """

    def __init__(
        self,
        config: DinatConfig,
        channels: int,
        heads: int,
        dilation: int,
        backend: str,
    ) -> None:
        super().__init__()
        self.self = NeighborhoodSelfAttention(config, channels, heads, dilation, backend)
        self.output = AttentionOutput(config, channels)
        self.window = config.kernel_size * dilation

    def forward(self, x: Tensor, with_weights: bool, add: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        height, width = x.shape[1:3]
        below, right = max(0, self.window - height), max(0, self.window - width)
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        attended, weights = self.self(x, with_weights)
        return self.output(attended[:, :height, :width], add), weights


class Intermediate(nn.Module):
    """The MLP's first product and its activation."""

    def __init__(self, config: DinatConfig, channels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, int(config.mlp_ratio * channels))
        if callable(config.hidden_act):
            self.activation = config.hidden_act
        elif config.hidden_act in ACTIVATIONS:
            self.activation = ACTIVATIONS[config.hidden_act]
        else:
            raise ConfigError(f"hidden_act {config.hidden_act!r} is not known: take one of {', '.join(ACTIVATIONS)}")

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is F.gelu:
            return product(x, self.dense, gelu=True)
        return self.activation(product(x, self.dense))


class Output(nn.Module):
    """The MLP's second product."""

    def __init__(self, config: DinatConfig, channels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(int(config.mlp_ratio * channels), channels)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return self.dropout(product(x, self.dense, add=add))


class Layer(nn.Module):
    """Attention and MLP, each after a layer norm and added to what came in, NHWC."""

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
        if self.layer_scale_parameters is None and not self.training:  # nothing comes between a branch and its sum
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


class Stage(nn.Module):
    """Layers of one resolution, and the downsampler to the next."""

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
        """Returns the map before and after the downsampler, and the last layer's attention weights if wanted."""
        weights = None
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x, weights = layer(x, with_weights and i == last)
        return x, x if self.downsample is None else self.downsample(x), weights


@dataclass
class Encoded:
    """What the encoder passed through. All maps NHWC, the embeddings first; `before` and `after` the downsamplers."""

    before: list[Tensor]
    after: list[Tensor]
    attentions: tuple[Tensor, ...] | None


class Encoder(nn.Module):
    """All stages. layer: what their layers are, a kind of Layer."""

    def __init__(self, config: DinatConfig, backend: str, layer: type[Layer] = Layer) -> None:
        super().__init__()
        total = sum(config.depths)
        rates = [config.drop_path_rate * i / max(1, total - 1) for i in range(total)]
        starts = [sum(config.depths[:i]) for i in range(config.num_layers)]
        self.levels = nn.ModuleList(
            Stage(config, i, rates[start : start + depth], backend, layer)
            for i, (start, depth) in enumerate(zip(starts, config.depths, strict=True))
        )

    def forward(self, x: Tensor, with_weights: bool = False) -> Encoded:
        before, after, attentions = [x], [x], []
        for stage in self.levels:
            undivided, x, weights = stage(x, with_weights)
            before.append(undivided)
            after.append(x)
            attentions.append(weights)
        return Encoded(before, after, tuple(attentions) if with_weights else None)


class DinatModel(PreTrainedModel):
    """DiNAT without a head: pixel_values (B, num_channels, H, W) -> DinatModelOutput. Any H and W."""

    absent_prefixes = ("classifier.",)

    def __init__(self, config: DinatConfig, add_pooling_layer: bool = True, attention: str = "auto") -> None:
        super().__init__(config, attention)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, attention)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.add_pooling_layer = add_pooling_layer
        self._initialize()

    def get_input_embeddings(self) -> PatchEmbeddings:
        """The module that takes the pixels."""
        return self.embeddings.patch_embeddings

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DinatModelOutput | tuple[Any, ...]:
        """See the class. An argument of None takes the configuration's value; return_dict=False gives a tuple."""
        output = self.run(
            pixel_values,
            _choose(output_attentions, self.config.output_attentions),
            _choose(output_hidden_states, self.config.output_hidden_states),
        )
        return output if _choose(return_dict, self.config.return_dict) else output.to_tuple()

    def encode(self, pixel_values: Tensor, output_attentions: bool = False) -> Encoded:
        """Every map of the network, before the final layer norm."""
        return self.encoder(self.embeddings(pixel_values), output_attentions)

    def run(self, pixel_values: Tensor | None, output_attentions: bool, output_hidden_states: bool) -> DinatModelOutput:
        """The forward pass with nothing left to choose."""
        encoded = self.encode(_given(pixel_values), output_attentions)
        last = self.layernorm(encoded.after[-1])
        states = tuple(encoded.after) if output_hidden_states else None
        return DinatModelOutput(
            last_hidden_state=last,
            pooler_output=last.mean(dim=(1, 2)) if self.add_pooling_layer else None,
            hidden_states=states,
            attentions=encoded.attentions,
            reshaped_hidden_states=None if states is None else tuple(state.permute(0, 3, 1, 2) for state in states),
        )


class DinatForImageClassification(PreTrainedModel):
    """DiNAT with a linear classifier over the pooled map: pixel_values (B, num_channels, H, W) -> logits (B, num_labels)."""

    def __init__(self, config: DinatConfig, attention: str = "auto") -> None:
        super().__init__(config, attention)
        self.dinat = DinatModel(config, attention=attention)
        width = config.hidden_size
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self._initialize()

    @property
    def num_labels(self) -> int:
        """Classes of the classifier."""
        return self.config.num_labels

    def get_input_embeddings(self) -> PatchEmbeddings:
        """The module that takes the pixels."""
        return self.dinat.get_input_embeddings()

    def classify(self, pixel_values: Tensor, features: Collection[str] = ()) -> tuple[Tensor, dict[str, Tensor | list[Tensor]]]:
        """Logits (B, num_labels), and maps by name, those of config.feature_names that are asked for.

        stem, stageN: (B, C, h, w), what a DinatBackbone with fresh norms returns.  pooled: (B, C), what the classifier sees.
        hidden_states: a list of (B, C, h, w), the reshaped_hidden_states.
        After the last stage all is float32: it costs next to nothing, and logits keep digits that bf16 and fp16 have not.
        """
        encoded = self.dinat.encode(pixel_values)
        pooled = _norm_in_float32(self.dinat.layernorm, encoded.after[-1]).mean(dim=(1, 2))
        maps: dict[str, Tensor | list[Tensor]] = {}
        for name in features:
            if name == "pooled":
                maps[name] = pooled
            elif name == "hidden_states":
                maps[name] = [state.permute(0, 3, 1, 2) for state in encoded.after]
            else:
                stage = encoded.before[self.config.stage_names.index(name)]
                maps[name] = F.layer_norm(stage, stage.shape[-1:]).permute(0, 3, 1, 2)
        if isinstance(self.classifier, nn.Identity):
            return pooled, maps
        return F.linear(pooled, self.classifier.weight.float(), self.classifier.bias.float()), maps

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DinatImageClassifierOutput | tuple[Any, ...]:
        """See the class. labels: (B,) int64 classes, or (B, num_labels) or (B,) float, for a loss by config.problem_type.

        An argument of None takes the configuration's value; return_dict=False gives a tuple.
        """
        encoded = self.dinat.run(
            pixel_values,
            _choose(output_attentions, self.config.output_attentions),
            _choose(output_hidden_states, self.config.output_hidden_states),
        )
        logits = self.classifier(encoded.pooler_output)
        output = DinatImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            reshaped_hidden_states=encoded.reshaped_hidden_states,
        )
        return output if _choose(return_dict, self.config.return_dict) else output.to_tuple()


def _norm_in_float32(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x) in float32, whatever its parameters are kept in."""
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


class DinatBackbone(PreTrainedModel):
    """Feature maps for a detector or segmenter: pixel_values (B, num_channels, H, W) -> BackboneOutput.

    The stages of config.out_features, each before its downsampler and after a layer norm of its own, as NCHW.
    """

    absent_prefixes = ("classifier.", "layernorm.", "hidden_states_norms.")
    fresh_prefixes = ("hidden_states_norms.",)

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
        """Names of the stages returned."""
        return self.config.out_features

    @property
    def num_features(self) -> list[int]:
        """Channels of the stem and of every stage."""
        stages = range(self.config.num_layers)
        return [self.config.embed_dim, *(self.config.channels_of(stage) for stage in stages)]

    @property
    def channels(self) -> list[int]:
        """Channels of the stages returned."""
        names = self.config.stage_names
        return [self.num_features[names.index(stage)] for stage in self.out_features]

    def get_input_embeddings(self) -> PatchEmbeddings:
        """The module that takes the pixels."""
        return self.embeddings.patch_embeddings

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput | tuple[Any, ...]:
        """See the class. An argument of None takes the configuration's value; return_dict=False gives a tuple."""
        with_weights = _choose(output_attentions, self.config.output_attentions)
        encoded = self.encoder(self.embeddings(_given(pixel_values)), with_weights)
        maps = dict(zip(self.config.stage_names, encoded.before, strict=True))
        output = BackboneOutput(
            feature_maps=tuple(
                norm(maps[stage]).permute(0, 3, 1, 2).contiguous() for stage, norm in self.hidden_states_norms.items()
            ),
            hidden_states=tuple(encoded.before) if _choose(output_hidden_states, self.config.output_hidden_states) else None,
            attentions=encoded.attentions,
        )
        if _choose(return_dict, self.config.return_dict):
            return output
        return (output.feature_maps,) if output.hidden_states is None else (output.feature_maps, output.hidden_states)


def _choose(asked: bool | None, default: bool) -> bool:
    return default if asked is None else asked


def _given(pixel_values: Tensor | None) -> Tensor:
    if pixel_values is None:
        raise DinatError("You have to specify pixel_values")
    return pixel_values
