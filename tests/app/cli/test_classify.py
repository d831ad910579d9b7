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


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_as_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(DIGITS), "--output", "jsonl", "--top-k", "2", *EXACT]) == 0
    said = lines(capsys.readouterr().out)
    assert [one["path"] for one in said] == ALL
    assert [one["predictions"][0]["label"] for one in said] == [Path(path).name[0] for path in ALL]
    assert {len(one["predictions"]) for one in said} == {2}


def test_files_patterns_and_what_is_named_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", ALL[3], str(DIGITS / "7-*.png"), ALL[3], "--output", "csv", "--top-k", "1", *EXACT]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert (Path(rows[0][0]).name[0], rows[0][1], rows[0][2]) == (Path(ALL[3]).name[0], "", Path(ALL[3]).name[0])
    assert [row[0] for row in rows] == list(dict.fromkeys([ALL[3], *sorted(str(path) for path in DIGITS.glob("7-*.png"))]))


def test_a_table_for_people_and_bad_files_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.png").write_bytes(Path(ALL[0]).read_bytes())
    (tmp_path / "bad.png").write_bytes(b"text")
    assert main(["classify", str(tmp_path), *EXACT]) == 1
    out, err = capsys.readouterr()
    assert "good.png" in out.replace("\n", "")
    assert "bad.png: the picture is text" in err
    assert "1 of 2 pictures could not be classified" in err


def test_a_picture_on_standard_input() -> None:
    words = [sys.executable, "-m", "dinat", "classify", "-", "--output", "jsonl", *EXACT]
    done = subprocess.run(words, input=(DIGITS / "7-1.png").read_bytes(), capture_output=True, timeout=60, check=True)
    assert lines(done.stdout.decode())[0]["predictions"][0]["label"] == "7"


@pytest.mark.parametrize("output", ["jsonl", "csv"])
def test_it_goes_on_where_it_stopped(output: str, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert main(["classify", str(DIGITS), "--output", output, "--to", str(whole), *EXACT]) == 0
    text = whole.read_text()
    half.write_text(text[: len(text) // 2])  # killed within a line
    kept = text[: len(text) // 2].count("\n")
    assert main(["classify", str(DIGITS), "--output", output, "--to", str(half), *EXACT]) == 0
    assert 0 < kept < len(ALL)
    names = [line.split(",")[0] if output == "csv" else json.loads(line)["path"] for line in half.read_text().splitlines()]
    assert names == ALL
    assert half.read_text().splitlines()[:kept] == text.splitlines()[:kept]  # the rest ran in other batches


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_maps_of_every_picture(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--features", "stage3,hidden_states", "--maps", str(tmp_path), "--maps-format", kind]
    assert main(["classify", *ALL[:2], *flags, *EXACT]) == 0
    for path in ALL[:2]:
        file = tmp_path / (path.lstrip("/") + f".{kind}")
        maps = dict(np.load(file)) if kind == "npz" else load_file(file)
        assert set(maps) == {"stage3", *(f"hidden_states.{i}" for i in range(4))}
        assert maps["stage3"].shape == (128, 4, 4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["/no/such/file.png"], "/no/such/file.png is not there"),
        ([ALL[0], "--to", "x"], "--to keeps jsonl or csv"),
        ([ALL[0], "--features", "stage1"], "one wants the other"),
        ([ALL[0], "--top-k", "11", *EXACT], "top_k is 11, allowed are 1 to 10"),
        ([ALL[0], "--features", "stage9", "--maps", "x", *EXACT], "features names stage9"),
        ([ALL[0], "--model", "/no/such", *EXACT], "'/no/such' does not exist"),
        ([ALL[0], "--max-batch", "0"], "DINAT_MAX_BATCH"),
        ([ALL[0], "--output", "jsonl", "--to", __file__], "holds something else"),
    ],
)
def test_what_cannot_be_done_is_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", *flags]) == 1
    assert words in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_it_quietly() -> None:
    words = [sys.executable, "-m", "dinat", "classify", *ALL, "--output", "csv", *EXACT]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, b"")


def test_an_empty_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(tmp_path)]) == 1
    assert "no picture in" in capsys.readouterr().err
