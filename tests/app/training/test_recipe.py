"""Hyperparameters of `dinat train`: defaults by the data, frozen layers, learning rates by depth, weights of classes."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dinat.app.cli import main
from dinat.app.training.defaults import resolve
from dinat.app.training.layers import depth_of_parameters, freeze
from dinat.app.training.recipe import Recipe
from dinat.model import ConfigError, DinatConfig, DinatForImageClassification, hf
from tests.app.training.test_train import SMALL, data, train

pytestmark = pytest.mark.train

__all__ = ["data"]

FAST = ("--size", 32, "--epochs", 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINAT_CACHE_DIR", str(tmp_path / "cache"))


def network() -> hf.DinatForImageClassification:
    config = DinatForImageClassification.from_pretrained("digits").config
    return hf.DinatForImageClassification(hf.DinatConfig(**config.to_dict()))


def defaults(num_images: int, initial: DinatConfig, classes: list[str], **recipe: object) -> tuple[int | None, float | None]:
    resolved = resolve(Recipe(**recipe), initial, classes, num_images, 1)
    return resolved.epochs, resolved.learning_rate


def test_defaults_depend_on_the_data_and_on_what_the_checkpoint_contributes() -> None:
    digits = DinatForImageClassification.from_pretrained("digits").config
    mini = DinatConfig.preset("mini")
    flowers, few = ["rose", "tulip"], ["0", "1"]
    assert defaults(320, mini, flowers) == (30, 1e-4)  # 300 steps of 32 images
    assert defaults(320, digits, few) == (30, 1e-4)
    assert defaults(320, digits, flowers) == (100, 3e-3)  # features of digits do not fit: 1,000 steps
    assert defaults(320, mini, flowers, weights="random") == (100, pytest.approx(3e-3 * 128 / 512))
    assert defaults(320, digits, few, weights="random") == (100, 3e-3)
    assert defaults(100_000, mini, flowers) == (10, 1e-4)
    assert defaults(20, mini, flowers, weights="random")[0] == 200
    assert defaults(320, mini, flowers, epochs=3, learning_rate=0.5, batch_size=8) == (3, 0.5)
    assert defaults(320, mini, flowers, batch_size=8)[0] == 10
    assert resolve(Recipe(batch_size=8), mini, flowers, 320, 4).epochs == 30


def test_frozen_layers() -> None:
    def trained(part: str) -> set[str]:
        model = network()
        freeze(model, part)
        return {name for name, value in model.named_parameters() if value.requires_grad}

    everything = trained("none")
    assert trained("backbone") == {"classifier.weight", "classifier.bias"}
    assert {name for name in everything - trained("stem")} == {name for name in everything if ".embeddings." in name}
    frozen = everything - trained("stage2")
    assert "dinat.encoder.levels.1.layers.1.output.dense.weight" in frozen
    assert "dinat.encoder.levels.0.downsample.reduction.weight" in frozen
    assert "dinat.encoder.levels.1.downsample.reduction.weight" not in frozen
    assert not any("levels.2" in name for name in frozen)
    with pytest.raises(ConfigError, match="'stage9' is not a part of the network: use none, backbone, stem, stage1"):
        freeze(network(), "stage9")


def test_frozen_weights_do_not_change(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "out", *FAST, "--freeze", "backbone", "--learning-rate", 0.1, "--weight-decay", 1)
    before = DinatForImageClassification.from_pretrained("digits").state_dict()
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in after.items() if not name.startswith("classifier"))
    assert not torch.allclose(before["classifier.weight"][:6], after["classifier.weight"])


def test_depth_of_parameters() -> None:
    depths = depth_of_parameters(network())
    assert depths["classifier.weight"] == depths["dinat.layernorm.weight"] == 0
    assert [depths[f"dinat.encoder.levels.{i}.layers.{j}.attention.self.rpb"] for i in range(3) for j in range(2)] == [
        *range(6, 0, -1)
    ]
    assert depths["dinat.encoder.levels.0.downsample.norm.weight"] == 5
    assert depths["dinat.embeddings.norm.weight"] == 7


@pytest.mark.slow
def test_layer_decay_scales_the_steps_of_deep_layers(data: Path, tmp_path: Path) -> None:
    """The first step of Adam has the size of the learning rate, which the factor 0.1 per layer makes negligible."""
    train(data, tmp_path / "out", *FAST, "--layer-decay", 0.1, "--learning-rate", 0.01, "--warmup", 0, "--weight-decay", 0)
    before = DinatForImageClassification.from_pretrained("digits").state_dict()
    after = load_file(tmp_path / "out" / "model.safetensors")

    def step(name: str) -> float:
        return float((after[name] - before[name]).abs().max())

    assert step("dinat.layernorm.weight") > 5e-3
    assert 1e-7 < step("dinat.encoder.levels.2.layers.1.output.dense.weight") < 3e-3
    assert step("dinat.embeddings.norm.weight") < 1e-6


def test_class_weights_are_those_of_the_loss(data: Path, tmp_path: Path) -> None:
    from dinat.app.training.trainer import DinatTrainer

    logits, labels, weights = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2]), [0.5, 1.0, 2.0]
    trainer = object.__new__(DinatTrainer)
    trainer.recipe = Recipe(label_smoothing=0)
    trainer.class_weights = torch.tensor(weights)

    class Model(torch.nn.Module):
        num_labels = 3

        def forward(self, pixel_values: torch.Tensor) -> object:
            return type("Output", (), {"logits": logits})

    class Accelerator:
        @staticmethod
        def unwrap_model(model: torch.nn.Module) -> torch.nn.Module:
            return model

    trainer.accelerator = Accelerator()
    loss = trainer.compute_loss(Model(), {"pixel_values": torch.zeros(6, 3, 4, 4), "labels": labels})
    each = F.cross_entropy(logits, labels, reduction="none")
    assert loss == pytest.approx(float((each * torch.tensor(weights)[labels]).mean()), rel=1e-5)


@pytest.mark.slow
def test_imbalance_and_underfitting_are_reported(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        shutil.copy(data / "0" / "0-1.png", data / "0" / f"0-{number + 3}.png")
    train(data, tmp_path / "out", *FAST, "--weights", "random", "--learning-rate", 1e-6)
    log = capsys.readouterr().err
    assert "the classes are imbalanced: 16 images of 0, 1 of" in log
    [underfits] = [line for line in log.splitlines() if "the network underfits: it classifies only" in line]
    assert "more --epochs (2), a higher --learning-rate (3e-06) or --augment none" in underfits


@pytest.mark.slow
def test_fitted_network_is_not_reported(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(data, tmp_path / "out", "--epochs", 1, "--report-to", "tensorboard")
    assert "underfits" not in capsys.readouterr().err
    assert list((tmp_path / "out" / "checkpoints").rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_more_epochs_continue_a_finished_training(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--size", 32, "--keep", "last")
    train(data, tmp_path / "out", *flags, "--epochs", 2)
    first = load_file(tmp_path / "out" / "model.safetensors")
    capsys.readouterr()
    train(data, tmp_path / "out", *flags, "--epochs", 3)
    log = capsys.readouterr().err
    assert "resuming after epoch 2" in log
    assert log.count("dinat: epoch ") == 1
    assert "dinat: epoch 3 of 3" in log
    last = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(first[name], last[name]) for name in first)
    state = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (state["recipe"]["epochs"], state["finished"]) == (3, True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False).returncode:
        pytest.skip("requires the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("free", range(8))
def test_full_disk_is_one_line_and_the_training_resumes(
    free: int, data: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full at the first file, or while the weights or a checkpoint are written."""
    flags = ["--size", 32, "--epochs", 2, "--keep", "last"]
    filler = small_disk / "filler"
    filler.write_bytes(bytes((8 - free) * 2**20))
    arguments = ["train", str(data), str(small_disk / "out"), *SMALL, *map(str, flags)]
    assert main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"dinat: the disk of {small_disk / 'out'} is full: free space, then run the same command again to resume"
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert main(arguments) == 0
    train(data, tmp_path / "whole", *flags)
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", small_disk / "out"))
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) <= 1e-6
