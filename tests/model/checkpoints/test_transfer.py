from pathlib import Path

import pytest
import torch

from dinat.model import ConfigError, DinatConfig, DinatForImageClassification
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.checkpoints.transfer import HEAD, transfer
from tests.model.checkpoints.originals import random_network


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = DinatConfig(
        embed_dim=16,
        depths=[2, 2],
        num_heads=[1, 2],
        kernel_size=3,
        dilations=[[1, 5], [2, 1]],
        id2label=dict(enumerate(["ant", "bee", "cat"])),
        image_size=64,
    )
    random_network(config).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_equal_labels_change_nothing(source: Path) -> None:
    same = transfer(open_checkpoint(source), ["ant", "bee", "cat"])
    assert same.changes == []
    before = open_checkpoint(source).state_dict()
    assert same.state_dict.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in same.state_dict.items())


def test_existing_labels_reuse_their_rows_of_the_head(source: Path) -> None:
    torch.manual_seed(0)
    other = transfer(open_checkpoint(source), ["cat", "dog", "ant"])
    before = open_checkpoint(source).state_dict()
    for key in HEAD:
        assert torch.equal(other.state_dict[key][[0, 2]], before[key][[2, 0]])
    assert 0 < other.state_dict[HEAD[0]][1].std() < 3 * open_checkpoint(source).config.initializer_range
    assert other.config.id2label == {0: "cat", 1: "dog", 2: "ant"}
    assert other.config.label2id == {"cat": 0, "dog": 1, "ant": 2}
    assert other.changes == ["a head for 3 classes: 2 from the checkpoint, the others newly initialized"]
    network = DinatForImageClassification(other.config)
    network.load_state_dict(other.state_dict)


def test_interpolated_positional_biases_preserve_a_plane(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    weights = checkpoint.state_dict()
    rpb = "dinat.encoder.levels.0.layers.0.attention.self.rpb"
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    weights[rpb] = (2 * y - 3 * x + 1)[None]
    network = DinatForImageClassification(checkpoint.config)
    network.load_state_dict(weights)
    network.save_pretrained(source)
    wider = transfer(open_checkpoint(source), ["ant", "bee", "cat"], kernel_size=5)
    assert wider.config.kernel_size == 5
    interpolated = wider.state_dict[rpb]
    assert interpolated.shape == (1, 9, 9)
    y, x = torch.meshgrid(torch.arange(9.0) / 2, torch.arange(9.0) / 2, indexing="ij")
    inner = slice(2, -2)  # bicubic interpolation repeats the edge values and is not linear there
    torch.testing.assert_close(interpolated[0, inner, inner], (2 * y - 3 * x + 1)[inner, inner])
    for corner in (0, -1):
        torch.testing.assert_close(interpolated[0, corner, corner], weights[rpb][0, corner, corner])
    DinatForImageClassification(wider.config).load_state_dict(wider.state_dict)
    assert any("interpolated" in change for change in wider.changes)


@pytest.mark.parametrize(
    ("size", "kernel_size", "dilations"),
    [
        (384, None, [[1, 13, 1], [1, 6, 1, 6], [1, 3, 1, 3, 1, 3], [1, 1, 1, 1, 1]]),
        (384, 11, [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]),
        (112, None, [[1, 4, 1], [1, 2, 1, 2], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
    ],
)
def test_largest_possible_dilations_stay_the_largest_possible(
    size: int, kernel_size: int | None, dilations: list[list[int]], tmp_path: Path
) -> None:
    mini = DinatConfig(
        embed_dim=16,
        depths=[3, 4, 6, 5],
        num_heads=[1, 1, 1, 1],
        dilations=[[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]],
        num_labels=2,
    )
    DinatForImageClassification(mini).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    result = transfer(checkpoint, ["LABEL_0", "LABEL_1"], size=size, kernel_size=kernel_size)
    assert result.config.dilations == dilations
    assert result.config.image_size == size


def test_dilations_are_limited_by_the_new_feature_maps(source: Path) -> None:
    larger = transfer(open_checkpoint(source), ["ant", "bee", "cat"], size=128)
    assert larger.config.dilations == [[1, 10], [5, 1]]  # both were the largest possible: 16 // 3 and 8 // 3
    half = transfer(open_checkpoint(source), ["ant", "bee", "cat"], size=32)
    assert half.config.dilations == [[1, 2], [1, 1]]


def test_multi_label_checkpoint_raises_config_error(source: Path) -> None:
    network = DinatForImageClassification.from_pretrained(source)
    network.config.problem_type = "multi_label_classification"
    network.save_pretrained(source)
    with pytest.raises(ConfigError, match="only single-label classifiers are supported"):
        transfer(open_checkpoint(source), ["ant"])
