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
from dinat.app.evaluation.labelled_images import DataError, class_ids, read_data
from dinat.app.evaluation.scores import Evaluation
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from tests.app.conftest import DIGITS

EXACT = ["--runtime", "torch", "--precision", "fp32"]
ALL = sorted(DIGITS.glob("*.png"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in ALL:
        place = tmp_path / "data" / path.name[0]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    shutil.move(tmp_path / "data" / "3" / "3-1.png", tmp_path / "data" / "8" / "3-1.png")  # so that one is wrong
    return tmp_path / "data"


def measured(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    assert main(["evaluate", "digits", *map(str, words), "--json", *EXACT]) == 0
    results: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["results"]
    return results


def test_it_says_what_the_network_says_with_either_preprocessing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, original = measured(capsys, folder, "--preprocessing", "both")
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
        assert result["pictures"] == len(ALL)
    assert checkpoint["top1"] == pytest.approx(1 - 1 / len(ALL))
    assert (checkpoint["preprocessing"], original["preprocessing"]) == ("checkpoint", "original")
    (eight,) = [row for row in checkpoint["classes"] if row["class"] == "8"]
    assert eight["said instead"] == "3 (1)"


def test_measures_are_those_of_the_books() -> None:
    random = np.random.default_rng(0)
    truth, best, scores = random.integers(0, 4, 500), random.integers(0, 4, 500), random.random(500)
    evaluation = Evaluation(list("abcd"), truth, best, truth == best, scores, 1.0)
    rows = evaluation.by_class
    assert [row["recall"] for row in rows] == pytest.approx(recall_score(truth, best, average=None))
    assert [row["precision"] for row in rows] == pytest.approx(precision_score(truth, best, average=None))
    expected = 0.0
    for low in np.arange(15) / 15:
        within = (scores >= low) & (scores < low + 1 / 15)
        expected += within.sum() * abs(scores[within].mean() - (truth == best)[within].mean()) / 500
    assert evaluation.calibration_error == pytest.approx(expected)
    sure = Evaluation(["a"], np.zeros(3, int), np.zeros(3, int), np.ones(3, bool), np.ones(3), 1.0)
    assert sure.calibration_error == 0
    assert sure.reliability == [{"pictures": 3, "score": 1.0, "accuracy": 1.0}]


def test_the_report_is_one_page_with_its_pictures_inside(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(capsys, folder, "--preprocessing", "both", "--report", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,iVBOR") == 4
    assert not re.search(r"https?://|<script|<link", page)
    assert "95.00%" in page


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_list_of_paths_and_labels(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(str(path.relative_to(folder)), path.parent.name) for path in sorted(folder.rglob("*.png"))]
    text = "\n".join(
        ["path,label", *(",".join(row) for row in rows)]
        if kind == "csv"
        else [json.dumps({"path": path, "label": int(label)}) for path, label in rows]
    )
    (folder / f"list.{kind}").write_text(text)
    (listed,) = measured(capsys, folder / f"list.{kind}")
    (whole,) = measured(capsys, folder)
    assert listed["confusion"] == whole["confusion"]


def test_labels_in_the_order_of_the_classes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for digit in range(10):
        (folder / str(digit)).rename(folder / f"n0000000{9 - digit}")
    (by_order,) = measured(capsys, folder)  # synsets are sorted: all are the wrong way round
    assert by_order["top1"] < 0.2
    (tmp_path / "classes.txt").write_text("\n".join(f"n0000000{9 - digit}" for digit in range(10)))
    (named,) = measured(capsys, folder, "--classes", tmp_path / "classes.txt")
    assert named["top1"] == pytest.approx(1 - 1 / len(ALL))


def test_which_class_a_label_is() -> None:
    config = DinatConfig(id2label={0: "cat", 1: "dog"})
    assert class_ids(["dog"], config) == {"dog": 1}
    assert class_ids(["n00000002", "n00000001"], config) == {"n00000001": 0, "n00000002": 1}
    assert class_ids(["b"], config, ["a", "b"]) == {"b": 1}
    with pytest.raises(DataError, match=r"1 labels of the data are not the network's: 'cow'; its labels are 'cat', 'dog'"):
        class_ids(["cat", "cow"], config)
    with pytest.raises(DataError, match=r"1 synsets, the network 2 classes.*--classes"):
        class_ids(["n00000001"], config)
    with pytest.raises(DataError, match=r"--classes names 1 labels.*has 2"):
        class_ids(["a"], config, ["a"])


def test_what_cannot_be_read_is_named_and_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "5" / "cut.png").write_bytes(ALL[0].read_bytes()[:300])
    (folder / "7").rename(folder.parent / "7")
    (folder / "7").mkdir()
    assert main(["evaluate", "digits", str(folder), *EXACT]) == 1
    said = capsys.readouterr()
    assert f"{folder / '7'} has no picture: the class is left out" in said.err
    assert re.search(r"cut\.png: the image is damaged", said.err)
    assert "94.44%" in said.out  # 17 of 18: one is a 3 among the 8s


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda data: None, "is not there: give a folder of folders, or a .csv or .jsonl"),
        (lambda data: data.mkdir(), "has no folder for each label"),
        (lambda data: (data / "cat").mkdir(parents=True), "has no picture: read are .jpg"),
    ],
)
def test_a_wrong_folder_is_one_line(make: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data")
    assert main(["evaluate", "digits", str(tmp_path / "data"), *EXACT]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.csv", "file,class\na.png,1", "entry 1, must have a path and a label"),
        ("x.jsonl", '{"path": "a.png", "label": 1}\n[]', "entry 2, must have"),
        ("x.jsonl", "{", "cannot be read"),
        ("x.csv", "", "has no picture"),
    ],
)
def test_a_wrong_list_is_named(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=re.escape(words)):
        read_data(tmp_path / name)


def test_files_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"path": "gone.png", "label": "1"}}\n{{"path": "{ALL[2]}", "label": "1"}}\n')
    assert main(["evaluate", "digits", str(tmp_path / "x.jsonl"), *EXACT]) == 1
    assert "gone.png" in capsys.readouterr().err
