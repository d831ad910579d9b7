"""Text files that people write: CSV and JSON Lines tables, and lists with one entry a line."""

import csv
import json
import re
import unicodedata
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from dinat.model.errors import DinatError

JSON_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES)
"""Suffixes, in lower case, of tables."""

MAX_FIELD_BYTES = 16 * 2**20
"""Maximum size of a field of a CSV file, and of a line of JSON."""

DELIMITERS = ",;\t|"

_BOMS = (
    (BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark begins like it
    (BOM_UTF32_BE, "utf-32"),
    (BOM_UTF8, "utf-8-sig"),
    (BOM_UTF16_LE, "utf-16"),
    (BOM_UTF16_BE, "utf-16"),
)


class TableError(DinatError):
    """A text file that cannot be read."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        line: Number of its last line in the file, from 1.
        values: Its values by column name. Those of CSV are text.
    """

    line: int
    values: dict[str, Any]


INVISIBLE = "\u200b\u2060\ufeff"
"""Characters of no width, which web pages, and files that were joined, have beside words."""


def normalize(text: str) -> str:
    """Return text as it is compared: without white space around it, composed (Unicode NFC; file names of macOS are NFD)."""
    return unicodedata.normalize("NFC", text.strip().strip(INVISIBLE).strip())


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or UTF-16 or UTF-32 with a byte order mark. Raises TableError, OSError."""
    with _opened(path) as file:
        return file.read()


def read_lines(path: Path) -> list[str]:
    """Read a file with one entry a line, normalized, without blank lines at its end.

    Raises:
        TableError: A line is blank, or the file is not text.
        OSError: The file cannot be read.
    """
    with _opened(path) as file:
        entries = [normalize(line) for line in file]
    while entries and not entries[-1]:
        entries.pop()
    if "" in entries:
        raise TableError(f"{path}, line {entries.index('') + 1}, is blank: write one entry a line")
    return entries


def read_table(path: Path) -> Iterator[Row]:
    """Yield the rows of a .csv or .tsv file, whose first line names the columns, or the objects of a .jsonl file.

    The delimiter of a .csv file may be a comma, semicolon, tab or bar: the most frequent one in its first line. Rows without
    values are omitted, and values that a row lacks are empty.

    Raises:
        TableError: A row is malformed, or the file is not text. The message has the number of the line.
        OSError: The file cannot be read.
    """
    with _opened(path) as file:
        yield from _json_rows(path, file) if path.suffix.lower() in JSON_SUFFIXES else _csv_rows(path, file)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Open a text file with the encoding of its byte order mark; UTF-8 without one."""
    with path.open("rb") as file:
        head = file.read(4)
    encoding = next((name for mark, name in _BOMS if head.startswith(mark)), "utf-8")
    try:
        with path.open(encoding=encoding, newline="") as text:
            yield text
    except UnicodeError:  # UTF-16 with an odd number of bytes is a plain UnicodeError
        with path.open("rb") as file:
            line = next((number for number, content in enumerate(file, 1) if not is_utf8(content)), 1)
        name = encoding.removesuffix("-sig").upper()
        raise TableError(f'{path}, line {line}, is not {name}: save the file as UTF-8 (in Excel: "CSV UTF-8")') from None


def is_utf8(data: bytes) -> bool:
    """Return whether bytes are text in UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _csv_rows(path: Path, file: TextIO) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD_BYTES)
    delimiter, skipped = _delimiter(path, file)
    reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
    try:
        header = [normalize(name) for name in next(filter(any, reader), [])]
        for name in filter(None, header):
            if header.count(name) > 1:
                raise TableError(f"{path} has the column {name!r} twice: names of columns must differ")
        for values in reader:
            if not any(value.strip() for value in values):
                continue
            if any(value.strip() for value in values[len(header) :]):
                raise TableError(
                    f"{path}, line {reader.line_num + skipped}, has {len(values)} values, its header has {len(header)}: "
                    f"write a value with {delimiter!r} in quotes"
                )
            yield Row(reader.line_num + skipped, dict(zip_longest(header, values[: len(header)], fillvalue="")))
    except csv.Error as error:
        raise TableError(f"{path}, line {reader.line_num + skipped}: {error}") from None


def _delimiter(path: Path, file: TextIO) -> tuple[str, int]:
    """Return the delimiter, and the number of lines read: Excel may write it in a first line of its own, as in "sep=;"."""
    first = next((line for line in iter(lambda: file.readline(MAX_FIELD_BYTES), "") if line.strip()), "")
    if first.lower().startswith("sep=") and len(first.strip()) == 5:
        return first[4], 1
    file.seek(0)
    if path.suffix.lower() == ".tsv":
        return "\t", 0
    return max(DELIMITERS, key=first.count), 0


def _json_rows(path: Path, file: TextIO) -> Iterator[Row]:
    number = 0
    while line := file.readline(MAX_FIELD_BYTES):
        number += 1
        if not line.strip():
            continue
        if len(line) == MAX_FIELD_BYTES:
            raise TableError(f"{path}, line {number}, is longer than {MAX_FIELD_BYTES:,} characters")
        try:
            values = json.loads(line)
        except RecursionError:
            raise TableError(f"{path}, line {number}, is nested too deeply") from None
        except ValueError as error:
            raise TableError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise TableError(f"{path}, line {number}, must be an object, got {type(values).__name__}: write one object a line")
        yield Row(number, values)


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of these names that is a column, whatever its case and with any of space, - and _; None without one."""
    by_name = {re.sub(r"[\s-]", "_", column.strip().lower()): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)
