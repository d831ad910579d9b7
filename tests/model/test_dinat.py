import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dinat.model import ConfigError, DinatBackbone, DinatConfig, DinatError, DinatForImageClassification, DinatModel
from dinat.model.dinat import DropPath


def small(**changes: Any) -> DinatConfig:
    """The configuration of transformers' tests."""
    fields: dict[str, Any] = {
        "embed_dim": 16,
        "depths": [1, 2, 1],
        "num_heads": [2, 4, 8],
        "kernel_size": 3,
        "dilations": [[3], [1, 2], [1]],
        "mlp_ratio": 2.0,
        "num_labels": 10,
    }
    return DinatConfig(**(fields | changes))


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(13, 3, 64, 64)


def test_output_shapes(pixels: torch.Tensor) -> None:
    output = DinatModel(small())(pixels, output_hidden_states=True, output_attentions=True)
    assert output.last_hidden_state.shape == (13, 4, 4, 64)
    assert output.pooler_output.shape == (13, 64)
    assert [tuple(state.shape[1:]) for state in output.hidden_states] == [(16, 16, 16), (8, 8, 32), (4, 4, 64), (4, 4, 64)]
    assert [tuple(state.shape[1:]) for state in output.reshaped_hidden_states] == [
        (16, 16, 16),
        (32, 8, 8),
        (64, 4, 4),
        (64, 4, 4),
    ]
    assert [tuple(weights.shape[1:]) for weights in output.attentions] == [(2, 16, 16, 9), (4, 8, 8, 9), (8, 4, 4, 9)]


def test_outputs_not_requested_are_none_and_not_in_the_tuple(pixels: torch.Tensor) -> None:
    network = DinatForImageClassification(small()).eval()
    output = network(pixels)
    assert output.hidden_states is None
    assert output.attentions is None
    (logits,) = network(pixels, return_dict=False)
    assert torch.equal(logits, output["logits"])
    assert torch.equal(logits, output[0])
    assert len(network(pixels, labels=torch.zeros(13, dtype=torch.long), output_hidden_states=True, return_dict=False)) == 3
    assert DinatModel(small(), add_pooling_layer=False)(pixels).pooler_output is None


def test_configuration_sets_the_default_outputs(pixels: torch.Tensor) -> None:
    output = DinatModel(small(output_hidden_states=True, output_attentions=True))(pixels)
    assert len(output.hidden_states) == 4
    assert len(output.attentions) == 3
    assert isinstance(DinatModel(small(return_dict=False))(pixels), tuple)


def test_output_attentions_does_not_change_the_logits(pixels: torch.Tensor) -> None:
    network = DinatForImageClassification(small()).eval()
    torch.testing.assert_close(network(pixels, output_attentions=True).logits, network(pixels).logits)


def test_one_channel(pixels: torch.Tensor) -> None:
    assert DinatForImageClassification(small(num_channels=1))(pixels[:, :1]).logits.shape == (13, 10)


@pytest.mark.parametrize("size", [(1, 1), (33, 17), (5, 200), (97, 64)])
def test_any_image_size_is_supported(size: tuple[int, int]) -> None:
    backbone = DinatBackbone(small(out_features=["stem", "stage3"])).eval()
    stem, last = backbone(torch.randn(2, 3, *size)).feature_maps
    assert stem.shape == (2, 16, *[math.ceil(side / 4) for side in size])
    assert last.shape == (2, 64, *[math.ceil(side / 16) for side in size])


def test_backbone_feature_maps_and_channels(pixels: torch.Tensor) -> None:
    backbone = DinatBackbone(small(out_features=["stage1", "stage2"], out_indices=[1, 2]))
    output = backbone(pixels)
    assert [tuple(feature_map.shape) for feature_map in output.feature_maps] == [(13, 16, 16, 16), (13, 32, 8, 8)]
    assert backbone.channels == [16, 32]
    assert backbone.num_features == [16, 16, 32, 64]
    assert output.hidden_states is None
    assert [tuple(m.shape) for m in DinatBackbone(small())(pixels).feature_maps] == [(13, 64, 4, 4)]
    maps, states = backbone(pixels, output_hidden_states=True, return_dict=False)
    assert (len(maps), len(states)) == (2, 4)


def test_zero_initializer_range_gives_only_zeros_and_ones() -> None:
    network = DinatForImageClassification(small(initializer_range=0.0))
    assert {p.mean().item() for p in network.parameters()} == {0.0, 1.0}


def test_initial_weights_have_the_configured_deviation() -> None:
    network = DinatForImageClassification(small(initializer_range=0.5))
    assert network.dinat.encoder.levels[2].layers[0].intermediate.dense.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert not network.dinat.encoder.levels[0].layers[0].attention.self.rpb.any()


