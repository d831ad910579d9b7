"""One term for one thing: words that this project's text and names do not use, and the term to use instead.

`python -m tests.test_terms [PATH ...]` lists what it finds, by default in every file that git tracks.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SKIPPED = re.compile(
    r"\.(npz|png|safetensors|svg)$|^benchmarks/results/.*\.json$|^tests/kubernetes/schemas\.json$"
    r"|^requirements-image.*\.txt$|^tests/test_terms\.py$"
)
"""Data, hashes, and this file."""

TERMS = {
    r"doors?": "endpoint",
    r"ways? in": "endpoint",
    r"pictures?": "image",
    r"(?<!model )(?<!Model )(?<!model_)cards?": "GPU",
    r"cardsize|on_card": "GPU",
    r"(?:the|a|this|each|every|one|another) processors?(?! (?:file|config|class))": "CPU",
    r"kept": "cached, stored, selected",
    r"left[ _]out|leaves out|leave out": "disabled, omitted",
    r"what serves|who computes|what computes|whoever computes": "active, selected; engine process",
    r"said again|asks? again|asked again|says? again": "retry, resume, restart",
    r"goes on|go on|went on|gone on": "continue, resume",
    r"shows? right numbers|proves? itself|prove themselves": "self-check",
    r"wants?|wanted|wanting": "requires, requested, expected",
    r"under[ _]way": "in flight, running",
    r"turned away|turns away|turn away": "rejected",
    r"refus(?:e|es|ed|al|als|ing)(?<!connection refused)": "reject",
    r"front[ _-]ends?": "frontend, frontend process",
    r"deaths?|dies|died|dead|bur(?:y|ied|ial)|stillborn": "crash, exit",
    r"whoever|nobody|somebody": "the caller, the client, no client",
    r"patience": "timeout, retry budget",
    r"farewell": "flush",
    r"lives? of|born": "state",
    r"mend(?:s|ed|ing)?": "fix, repair",
}
"""Regular expression, of whole words and parts of names -> term."""

ALLOWED = (
    (
        re.compile(r"^(app/training|app/cli/train|tests/app/training|README|docs|examples)"),
        re.compile(r"patience", re.IGNORECASE),
    ),
    (re.compile(r"^app/batch/sources\.py$"), re.compile(r'"picture"')),
    (re.compile(r""), re.compile(r"connection refused|ECONNREFUSED|ConnectionRefused\w*|model[ _-]cards?|ModelCard\w*")),
)
"""Path and text: early stopping's patience, a name of Parquet columns, a model card, a connection that is refused."""

_NAME_PARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_")
_FOUND = {re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", re.IGNORECASE): term for pattern, term in TERMS.items()}


def tracked(*paths: str) -> list[Path]:
    """Files that git tracks below these paths."""
    listed = subprocess.run(["git", "ls-files", "-z", "--", *paths], cwd=ROOT, capture_output=True, check=True).stdout
    names = [name for name in listed.decode().split("\0") if name and not SKIPPED.search(name)]
    return [ROOT / name for name in names if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def findings(text: str, path: str = "") -> Iterator[tuple[int, str, str]]:
    """Line, what is in it, and what to write instead."""
    allowed = [what for where, what in ALLOWED if where.search(path)]
    for number, line in enumerate(text.splitlines(), 1):
        for what in allowed:
            line = what.sub(" ", line)
        apart = _NAME_PARTS.sub(" ", line)
        for pattern, term in _FOUND.items():
            match = pattern.search(line) or pattern.search(apart)
            if match:
                yield number, match[0], term


@pytest.mark.parametrize("text", ["the doors", "left_out = 1", "class PictureJob", "it is kept", "which wants a key"])
def test_a_banned_word_is_found_in_text_and_in_names(text: str) -> None:
    assert list(findings(text))


@pytest.mark.parametrize("text", ["the image processor", "ModelCard", "connection refused", "discard", "a wildcard", "adored"])
def test_a_term_of_the_field_is_not(text: str) -> None:
    assert not list(findings(text))


@pytest.mark.parametrize("path", tracked(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_has_a_banned_word(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = [f"{name}:{line}: {what!r}, write: {term}" for line, what, term in findings(path.read_text(), name)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    count = 0
    for file in tracked(*sys.argv[1:]):
        relative = str(file.relative_to(ROOT))
        for line, what, term in findings(file.read_text(), relative):
            print(f"{relative}:{line}: {what!r}, write: {term}")
            count += 1
    sys.exit(f"{count} found" if count else 0)
