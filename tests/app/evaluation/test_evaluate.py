import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from dinat.app.cli import main
from dinat.app.evaluation.labelled_images import DataError, class_ids, read_labelled_images
from dinat.app.evaluation.scores import Evaluation
from dinat.app.tables import TableError
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from tests.app.conftest import DIGITS

EXACT = ["--runtime", "torch", "--precision", "fp32"]
ALL = sorted(DIGITS.glob("*.png"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of digits, one of which, a 3, is labelled 8."""
    for path in ALL:
        label_folder = tmp_path / "data" / path.name[0]
        label_folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, label_folder)
    shutil.move(tmp_path / "data" / "3" / "3-1.png", tmp_path / "data" / "8" / "3-1.png")
    return tmp_path / "data"


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert main(["evaluate", "digits", *map(str, arguments), "--json", *EXACT]) == 0
    results: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["results"]
    return results


def test_metrics_match_the_network_with_either_preprocessing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, original = evaluate(capsys, folder, "--preprocessing", "both")
    network = DinatForImageClassification.from_pretrained("digits")
    own = DinatImageProcessor.from_pretrained("digits")
    cropped = DinatImageProcessor.original(64)
    paths = sorted(folder.rglob("*.png"))
    truth = np.array([int(path.parent.name) for path in paths])
    for result, resized in ((checkpoint, own), (original, cropped)):
        pixels = torch.cat(
            [own.normalize(torch.from_numpy(np.array(resized.resize(Image.open(path)))[None])) for path in paths]
        )
        with torch.no_grad():
            scores = network.classify(pixels)[0].softmax(-1).numpy()
        assert result["top1"] == pytest.approx((scores.argmax(1) == truth).mean())
        best = np.argsort(-scores, axis=1)[:, :5]
        assert result["top5"] == pytest.approx((best == truth[:, None]).any(1).mean())
        assert result["confusion"]["rows"] == confusion_matrix(truth, scores.argmax(1), labels=range(10)).tolist()
        assert result["images"] == len(ALL)
    assert checkpoint["top1"] == pytest.approx(1 - 1 / len(ALL))
    assert (checkpoint["preprocessing"], original["preprocessing"]) == ("checkpoint", "original")
    (eight,) = [row for row in checkpoint["classes"] if row["class"] == "8"]
    assert eight["confused with"] == "3 (1)"


def test_metrics_match_scikit_learn_and_definition() -> None:
    random = np.random.default_rng(0)
    truth, best, scores = random.integers(0, 4, 500), random.integers(0, 4, 500), random.random(500)
    evaluation = Evaluation(list("abcd"), truth, best, truth == best, scores, 1.0)
    rows = evaluation.by_class
    assert [row["recall"] for row in rows] == pytest.approx(recall_score(truth, best, average=None))
    assert [row["precision"] for row in rows] == pytest.approx(precision_score(truth, best, average=None))
    expected = 0.0
    for low in np.arange(15) / 15:
        in_bin = (scores >= low) & (scores < low + 1 / 15)
        expected += in_bin.sum() * abs(scores[in_bin].mean() - (truth == best)[in_bin].mean()) / 500
    assert evaluation.calibration_error == pytest.approx(expected)
    perfect = Evaluation(["a"], np.zeros(3, int), np.zeros(3, int), np.ones(3, bool), np.ones(3), 1.0)
    assert perfect.calibration_error == 0
    assert perfect.reliability == [{"images": 3, "score": 1.0, "accuracy": 1.0}]


def test_report_is_a_self_contained_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(capsys, folder, "--preprocessing", "both", "--report", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,iVBOR") == 4
    assert not re.search(r"https?://|<script|<link", page)
    assert "95.00%" in page


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_list_of_paths_and_labels(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(str(path.relative_to(folder)), path.parent.name) for path in sorted(folder.rglob("*.png"))]
    text = "\n".join(
        ["path,label", *(",".join(row) for row in rows)]
        if kind == "csv"
        else [json.dumps({"path": path, "label": int(label)}) for path, label in rows]
    )
    (folder / f"list.{kind}").write_text(text)
    (from_list,) = evaluate(capsys, folder / f"list.{kind}")
    (from_folder,) = evaluate(capsys, folder)
    assert from_list["confusion"] == from_folder["confusion"]


def test_classes_file_sets_the_order_of_labels(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for digit in range(10):
        (folder / str(digit)).rename(folder / f"n0000000{9 - digit}")
    (by_order,) = evaluate(capsys, folder)  # synsets are sorted, here in the reverse order of the classes
    assert by_order["top1"] < 0.2
    (tmp_path / "classes.txt").write_text("\n".join(f"n0000000{9 - digit}" for digit in range(10)))
    (by_file,) = evaluate(capsys, folder, "--classes", tmp_path / "classes.txt")
    assert by_file["top1"] == pytest.approx(1 - 1 / len(ALL))


def test_class_ids() -> None:
    config = DinatConfig(id2label={0: "cat", 1: "dog"})
    assert class_ids(["dog"], config) == {"dog": 1}
    assert class_ids(["n00000002", "n00000001"], config) == {"n00000001": 0, "n00000002": 1}
    assert class_ids(["b"], config, ["a", "b"]) == {"b": 1}
    message = r"1 label of the data is not a class of the network: 'cow'; its classes are 'cat', 'dog'"
    with pytest.raises(DataError, match=message):
        class_ids(["cat", "cow"], config)
    with pytest.raises(DataError, match=r"1 synset, the network has 2 classes.*--classes"):
        class_ids(["n00000001"], config)
    with pytest.raises(DataError, match=r"--classes has 1 label .*has 2"):
        class_ids(["a"], config, ["a"])


def test_unreadable_images_and_empty_folders_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "5" / "cut.png").write_bytes(ALL[0].read_bytes()[:300])
    (folder / "7").rename(folder.parent / "7")
    (folder / "7").mkdir()
    assert main(["evaluate", "digits", str(folder), *EXACT]) == 1
    out, err = capsys.readouterr()
    assert f"{folder / '7'} has no image: the class is skipped" in err
    assert re.search(r"cut\.png: the image is damaged", err)
    assert "94.44%" in out  # 17 of 18: a 3 is labelled 8


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda data: None, "does not exist: use a folder with one subfolder per label, or a .csv or .jsonl"),
        (lambda data: data.mkdir(), "has no subfolder per label"),
        (lambda data: (data / "cat").mkdir(parents=True), "has no image: supported are .jpg"),
    ],
)
def test_invalid_folder_is_one_line(create: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(tmp_path / "data")
    assert main(["evaluate", "digits", str(tmp_path / "data"), *EXACT]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "name,text\na.png,1", "line 2, must have a path and a label, it has name, text"),
        ("x.csv", "path,label\na.png,", "line 2, must have a path and a label, it has nothing as label"),
        ("x.jsonl", '{"path": 12, "label": 1}', "line 1, has the path 12: it must be text"),
        ("x.jsonl", '{"path": "a.png", "label": ["a"]}', "has the label ['a']: give each image one label"),
        ("x.csv", "", "has no image"),
        ("x.csv", "path,label\na.png,1\nb.png, \n", "line 3, must have a path and a label, it has nothing as label"),
        ("x.csv", "path,label\na.png\n", "line 2, must have a path and a label, it has nothing as label"),
        ("x.csv", "path,label\n\u200b,1\n", "line 2, must have a path and a label, it has nothing as path"),
        ("x.jsonl", '{"path": "a.png", "label": NaN}', "line 1, must have a path and a label, it has nothing as label"),
        ("x.csv", "image,label\nhttps://x.org/a.png,1\n", "line 2, has the URL https://x.org/a.png: URLs are not read"),
        ("x.csv", "path,label\nb/a.png,1\n", "none of its paths is a file, such as"),
        ("x.jsonl", '[{"path": "a.png", "label": "1"}]', "line 1, must be an object, got list: write one object a line"),
    ],
)
def test_invalid_list_is_rejected(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((DataError, TableError), match=re.escape(message)):
        read_labelled_images(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "file_name,label\nimages/cafe\u0301.png, 7 \n",
        "label;Path\n7;images\\caf\u00e9.png\n",
        "filename,class\n images/caf\u00e9.png,7\n",
    ],
)
def test_path_in_a_table_is_found_in_the_form_that_the_file_has(text: str, tmp_path: Path) -> None:
    for form in ("caf\u00e9.png", "cafe\u0301.png"):
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / form).write_bytes(b"")
        (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
        (image,) = read_labelled_images(tmp_path / "metadata.csv").images
        assert (image.path.name, image.label, image.path.is_file()) == (form, "7", True)
        shutil.rmtree(tmp_path / "images")


def test_path_that_no_file_can_have_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text(
        f'{{"path": "a\\u0000.png", "label": 1}}\n{{"path": "\\ud800", "label": 1}}\n{{"path": "{ALL[2]}", "label": "1"}}\n'
    )
    assert main(["evaluate", "digits", str(tmp_path / "x.jsonl"), *EXACT]) == 1
    errors = capsys.readouterr().err
    assert "embedded null byte" in errors
    assert "Traceback" not in errors and "internal error" not in errors


def test_labels_are_compared_normalized(tmp_path: Path) -> None:
    for folder in ("cafe\u0301", "caf\u00e9"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(b"")
    dataset = read_labelled_images(tmp_path)
    assert (dataset.labels, len(dataset.images)) == (["caf\u00e9"], 2)
    config = DinatConfig(id2label={0: "cafe\u0301", 1: "th\u00e9"})
    assert class_ids(dataset.labels, config) == {"caf\u00e9": 0}
    assert class_ids(["the\u0301"], config, ["caf\u00e9", "th\u00e9 "]) == {"the\u0301": 1}


def test_label_of_two_classes_is_rejected() -> None:
    config = DinatConfig(id2label={0: "crane", 1: "maillot", 2: "crane"})
    assert class_ids(["maillot"], config) == {"maillot": 1}
    with pytest.raises(DataError, match=r"the classes 0 and 2 of the network are both 'crane': use --classes"):
        class_ids(["crane"], config)
    with pytest.raises(DataError, match=r"the classes 0 and 1 of the network are both 'a'"):
        class_ids(["a"], config, ["a", "a", "b"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_classes_file_of_an_editor(folder: Path, encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_bytes(("\r\n".join("0123456789") + "\r\n\r\n").encode(encoding))
    (result,) = evaluate(capsys, folder, "--classes", tmp_path / "classes.txt")
    assert result["top1"] == pytest.approx(1 - 1 / len(ALL))


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"path": "gone.png", "label": "1"}}\n{{"path": "{ALL[2]}", "label": "1"}}\n')
    assert main(["evaluate", "digits", str(tmp_path / "x.jsonl"), *EXACT]) == 1
    assert "gone.png" in capsys.readouterr().err


def test_table_of_a_folder_is_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{path.relative_to(folder)},{path.name[0]}" for path in sorted(folder.rglob("*.png"))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    (result,) = evaluate(capsys, folder)
    assert (result["images"], result["top1"]) == (len(ALL), 1)


@pytest.mark.parametrize("text", ["patient,age\n1,70\n", "file_name,text\n7/7-1.png,a seven\n", ""])
def test_metadata_of_another_kind_is_not_a_table_of_labels(text: str, tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    shutil.copy(DIGITS / "7-1.png", tmp_path / "7")
    (tmp_path / "metadata.csv").write_text(text)
    dataset = read_labelled_images(tmp_path)
    assert [(image.path.name, image.label) for image in dataset.images] == [("7-1.png", "7")]
    assert dataset.skipped[".csv"] == 1


def test_parts_of_training_data_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder.parent / "parts"
    shutil.copytree(folder, data / "train")
    shutil.copytree(folder, data / "val")
    assert main(["evaluate", "digits", str(data), *EXACT]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 labels of the data are not classes of the network: 'train', 'val'" in line
    assert f"{data} has parts, such as {data}/val: evaluate one of them" in line


def test_duplicate_images_and_splits_are_reported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "0" / "0-1.png", folder / "1" / "same.png")
    assert main(["evaluate", "digits", str(folder), *EXACT]) == 0
    name = "1 image has several labels, such as {0}/0/0-1.png (0) and {0}/1/same.png (1)"
    assert name.format(folder) in capsys.readouterr().err
    (tmp_path / "x.csv").write_text(f"path,label,split\n{ALL[0]},0,train\n{ALL[0]},0,test\n")
    for preprocessing in ("checkpoint", "original"):
        assert main(["evaluate", "digits", str(tmp_path / "x.csv"), "--preprocessing", preprocessing, *EXACT]) == 0
        err = capsys.readouterr().err
        assert f"1 image occurs more than once, such as {ALL[0]} and itself" in err
        assert "the images of all splits are evaluated: 1 of 'train', 1 of 'test'" in err


def test_missing_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a.png,1\nb.png,2\n")
    with pytest.raises(DataError, match=r"it has a\.png, 1; the first line must name the columns, such as path,label"):
        read_labelled_images(tmp_path / "x.csv")


def test_missing_folder_of_the_report_is_named_before_the_evaluation(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "no-checkpoint", str(folder), "--report", str(tmp_path / "no" / "x.html"), *EXACT]) == 1
    expected = f"dinat: --report {tmp_path}/no/x.html: the folder {tmp_path}/no does not exist"
    assert capsys.readouterr().err.splitlines() == [expected]
