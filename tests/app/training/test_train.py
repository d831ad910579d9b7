"""`dinat train`, on small folders of digits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from dinat.app.cli import main
from dinat.app.training.augmentation import OPERATIONS, Augmentation, mix, random_box, targets, trivial
from dinat.app.training.recipe import Recipe
from dinat.app.training.task import Task, read_parts
from dinat.app.training.trainer import Progressed
from dinat.model import DinatForImageClassification, DinatImageProcessor
from tests.app.conftest import DIGITS
from tests.app.sample_images import noise

SMALL = ["--from", "digits", "--device", "cpu", "--batch-size", "4", "--flip", "0", "--validation", "0.5"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pictures of each of six digits."""
    for path in sorted(DIGITS.glob("[0-5]-*.png")):
        place = tmp_path / "data" / path.name[0]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return tmp_path / "data"


def trained(data: Path, out: Path, *words: object) -> None:
    assert main(["train", str(data), str(out), *SMALL, *map(str, words)]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["train", *map(str, words)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dinat: ")
    return last.removeprefix("dinat: ")


def test_what_comes_out_is_a_checkpoint_with_a_card_whose_figures_it_has(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained(data, out, "--epochs", 2, "--ema", 0.5)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "curves.png",
        "model.safetensors",
        "preprocessor_config.json",
        "training.json",
    ]
    network, processor = DinatForImageClassification.from_pretrained(out), DinatImageProcessor.from_pretrained(out)
    assert network.config.id2label == {index: str(index) for index in range(6)}
    first = DinatForImageClassification.from_pretrained("digits")
    assert not torch.equal(network.state_dict()["classifier.weight"], first.state_dict()["classifier.weight"][:6])
    card = (out / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| held back of it"))
    _, pictures, top1, _, loss = [cell.strip() for cell in row.strip("|").split("|")]
    recipe = Recipe(**json.loads((out / "training.json").read_text())["recipe"])
    held_back = read_parts(Task("digits", None, data, None, out, recipe, 10**8)).held_back
    labels = torch.tensor([int(one.label) for one in held_back])
    with torch.no_grad():
        logits = network(processor([Image.open(one.path) for one in held_back])).logits
    assert int(pictures) == len(held_back) == 6
    assert float(top1.rstrip("%")) == pytest.approx(float((logits.argmax(1) == labels).float().mean()) * 100, abs=0.01)
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-4)
    with Image.open(out / "curves.png") as picture:
        assert picture.width > 500


def test_batches_whose_gradients_are_added_are_one_batch(data: Path, tmp_path: Path) -> None:
    same = ["--epochs", 1, "--drop-path", 0, "--keep", "last", "--warmup", 0]
    trained(data, tmp_path / "whole", *same, "--batch-size", 6)
    trained(data, tmp_path / "parts", *same, "--batch-size", 2, "--accumulate", 3)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    start = DinatForImageClassification.from_pretrained("digits").state_dict()
    moved = 0.0
    for name, value in whole.items():
        assert (value - parts[name]).abs().max() < 2e-5, name
        if value.shape == start[name].shape:
            moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 5e-5


def test_killed_and_resumed_it_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    recipe = ["--epochs", 4, "--ema", 0.9, "--mixup", 0.8, "--cutmix", 1, "--erase", 0.3, "--drop-path", 0.2, "--keep", "last"]
    trained(data, tmp_path / "whole", *recipe)
    command = [sys.executable, "-m", "dinat", "train", str(data), str(tmp_path / "killed"), *SMALL, *map(str, recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch 2 of 4" in line:  # before, while or after its checkpoint is written
            time.sleep(random.random() * 0.2)
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoints").exists()
    DinatForImageClassification.from_pretrained(tmp_path / "killed")  # what was best so far is whole
    trained(data, tmp_path / "killed", *recipe)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert max(float((whole[name] - killed[name]).abs().max()) for name in whole) <= 1e-6
    assert not (tmp_path / "killed" / "checkpoints").exists()


def test_a_stopped_training_is_gone_on_with_only_as_it_was(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progressed, "add", stop)
        assert main(["train", str(data), str(out), *SMALL]) == 130
    same = [data, out, *SMALL]
    assert "epochs 3, 10 before" in refused(capsys, *same, "--epochs", 3)
    (data / "0" / "0-1.png").rename(data / "0" / "other.png")
    assert "other pictures in the data" in refused(capsys, *same)
    (data / "0" / "other.png").rename(data / "0" / "0-1.png")
    trained(data, out)
    assert "finished" in refused(capsys, *same)


def test_it_stops_when_it_has_long_been_at_its_best(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(data, tmp_path / "out", "--epochs", 30, "--patience", 1, "--learning-rate", 0.05)
    assert 2 <= capsys.readouterr().err.count("dinat: epoch") < 30


def test_bf16_checkpointing_and_another_kernel_and_size(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--epochs", 1, "--size", 96, "--kernel-size", 5, "--precision", "bf16", "--gradient-checkpointing", "true")
    trained(data, tmp_path / "out", *words)
    said = capsys.readouterr().err
    assert "kernel 5 (before: 3): relative positional biases are interpolated" in said
    assert "images of 96 pixels (before: 64)" in said
    network = DinatForImageClassification.from_pretrained(tmp_path / "out")
    assert network.config.kernel_size == 5
    assert DinatImageProcessor.from_pretrained(tmp_path / "out").output_size == (96, 96)


def test_what_cannot_be_trained_on_is_said_in_a_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "not there" in refused(capsys, tmp_path / "no", out, *SMALL)
    assert "--epochs '0'" in refused(capsys, data, out, *SMALL, "--epochs", 0)
    assert "patience" in refused(capsys, data, out, *SMALL, "--patience", 2, "--keep", "last")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "something else" in refused(capsys, data, tmp_path / "other", *SMALL)
    (data / "1" / "1-1.png").unlink()
    assert "but one picture" in refused(capsys, data, out, *SMALL)
    assert not out.exists()
    (tmp_path / "one" / "7").mkdir(parents=True)
    shutil.copy(DIGITS / "7-1.png", tmp_path / "one" / "7")
    assert "one class alone" in refused(capsys, tmp_path / "one", out, *SMALL)
    (tmp_path / "list.csv").write_text("path,label\nno.png,a\n")
    assert "no.png" in refused(capsys, tmp_path / "list.csv", out, *SMALL)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_damaged_picture_is_named_and_once_it_is_gone_training_goes_on(
    workers: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (data / "2" / "2-1.png").read_bytes()
    (data / "2" / "2-1.png").write_bytes(whole[: len(whole) // 2])
    said = refused(capsys, data, tmp_path / "out", *SMALL, "--workers", workers, "--epochs", 1)
    assert said.startswith(f"{data / '2' / '2-1.png'}: the image is damaged")
    (data / "2" / "2-1.png").write_bytes(whole)
    trained(data, tmp_path / "out", "--epochs", 1)


def test_augmented_pictures_depend_on_their_seed_alone() -> None:
    augmentation = Augmentation(Recipe(erase=0.5), DinatImageProcessor(size=48))
    picture = noise(80, 60)
    first = [augmentation(picture, str(seed)) for seed in range(20)]
    again = [augmentation(picture, str(seed)) for seed in range(20)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({one.numpy().tobytes() for one in first}) == 20
    assert {one.shape for one in first} == {(3, 48, 48)}


def test_without_augmentation_a_picture_is_what_the_processor_makes_of_it() -> None:
    processor = DinatImageProcessor(size=48, resample=3)
    plain = Augmentation(Recipe(area=1, flip=0, augment="none"), processor)
    picture = noise(60, 60)
    boxes = {random_box((60, 60), 1.0, random.Random(seed)) for seed in range(50)}
    assert boxes == {(0, 0, 60, 60)}
    assert torch.equal(plain(picture, "0"), processor(picture)[0])


def test_boxes_lie_in_the_picture_and_are_as_large_as_asked() -> None:
    for seed in range(300):
        left, top, right, bottom = random_box((200, 120), 0.3, random.Random(seed))
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 120
        assert (right - left) * (bottom - top) >= 0.28 * 200 * 120
        assert 0.7 < (right - left) / (bottom - top) < 1.4 or (right - left, bottom - top) == (200, 120)


class Chosen(random.Random):
    """Chance that chooses one operation at one strength."""

    def __init__(self, operation: str, strength: int, sign: int = 1) -> None:
        super().__init__(0)
        self.operation, self.strength, self.sign = operation, strength, sign

    def randrange(self, *_: object) -> int:  # type: ignore[override]
        return self.strength

    def choice(self, several: object) -> object:  # type: ignore[override]
        return self.operation if several is OPERATIONS else self.sign


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_do_more_at_more_strength(operation: str) -> None:
    picture = noise(16, 16).resize((64, 64), Image.Resampling.BICUBIC).point(lambda value: 60 + value // 2)

    def distance(strength: int, sign: int = 1) -> float:
        changed = trivial(picture, Chosen(operation, strength, sign))
        assert (changed.size, changed.mode) == ((64, 64), "RGB")
        return sum(ImageChops.difference(picture, changed).convert("L").tobytes()) / 64**2

    if operation in ("identity", "autocontrast", "equalize"):
        assert distance(0) == distance(30)
        assert (distance(0) == 0) == (operation == "identity")
    else:
        assert distance(0) <= 1.0
        assert distance(30) > distance(5)


def test_pictures_are_moved_by_as_much_as_is_said() -> None:
    black = Image.new("RGB", (224, 224))
    black.paste((255, 255, 255), (100, 100, 110, 110))
    moved = trivial(black, Chosen("translate x", 30, -1))
    assert moved.getpixel((105 + 32, 105)) == (255, 255, 255)
    assert moved.getpixel((5, 105)) == (128, 128, 128)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1), (0.8, 1)])
def test_what_is_wanted_of_a_mixed_picture_is_mixed_as_the_picture_is(mixup: float, cutmix: float) -> None:
    labels = torch.tensor([0, 1, 2, 3])
    plain = targets(labels, 4, 0)
    colours = torch.eye(4)[:, :, None, None].expand(4, 4, 40, 40)  # a channel for each class
    torch.manual_seed(0)
    changed = 0
    for _ in range(30):
        pixels, wanted = mix(colours, plain, mixup, cutmix)
        torch.testing.assert_close(pixels.mean((2, 3)), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(wanted.sum(1), torch.ones(4))
        changed += bool((wanted != plain).any())
    assert changed > 20
    torch.testing.assert_close(targets(labels, 4, 0.2)[0], torch.tensor([0.85, 0.05, 0.05, 0.05]))
