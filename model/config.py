"""Configuration of a DiNAT, and presets of the published networks.

Field names, defaults and rules are those of transformers 4.53.3, so that config.json files of the Hub can be read.
"""

import difflib
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dinat.model.checkpoints.files import CONFIG, find_files
from dinat.model.errors import CheckpointError, ConfigError
from dinat.model.field_rules import Rule, check_fields, flag, integer, number, optional, sequence, shown, text
from dinat.model.writing import writing

DEFAULT_DEPTHS = (3, 4, 6, 5)
DEFAULT_DILATIONS = [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]


def image_size(config: "DinatConfig") -> int:
    """Return the side of a network's images in pixels: the configuration's image_size, or that of the published networks."""
    return getattr(config, "image_size", 224)


def without_dilation(fields: Mapping[str, Any]) -> list[list[int]]:
    """Return the dilations of a NAT with these configuration fields: 1 for each layer of its depths."""
    return [[1] * depth for depth in fields.get("depths", DEFAULT_DEPTHS)]


def _alternating(depths: Sequence[int], largest: Sequence[int]) -> list[list[int]]:
    """Return the published pattern of dilations per layer: 1, d, 1, d, ... with one d per stage."""
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
"""Published ImageNet-1k models by short name: the fields that differ from the defaults (arXiv 2209.15001, table 2)."""

NAT_PRESETS: dict[str, dict[str, Any]] = {
    f"nat-{name}": {
        **PRESETS[name],
        "dilations": without_dilation(PRESETS[name]),
        "layer_scale_init_value": 1e-5 if name in ("small", "base") else 0.0,
    }
    for name in ("mini", "tiny", "small", "base")
}
"""Published NAT models (arXiv 2204.07143): the same networks without dilation."""

HUB_IDS = {
    "mini": "shi-labs/dinat-mini-in1k-224",
    "tiny": "shi-labs/dinat-tiny-in1k-224",
    "small": "shi-labs/dinat-small-in1k-224",
    "base": "shi-labs/dinat-base-in1k-224",
    "large": "shi-labs/dinat-large-in22k-in1k-224",
    "large-384": "shi-labs/dinat-large-in22k-in1k-384",
    "large-11x11-384": "shi-labs/dinat-large-11x11-in22k-in1k-384",
}
"""Hub repositories of the presets' weights."""


MAX_STAGES, MAX_DEPTH, MAX_CHANNELS, MAX_LABELS = 16, 1024, 2**20, 2**17
MAX_PARAMETERS = 2**34

FIELD_RULES: dict[str, Rule] = {
    "num_channels": integer(1, 1024),
    "embed_dim": integer(2, MAX_CHANNELS),
    "depths": sequence(integer(1, MAX_DEPTH), 1, MAX_STAGES),
    "num_heads": sequence(integer(1, MAX_CHANNELS), 1, MAX_STAGES),
    "dilations": optional(sequence(sequence(lambda _: None, 1, MAX_DEPTH), 1, MAX_STAGES)),
    "mlp_ratio": number(0, 1024),
    "qkv_bias": flag,
    "hidden_dropout_prob": number(0, 1),
    "attention_probs_dropout_prob": number(0, 1),
    "drop_path_rate": number(0, 1),
    "initializer_range": number(0, 1e6),
    "layer_norm_eps": number(0, 1),
    "layer_scale_init_value": number(-1e6, 1e6),
    "num_labels": optional(integer(0, MAX_LABELS)),
    "problem_type": optional(text("regression", "single_label_classification", "multi_label_classification")),
    "output_attentions": optional(flag),
    "output_hidden_states": optional(flag),
    "return_dict": optional(flag),
}
"""Types and ranges of the fields that are simple values."""


