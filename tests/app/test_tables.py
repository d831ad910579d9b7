import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinat.app.tables import TableError, find_column, normalize, read_lines, read_table, read_text

ROWS = [{"path": "é.png", "label": "süß"}, {"path": "b,c.png", "label": 'two\nlines "quoted" \u0085 \u2028'}]
CSV = 'path,label\né.png,süß\n"b,c.png","two\nlines ""quoted"" \u0085 \u2028"\n'


def rows(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read_table(path)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["x.csv", "X.CSV", "x.jsonl", "x.ndjson"])
def test_text_of_every_unicode_encoding(name: str, encoding: str, tmp_path: Path) -> None:
    is_csv = name.lower().endswith("csv")
    text = CSV if is_csv else "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert rows(tmp_path / name) == ROWS


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_utf16_of_either_byte_order(mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(mark + "é\n".encode("utf-16-le" if mark == b"\xff\xfe" else "utf-16-be"))
    assert read_text(tmp_path / "x.txt") == "é\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("path;label\na.png;1,5\n", "x.csv"),
        ("path\tlabel\na.png\t1,5\n", "x.csv"),
        ("path\tlabel\na.png\t1,5\n", "x.tsv"),
        ('path,label\na.png,"1,5"\n', "x.csv"),
        ("sep=;\npath;label\na.png;1,5\n", "x.csv"),
        ("path|label\r\na.png|1,5\r\n", "x.csv"),
        (" path ; label \na.png;1,5;\n;;\n\n", "x.csv"),
        ("path;label\ra.png;1,5\r", "x.csv"),
        ("\n \npath;label\na.png;1,5\n", "x.csv"),  # blank lines above the table
        (',,\npath,label\na.png,"1,5"\n', "x.csv"),  # an empty row of a spreadsheet
        ('"path", "label"\n"a.png", "1,5"\n', "x.csv"),
        ('path,label\na.png,"1,5"\n"",\n', "x.csv"),
        ('\u200bpath,label\ufeff\na.png,"1,5"\n', "x.csv"),  # files that were joined, each with a byte order mark
    ],
)
def test_delimiters_and_line_ends_of_spreadsheets(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert rows(tmp_path / name) == [{"path": "a.png", "label": "1,5"}]


def test_long_field(tmp_path: Path) -> None:
    caption = "x" * 200_000
    (tmp_path / "x.csv").write_text(f"path,caption\na.png,{caption}\n")
    assert rows(tmp_path / "x.csv") == [{"path": "a.png", "caption": caption}]


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        ("path,label\na.png,1\nb.png,süß\n".encode("cp1252"), "x.csv", r"line 3, is not UTF-8: save the file as UTF-8"),
        ("é\n".encode("utf-16")[:-1], "x.csv", "is not UTF-16"),
        (b"path,label\na,b.png,1\n", "x.csv", r"line 2, has 3 values, its header has 2: write a value with ',' in quotes"),
        (b'path,label\n\n"a\nb",1,2\n', "x.csv", "line 4, has 3 values"),
        (b"path,label,label\na,1,2\n", "x.csv", "has the column 'label' twice"),
        (b'{"a": 1}\n[1]\n', "x.jsonl", "line 2, must be an object, got list"),
        (b'{"a": 1}\n\n{"a"\n', "x.jsonl", "line 3, is not JSON"),
        (b"[" * 200_000, "x.jsonl", "line 1, is (nested too deeply|not JSON)"),
        (b"\xef\xbb\xbf{", "x.jsonl", "line 1, is not JSON: Expecting property name"),
    ],
)
def test_malformed_row_is_named(data: bytes, name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TableError, match=message):
        rows(tmp_path / name)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff\xfe\0\0", b"sep=;\n", b'path,label\n"', b'{"path": ']),
    st.binary(max_size=60) | st.text(max_size=40).map(str.encode),
    st.sampled_from(["x.csv", "x.tsv", "x.jsonl"]),
)
def test_any_file_is_read_or_named(tmp_path: Path, head: bytes, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(head + data)
    try:
        assert all(isinstance(row, dict) for row in rows(tmp_path / name))
    except TableError as error:
        assert "\n" not in str(error).replace(str(tmp_path), "")
    try:
        read_lines(tmp_path / name)
    except TableError as error:
        assert str(error).startswith(str(tmp_path / name))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lines_are_normalized(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes("0\r\ncafe\u0301 \r\nwith\u0085mark\r\n\r\n\n".encode(encoding))
    assert read_lines(tmp_path / "labels.txt") == ["0", "café", "with\u0085mark"]


def test_blank_line_between_others_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\n\nb\n")
    with pytest.raises(TableError, match=r"line 2, is blank"):
        read_lines(tmp_path / "labels.txt")


def test_column_is_found_in_any_case() -> None:
    assert find_column(["Label", " File_Name"], ("path", "file_name")) == " File_Name"
    assert find_column(["Label"], ("path", "file_name")) is None
    assert normalize(" e\u0301\n") == "é"


def test_values_that_a_row_lacks_are_empty(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("path,label,note\na.png\n")
    (row,) = read_table(tmp_path / "x.csv")
    assert row.values == {"path": "a.png", "label": "", "note": ""}


def test_column_is_found_with_any_separator_of_words() -> None:
    assert [find_column([name], ["file_name"]) for name in ("File Name", "file-name", " FILE_NAME ")] == [
        "File Name",
        "file-name",
        " FILE_NAME ",
    ]
