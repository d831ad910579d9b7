"""Encoding of arrays and the estimated size of responses."""

import json

import numpy as np
import orjson
import pytest

from dinat.app.api.response_size import BYTES_PER_VALUE, feature_values
from dinat.app.api.results import CHUNK_VALUES, json_array
from dinat.app.engine.runtimes.runtime import LoadedModel
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from tests.app.conftest import Service


@pytest.mark.parametrize(
    "shape", [(0,), (3,), (2, 0), (2, 3, 4), (CHUNK_VALUES * 2 + 1,), (3, CHUNK_VALUES), (2, 2, CHUNK_VALUES + 1)]
)
def test_array_is_encoded_as_nested_lists(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    decoded = orjson.loads(orjson.dumps({"data": json_array(values)}))["data"]
    np.testing.assert_array_equal(np.array(decoded, np.float32).reshape(shape), values)
    integers = (values * 1000).astype(np.int64)
    assert json.loads(orjson.dumps(json_array(integers))) == integers.tolist()


def test_transposed_array_is_encoded_in_its_order() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert orjson.loads(orjson.dumps(json_array(values))) == values.tolist()


def test_a_value_has_at_most_18_bytes_in_json() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    for values in (bits, np.nan_to_num(bits), np.array([np.finfo(np.float32).min, np.finfo(np.float32).tiny], np.float32)):
        encoded = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)
        assert len(max(encoded.split(b","), key=len)) < BYTES_PER_VALUE["json"]


@pytest.mark.parametrize("size", [(64, 64), (61, 33), (224, 224), (5, 250)])
def test_feature_sizes_match_the_network(size: tuple[int, int]) -> None:
    config = DinatConfig(embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], dilations=[[1], [1], [1]], kernel_size=3)
    processor = DinatImageProcessor(size={"height": size[0], "width": size[1]})
    pixels = processor(np.zeros((70, 70, 3), np.uint8))
    _, features = DinatForImageClassification(config).eval().classify(pixels, config.feature_names)
    states = features.pop("hidden_states")
    actual = {name: value.numel() for name, value in features.items()}
    actual["hidden_states"] = sum(state.numel() for state in states)
    actual |= {f"hidden_states.{i}": state.numel() for i, state in enumerate(states)}
    assert feature_values(LoadedModel(config, processor, "torch", "cpu", "fp32", {})) == actual


def test_feature_sizes_are_unknown_if_they_depend_on_the_image(service: Service) -> None:
    loaded = service.engine.loaded
    processor = DinatImageProcessor(do_resize=False)
    assert feature_values(LoadedModel(loaded.config, processor, "torch", "cpu", "fp32", {})) is None
