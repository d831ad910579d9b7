"""Selections of autotune, and the candidates that hung, stored for later processes in one folder."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Selection:
    """The implementation of a step, and the measurements that led to it.

    Attributes:
        backend: Name of the selected candidate.
        seconds: Median time of each timed candidate.
        errors: Relative error of each checked candidate.
        disabled: Reason for each disabled candidate.
    """

    backend: str
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    disabled: dict[str, str] = field(default_factory=dict)


def read_selections(file: Path | None) -> dict[str, Selection]:
    """Return the stored selections by file_key; none if the file does not exist or cannot be read."""
    try:
        rows = json.loads(file.read_text()) if file is not None else {}
        return {str(key): Selection(row["backend"], dict(row["seconds"]), dict(row["errors"])) for key, row in rows.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def write_selections(file: Path, selected: dict[str, Selection]) -> None:
    """Add selections, by file_key, to a file. Those with disabled candidates are not stored: the cause may be temporary.

    Raises:
        OSError: The file cannot be written.
    """
    rows = read_selections(file) | {key: selection for key, selection in selected.items() if not selection.disabled}
    _write_json(file, {key: asdict(selection) for key, selection in rows.items()})


def _write_json(file: Path, rows: dict[str, Any]) -> None:
    """Replace a file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{time.monotonic_ns()}")
    temporary.write_text(json.dumps(rows, indent=1))
    temporary.replace(file)


def hung_file(file: Path) -> Path:
    """Return the file of the candidates that hung, beside that of the selections. Deleted, they are tried again."""
    return file.with_name(f"{file.stem}-hung.json")


def read_hung(file: Path | None) -> dict[str, str]:
    """Return the candidates that hung in an earlier process, by kind of step and name, with the reason."""
    try:
        rows = {} if file is None else json.loads(hung_file(file).read_text())
        return {str(name): str(why) for name, why in rows.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def write_hung(file: Path | None, rows: dict[str, str]) -> bool:
    """Add candidates to those that hung. Return whether that succeeded."""
    if file is None:
        return False
    try:
        _write_json(hung_file(file), read_hung(file) | rows)
    except OSError:
        return False
    return True