class DinatConfig:
    """Configuration of a DiNAT.

    Args:
        patch_size: Must be 4.
        num_channels: Channels of the image.
        embed_dim: Channels of stage 1; stage i (from 1) has embed_dim * 2**(i-1).
        depths: Layers per stage.
        num_heads: Attention heads per stage.
        kernel_size: Window size of all layers, odd and at least 3.
        dilations: One per layer, nested by stage. Required if depths are not the default.
        mlp_ratio: Hidden channels of the MLP relative to the channels of the stage.
        qkv_bias: Whether the QKV projection has a bias.
        hidden_dropout_prob: Dropout probability of the embeddings and MLP outputs.
        attention_probs_dropout_prob: Dropout probability of the attention weights and outputs.
        drop_path_rate: Stochastic depth rate of the last layer; it increases linearly from 0 at the first layer.
        hidden_act: Activation of the MLP, a name or a callable.
        initializer_range: Standard deviation of initial weights.
        layer_norm_eps: Epsilon of the layer norms in layers and after the last stage.
        layer_scale_init_value: If above 0, initial layer scale, which is one factor per branch and channel.
        out_features: Stages that a DinatBackbone returns, of stage_names; derived from out_indices if None.
        out_indices: The same by index, 0 is the stem; derived from out_features if None.
        num_labels: Number of classes; 2 if None and id2label is None.
        id2label: Label of each class.
        label2id: Class of each label; derived from id2label if None.
        problem_type: regression, single_label_classification, multi_label_classification or None; see classification_loss.
        output_attentions: Default of the argument of the networks' forward.
        output_hidden_states: Default of the argument of the networks' forward.
        return_dict: Default of the argument of the networks' forward.
        other: Unknown fields, which are stored as attributes, with a warning.

    Raises:
        ConfigError: The fields are invalid or contradict each other.
    """

    model_type = "dinat"

    def __init__(
        self,
        patch_size: int = 4,
        num_channels: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = DEFAULT_DEPTHS,
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
        check_fields(locals(), FIELD_RULES, ConfigError)
        if not (isinstance(hidden_act, str) or callable(hidden_act)):
            raise ConfigError(f"hidden_act must be a name or a function, got {shown(hidden_act)}")
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
        other = {name: value for name, value in other.items() if name not in _DERIVED}
        self._store(other)
        warn_if_unknown(other)
        self._check_layers(dilations is None)
        self._check_size()
        self._out_features, self._out_indices = _align(out_features, out_indices, self.stage_names)

    def _store(self, other: Mapping[str, Any]) -> None:
        """Store unknown fields as attributes. Raises ConfigError if a name is that of a property or method."""
        for name, value in other.items():
            if isinstance(getattr(type(self), name, None), property):
                raise ConfigError(f"{name} is derived from depths and num_heads: set those instead")
            if name.startswith("__") or hasattr(type(self), name):
                raise ConfigError(f"{name} is not the name of a field")
            setattr(self, name, value)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DinatConfig":
        """Return the configuration of a published model with 1,000 labels.

        Args:
            name: One of PRESETS or NAT_PRESETS.
            changes: Fields to replace.
        """
        presets = PRESETS | NAT_PRESETS
        if name not in presets:
            raise ConfigError(f"preset {name!r} is not known: use one of {', '.join(presets)}")
        return cls(**({"num_labels": 1000} | presets[name] | changes))

    @property
    def num_layers(self) -> int:
        """Number of stages, by the name of transformers."""
        return len(self.depths)

    @property
    def num_hidden_layers(self) -> int:
        """Alias of num_layers."""
        return len(self.depths)

    @property
    def num_attention_heads(self) -> list[int]:
        """Alias of num_heads."""
        return self.num_heads

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage. The value in published config.json files, 512, is wrong for most of them and ignored."""
        return self.channels_of(self.num_layers - 1)

    @property
    def stage_names(self) -> list[str]:
        """["stem", "stage1", ...]."""
        return ["stem", *(f"stage{i + 1}" for i in range(self.num_layers))]

    @property
    def feature_names(self) -> list[str]:
        """Features that DinatForImageClassification.classify can return: stage_names, "pooled", "hidden_states"."""
        return [*self.stage_names, "pooled", "hidden_states"]

    @property
    def num_labels(self) -> int:
        """Number of classes; 0 for a network without a classifier."""
        return len(self.id2label)

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that a backbone returns. Setting it sets out_indices; None means the last stage."""
        return self._out_features

    @out_features.setter
    def out_features(self, names: list[str] | None) -> None:
        self._out_features, self._out_indices = _align(names, None, self.stage_names)

    @property
    def out_indices(self) -> list[int]:
        """Indices of the stages that a backbone returns, 0 is the stem. Setting it sets out_features; None: the last stage."""
        return self._out_indices

    @out_indices.setter
    def out_indices(self, indices: Sequence[int] | None) -> None:
        self._out_features, self._out_indices = _align(None, indices, self.stage_names)

    def channels_of(self, stage: int) -> int:
        """Return the channels of a stage, counted from 0."""
        return int(self.embed_dim * 2**stage)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of config.json, as transformers writes it."""
        values = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        values |= {name: getattr(self, name) for name in _DERIVED} | {"model_type": self.model_type}
        values |= {"out_features": self.out_features, "out_indices": self.out_indices}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DinatConfig":
        """Create a configuration from to_dict() or from the contents of a config.json, also of a NAT (no dilations).

        Raises:
            ConfigError: The model type is not supported, or the fields are invalid.
        """
        values = dict(values)
        model_type = values.pop("model_type", cls.model_type)
        if model_type not in (cls.model_type, "nat"):
            raise ConfigError(f"model_type {model_type!r} is not supported: use dinat or nat")
        if model_type == "nat" and values.get("dilations") is None:
            values["dilations"] = without_dilation(values)
        other = {name: values.pop(name) for name in list(values) if name not in FIELDS}
        config = cls(**values)
        config._store({name: value for name, value in other.items() if name not in _DERIVED})
        return config

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "DinatConfig":
        """Read the config.json of a checkpoint.

        Args:
            source: See dinat.model.checkpoints.files.find_files.
            options: Keyword arguments of find_files.

        Raises:
            CheckpointError: There is no config.json. An original file has none: use open_checkpoint(file).config.
        """
        files = find_files(source, **options)
        if files.original is not None:
            raise CheckpointError(f"{source} contains only weights: use open_checkpoint, which infers the configuration")
        return cls.from_dict(files.read_config())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json into a folder, which is created if missing.

        Raises:
            ConfigError: hidden_act is a function, which has no representation in JSON.
        """
        values = self.to_dict()
        if not isinstance(self.hidden_act, str):
            raise ConfigError(
                f"hidden_act {self.hidden_act!r} is a function and cannot be written to config.json: use its name"
            )
        Path(folder).mkdir(parents=True, exist_ok=True)
        with writing(Path(folder) / CONFIG):
            (Path(folder) / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DinatConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"DinatConfig({json.dumps(self.to_dict(), indent=2, sort_keys=True, default=repr)})"

    def _set_labels(self, num_labels: int | None, id2label: dict[Any, str] | None, label2id: dict[str, int] | None) -> None:
        if label2id is not None and not isinstance(label2id, Mapping):
            raise ConfigError(f"label2id must be a mapping from labels to ids, got {shown(label2id)}")
        if id2label is not None:
            self.id2label = _labels(id2label)
            if num_labels is not None and num_labels != len(self.id2label):
                raise ConfigError(f"num_labels is {num_labels} but id2label has {len(self.id2label)} labels")
        else:
            self.id2label = {index: f"LABEL_{index}" for index in range(2 if num_labels is None else num_labels)}
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ConfigError(f"id2label must contain each of the ids 0 to {len(self.id2label) - 1}")
        self.label2id = label2id or {label: index for index, label in self.id2label.items()}

    def _check_size(self) -> None:
        """Raise ConfigError if the network would be larger than any that fits into memory."""
        if self.hidden_size > MAX_CHANNELS:
            raise ConfigError(f"the last stage would have {self.hidden_size:,} channels, over {MAX_CHANNELS:,}")
        channels = [self.channels_of(stage) for stage in range(self.num_layers)]
        layers = sum(depth * c * c * (4 + 2 * self.mlp_ratio) for depth, c in zip(self.depths, channels, strict=True))
        parameters = layers + sum(18 * c * c for c in channels[:-1]) + self.num_labels * channels[-1]
        heads = sum(depth * count for depth, count in zip(self.depths, self.num_heads, strict=True))
        parameters += heads * 4 * self.kernel_size**2
        if parameters > MAX_PARAMETERS:
            raise ConfigError(f"the network would have {parameters:.2g} parameters, over {MAX_PARAMETERS:.2g}")

    def _check_layers(self, dilations_are_default: bool) -> None:
        if not self.depths or len(self.num_heads) != len(self.depths):
            raise ConfigError(f"num_heads {self.num_heads} must contain one number per stage of depths {self.depths}")
        if [len(stage) for stage in self.dilations] != self.depths:
            origin = "the default dilations are" if dilations_are_default else "got"
            raise ConfigError(f"dilations must contain one number per layer of depths {self.depths}, {origin} {self.dilations}")
        if any(not isinstance(d, int) or d < 1 for stage in self.dilations for d in stage):
            raise ConfigError(f"dilations must be integers of at least 1, got {self.dilations}")
        if not isinstance(self.kernel_size, int) or self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size must be odd and at least 3, got {shown(self.kernel_size)}")


def _labels(id2label: Any) -> dict[int, str]:
    """Return id2label with integer keys. Raises ConfigError if it maps anything but integers to strings."""
    if isinstance(id2label, Mapping) and len(id2label) > MAX_LABELS:
        raise ConfigError(f"id2label has {len(id2label):,} labels, the maximum is {MAX_LABELS:,}")
    try:
        labels = {int(index): label for index, label in id2label.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(f"id2label must be a mapping from ids to labels, got {shown(id2label)}") from None
    other = next((label for label in labels.values() if not isinstance(label, str)), None)
    if other is not None:
        raise ConfigError(f"id2label must map ids to strings, got {shown(other)}")
    return labels


_DERIVED = ("hidden_size", "num_layers", "stage_names")

FIELDS = frozenset(inspect.signature(DinatConfig).parameters) - {"other"}
"""Names of the fields that define a network, its outputs or its labels."""
STORED_FIELDS = ("image_size", "architectures", "torch_dtype", "dtype", "transformers_version")
"""Names of other fields that config.json files have."""


def warn_if_unknown(names: Iterable[str]) -> None:
    """Warn about names that are no fields, with the nearest field: most of them are typing errors."""
    for name in names:
        if name not in FIELDS and name not in STORED_FIELDS and name not in _DERIVED:
            nearest = difflib.get_close_matches(name, FIELDS, 1)
            hint = f": do you mean {nearest[0]}?" if nearest else ""
            warnings.warn(f"{name} is not a field of DinatConfig and has no effect{hint}", stacklevel=3)


def _align(names: list[str] | None, indices: Sequence[int] | None, stages: list[str]) -> tuple[list[str], list[int]]:
    """Derive whichever of out_features and out_indices is None, and check both; negative indices stay negative."""
    if names is not None and not isinstance(names, list):
        raise ConfigError(f"out_features must be a list, got {type(names).__name__}")
    if indices is not None:
        indices = list(indices)
        if not all(isinstance(index, int) for index in indices):
            raise ConfigError(f"out_indices must be integers, got {shown(indices)}")
        outside = [index for index in indices if not -len(stages) <= index < len(stages)]
        if outside:
            raise ConfigError(f"out_indices {outside} are outside the {len(stages)} stages {stages}")
    if names is None:
        indices = [len(stages) - 1] if indices is None else indices
        names = [stages[index] for index in indices]
    unknown = [name for name in names if name not in stages]
    if unknown:
        raise ConfigError(f"out_features {unknown} are not among the stages {stages}")
    positions = [stages.index(name) for name in names]
    if positions != sorted(set(positions)):
        raise ConfigError(f"out_features and out_indices must name each stage once, in the order of {stages}; got {names}")
    if indices is None:
        indices = positions
    if [index % len(stages) for index in indices] != positions:
        raise ConfigError(f"out_features {names} and out_indices {indices} must name the same stages")
    return names, indices
