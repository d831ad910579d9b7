"""Hostile checkpoints: each ends in one line, quickly and in little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LONGEST_LINE, SECONDS, MEGABYTES = 6000, 2, 500


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hostile_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.model.checkpoints.hostile", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) > 100
    for outcome in outcomes:
        message = outcome["message"]
        assert outcome["status"] == 0, outcome
        assert message and "\n" not in message and len(message) < LONGEST_LINE and not message.startswith("TRACEBACK"), outcome
        assert outcome["seconds"] < SECONDS and outcome["megabytes"] < MEGABYTES, outcome
    assert sum(outcome["message"] == "loaded" for outcome in outcomes) < 0.1 * len(outcomes)
