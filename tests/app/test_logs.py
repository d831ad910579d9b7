"""Logs of what clients send."""

import subprocess
import sys

SETUP = """
import logging
import sys

import structlog

from dinat.app.api.forms import parse_multipart
from dinat.app.errors import NoImage
from dinat.app.logs import configure_logs, flush_logs

"""


def log_of(code: str, *arguments: str) -> str:
    """Return what a process writes to standard error."""
    command = [sys.executable, "-c", SETUP + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_control_characters_do_not_reach_a_terminal() -> None:
    code = """
configure_logs("console")
structlog.get_logger().info("request", path=sys.argv[1])
flush_logs()
logging.getLogger("other").info("%s", sys.argv[1])
"""
    log = log_of(code, "/\x1b]0;title\x07\x9b2J\u202eend")
    assert log.count(r"/\x1b]0;title\x07\x9b2J\u202eend") == 2
    assert not {"\x1b]", "\x07", "\x9b", "\u202e"} & {log[i : i + n] for n in (1, 2) for i in range(len(log))}


def test_malformed_form_is_no_warning() -> None:
    code = """
configure_logs("json")
try:
    parse_multipart(b"--b\\r\\n\\0", "multipart/form-data; boundary=b", 1)
except NoImage as error:
    logging.getLogger("other").warning(error.detail)
"""
    (line,) = log_of(code).splitlines()
    assert "the form is malformed: Found invalid character" in line


def test_lines_of_an_event_are_preserved() -> None:
    code = """
configure_logs("console")
try:
    raise ValueError("first\\nsecond\\t\\x1b[2J")
except ValueError as error:
    structlog.get_logger().error("failed", detail=str(error))
    logging.getLogger("other").error("failed:\\n%s", error)
"""
    log = log_of(code)
    assert "failed:\nfirst\nsecond\t\\x1b[2J" in log
    assert "\x1b[2J" not in log
