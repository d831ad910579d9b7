"""Outputs of the networks, with the names of transformers."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree


class ModelOutput:
    """Outputs by field, by key, or by index into to_tuple(). Outputs that were not requested are None."""

    def __init_subclass__(cls) -> None:
        """Make the outputs a pytree, as torch.export requires."""
        super().__init_subclass__()
        name = f"{cls.__module__}.{cls.__qualname__}"
        _pytree.register_pytree_node(cls, _flatten, partial(_unflatten, cls), serialized_type_name=name)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None in transformers' order, which does not include reshaped_hidden_states."""
        names = [field.name for field in fields(self) if field.name != "reshaped_hidden_states"]  # type: ignore[arg-type]
        return tuple(value for name in names if (value := getattr(self, name)) is not None)

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    named = {field.name: getattr(output, field.name) for field in fields(output)}  # type: ignore[arg-type]
    names = [name for name, value in named.items() if value is not None]
    return [named[name] for name in names], names


def _unflatten(cls: type[Any], values: Iterable[Any], names: list[str]) -> Any:
    return cls(**{field.name: None for field in fields(cls)} | dict(zip(names, values, strict=True)))


@dataclass
class DinatModelOutput(ModelOutput):
    """Output of DinatModel.

    Attributes:
        last_hidden_state: Output of the final layer norm (B, h, w, C).
        pooler_output: Mean of last_hidden_state over h and w (B, C), or None.
        hidden_states: The embeddings, then the output of each stage after its downsampler, NHWC.
        attentions: Weights of each stage's last layer (B, heads, H, W, kernel_size**2), with the padded H and W.
        reshaped_hidden_states: The hidden states as NCHW.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class DinatImageClassifierOutput(ModelOutput):
    """Output of DinatForImageClassification.

    Attributes:
        loss: Scalar, or None without labels.
        logits: (B, num_labels).
        hidden_states: See DinatModelOutput.
        attentions: See DinatModelOutput.
        reshaped_hidden_states: See DinatModelOutput.
    """

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class BackboneOutput(ModelOutput):
    """Output of DinatBackbone.

    Attributes:
        feature_maps: One for each of out_features, NCHW.
        hidden_states: The embeddings, then the output of each stage before its downsampler, NHWC.
        attentions: See DinatModelOutput.
    """

    feature_maps: tuple[Tensor, ...]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
