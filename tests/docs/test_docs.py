"""README.md and docs/: every example runs, the reference is current, and the site has no broken link."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs import code_blocks, configuration
from tests.docs.code_blocks import PAGES, ROOT, CodeBlock
from tests.e2e.processes import Server

BLOCKS = [block for page in PAGES for block in code_blocks.code_blocks(page)]
TO_RUN = [
    block for block in BLOCKS if block.reason is None and not {block.language, block.page} & set(code_blocks.TESTED_ELSEWHERE)
]
FROM_OTHER_HOSTS = re.compile(
    r"""<(?:script|img|iframe)\b[^>]* src="?(?:https?:)?//[^>]*|<link\b[^>]* rel="?(?:stylesheet|preconnect)[^>]*//[^>]*"""
    r"""|url\(["']?(?:https?:)?//[^)]*"""
)
TOOLS = {"javascript": "node", "java": "java"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples read from the checkout."""
    path = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "model", "README.md"):
        (path / name).symlink_to(ROOT / name)
    return path


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(240)
@pytest.mark.parametrize("block", TO_RUN, ids=str)
def test_example_runs_and_prints_what_it_says(block: CodeBlock, server: Server, folder: Path) -> None:
    if block.language in TOOLS and shutil.which(TOOLS[block.language]) is None:
        pytest.skip(f"{TOOLS[block.language]} is not installed")
    code_blocks.run(block, server.url.removeprefix("http://"), folder)


def test_one_example_of_each_kind_is_found() -> None:
    assert {"console", "python", "javascript", "java"} <= {block.language for block in TO_RUN}
    assert len(TO_RUN) > 25
    assert all(block.reason for block in BLOCKS if block.language == "go")


def test_a_wrong_output_fails(folder: Path) -> None:
    right = CodeBlock("page", 1, "console", "$ echo 1.26\n1.30\n$ echo a b c\na ... c\n", None)
    code_blocks.run(right, "", folder)
    for wrong in ("$ echo 1.26\n1.5\n", "$ echo a b\na ... c\n", "$ false\n"):
        with pytest.raises(AssertionError):
            code_blocks.run(CodeBlock("page", 1, "console", wrong, None), "", folder)


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120


def test_configuration_page_is_current() -> None:
    assert configuration.PAGE.read_text() == configuration.page(), "run python -m tests.docs.configuration"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_site_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "python" / "index.html").read_text()
    for name in ("DinatConfig", "DinatForImageClassification", "neighborhood_attention", "DinatClient"):
        assert f'id="dinat.{name}' in page or f'id="dinat.attention.{name}' in page
    for path in (tmp_path / "site").rglob("*"):
        if path.suffix in (".html", ".css"):
            text = path.read_text()
            assert not FROM_OTHER_HOSTS.findall(text), path
            assert path.suffix == ".css" or "mermaid" not in text, (
                f"{path} has a diagram that requires a script of another host"
            )
