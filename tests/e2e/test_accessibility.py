"""axe-core finds no violation on the page, in any state and color scheme."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browser import MARKS, SEVEN, playwright, visiting
from tests.e2e.processes import Server

AXE = Path(sys.prefix) / "web" / "node_modules" / "axe-core" / "axe.min.js"
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
pytestmark = [
    *MARKS,
    pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed (make test installs it where npm is installed)"),
]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_has_no_accessibility_violations(server: Server, browser: Any, scheme: str) -> None:
    with visiting(browser, server.url, expect_errors=True, color_scheme=scheme) as visit:
        page = visit.wait_until_ready().page
        page.evaluate(AXE.read_text())
        assert_accessible(page, "first visit")
        visit.choose("7-1.png", SEVEN)
        visit.wait_for_results()
        assert_accessible(page, "result")
        page.click("#draw")
        page.focus("#view")
        page.hover("#layers button >> nth=1")
        assert_accessible(page, "drawing area, focus and hover")
        page.click("#feature-maps button >> nth=0")
        assert_accessible(page, "enlarged feature map")
        page.keyboard.press("Escape")
        visit.choose("paper.pdf", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n")
        playwright.expect(page.locator("#error")).to_contain_text("PDF")
        page.evaluate("document.getElementById('key-form').hidden = false")
        assert_accessible(page, "error")


def assert_accessible(page: Any, state: str) -> None:
    """Run every rule of axe-core, best practices and contrast included."""
    result = page.evaluate("tags => axe.run(document, {runOnly: {type: 'tag', values: tags}})", TAGS)
    assert len(result["passes"]) > 20, state
    found = [f"{violation['id']}: {node['html']}" for violation in result["violations"] for node in violation["nodes"]]
    assert not found, f"{state}: {found}"
    assert not result["incomplete"], f"{state}: axe-core cannot decide {result['incomplete']}"
