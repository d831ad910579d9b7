"""The configuration of a DiNAT, and the published ones.

Field names, defaults and rules are those of transformers 4.53.3, so that a config.json of the Hub reads as it is.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dinat.model.checkpoints.files import CONFIG, find_files
from dinat.model.errors import CheckpointError, ConfigError

DEFAULT_DILATIONS = [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]


def _alternating(depths: Sequence[int], largest: Sequence[int]) -> list[list[int]]:
    """Dilations per layer as published: 1, d, 1, d, ... with one d for each stage."""
    return [[d if layer % 2 else 1 for layer in range(depth)] for depth, d in zip(depths, largest, strict=True)]


_LARGE: dict[str, Any] = {
    "embed_dim": 192,
    "depths": [3, 4, 18, 5],
    "num_heads": [6, 12, 24, 48],
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.35,
}
_D8 = _alternating([3, 4, 18, 5], [8, 4, 2, 1])
_D13 = _alternating([3, 4, 18, 5], [13, 6, 3, 1])

PRESETS: dict[str, dict[str, Any]] = {
    "mini": {"drop_path_rate": 0.2},
    "tiny": {"depths": [3, 4, 18, 5], "dilations": _D8, "drop_path_rate": 0.2},
    "small": {
        "embed_dim": 96,
        "depths": [3, 4, 18, 5],
        "num_heads": [3, 6, 12, 24],
        "mlp_ratio": 2.0,
        "dilations": _D8,
        "drop_path_rate": 0.3,
    },
    "base": {
        "embed_dim": 128,
        "depths": [3, 4, 18, 5],
        "num_heads": [4, 8, 16, 32],
        "mlp_ratio": 2.0,
        "dilations": _D8,
        "drop_path_rate": 0.5,
        "layer_scale_init_value": 1e-5,
    },
    "large": _LARGE | {"dilations": _D8},
    "large-384": _LARGE | {"dilations": _D13, "image_size": 384},
    "large-11x11-384": _LARGE | {"dilations": _D8, "kernel_size": 11, "image_size": 384},
}
"""The published ImageNet-1k models by short name, as they differ from the defaults (arXiv 2209.15001, table 2)."""

NAT_PRESETS: dict[str, dict[str, Any]] = {
    f"nat-{name}": {
        **PRESETS[name],
        "dilations": [[1] * depth for depth in PRESETS[name].get("depths", [3, 4, 6, 5])],
        "layer_scale_init_value": 1e-5 if name in ("small", "base") else 0.0,
    }
    for name in ("mini", "tiny", "small", "base")
}
"""The published NAT models (arXiv 2204.07143): the same networks without dilation."""

HUB_IDS = {
    "mini": "shi-labs/dinat-mini-in1k-224",
    "tiny": "shi-labs/dinat-tiny-in1k-224",
    "small": "shi-labs/dinat-small-in1k-224",
    "base": "shi-labs/dinat-base-in1k-224",
    "large": "shi-labs/dinat-large-in22k-in1k-224",
    "large-384": "shi-labs/dinat-large-in22k-in1k-384",
    "large-11x11-384": "shi-labs/dinat-large-11x11-in22k-in1k-384",
}
"""Where each preset's weights are on the Hub."""


