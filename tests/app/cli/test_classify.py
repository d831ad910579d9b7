import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dinat.app.cli import main
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


def test_image_on_standard_input() -> None:
    command = [sys.executable, "-m", "dinat", "classify", "-", "--output", "jsonl", *EXACT]
    done = subprocess.run(command, input=(DIGITS / "7-1.png").read_bytes(), capture_output=True, timeout=60, check=True)
    assert parse_lines(done.stdout.decode())[0]["predictions"][0]["label"] == "7"


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
