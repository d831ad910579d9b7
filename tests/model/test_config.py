import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinat.model import ConfigError, DinatConfig, DinatForImageClassification
from dinat.model.config import HUB_IDS, PRESETS

PARAMETERS = {
    "mini": 19_984_174,
    "tiny": 27_901_582,
    "small": 50_719_681,
    "base": 89_769_652,
    "large": 200_943_514,
    "large-384": 200_943_514,
    "large-11x11-384": 201_144_250,
}
TENSORS = {"mini": 325, "base": 559}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_match_the_published_networks(name: str) -> None:
    with torch.device("meta"):
        network = DinatForImageClassification(DinatConfig.preset(name))
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
    assert len(network.state_dict()) == TENSORS.get(name, 529)
    assert name in HUB_IDS


def test_dilations_of_large_384() -> None:
    assert DinatConfig.preset("large-384").dilations == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]


def test_defaults() -> None:
    config = DinatConfig()
    assert (config.embed_dim, config.depths, config.num_heads, config.kernel_size) == (64, [3, 4, 6, 5], [2, 4, 8, 16], 7)
    assert config.dilations == [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]
    assert (config.out_features, config.out_indices) == (["stage4"], [4])
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert config.num_hidden_layers == 4
    assert config.num_attention_heads == [2, 4, 8, 16]


def test_configs_do_not_share_default_dilations() -> None:
    DinatConfig().dilations[0][0] = 5
    assert DinatConfig().dilations[0][0] == 1


def test_derived_fields_of_published_files_are_ignored() -> None:
    values = DinatConfig.preset("base").to_dict() | {"hidden_size": 512, "stage_names": None, "num_layers": 9}
    config = DinatConfig.from_dict(values)
    assert config.hidden_size == 1024
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert config.num_layers == 4


def test_unknown_fields_are_preserved() -> None:
    assert DinatConfig.from_dict({"path_norm": True}).to_dict()["path_norm"] is True


def test_unknown_fields_of_a_call_are_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"embed_dims is not a field of DinatConfig .* do you mean embed_dim\?"):
        DinatConfig(embed_dims=32)
    with pytest.warns(UserWarning, match=r"zzz is not a field of DinatConfig and has no effect$"):
        DinatConfig.preset("mini", zzz=1)
    with pytest.warns(UserWarning, match=r"num_label is not a field .* do you mean num_labels\?"):
        DinatForImageClassification.from_pretrained("digits", num_label=3)


def test_nat_is_read_as_a_dinat_without_dilation() -> None:
    config = DinatConfig.from_dict({"model_type": "nat", "depths": [3, 4, 6, 5], "layer_scale_init_value": 1e-5})
    assert config.dilations == [[1] * 3, [1] * 4, [1] * 6, [1] * 5]


def test_configuration_round_trip(tmp_path: Path) -> None:
    config = DinatConfig.preset("large-11x11-384", out_indices=[0, -1], id2label={0: "cat", 1: "dog"}, num_labels=2)
    config.save_pretrained(tmp_path)
    assert DinatConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config
    assert DinatConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"out_indices": [0, -1]}, (["stem", "stage4"], [0, -1])),
        ({"out_indices": (1, 2)}, (["stage1", "stage2"], [1, 2])),
        ({"out_features": ["stage2"]}, (["stage2"], [2])),
        ({"out_features": ["stem", "stage4"], "out_indices": [0, -1]}, (["stem", "stage4"], [0, -1])),
    ],
)
def test_out_features_and_out_indices_are_derived(fields: dict[str, Any], expected: tuple[list[str], list[int]]) -> None:
    config = DinatConfig(**fields)
    assert (config.out_features, config.out_indices) == expected


