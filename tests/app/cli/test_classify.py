import csv
import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dinat.app.cli import main
from dinat.model import DinatForImageClassification, DinatImageProcessor
from tests.app.conftest import DIGITS

ALL = sorted(str(path) for path in DIGITS.glob("*.png"))
EXACT = ["--runtime", "torch", "--precision", "fp32"]


def parse_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_folder_as_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(DIGITS), "--output", "jsonl", "--top-k", "2", *EXACT]) == 0
    results = parse_lines(capsys.readouterr().out)
    assert [result["path"] for result in results] == ALL
    assert [result["predictions"][0]["label"] for result in results] == [Path(path).name[0] for path in ALL]
    assert {len(result["predictions"]) for result in results} == {2}


def test_files_and_patterns_are_classified_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", ALL[3], str(DIGITS / "7-*.png"), ALL[3], "--output", "csv", "--top-k", "1", *EXACT]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert (Path(rows[0][0]).name[0], rows[0][1], rows[0][2]) == (Path(ALL[3]).name[0], "", Path(ALL[3]).name[0])
    assert [row[0] for row in rows] == list(dict.fromkeys([ALL[3], *sorted(str(path) for path in DIGITS.glob("7-*.png"))]))


def test_table_output_lists_failed_images_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.png").write_bytes(Path(ALL[0]).read_bytes())
    (tmp_path / "bad.png").write_bytes(b"text")
    assert main(["classify", str(tmp_path), *EXACT]) == 1
    out, err = capsys.readouterr()
    assert "good.png" in out.replace("\n", "")
    assert "bad.png: the image is text" in err
    assert "1 of 2 images could not be classified" in err


def test_control_characters_of_names_and_labels_do_not_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["\x1b[31mred\x1b]0;title\x07.png", "one\x9b2J\nline\x7f\u202e.png"]
    network = DinatForImageClassification.from_pretrained("digits")
    network.config.id2label[7] = "seven :cat: [x]\x1b[2J"
    network.save_pretrained(tmp_path / "model")
    DinatImageProcessor.from_pretrained("digits").save_pretrained(tmp_path / "model")
    for label, name in (("good", names[0]), ("bad", names[1])):
        (tmp_path / label).mkdir()
        (tmp_path / label / name).write_bytes((DIGITS / "7-1.png").read_bytes() if label == "good" else b"text")
    flags = [*EXACT, "--model", str(tmp_path / "model")]
    assert main(["classify", "good", "bad", *flags]) == 1
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps({"path": str(tmp_path / "good" / names[0]), "label": "seven :cat: [x]\x1b[2J"}) + "\n")
    assert main(["evaluate", str(tmp_path / "model"), str(table), *EXACT]) == 0
    assert main(["classify", f"no/{names[0]}", *EXACT]) == 1
    out, err = capsys.readouterr()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out + err)
    assert r"\x1b[31mred\x1b]0;title\x07.png" in out and out.count(r"seven :cat: [x]\x1b[2J") >= 2
    assert r"one\x9b2J\nline\x7f\u202e.png: the image is text" in err
    assert err.splitlines()[-1] == r"dinat: no/\x1b[31mred\x1b]0;title\x07.png does not exist"


def test_image_on_standard_input() -> None:
    command = [sys.executable, "-m", "dinat", "classify", "-", "--output", "jsonl", *EXACT]
    done = subprocess.run(command, input=(DIGITS / "7-1.png").read_bytes(), capture_output=True, timeout=60, check=True)
    assert parse_lines(done.stdout.decode())[0]["predictions"][0]["label"] == "7"


