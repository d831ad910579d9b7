"""The web page in Debian's Chromium, which can reach no host but the service."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.processes import DIGITS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian's package of that name)"),
]
FLAGS = [
    "--no-sandbox",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]


SEVEN = (DIGITS / "7-1.png").read_bytes()


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium."""
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class Visit:
    """The open page, with the URLs of its requests and the messages of its errors and warnings."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url + "/")

    def wait_until_ready(self) -> "Visit":
        playwright.expect(self.page.locator("#status")).to_have_text("ready")
        return self

    def choose(self, name: str, data: bytes) -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": "application/octet-stream", "buffer": data})

    def wait_for_results(self) -> None:
        """Wait until all results of an image are shown, which may be an earlier one."""
        playwright.expect(self.page.locator("#layers button").first).to_be_visible()

    def wait_for_image(self, name: str) -> None:
        """Wait until the caption contains the name and all results are shown."""
        playwright.expect(self.page.locator("#caption")).to_contain_text(name)
        self.wait_for_results()

    def best_label(self) -> str:
        return str(self.page.locator("#labels li > span").first.inner_text())


@contextmanager
def visiting(browser: Any, url: str, expect_errors: bool = False, **settings: Any) -> Iterator[Visit]:
    """Open the page; at the end, assert that it had no errors, unless expected, and sent no request to another host."""
    context = browser.new_context(**settings)
    try:
        visit = Visit(context.new_page(), url)
        yield visit
        assert expect_errors or not visit.errors
        hosts = {urlsplit(request).netloc for request in visit.requests if not request.startswith("blob:")}
        assert hosts == {urlsplit(url).netloc}
    finally:
        context.close()