def test_out_features_and_out_indices_set_each_other() -> None:
    config = DinatConfig(out_features=["stage1"])
    config.out_indices = [2, 3]
    assert config.out_features == ["stage2", "stage3"]
    config.out_features = None
    assert config.out_indices == [4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out_features": ["stage9"]}, "stage9"),
        ({"out_features": ("stage1",)}, "must be a list"),
        ({"out_features": ["stage1", "stage1"]}, "each stage once"),
        ({"out_features": ["stage2", "stage1"]}, "in the order"),
        ({"out_indices": [5]}, "outside the 5 stages"),
        ({"out_features": ["stage1"], "out_indices": [2]}, "must name the same stages"),
        ({"out_features": ["stage1"], "out_indices": [1, 2]}, "must name the same stages"),
        ({"depths": [3, 4, 18, 5]}, "dilations must contain one number per layer"),
        ({"num_heads": [2, 4]}, "one number per stage"),
        ({"dilations": [[1, 0, 1], [1] * 4, [1] * 6, [1] * 5]}, "at least 1"),
        ({"kernel_size": 4}, "odd and at least 3, got 4"),
        ({"id2label": {0: "a", 2: "b"}}, "ids 0 to 1"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels is 3 but id2label has 1"),
        ({"num_hidden_layers": 3}, "is derived from depths"),
    ],
)
def test_invalid_fields_raise_config_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DinatConfig(**fields)


def test_unsupported_models_raise_config_error() -> None:
    with pytest.raises(ConfigError, match="model_type 'swin' is not supported"):
        DinatConfig.from_dict({"model_type": "swin"})
    with pytest.raises(ConfigError, match="preset 'huge' is not known: use one of mini"):
        DinatConfig.preset("huge")
    with pytest.raises(ConfigError, match="is a function"):
        DinatConfig(hidden_act=torch.relu).save_pretrained("unused")


HOSTILE_FIELDS = [
    {"mlp_ratio": "3.0"},
    {"mlp_ratio": float("nan")},
    {"mlp_ratio": [3]},
    {"embed_dim": 2**40},
    {"embed_dim": 64.0},
    {"embed_dim": -64},
    {"embed_dim": 1},
    {"embed_dim": True},
    {"embed_dim": 2**16, "depths": [1000] * 4, "dilations": [[1] * 1000] * 4},
    {"depths": "3465"},
    {"depths": 3},
    {"depths": [3, 4, 6, 10**9]},
    {"num_heads": [2, 4, 8, "16"]},
    {"num_heads": None},
    {"dilations": [1, 2, 3, 4]},
    {"dilations": "1234"},
    {"kernel_size": 7.0},
    {"kernel_size": [7]},
    {"kernel_size": 10**9 + 1},
    {"qkv_bias": "yes"},
    {"hidden_dropout_prob": -0.1},
    {"drop_path_rate": float("inf")},
    {"layer_norm_eps": "1e-5"},
    {"layer_norm_eps": -1.0},
    {"initializer_range": None},
    {"layer_scale_init_value": []},
    {"num_labels": 10**9},
    {"num_labels": -1},
    {"num_labels": "10"},
    {"id2label": ["a", "b"]},
    {"id2label": {"a": "b"}},
    {"id2label": {0: 1}},
    {"id2label": "ab"},
    {"label2id": ["a"]},
    {"hidden_act": 3},
    {"problem_type": "multi"},
    {"num_channels": 0},
    {"out_features": "stage1"},
    {"out_indices": ["1"]},
    {"channels_of": 1},
    {"from_dict": {}},
    {"__class__": 1},
]


@pytest.mark.parametrize("fields", HOSTILE_FIELDS, ids=lambda fields: ",".join(fields))
def test_hostile_config_json_is_one_line(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        DinatConfig.from_dict(fields)
    message = str(caught.value)
    assert len(message) < 400
    assert "\n" not in message


def test_numbers_of_numpy_and_published_extras_are_accepted() -> None:
    config = DinatConfig.from_dict(
        {
            "embed_dim": np.int64(32),
            "mlp_ratio": 3,
            "drop_path_rate": np.float32(0.1),
            "architectures": ["DinatForImageClassification"],
            "torch_dtype": "float32",
            "transformers_version": "4.22.0",
            "hidden_size": 512,
            "output_attentions": None,
        }
    )
    assert config.hidden_size == 256
    assert config.architectures == ["DinatForImageClassification"]  # type: ignore[attr-defined]