class DinatConfig:
    """What a DiNAT is made of.

    patch_size: only 4 can be built.  num_channels: of the picture.  embed_dim: channels of stage 1; stage i (from 1) has
    embed_dim * 2**(i-1).  depths: layers per stage.  num_heads: per stage.  kernel_size: one odd number for all layers.
    dilations: one per layer, nested by stage; must be given when depths are not the default.  mlp_ratio, qkv_bias,
    hidden_dropout_prob, attention_probs_dropout_prob, drop_path_rate (grows linearly over the layers), hidden_act (a name
    or a callable), initializer_range, layer_norm_eps.  layer_scale_init_value: above 0 for one scale per branch and channel.
    out_features, out_indices: stages a DinatBackbone returns ("stem", "stage1", ...); the other is derived.
    num_labels, id2label, label2id, problem_type (regression, single_label_classification, multi_label_classification or
    None), output_attentions, output_hidden_states, return_dict: as in transformers.  Unknown keywords are kept as attributes.

    Raises ConfigError (a ValueError) where the fields contradict each other.
    """

    model_type = "dinat"

    def __init__(
        self,
        patch_size: int = 4,
        num_channels: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.1,
        hidden_act: str | Callable[[Tensor], Tensor] = "gelu",
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        layer_scale_init_value: float = 0.0,
        out_features: list[str] | None = None,
        out_indices: Sequence[int] | None = None,
        num_labels: int | None = None,
        id2label: dict[Any, str] | None = None,
        label2id: dict[str, int] | None = None,
        problem_type: str | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **other: Any,
    ) -> None:
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.embed_dim = embed_dim
        self.depths = list(depths)
        self.num_heads = list(num_heads)
        self.kernel_size = kernel_size
        self.dilations = [list(stage) for stage in (DEFAULT_DILATIONS if dilations is None else dilations)]
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.layer_scale_init_value = layer_scale_init_value
        self.problem_type = problem_type
        self.output_attentions = output_attentions
        self.output_hidden_states = output_hidden_states
        self.return_dict = return_dict
        self._set_labels(num_labels, id2label, label2id)
        for name in _DERIVED:
            other.pop(name, None)
        for name, value in other.items():
            if isinstance(getattr(type(self), name, None), property):
                raise ConfigError(f"{name} follows from depths and num_heads: set those")
            setattr(self, name, value)
        self._check_layers(dilations is None)
        self._out_features, self._out_indices = _align(out_features, out_indices, self.stage_names)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DinatConfig":
        """One of the published models by short name (see PRESETS, NAT_PRESETS), 1,000 labels, with `changes` on top."""
        presets = PRESETS | NAT_PRESETS
        if name not in presets:
            raise ConfigError(f"preset {name!r} is not known: take one of {', '.join(presets)}")
        return cls(**({"num_labels": 1000} | presets[name] | changes))

    @property
    def num_layers(self) -> int:
        """How many stages (the name is transformers')."""
        return len(self.depths)

    @property
    def num_hidden_layers(self) -> int:
        """The same as num_layers."""
        return len(self.depths)

    @property
    def num_attention_heads(self) -> list[int]:
        """The same as num_heads."""
        return self.num_heads

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage. Derived: the 512 that published config.json files carry is wrong for most of them."""
        return self.channels_of(self.num_layers - 1)

    @property
    def stage_names(self) -> list[str]:
        """["stem", "stage1", ...]."""
        return ["stem", *(f"stage{i + 1}" for i in range(self.num_layers))]

    @property
    def feature_names(self) -> list[str]:
        """What can be asked of a classifier besides logits: stage_names, "pooled", "hidden_states"."""
        return [*self.stage_names, "pooled", "hidden_states"]

    @property
    def num_labels(self) -> int:
        """Classes of the classifier; 0 for none."""
        return len(self.id2label)

    @property
    def out_features(self) -> list[str]:
        """Stages a backbone returns, by name. Setting it sets out_indices; None means the last stage."""
        return self._out_features

    @out_features.setter
    def out_features(self, names: list[str] | None) -> None:
        self._out_features, self._out_indices = _align(names, None, self.stage_names)

    @property
    def out_indices(self) -> list[int]:
        """Stages a backbone returns, by index (0 is the stem). Setting it sets out_features; None means the last stage."""
        return self._out_indices

    @out_indices.setter
    def out_indices(self, indices: Sequence[int] | None) -> None:
        self._out_features, self._out_indices = _align(None, indices, self.stage_names)

    def channels_of(self, stage: int) -> int:
        """Channels of a stage, counted from 0."""
        return int(self.embed_dim * 2**stage)

    def to_dict(self) -> dict[str, Any]:
        """Everything config.json holds, as transformers writes it."""
        values = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        values |= {name: getattr(self, name) for name in _DERIVED} | {"model_type": self.model_type}
        values |= {"out_features": self.out_features, "out_indices": self.out_indices}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DinatConfig":
        """Read what to_dict, or a config.json of the Hub, holds. NAT's config.json (no dilation anywhere) reads too."""
        values = dict(values)
        model_type = values.pop("model_type", cls.model_type)
        if model_type not in (cls.model_type, "nat"):
            raise ConfigError(f"config is of model_type {model_type!r}, this project runs dinat and nat")
        if model_type == "nat" and values.get("dilations") is None:
            values["dilations"] = [[1] * depth for depth in values.get("depths", [3, 4, 6, 5])]
        return cls(**values)

    @classmethod
    def from_pretrained(cls, source: str | Path, **where: Any) -> "DinatConfig":
        """What config.json of a checkpoint says; `source` and `where` as dinat.model.checkpoints.files.find_files takes them.

        Raises CheckpointError, also for an original file, which has none: use open_checkpoint(file).config.
        """
        files = find_files(source, **where)
        if files.original is not None:
            raise CheckpointError(f"{source} holds only weights: open_checkpoint derives the configuration from them")
        return cls.from_dict(files.read_config())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json into a folder, which is made where it is missing."""
        values = self.to_dict()
        if not isinstance(self.hidden_act, str):
            raise ConfigError(
                f"hidden_act {self.hidden_act!r} is a function and cannot be written to config.json: give its name"
            )
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DinatConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"DinatConfig({json.dumps(self.to_dict(), indent=2, sort_keys=True, default=repr)})"

    def _set_labels(self, num_labels: int | None, id2label: dict[Any, str] | None, label2id: dict[str, int] | None) -> None:
        if id2label is not None:
            self.id2label = {int(index): label for index, label in id2label.items()}
            if num_labels is not None and num_labels != len(self.id2label):
                raise ConfigError(f"num_labels is {num_labels} but id2label names {len(self.id2label)} labels")
        else:
            self.id2label = {index: f"LABEL_{index}" for index in range(2 if num_labels is None else num_labels)}
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ConfigError(f"id2label must name the ids 0 to {len(self.id2label) - 1}, each once")
        self.label2id = label2id or {label: index for index, label in self.id2label.items()}

    def _check_layers(self, dilations_are_default: bool) -> None:
        if not self.depths or len(self.num_heads) != len(self.depths):
            raise ConfigError(f"num_heads {self.num_heads} must name one number for each stage of depths {self.depths}")
        if [len(stage) for stage in self.dilations] != self.depths:
            given = "the default dilations are" if dilations_are_default else "got"
            raise ConfigError(
                f"dilations must name one number for each layer of depths {self.depths}, {given} {self.dilations}"
            )
        if any(not isinstance(d, int) or d < 1 for stage in self.dilations for d in stage):
            raise ConfigError(f"dilations must be whole numbers of at least 1, got {self.dilations}")
        if not isinstance(self.kernel_size, int) or self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size must be odd and at least 3, got {self.kernel_size}")


_DERIVED = ("hidden_size", "num_layers", "stage_names")


def _align(names: list[str] | None, indices: Sequence[int] | None, stages: list[str]) -> tuple[list[str], list[int]]:
    """Derive whichever of out_features and out_indices is missing, and check both; negative indices are kept."""
    if names is not None and not isinstance(names, list):
        raise ConfigError(f"out_features must be a list, got {type(names).__name__}")
    if indices is not None:
        indices = list(indices)
        outside = [index for index in indices if not -len(stages) <= index < len(stages)]
        if outside:
            raise ConfigError(f"out_indices {outside} are outside the {len(stages)} stages {stages}")
    if names is None:
        indices = [len(stages) - 1] if indices is None else indices
        names = [stages[index] for index in indices]
    unknown = [name for name in names if name not in stages]
    if unknown:
        raise ConfigError(f"out_features {unknown} are not among the stages {stages}")
    places = [stages.index(name) for name in names]
    if places != sorted(set(places)):
        raise ConfigError(f"out_features and out_indices must name each stage once, in the order of {stages}; got {names}")
    if indices is None:
        indices = places
    if [index % len(stages) for index in indices] != places:
        raise ConfigError(f"out_features {names} and out_indices {indices} must name the same stages")
    return names, indices
