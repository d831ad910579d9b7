"""Code blocks of README.md and docs/, and how to run them against a server.

A block that cannot run here has a comment before it, `<!-- not run: why -->`. In a console block, lines that start with "$ "
are commands, and the lines below are their output. In programs, `# ...` or `// ...` after or below a print is its output.
Fractions are compared to one digit, "..." stands for any text.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_REQUEST_ID = re.compile(r'("request_id":)"[^"]*"')
ADDRESS = "localhost:8000"
"""Of the server in all examples."""

TESTED_ELSEWHERE = {
    "html": "tests/e2e/test_page.py",
    "nginx": "tests/test_deploy.py, tests/e2e/test_traffic.py",
    "yaml": "tests/test_deploy.py, tests/kubernetes, tests/e2e/test_traffic.py",
    "deploy.md": "tests/image, tests/test_deploy.py",
    "scale.md": "tests/kubernetes, tests/e2e/test_ray.py, tests/e2e/test_proxies.py",
}
"""Languages and pages that require containers, clusters or proxies, and the tests that have them."""


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block.

    Attributes:
        page: File name.
        line: Line in the file, from 1.
        reason: Why it is not run; None if it is.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def code_blocks(page: Path) -> list[CodeBlock]:
    """Return the blocks of a page."""
    text = page.read_text()
    return [
        CodeBlock(page.name, text.count("\n", 0, found.start("code")), found["language"], found["code"], found["reason"])
        for found in _BLOCK.finditer(text)
    ]


def run(block: CodeBlock, address: str, folder: Path) -> None:
    """Run a block in a folder with the checkout's examples, and check its output.

    Raises:
        AssertionError: It fails, or prints something else than it says.
    """
    code = block.code.replace(ADDRESS, address)
    if block.language == "console":
        for command, expected in _commands(code):
            _check(["bash", "-eo", "pipefail", "-c", command], expected, folder)
    elif block.language == "python":
        _check([sys.executable, "-c", code], _stated_output(code, "#"), folder)
    elif block.language == "javascript":
        (folder / "example.mjs").write_text(code)
        _check(["node", "example.mjs"], _stated_output(code, "//"), folder)
    elif block.language == "java":
        (folder / "Classify.java").write_text(code)
        _check(["java", "Classify.java"], _stated_output(code, "//"), folder)
    else:
        raise AssertionError(f"{block}: no way to run {block.language}")


def _commands(code: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        count = next(n for n, line in enumerate(lines, 1) if not line.endswith("\\"))
        yield "\n".join(lines[:count]), "\n".join(lines[count:])


def _stated_output(code: str, comment: str) -> str:
    """Return what the comments beside or below prints say."""
    stated = re.findall(rf"(?:print|log|println)\(.*\);?(?:\n\s*|\s+){re.escape(comment)} (.+)", code)
    assert stated, f"no output is stated in:\n{code}"
    return "\n".join(stated)


def _check(command: list[str], expected: str, folder: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"PYTHONWARNINGS": "ignore", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
    if expected:
        pattern = ".*".join(re.escape(part) for part in _normalized(expected).split("..."))
        output = _normalized(done.stdout)
        assert re.search(pattern, output, re.DOTALL), f"{command[-1]}\nprints\n{output}\nexpected\n{_normalized(expected)}"


def _normalized(text: str) -> str:
    text = _REQUEST_ID.sub(r'\1"..."', text)
    text = _NUMBER.sub(lambda number: f"{float(number[0]):.1f}", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