def test_standard_input_without_an_end_is_rejected() -> None:
    command = [sys.executable, "-m", "dinat", "classify", "-", *EXACT]
    environment = os.environ | {"DINAT_MAX_UPLOAD_BYTES": "1000"}
    with Path("/dev/zero").open("rb") as endless:
        done = subprocess.run(command, stdin=endless, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert "dinat: -: standard input has more than 1,000 bytes: save the image to a file" in done.stderr


@pytest.mark.parametrize("output", ["jsonl", "csv"])
def test_incomplete_output_file_is_resumed(output: str, tmp_path: Path) -> None:
    complete, half = tmp_path / "complete", tmp_path / "half"
    assert main(["classify", str(DIGITS), "--output", output, "--to", str(complete), *EXACT]) == 0
    text = complete.read_text()
    half.write_text(text[: len(text) // 2])  # as if killed in the middle of a line
    num_lines = text[: len(text) // 2].count("\n")
    assert main(["classify", str(DIGITS), "--output", output, "--to", str(half), *EXACT]) == 0
    assert 0 < num_lines < len(ALL)
    names = [line.split(",")[0] if output == "csv" else json.loads(line)["path"] for line in half.read_text().splitlines()]
    assert names == ALL
    # the scores of the other lines may differ in the last digits: they ran in other batches
    assert half.read_text().splitlines()[:num_lines] == text.splitlines()[:num_lines]


@pytest.mark.parametrize("output", ["jsonl", "csv"])
def test_images_with_an_error_are_retried(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, to = tmp_path / "images", tmp_path / "labels"
    folder.mkdir()
    names = ["7.png", "two\nlines.png", os.fsdecode(b"caf\xe9.png"), "[red] a,b.png"]
    for name in names:
        (folder / name).write_bytes(b"text")
    (folder / names[0]).write_bytes((DIGITS / "7-1.png").read_bytes())
    command = ["classify", str(folder), "--output", output, "--to", str(to), *EXACT]

    def labels() -> dict[str, str]:
        if output == "csv":
            with to.open(newline="") as file:
                return {row[0]: row[2] if len(row) > 2 else row[1] for row in csv.reader(file)}
        rows = parse_lines(to.read_text())
        return {row["path"]: row.get("error") or row["predictions"][0]["label"] for row in rows}

    assert main(command) == 1
    assert [value[:17] for value in labels().values()].count("the image is text") == 3
    for name in names[1:]:
        (folder / name).write_bytes((DIGITS / "3-1.png").read_bytes())
    assert main(command) == 0
    expected = {f"{folder}/{name}".replace("\udce9", "\\udce9"): "3" for name in names[1:]}
    assert labels() == {str(folder / "7.png"): "7"} | expected
    size = to.stat().st_size
    assert main(command) == 0
    assert to.stat().st_size == size


@pytest.mark.parametrize(("written", "output"), [("jsonl", "csv"), ("csv", "jsonl")])
def test_output_of_the_other_format_is_not_overwritten(
    written: str, output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "labels"
    assert main(["classify", *ALL[:2], "--output", written, "--to", str(to), *EXACT]) == 0
    before = to.read_bytes()
    assert main(["classify", ALL[2], "--output", output, "--to", str(to), *EXACT]) == 1
    assert f"exists and is not {output} output of dinat classify" in capsys.readouterr().err
    assert to.read_bytes() == before


def test_csv_that_ends_within_quotes_is_resumed(tmp_path: Path) -> None:
    to = tmp_path / "labels.csv"
    to.write_text(f'{ALL[0]},,0,1\n"two\nlin')
    assert main(["classify", *ALL[:2], "--output", "csv", "--to", str(to), *EXACT]) == 0
    with to.open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ALL[:2]


@pytest.mark.parametrize("output", ["table", "csv", "jsonl"])
def test_names_of_any_encoding_are_written(output: str, tmp_path: Path) -> None:
    for name in (b"caf\xe9.png", "süß [bold].png".encode()):
        (tmp_path / os.fsdecode(name)).write_bytes((DIGITS / "7-1.png").read_bytes())
    command = [sys.executable, "-m", "dinat", "classify", str(tmp_path), "--output", output, *EXACT]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, timeout=60, check=True, env=environment)
    text = done.stdout.decode()
    assert "caf\\udce9.png".replace("\\", "\\\\" if output == "jsonl" else "\\") in text
    assert "\\xfc\\xdf [bold].png".replace("\\x", "\\u00" if output == "jsonl" else "\\x") in text


@pytest.mark.parametrize("file_format", ["npz", "safetensors"])
def test_feature_maps_are_saved_per_image(file_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--features", "stage3,hidden_states", "--maps", str(tmp_path), "--maps-format", file_format]
    assert main(["classify", *ALL[:2], *flags, *EXACT]) == 0
    for path in ALL[:2]:
        file = tmp_path / (path.lstrip("/") + f".{file_format}")
        feature_maps = dict(np.load(file)) if file_format == "npz" else load_file(file)
        assert set(feature_maps) == {"stage3", *(f"hidden_states.{i}" for i in range(4))}
        assert feature_maps["stage3"].shape == (128, 4, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["/no/such/file.png"], "/no/such/file.png does not exist"),
        ([ALL[0], "--to", "x"], "--to writes jsonl or csv"),
        ([ALL[0], "--features", "stage1"], "require each other"),
        ([ALL[0], "--top-k", "11", *EXACT], "top_k must be between 1 and 10, got 11"),
        ([ALL[0], "--features", "stage9", "--maps", "x", *EXACT], "features must be among stem"),
        ([ALL[0], "--model", "/no/such", *EXACT], "'/no/such' does not exist"),
        ([ALL[0], "--max-batch", "0"], "DINAT_MAX_BATCH"),
        ([ALL[0], "--output", "jsonl", "--to", __file__], "is not jsonl output of dinat classify"),
    ],
)
def test_user_error_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_closed_pipe_ends_without_traceback() -> None:
    command = [sys.executable, "-m", "dinat", "classify", *ALL, "--output", "csv", *EXACT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (1, b"")


def test_empty_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(tmp_path)]) == 1
    assert "no image in" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["csv", "jsonl"])
def test_full_disk_names_the_file(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", ALL[0], "--output", output, "--to", "/dev/full", *EXACT]) == 1
    assert capsys.readouterr().err.splitlines() == ["dinat: [Errno 28] No space left on device: '/dev/full'"]


class _Full(io.StringIO):
    """A stream to a full disk."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_of_standard_output_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", _Full())
        assert main(["classify", ALL[0], "--output", "csv", *EXACT]) == 1
    assert capsys.readouterr().err.splitlines() == ["dinat: [Errno 28] No space left on device: 'standard output'"]
