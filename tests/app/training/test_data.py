"""Data of `dinat train`: its parts, labels, and images that cannot be read."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dinat.app.cli import main
from dinat.app.evaluation.duplicates import describe_duplicates, describe_overlap
from dinat.app.evaluation.labelled_images import DataError
from dinat.app.training.labels import balanced_weights, check_labels, imbalance
from dinat.app.training.layout import Parts, find_parts
from dinat.app.training.model_card import table_cell
from dinat.app.training.readable import check_images
from dinat.app.training.recipe import Recipe
from dinat.app.training.spec import TrainingSpec, read_split
from tests.app.conftest import DIGITS
from tests.app.training.test_train import SMALL, data, error_of, train

pytestmark = pytest.mark.train

__all__ = ["data"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def copy(folder: Path, *names: str) -> None:
    """Copy digits into folders by label."""
    for name in names:
        (folder / name[0]).mkdir(parents=True, exist_ok=True)
        shutil.copy(DIGITS / f"{name}.png", folder / name[0])


def spec(data: Path, validate_on: Path | None = None) -> TrainingSpec:
    return TrainingSpec("digits", None, data, validate_on, data.parent / "out", Recipe(), 10**8)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_folders_train_and_val_are_training_and_validation_data(name: str, tmp_path: Path) -> None:
    copy(tmp_path / "data" / "train", "0-1", "1-1")
    copy(tmp_path / "data" / name, "0-2", "1-2")
    split = read_split(spec(tmp_path / "data"))
    assert split.classes == ["0", "1"]
    assert [image.path.name for image in split.train] == ["0-1.png", "1-1.png"]
    assert [image.path.name for image in split.validation] == ["0-2.png", "1-2.png"]


@pytest.mark.parametrize(
    ("train_name", "name"), [("Training", "Testing"), ("TRAIN", "TEST"), ("train", "dev"), ("Train", "Eval")]
)
def test_other_names_of_the_parts_are_no_labels(train_name: str, name: str, tmp_path: Path) -> None:
    copy(tmp_path / "data" / train_name, "0-1", "1-1")
    copy(tmp_path / "data" / name, "0-2", "1-2")
    split = read_split(spec(tmp_path / "data"))
    table = tmp_path / "table.csv"
    parts = {train_name: split.train, name: split.validation}
    rows = [f"{image.path},{image.label},{part}\n" for part, images in parts.items() for image in images]
    table.write_text("path,label,split\n" + "".join(rows))
    for source in (split, read_split(spec(table))):
        assert (source.classes, source.is_held_out) == (["0", "1"], False)
        assert [image.path.name for image in source.train] == ["0-1.png", "1-1.png"]
        assert [image.path.name for image in source.validation] == ["0-2.png", "1-2.png"]


def test_table_of_all_parts_is_divided_by_folders(tmp_path: Path) -> None:
    """Hugging Face's ImageFolder allows one metadata file above the folders of the parts."""
    for part, number in (("train", 1), ("test", 2)):
        (tmp_path / "data" / part).mkdir(parents=True)
        for label in "34":
            shutil.copy(DIGITS / f"{label}-{number}.png", tmp_path / "data" / part)
    rows = ["train/3-1.png,3", "train/4-1.png,4", "test/3-2.png,3", "test/4-2.png,4"]
    (tmp_path / "data" / "metadata.csv").write_text("file_name,label\n" + "\n".join(rows))
    split = read_split(spec(tmp_path / "data"))
    assert (split.classes, split.is_held_out) == (["3", "4"], False)
    assert [image.path.name for image in split.train] == ["3-1.png", "4-1.png"]
    assert [image.path.name for image in split.validation] == ["3-2.png", "4-2.png"]


def test_val_comes_before_test_and_validate_on_before_both(tmp_path: Path) -> None:
    for part in ("train", "val", "test", "other"):
        copy(tmp_path / part, "0-1")
    train_folder, val, test, other = (tmp_path / part for part in ("train", "val", "test", "other"))
    assert find_parts(tmp_path, None) == Parts(train_folder, val, (other, test))
    assert find_parts(tmp_path, other) == Parts(train_folder, other, (test, val))


