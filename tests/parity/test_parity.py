"""The network, its losses and its image processor against transformers 4.53.3 (golden.npz, created by make_golden.py)."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dinat.model import DinatBackbone, DinatConfig, DinatForImageClassification, DinatImageProcessor
from tests.parity.cases import (
    IMAGE_SIZES,
    INPUTS,
    NETWORKS,
    PROCESSORS,
    STAGES,
    config_fields,
    fingerprint,
    loss_cases,
    pixel_values,
    synthetic_image,
    weight,
)

GOLDEN = np.load(Path(__file__).with_name("golden.npz"))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Relative to the largest value of a tensor, or to 1 if it is smaller."""


def with_weights(network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    network = network.to(dtype).eval()
    state = network.state_dict()
    network.load_state_dict({name: torch.from_numpy(weight(name, tuple(value.shape))) for name, value in state.items()})
    return network


def outputs(network: str, size: tuple[int, int], dtype: torch.dtype, attention: str) -> Iterator[tuple[str, Tensor]]:
    pixels = torch.from_numpy(pixel_values(*size)).to(dtype)
    classifier = with_weights(DinatForImageClassification(DinatConfig(**config_fields(network)), attention), dtype)
    output = classifier(pixels, output_hidden_states=True)
    yield "logits", output.logits
    for i, (state, reshaped) in enumerate(zip(output.hidden_states, output.reshaped_hidden_states, strict=True)):
        yield f"hidden_states/{i}", state
        yield f"reshaped_hidden_states/{i}", reshaped
    for i, weights in enumerate(classifier(pixels, output_attentions=True).attentions):
        yield f"attentions/{i}", weights
    backbone = with_weights(DinatBackbone(DinatConfig(**config_fields(network), out_features=STAGES), attention), dtype)
    maps = backbone(pixels, output_hidden_states=True)
    for stage, feature_map, state in zip(STAGES, maps.feature_maps, maps.hidden_states, strict=True):
        yield f"feature_maps/{stage}", feature_map
        yield f"backbone_hidden_states/{stage}", state


@pytest.mark.parametrize("attention", ["tiled", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("size", INPUTS, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("network", NETWORKS)
def test_outputs_match_transformers(
    network: str, size: tuple[int, int], dtype: torch.dtype, attention: str, record_property
) -> None:
    largest = 0.0
    with torch.no_grad():
        for name, value in outputs(network, size, dtype, attention):
            key = f"{network}/{size[0]}x{size[1]}/{name}"
            assert value.shape == tuple(GOLDEN[f"{key}/shape"]), key
            difference = np.abs(fingerprint(value.numpy()) - GOLDEN[key]).max()
            largest = max(largest, difference / max(1.0, np.abs(GOLDEN[key]).max()))
    record_property("largest difference", float(largest))
    assert largest <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", loss_cases())
def test_losses_match_transformers(name: str) -> None:
    changes, labels = loss_cases()[name]
    network = with_weights(DinatForImageClassification(DinatConfig(**(config_fields("k7-8421") | changes))), torch.float64)

    loss = network(torch.from_numpy(pixel_values(64, 96)), labels=torch.from_numpy(labels)).loss

    assert loss.item() == pytest.approx(GOLDEN[f"loss/{name}"].item(), abs=1e-9)
    assert network.config.problem_type == GOLDEN[f"problem_type/{name}"].item()


@pytest.mark.parametrize("size", IMAGE_SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", PROCESSORS)
def test_image_processor_matches_transformers(name: str, size: tuple[int, int]) -> None:
    key = f"processor/{name}/{size[0]}x{size[1]}"

    exact = DinatImageProcessor(**(PROCESSORS[name] | {"do_normalize": False}))(synthetic_image(*size))
    normalized = DinatImageProcessor(**PROCESSORS[name])(synthetic_image(*size))

    assert hashlib.sha256(exact[0].numpy().tobytes()).hexdigest() == GOLDEN[f"{key}/sha256"].item()
    assert np.abs(fingerprint(normalized.numpy()) - GOLDEN[f"{key}/pixel_values"]).max() <= 1e-6
