"""Sharded weights, and weights that are no floating-point numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinat.model import CheckpointError, ConfigError, DinatForImageClassification
from tests.model.checkpoints.originals import random_network
from tests.model.checkpoints.test_checkpoint import PIXELS, small


@pytest.fixture
def network() -> DinatForImageClassification:
    return random_network(small())


@pytest.fixture
def folder(tmp_path: Path, network: DinatForImageClassification) -> Path:
    network.save_pretrained(tmp_path)
    return tmp_path


def shard(folder: Path, suffix: str) -> None:
    """Divide the weights into files of at most 2 kB, as huggingface_hub and transformers do."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if suffix == ".safetensors":
        save_torch_state_dict(weights, folder, max_shard_size=2000)
    else:
        save_torch_state_dict(weights, folder, max_shard_size=2000, safe_serialization=False)
    assert len(list(folder.glob(f"*-of-*{suffix}"))) > 2


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_weights(suffix: str, network: DinatForImageClassification, folder: Path) -> None:
    shard(folder, suffix)
    assert torch.equal(DinatForImageClassification.from_pretrained(folder)(PIXELS).logits, network(PIXELS).logits)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_keys_of_a_wrapped_network(prefix: str, name: str, network: DinatForImageClassification, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    weights = {prefix + key: value.contiguous() for key, value in network.state_dict().items()}
    (save_file if name.endswith(".safetensors") else torch.save)(weights, folder / name)
    assert torch.equal(DinatForImageClassification.from_pretrained(folder)(PIXELS).logits, network(PIXELS).logits)


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["state_dict", "state_dict_ema"]])
def test_training_checkpoint_in_the_layout_of_the_hub(
    keys: list[str], network: DinatForImageClassification, folder: Path
) -> None:
    (folder / "model.safetensors").unlink()
    other = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
    content = {key: other for key in keys} | {keys[-1]: network.state_dict()}
    torch.save(content | {"epoch": 3}, folder / "pytorch_model.bin")
    assert torch.equal(DinatForImageClassification.from_pretrained(folder)(PIXELS).logits, network(PIXELS).logits)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_floating_dtype(dtype: torch.dtype, network: DinatForImageClassification, folder: Path) -> None:
    weights = {key: value.to(dtype) for key, value in network.state_dict().items()}
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    network.load_state_dict({key: value.float() for key, value in weights.items()})
    assert torch.equal(DinatForImageClassification.from_pretrained(folder)(PIXELS).logits, network(PIXELS).logits)


def test_weights_are_saved_in_shards(network: DinatForImageClassification, folder: Path) -> None:
    def files() -> set[str]:
        return {path.name for path in folder.iterdir()} - {"config.json"}

    network.save_pretrained(folder, max_shard_size=2000)
    shards = files() - {"model.safetensors.index.json"}
    assert len(shards) > 2 and "model.safetensors" not in shards
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(network.state_dict()) and set(index["weight_map"].values()) == shards
    loaded = DinatForImageClassification.from_pretrained(folder)
    assert torch.equal(loaded(PIXELS).logits, network(PIXELS).logits)

    loaded.save_pretrained(folder, max_shard_size="4KB")
    assert 1 < len(files()) < len(shards)
    assert torch.equal(DinatForImageClassification.from_pretrained(folder)(PIXELS).logits, network(PIXELS).logits)

    loaded.save_pretrained(folder)
    assert files() == {"model.safetensors"}
    assert torch.equal(DinatForImageClassification.from_pretrained(folder)(PIXELS).logits, network(PIXELS).logits)


def test_another_number_of_labels_is_a_new_head(network: DinatForImageClassification, folder: Path) -> None:
    with pytest.warns(UserWarning, match="the classifier for 3 labels is new, not that of"):
        loaded = DinatForImageClassification.from_pretrained(folder, num_labels=3)
    assert loaded(PIXELS).logits.shape == (2, 3)
    assert loaded.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert loaded.classifier.weight.abs().max() > 0
    assert torch.equal(loaded.dinat(PIXELS).pooler_output, network.dinat(PIXELS).pooler_output)
    with pytest.warns(UserWarning, match="the classifier for 2 labels is new"):
        named = DinatForImageClassification.from_pretrained(folder, id2label={0: "cat", 1: "dog"})
    assert named.config.label2id == {"cat": 0, "dog": 1}
    assert DinatForImageClassification.from_pretrained(folder, num_labels=0)(PIXELS).logits.shape == (2, 16)


def test_the_same_number_of_labels_is_the_same_head(network: DinatForImageClassification, folder: Path) -> None:
    loaded = DinatForImageClassification.from_pretrained(folder, num_labels=4)
    assert torch.equal(loaded(PIXELS).logits, network(PIXELS).logits)


def test_missing_shard(folder: Path) -> None:
    shard(folder, ".safetensors")
    (missing, *_) = sorted(folder.glob("*-of-*"))
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"has no {missing.name}, a part of its weights by model.safetensors.index.json"):
        DinatForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../../secret.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "config.json"}},
    ],
)
def test_invalid_index(index: dict[str, Any], folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has no valid weight_map"):
        DinatForImageClassification.from_pretrained(folder)


KEY = "classifier.bias"
HOSTILE: dict[str, Any] = {
    "int64": lambda x: x.long(),
    "sparse": lambda x: x.to_sparse(),
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x > 0,
    "without memory": lambda x: x.to("meta"),
    "without dimensions": lambda x: x.sum(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_weights_that_are_no_numbers(name: str, folder: Path) -> None:
    weights: dict[Any, Tensor] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights[KEY] = HOSTILE[name](weights[KEY])
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        DinatForImageClassification.from_pretrained(folder)
    assert KEY in str(caught.value) or "cannot be read as weights" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_keys_that_are_no_strings(folder: Path) -> None:
    weights: dict[Any, Tensor] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, 1: torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not contain a state dict"):
        DinatForImageClassification.from_pretrained(folder)


def test_weights_that_are_not_finite_are_a_warning(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[KEY][0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=f"1 weights of .* are not finite: {KEY}"):
        DinatForImageClassification.from_pretrained(folder)


def test_nested_brackets_are_one_line(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="is not JSON"):
        DinatForImageClassification.from_pretrained(folder)


def test_dtype_may_be_a_name() -> None:
    network = DinatForImageClassification.from_pretrained("digits", dtype="bfloat16")
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="unknown dtype 'Tensor'"):
        DinatForImageClassification.from_pretrained("digits", dtype="Tensor")
