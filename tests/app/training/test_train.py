"""`dinat train` on small folders of digits."""

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
from sklearn.metrics import f1_score

from dinat.app import threads
from dinat.app.cli import main
from dinat.app.training.augmentation import OPERATIONS, Augmentation, mix, random_box, soft_labels, trivial_augment
from dinat.app.training.recipe import Recipe
from dinat.app.training.spec import TrainingSpec, read_split
from dinat.app.training.trainer import Epoch, History, last_complete_checkpoint
from dinat.model import DinatForImageClassification, DinatImageProcessor
from tests.app.conftest import DIGITS
from tests.app.sample_images import noise

pytestmark = pytest.mark.train

SMALL = ["--from", "digits", "--device", "cpu", "--batch-size", "4", "--flip", "0", "--validation", "0.5"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images of each of six digits."""
    for path in sorted(DIGITS.glob("[0-5]-*.png")):
        label_folder = tmp_path / "data" / path.name[0]
        label_folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, label_folder)
    return tmp_path / "data"


def train(data: Path, out: Path, *arguments: object) -> None:
    assert main(["train", str(data), str(out), *SMALL, *map(str, arguments)]) == 0


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Train and return the error message."""
    capsys.readouterr()
    assert main(["train", *map(str, arguments)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dinat: ")
    return last.removeprefix("dinat: ")


def test_output_is_a_checkpoint_whose_metrics_match_its_model_card(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(data, out, "--epochs", 2, "--ema", 0.5)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "checkpoints",
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
    model_card = (out / "README.md").read_text()
    row = next(line for line in model_card.splitlines() if line.startswith("| held out, 50% of each class"))
    _, num_images, top1, _, macro_f1, loss = [cell.strip() for cell in row.strip("|").split("|")]
    recipe = Recipe(**json.loads((out / "training.json").read_text())["recipe"])
    validation = read_split(TrainingSpec("digits", None, data, None, out, recipe, 10**8)).validation
    labels = torch.tensor([int(image.label) for image in validation])
    with torch.no_grad():
        logits = network(processor([Image.open(image.path) for image in validation])).logits
    assert float(macro_f1.rstrip("%")) == pytest.approx(f1_score(labels, logits.argmax(1), average="macro") * 100, abs=0.01)
    assert int(num_images) == len(validation) == 6
    assert float(top1.rstrip("%")) == pytest.approx(float((logits.argmax(1) == labels).float().mean()) * 100, abs=0.01)
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-4)
    with Image.open(out / "curves.png") as image:
        assert image.width > 500


def test_gradient_accumulation_equals_one_large_batch(data: Path, tmp_path: Path) -> None:
    same = ["--epochs", 1, "--drop-path", 0, "--keep", "last", "--warmup", 0]
    train(data, tmp_path / "whole", *same, "--batch-size", 6)
    train(data, tmp_path / "parts", *same, "--batch-size", 2, "--accumulate", 3)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    start = DinatForImageClassification.from_pretrained("digits").state_dict()
    moved = 0.0
    for name, value in whole.items():
        assert (value - parts[name]).abs().max() < 2e-5, name
        if value.shape == start[name].shape:
            moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 5e-5


@pytest.mark.slow
def test_resumed_training_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    recipe = ["--epochs", 4, "--ema", 0.9, "--mixup", 0.8, "--cutmix", 1, "--erase", 0.3, "--drop-path", 0.2, "--keep", "last"]
    train(data, tmp_path / "whole", *recipe)
    command = [sys.executable, "-m", "dinat", "train", str(data), str(tmp_path / "killed"), *SMALL, *map(str, recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch 2 of 4" in line:  # kill before, during or after writing the checkpoint
            time.sleep(random.random() * 0.2)
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoints").exists()
    DinatForImageClassification.from_pretrained(tmp_path / "killed")  # the best weights so far are complete
    train(data, tmp_path / "killed", *recipe)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert max(float((whole[name] - killed[name]).abs().max()) for name in whole) <= 1e-6
    assert len(list((tmp_path / "killed" / "checkpoints").glob("checkpoint-*"))) == 1  # from which it can be continued


@pytest.mark.slow
def test_interrupted_training_resumes_only_with_the_same_spec(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(History, "add", interrupt)
        assert main(["train", str(data), str(out), *SMALL, "--epochs", "4"]) == 130
    same = [data, out, *SMALL, "--epochs", 4]
    assert "epochs is 3, was 4" in error_of(capsys, data, out, *SMALL, "--epochs", 3)
    assert "learning_rate is 0.01, was None" in error_of(capsys, *same, "--learning-rate", 0.01)
    (data / "0" / "0-1.png").rename(data / "0" / "other.png")
    assert "the data has 1 other image or label, such as " + str(data / "0" / "other.png") in error_of(capsys, *same)
    (data / "0" / "other.png").rename(data / "0" / "0-1.png")
    train(data, out, "--epochs", 4)
    assert "contains a finished training of 4 epochs" in error_of(capsys, *same)


@pytest.mark.slow
def test_early_stopping(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(data, tmp_path / "out", "--epochs", 30, "--patience", 1, "--learning-rate", 0.05)
    assert 2 <= capsys.readouterr().err.count("dinat: epoch") < 30


def test_bf16_gradient_checkpointing_kernel_size_and_input_size(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--epochs", 1, "--size", 96, "--kernel-size", 5, "--precision", "bf16", "--gradient-checkpointing")
    train(data, tmp_path / "out", *flags)
    log = capsys.readouterr().err
    assert "kernel 5 (before: 3): relative positional biases are interpolated" in log
    assert "images of 96 pixels (before: 64)" in log
    network = DinatForImageClassification.from_pretrained(tmp_path / "out")
    assert network.config.kernel_size == 5
    assert DinatImageProcessor.from_pretrained(tmp_path / "out").output_size == (96, 96)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
def test_diverged_training_fails_and_keeps_the_network_before(
    keep: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step an epoch; warm-up makes the learning rate of the first step zero."""
    out = tmp_path / "out"
    flags = [*SMALL, "--batch-size", 6, "--epochs", 4, "--warmup", 0.25, "--learning-rate", 1e30, "--keep", keep]
    for _ in range(2):  # it diverges again if it is resumed
        assert error_of(capsys, data, out, *flags) == (
            "the training diverged, the validation loss of epoch 2 is nan, and the network of epoch 1 is saved: use another "
            "folder with a lower --learning-rate"
        )
        assert all(value.isfinite().all() for value in load_file(out / "model.safetensors").values())
        assert DinatForImageClassification.from_pretrained(out).config.num_labels == 6


def test_training_that_diverges_in_the_first_epoch_saves_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(capsys, data, tmp_path / "out", *SMALL, "--epochs", 2, "--learning-rate", 1e30)
    assert "the validation loss of epoch 1 is nan, and no network is saved" in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_damaged_checkpoint_is_skipped_and_missing_weights_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add = tmp_path / "out", History.add

    def interrupt_third(history: History, epoch: Epoch) -> bool:
        if len(history.epochs) == 2:
            raise KeyboardInterrupt
        return add(history, epoch)

    with monkeypatch.context() as patched:
        patched.setattr(History, "add", interrupt_third)
        assert main(["train", str(data), str(out), *SMALL, "--epochs", "4"]) == 130
    newest = max((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for name in ("optimizer.pt", "model.safetensors", "trainer_state.json"):
        copy = tmp_path / "copy"
        shutil.copytree(out / "checkpoints", copy)
        damaged = copy / newest.name / name
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
        checkpoint = last_complete_checkpoint(copy)
        assert checkpoint is None or checkpoint.name != newest.name
        assert not (copy / newest.name).exists()
        shutil.rmtree(copy)
    (out / "model.safetensors").unlink()
    assert "has no model.safetensors anymore" in error_of(capsys, data, out, *SMALL, "--epochs", 4)


def test_invalid_data_and_flags_are_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "is inside" in error_of(capsys, data, data / "out", *SMALL)
    rows = [f"{data}/{label}/{label}-{n}.png,{label}" for label in (0, 1) for n in (1, 2)]
    (tmp_path / "nul.csv").write_text("\n".join(["path,label", *rows, "a\0.png,1", ""]))
    message = error_of(capsys, tmp_path / "nul.csv", out, *SMALL)
    assert "a\\x00.png: the file cannot be read: embedded null byte; replace or remove" in message
    (tmp_path / "data.zip").touch()
    assert "data.zip is neither a folder nor a table" in error_of(capsys, tmp_path / "data.zip", out, *SMALL)
    assert "does not exist" in error_of(capsys, tmp_path / "no", out, *SMALL)
    assert "--epochs '0'" in error_of(capsys, data, out, *SMALL, "--epochs", 0)
    assert "patience" in error_of(capsys, data, out, *SMALL, "--patience", 2, "--keep", "last")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "does not contain a training" in error_of(capsys, data, tmp_path / "other", *SMALL)
    (data / "1" / "1-1.png").unlink()
    assert "only one image" in error_of(capsys, data, out, *SMALL)
    assert not out.exists()
    (tmp_path / "one" / "7").mkdir(parents=True)
    shutil.copy(DIGITS / "7-1.png", tmp_path / "one" / "7")
    assert "only one class" in error_of(capsys, tmp_path / "one", out, *SMALL)
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"no-{i}.png,{i % 2}\n" for i in range(4)))
    assert f"relative to the folder of the table, {tmp_path}" in error_of(capsys, tmp_path / "list.csv", out, *SMALL)
    (tmp_path / "no-0.png").write_bytes((DIGITS / "0-1.png").read_bytes())
    assert "no-1.png: the file cannot be read: No such file" in error_of(capsys, tmp_path / "list.csv", out, *SMALL)


def test_training_computes_with_the_threads_of_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert main(["train", str(tmp_path / "none"), str(tmp_path / "out"), *SMALL]) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_augmentation_depends_only_on_the_seed() -> None:
    augmentation = Augmentation(Recipe(erase=0.5), DinatImageProcessor(size=48))
    image = noise(80, 60)
    first = [augmentation(image, str(seed)) for seed in range(20)]
    again = [augmentation(image, str(seed)) for seed in range(20)]
    assert all(torch.equal(augmented, other) for augmented, other in zip(first, again, strict=True))
    assert len({augmented.numpy().tobytes() for augmented in first}) == 20
    assert {augmented.shape for augmented in first} == {(3, 48, 48)}


def test_disabled_augmentation_equals_the_image_processor() -> None:
    processor = DinatImageProcessor(size=48, resample=3)
    plain = Augmentation(Recipe(area=1, flip=0, augment="none"), processor)
    image = noise(60, 60)
    boxes = {random_box((60, 60), 1.0, random.Random(seed)) for seed in range(50)}
    assert boxes == {(0, 0, 60, 60)}
    assert torch.equal(plain(image, "0"), processor(image)[0])


def test_random_boxes_are_inside_the_image_and_large_enough() -> None:
    for seed in range(300):
        left, top, right, bottom = random_box((200, 120), 0.3, random.Random(seed))
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 120
        assert (right - left) * (bottom - top) >= 0.28 * 200 * 120
        assert 0.7 < (right - left) / (bottom - top) < 1.4 or (right - left, bottom - top) == (200, 120)


class FixedChoice(random.Random):
    """A random number generator that selects one operation at one strength."""

    def __init__(self, operation: str, strength: int, sign: int = 1) -> None:
        super().__init__(0)
        self.operation, self.strength, self.sign = operation, strength, sign

    def randrange(self, *_: object) -> int:  # type: ignore[override]
        return self.strength

    def choice(self, options: object) -> object:  # type: ignore[override]
        return self.operation if options is OPERATIONS else self.sign


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_effect_grows_with_strength(operation: str) -> None:
    image = noise(16, 16).resize((64, 64), Image.Resampling.BICUBIC).point(lambda value: 60 + value // 2)

    def distance(strength: int, sign: int = 1) -> float:
        changed = trivial_augment(image, FixedChoice(operation, strength, sign))
        assert (changed.size, changed.mode) == ((64, 64), "RGB")
        return sum(ImageChops.difference(image, changed).convert("L").tobytes()) / 64**2

    if operation in ("identity", "autocontrast", "equalize"):
        assert distance(0) == distance(30)
        assert (distance(0) == 0) == (operation == "identity")
    else:
        assert distance(0) <= 1.0
        assert distance(30) > distance(5)


def test_translation_distance() -> None:
    black = Image.new("RGB", (224, 224))
    black.paste((255, 255, 255), (100, 100, 110, 110))
    moved = trivial_augment(black, FixedChoice("translate x", 30, -1))
    assert moved.getpixel((105 + 32, 105)) == (255, 255, 255)
    assert moved.getpixel((5, 105)) == (128, 128, 128)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1), (0.8, 1)])
def test_targets_are_mixed_like_the_pixels(mixup: float, cutmix: float) -> None:
    labels = torch.tensor([0, 1, 2, 3])
    one_hot = soft_labels(labels, 4, 0)
    colors = torch.eye(4)[:, :, None, None].expand(4, 4, 40, 40)  # a channel for each class
    torch.manual_seed(0)
    changed = 0
    for _ in range(30):
        pixels, targets = mix(colors, one_hot, mixup, cutmix)
        torch.testing.assert_close(pixels.mean((2, 3)), targets, atol=1e-5, rtol=0)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        changed += bool((targets != one_hot).any())
    assert changed > 20
    torch.testing.assert_close(soft_labels(labels, 4, 0.2)[0], torch.tensor([0.85, 0.05, 0.05, 0.05]))
