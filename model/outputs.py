"""What the networks return, as transformers names it."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


class ModelOutput:
    """Fields of an answer that were not asked for are None. Also reads as a tuple, or by key, of those that are not."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are there, in transformers' order; reshaped_hidden_states has no place in it."""
        names = [field.name for field in fields(self) if field.name != "reshaped_hidden_states"]  # type: ignore[arg-type]
        return tuple(value for name in names if (value := getattr(self, name)) is not None)

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class DinatModelOutput(ModelOutput):
    """What DinatModel returns.

    last_hidden_state: (B, h, w, C), after the final layer norm.  pooler_output: (B, C), its mean over the map, or None.
    hidden_states: the embeddings, then each stage after its downsampler, NHWC.  attentions: of each stage's last layer,
    (B, heads, H, W, kernel_size**2) with the padded H and W.  reshaped_hidden_states: the hidden states as NCHW.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class DinatImageClassifierOutput(ModelOutput):
    """What DinatForImageClassification returns: loss () or None, logits (B, num_labels); the rest as in DinatModelOutput."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class BackboneOutput(ModelOutput):
    """What DinatBackbone returns: feature_maps, NCHW, one for each of out_features; the rest as in DinatModelOutput.

    Here hidden_states are those before the downsamplers.
    """

    feature_maps: tuple[Tensor, ...]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
