import pytest
import torch

from dinat.model import DinatConfig, DinatForImageClassification
from dinat.model.attention.geometry import neighbors
from dinat.model.neighborhoods import neighborhoods


def network(**changes: object) -> DinatForImageClassification:
    torch.manual_seed(0)
    fields = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "kernel_size": 3, "dilations": [[1, 4], [1, 2]]}
    config = DinatConfig(**fields | changes)  # type: ignore[arg-type]
    classifier = DinatForImageClassification(config).eval()
    for name, parameter in classifier.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    return classifier


@pytest.mark.parametrize(("y", "x"), [(0.0, 0.0), (0.5, 0.3), (1.0, 1.0), (0.99, 0.01)])
@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
def test_weights_match_those_of_each_stages_last_layer(y: float, x: float, size: tuple[int, int]) -> None:
    classifier, pixels = network(), torch.randn(1, 3, *size)
    attentions = classifier(pixels, output_attentions=True).attentions
    layers = neighborhoods(classifier, pixels, y, x)
    assert [(layer.stage, layer.layer, layer.dilation) for layer in layers] == [(1, 1, 1), (1, 2, 4), (2, 1, 1), (2, 2, 2)]
    for layer, weights in zip([layers[1], layers[3]], attentions, strict=True):
        row, column = layer.query
        torch.testing.assert_close(layer.weights.flatten(1), weights[0, :, row, column], rtol=0, atol=1e-6)
        padded = weights.shape[2:4]
        assert layer.rows == neighbors(padded[0], 3, layer.dilation)[0][row].tolist()
        assert layer.columns == neighbors(padded[1], 3, layer.dilation)[0][column].tolist()
    assert layers[0].size == (size[0] // 4, size[1] // 4)
    for layer in layers:
        torch.testing.assert_close(layer.weights.sum((1, 2)), torch.ones(layer.weights.shape[0]))


def test_neighborhood_of_a_small_feature_map_includes_padding() -> None:
    layers = neighborhoods(network(), torch.randn(1, 3, 32, 32), 0.9, 0.9)
    dilated = layers[1]
    assert (dilated.size, dilated.dilation) == ((8, 8), 4)
    assert max(dilated.rows) >= 8


def test_network_is_not_modified() -> None:
    classifier, pixels = network(), torch.randn(1, 3, 64, 64)
    before = classifier(pixels).logits
    neighborhoods(classifier, pixels, 0.5, 0.5)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in classifier.modules())
    torch.testing.assert_close(classifier(pixels).logits, before)


def test_network_without_qkv_bias() -> None:
    assert len(neighborhoods(network(qkv_bias=False), torch.randn(1, 3, 64, 64), 0.2, 0.7)) == 4
