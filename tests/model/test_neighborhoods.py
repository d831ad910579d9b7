import pytest
import torch

from dinat.model import DinatConfig, DinatForImageClassification
from dinat.model.attention.geometry import neighbors
from dinat.model.neighborhoods import neighborhoods


def network(**changes: object) -> DinatForImageClassification:
    torch.manual_seed(0)
    settings = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "kernel_size": 3, "dilations": [[1, 4], [1, 2]]}
    config = DinatConfig(**settings | changes)  # type: ignore[arg-type]
    made = DinatForImageClassification(config).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize(("y", "x"), [(0.0, 0.0), (0.5, 0.3), (1.0, 1.0), (0.99, 0.01)])
@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
def test_the_last_layer_of_each_stage_has_the_weights_that_the_network_gives(y: float, x: float, size: tuple[int, int]) -> None:
    made, pixels = network(), torch.randn(1, 3, *size)
    attentions = made(pixels, output_attentions=True).attentions
    seen = neighborhoods(made, pixels, y, x)
    assert [(one.stage, one.layer, one.dilation) for one in seen] == [(1, 1, 1), (1, 2, 4), (2, 1, 1), (2, 2, 2)]
    for one, weights in zip([seen[1], seen[3]], attentions, strict=True):
        row, column = one.query
        torch.testing.assert_close(one.weights.flatten(1), weights[0, :, row, column], rtol=0, atol=1e-6)
        padded = weights.shape[2:4]
        assert one.rows == neighbors(padded[0], 3, one.dilation)[0][row].tolist()
        assert one.columns == neighbors(padded[1], 3, one.dilation)[0][column].tolist()
    assert seen[0].size == (size[0] // 4, size[1] // 4)
    for one in seen:
        torch.testing.assert_close(one.weights.sum((1, 2)), torch.ones(one.weights.shape[0]))


def test_a_map_smaller_than_its_window_sees_padding() -> None:
    seen = neighborhoods(network(), torch.randn(1, 3, 32, 32), 0.9, 0.9)
    wide = seen[1]
    assert (wide.size, wide.dilation) == ((8, 8), 4)
    assert max(wide.rows) >= 8


def test_the_network_is_left_as_it_was() -> None:
    made, pixels = network(), torch.randn(1, 3, 64, 64)
    before = made(pixels).logits
    neighborhoods(made, pixels, 0.5, 0.5)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in made.modules())
    torch.testing.assert_close(made(pixels).logits, before)


def test_without_a_bias_in_the_products() -> None:
    assert len(neighborhoods(network(qkv_bias=False), torch.randn(1, 3, 64, 64), 0.2, 0.7)) == 4