def test_layer_scale_has_its_initial_value() -> None:
    network = DinatModel(small(layer_scale_init_value=0.25))
    assert (network.encoder.levels[0].layers[0].layer_scale_parameters == 0.25).all()
    assert network.encoder.levels[0].layers[0].layer_scale_parameters.shape == (2, 16)


def test_drop_path_rate_increases_and_applies_in_training_only(pixels: torch.Tensor) -> None:
    network = DinatModel(small(drop_path_rate=0.6))
    rates = [getattr(layer.drop_path, "probability", 0.0) for level in network.encoder.levels for layer in level.layers]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert not torch.equal(network(pixels).pooler_output, network(pixels).pooler_output)
    network.eval()
    assert torch.equal(network(pixels).pooler_output, network(pixels).pooler_output)


def test_drop_path_rate_of_one_drops_every_image() -> None:
    x = torch.randn(4, 3, 3, 8)
    assert torch.equal(DropPath(1.0)(x), torch.zeros_like(x))


@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_applies_in_training_only(pixels: torch.Tensor, dropout: str) -> None:
    network = DinatModel(small(drop_path_rate=0.0, **{dropout: 0.5}))
    assert not torch.equal(network(pixels).pooler_output, network(pixels).pooler_output)
    network.eval()
    assert torch.equal(network(pixels).pooler_output, network(pixels).pooler_output)


def test_every_parameter_gets_a_gradient(pixels: torch.Tensor) -> None:
    network = DinatForImageClassification(small(layer_scale_init_value=0.1))
    network(pixels, labels=torch.arange(13) % 10).loss.backward()
    without_gradient = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7}
    # Softmax is invariant to a shift of all scores, which is the effect of the key's bias.
    assert without_gradient <= {name for name in without_gradient if name.endswith("key.bias")}


def test_hidden_act_by_name_or_function(pixels: torch.Tensor) -> None:
    torch.manual_seed(0)
    by_name = DinatModel(small(hidden_act="relu")).eval()
    by_function = DinatModel(small(hidden_act=F.relu)).eval()
    by_function.load_state_dict(by_name.state_dict())
    assert torch.equal(by_name(pixels).pooler_output, by_function(pixels).pooler_output)


def test_no_labels_returns_pooled_features(pixels: torch.Tensor) -> None:
    network = DinatForImageClassification(small(num_labels=0)).eval()
    assert torch.equal(network(pixels).logits, network.dinat(pixels).pooler_output)


def test_input_embeddings() -> None:
    network = DinatForImageClassification(small())
    assert network.get_input_embeddings() is network.dinat.embeddings.patch_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 8}, "Dinat only supports patch size of 4 at the moment"),
        ({"num_heads": [3, 4, 8]}, r"The hidden size \(16\) is not a multiple of the number of attention heads \(3\)"),
        ({"hidden_act": "geglu"}, "hidden_act 'geglu' is not known: use one of gelu"),
    ],
)
def test_invalid_networks_raise_config_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DinatModel(small(**changes))


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.uint8, "must be floating-point numbers, got torch.uint8: use DinatImageProcessor"),
        (torch.int64, "must be floating-point numbers, got torch.int64"),
        (torch.float16, "pixel_values are torch.float16, the network is torch.float32: convert one of them"),
        (torch.float64, "pixel_values are torch.float64, the network is torch.float32"),
    ],
)
def test_pixel_values_of_another_dtype_raise_an_error(dtype: torch.dtype, message: str) -> None:
    with pytest.raises(DinatError, match=message):
        DinatModel(small()).eval()(torch.zeros(1, 3, 32, 32).to(dtype))


def test_autocast_accepts_pixel_values_of_another_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert DinatModel(small()).eval()(torch.zeros(1, 3, 32, 32).bfloat16()).last_hidden_state.isfinite().all()


def test_invalid_calls_raise_an_error() -> None:
    network = DinatForImageClassification(small())
    with pytest.raises(DinatError, match="You have to specify pixel_values"):
        network(None)
    with pytest.raises(DinatError, match="Make sure that the channel dimension"):
        network(torch.zeros(1, 4, 64, 64))
    with pytest.raises(DinatError, match=r"got \(3, 64, 64\)"):
        network(torch.zeros(3, 64, 64))
    with pytest.raises(DinatError, match="'fast' is not known"):
        DinatModel(small(), attention="fast")
    network.config.problem_type = "ranking"
    with pytest.raises(ConfigError, match="problem_type 'ranking'"):
        network(torch.zeros(1, 3, 64, 64), labels=torch.zeros(1))