def test_folders_of_images_called_train_and_test_are_labels(tmp_path: Path) -> None:
    for label in ("train", "test"):
        (tmp_path / label).mkdir()
        shutil.copy(DIGITS / "0-1.png", tmp_path / label)
    assert find_parts(tmp_path, None) == Parts(tmp_path, None)
    copy(tmp_path / "vehicles" / "train", "0-1")  # no validation data, and other labels
    (tmp_path / "vehicles" / "bus").mkdir()
    assert find_parts(tmp_path / "vehicles", None) == Parts(tmp_path / "vehicles", None)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_files_of_hugging_faces_image_folder(kind: str, tmp_path: Path) -> None:
    for part, number in (("train", 1), ("test", 2)):
        copy(tmp_path / "data" / part, f"3-{number}", f"4-{number}")
        rows = [(f"{label}/{label}-{number}.png", f"digit {label}") for label in (3, 4)]
        text = "file_name,label\n" + "".join(f"{path},{label}\n" for path, label in rows)
        if kind == "jsonl":
            text = "".join(json.dumps({"file_name": path, "label": label}) + "\n" for path, label in rows)
        (tmp_path / "data" / part / f"metadata.{kind}").write_text(text)
    split = read_split(spec(tmp_path / "data"))
    assert split.classes == ["digit 3", "digit 4"]
    assert [image.path.name for image in split.validation] == ["3-2.png", "4-2.png"]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["0|1", "1"], "'0|1' names several classes"),
        (["cat;dog", "cat"], "'cat;dog' names several classes"),
        (["['cat', 'dog']", "cat"], "names several classes"),
        (["0.5", "1", "-2e3"], "the labels are numbers, such as 0.5"),
    ],
)
def test_labels_that_are_not_names_of_classes_are_rejected(labels: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason.replace("|", r"\|")):
        check_labels(labels)


def test_names_with_numbers_and_bars_are_labels() -> None:
    check_labels(["0", "1", "10", "a|b", "2.5 mm"])
    check_labels(["1.0", "2.0"])  # integers that pandas stored as floating-point numbers
    check_labels(["tench, Tinca tinca", "maillot", "maillot, tank suit"])


def test_imbalance_and_balanced_weights() -> None:
    assert imbalance({"cat": 9, "dog": 1}) is None
    assert "30 images of cat, 3 of dog" in (imbalance({"cat": 30, "dog": 3, "cow": 5}) or "")
    assert balanced_weights({"a": 6, "b": 2}, ["a", "b"]) == [8 / 12, 8 / 4]


def test_readable_images_are_checked_once(data: Path, tmp_path: Path) -> None:
    images, file = read_split(spec(data)).train, tmp_path / "checked.txt"
    damaged, good = images[0].path, images[1].path
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    checked = check_images(images, 10**8, file)
    assert list(checked.failed) == [damaged]
    assert len(file.read_text().splitlines()) == len(images) - 1
    again = check_images(images, 10**8, file)
    assert (list(again.failed), again.digests) == ([damaged], checked.digests)
    good.write_bytes(b"no image")
    assert check_images(images, 10**8, file).failed.keys() == {damaged, good}
    assert check_images(images[2:], 1, file).failed.keys() == {image.path for image in images[2:]}  # another limit of pixels


@pytest.mark.slow
def test_all_unreadable_images_are_reported_before_the_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = [data / "2" / "2-1.png", data / "3" / "3-2.png"]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:60])
    same = [data, tmp_path / "out", *SMALL, "--epochs", 1]
    message = error_of(capsys, *same)
    assert all(str(path) in message for path in damaged)
    assert "--skip-broken" in message
    assert not (tmp_path / "out").exists()
    (data / "2" / "2-1.png").unlink()
    (data / "3" / "3-2.png").unlink()
    shutil.copy(data / "2" / "2-2.png", data / "2" / "2-3.png")
    shutil.copy(data / "3" / "3-1.png", data / "3" / "3-3.png")
    train(data, tmp_path / "out", "--epochs", 1)


@pytest.mark.slow
@pytest.mark.parametrize("advice", ["remove", "--skip-broken"])
def test_training_resumes_without_an_image_that_was_damaged_meanwhile(
    advice: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The split of the other images does not change."""
    for digit in range(6):
        shutil.copy(data / str(digit) / f"{digit}-1.png", data / str(digit) / f"{digit}-3.png")
    out = tmp_path / "out"
    before = read_split(TrainingSpec("digits", None, data, None, out, Recipe(validation=0.5, seed=0), 10**8))

    from dinat.app.training.trainer import DinatTrainer

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    flags = ["--epochs", 3, "--size", 32]
    with monkeypatch.context() as patched:
        patched.setattr(DinatTrainer, "accuracy", interrupt)
        assert main(["train", str(data), str(out), *SMALL, *map(str, flags)]) == 130
    damaged = before.train[0].path
    damaged.write_bytes(b"")
    message = error_of(capsys, data, out, *SMALL, *flags)
    assert str(damaged) in message
    if advice == "remove":
        damaged.unlink()
    train(data, out, *flags, *([] if advice == "remove" else [advice]))
    log = capsys.readouterr().err
    assert f"{len(before.train) - 1} for training, {len(before.validation)} for validation" in log
    assert "resuming after epoch 3" in log
    assert load_file(out / "model.safetensors")


def duplicated(folder: Path) -> Path:
    """A table in which images have two labels, occur twice, and are both training and validation images."""
    folder.mkdir()
    for name in ("0-1", "0-2", "1-1", "1-2"):
        shutil.copy(DIGITS / f"{name}.png", folder)
    shutil.copy(folder / "0-1.png", folder / "copy.png")
    rows = [
        ("0-1.png", "0", "train"),
        ("copy.png", "1", "Train"),  # the bytes of 0-1.png
        ("1-1.png", "1", "train"),
        ("1-1.png", "1", "train"),
        ("0-2.png", "0", "validation"),
        ("1-1.png", "1", "validation"),
        ("1-2.png", "1", "test"),
    ]
    table = folder / "labels.csv"
    table.write_text("file_name,label,Split\n" + "".join(",".join(row) + "\n" for row in rows))
    return table


def test_column_of_splits_divides_a_table(tmp_path: Path) -> None:
    table = duplicated(tmp_path / "data")
    split = read_split(spec(table))
    assert [image.path.name for image in split.train] == ["0-1.png", "copy.png", "1-1.png", "1-1.png"]
    assert [image.path.name for image in split.validation] == ["0-2.png", "1-1.png"]
    assert (split.notes, split.is_held_out) == (("1 image of the split 'test' is not used",), False)
    split = read_split(spec(table, table))  # --validate-on comes before the column
    assert (len(split.train), len(split.validation)) == (4, 7)
    assert split.notes == ("2 images of the split 'validation' are not used", "1 image of the split 'test' is not used")
    table.write_text(table.read_text().replace("train", "1").replace("Train", "2"))
    split = read_split(spec(table))
    assert split.notes == ("the splits 1, 2, test, validation are not used, none of them is train",)
    assert (len(split.train) + len(split.validation), split.is_held_out) == (7, True)


@pytest.mark.parametrize(("yes", "no"), [("True", "False"), ("1", "0"), ("true", " FALSE ")])
def test_fastais_column_of_validation_images_divides_a_table(yes: str, no: str, tmp_path: Path) -> None:
    copy(tmp_path / "data", "0-1", "0-2", "1-1", "1-2")
    table = tmp_path / "data" / "labels.csv"
    rows = [f"{name[0]}/{name}.png,{name[0]},{yes if name.endswith('2') else no}\n" for name in ("0-1", "0-2", "1-1", "1-2")]
    table.write_text("file_name,label,is_valid\n" + "".join(rows))
    split = read_split(spec(table))
    assert [image.path.name for image in split.train] == ["0-1.png", "1-1.png"]
    assert [image.path.name for image in split.validation] == ["0-2.png", "1-2.png"]
    assert (split.notes, split.is_held_out) == ((), False)


@pytest.mark.parametrize(
    ("columns", "values", "reason"),
    [
        ("is_valid", "maybe", "line 2, has the is_valid 'maybe': it must be true or false, or 1 or 0"),
        ("is_valid", "", "line 2, has the is_valid '': it must be"),
        ("split,is_valid", "train,1", "line 2, has the columns split and is_valid, which both name the split: remove one"),
    ],
)
def test_ambiguous_split_of_a_row_is_rejected(columns: str, values: str, reason: str, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(f"file_name,label,{columns}\n0-1.png,0,{values}\n")
    with pytest.raises(DataError, match=reason):
        read_split(spec(table))


def test_duplicate_images_are_described(tmp_path: Path) -> None:
    table = duplicated(tmp_path / "data")
    split = read_split(spec(table))
    digests = check_images([*split.train, *split.validation], 10**8, tmp_path / "checked.txt").digests
    name = f"{tmp_path}/data"
    assert describe_duplicates([*split.train, *split.validation], digests) == [
        f"1 image has several labels, such as {name}/0-1.png (0) and {name}/copy.png (1)",
        f"1 image occurs more than once, such as {name}/1-1.png and itself",
    ]
    assert describe_overlap(split.train, split.validation, digests) == (
        f"1 validation image is also a training image, such as {name}/1-1.png and itself: the validation accuracy is too high"
    )
    assert describe_duplicates(split.validation, digests) == []
    assert describe_overlap(split.train[:1], split.validation, digests) is None


def test_training_reports_duplicate_images_and_unused_splits(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(data / "0" / "0-1.png", data / "1" / "other.png")
    capsys.readouterr()
    train(data, tmp_path / "out", "--epochs", 1)
    assert f"1 image has several labels, such as {data}/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "cell"),
    [("a|b", r"a\|b"), ("two\nlines", "two lines"), ("<b>x</b> & y", "&lt;b&gt;x&lt;/b&gt; &amp; y"), ("7", "7")],
)
def test_labels_are_escaped_in_the_tables_of_the_model_card(label: str, cell: str) -> None:
    assert table_cell(label) == cell
