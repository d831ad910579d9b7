"""The page in a real browser: Debian's Chromium, with no host but the service within its reach."""

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.e2e.processes import DIGITS, Server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian's package of that name)")

WEB = Path(__file__).parents[2] / "app" / "web"
SEVEN = (DIGITS / "7-1.png").read_bytes()
FLAGS = [
    "--no-sandbox",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class Visit:
    """The page, open and ready; what it asked for, and what went wrong in it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.faults: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.faults.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url + "/")

    def ready(self) -> "Visit":
        playwright.expect(self.page.locator("#status")).to_have_text("ready")
        return self

    def choose(self, name: str, data: bytes) -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": "application/octet-stream", "buffer": data})

    def settled(self) -> None:
        """Wait for the last of what a picture brings, of whatever picture it was."""
        playwright.expect(self.page.locator("#layers button").first).to_be_visible()

    def labelled(self, name: str) -> None:
        """Wait until what is shown is the picture of that name, and all that belongs to it."""
        playwright.expect(self.page.locator("#caption")).to_contain_text(name)
        self.settled()

    def best(self) -> str:
        return str(self.page.locator("#labels li > span").first.inner_text())


@contextmanager
def visiting(browser: Any, url: str, faults: bool = False, **settings: Any) -> Iterator[Visit]:
    """A visit that is asserted to go without a fault, unless faults are what it is about, and to ask no other host."""
    context = browser.new_context(**settings)
    try:
        visit = Visit(context.new_page(), url)
        yield visit
        assert faults or not visit.faults
        here = urlsplit(url).netloc
        assert {urlsplit(one).netloc for one in visit.requests if not one.startswith("blob:")} == {here}
    finally:
        context.close()


def test_a_picture_that_is_chosen_is_classified(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        visit.ready().choose("7-1.png", SEVEN)
        visit.labelled("7-1.png")
        told = httpx.post(f"{server.url}/classify", content=SEVEN).json()["predictions"]
        rows = visit.page.locator("#labels li").all_inner_texts()
        assert [row.split("\n") for row in rows] == [[one["label"], f"{100 * one['score']:.1f} %"] for one in told]
        widths = visit.page.eval_on_selector_all(".track > span", "bars => bars.map(bar => parseFloat(bar.style.width))")
        np.testing.assert_allclose(widths, [100 * one["score"] for one in told], rtol=1e-4)
        parts = visit.page.locator("#times dt").all_inner_texts()
        assert parts == ["decode", "queue", "compute", "encode", "other", "in the service", "and the way there and back"]


def test_a_picture_is_dropped_and_pasted(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.ready().page
        for event, property, name in [("drop", "dataTransfer", "dropped.png"), ("paste", "clipboardData", "pasted.png")]:
            page.evaluate(
                """([event, property, name, bytes]) => {
                    const files = new DataTransfer();
                    files.items.add(new File([new Uint8Array(bytes)], name));
                    const happened = event === "drop" ? new DragEvent(event, {[property]: files, bubbles: true})
                        : new ClipboardEvent(event, {[property]: files, bubbles: true});
                    document.body.dispatchEvent(happened);
                }""",
                [event, property, name, list(SEVEN)],
            )
            visit.labelled(name)
            assert visit.best() == "7"


def test_the_button_pastes_what_the_clipboard_has(server: Server, browser: Any) -> None:
    with visiting(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as visit:
        page = visit.ready().page
        page.evaluate(
            """async bytes => navigator.clipboard.write([new ClipboardItem(
                {"image/png": new Blob([new Uint8Array(bytes)], {type: "image/png"})})])""",
            list(SEVEN),
        )
        page.click("#paste")
        visit.labelled("pasted.png")
        assert visit.best() == "7"


def test_the_camera_takes_a_picture(server: Server, browser: Any) -> None:
    with visiting(browser, server.url, permissions=["camera"]) as visit:
        page = visit.ready().page
        page.click("#camera")
        playwright.expect(page.locator("#video")).to_have_js_property("videoWidth", 640)
        page.click("#shoot")
        visit.labelled("camera.png")
        assert page.evaluate("document.getElementById('video').srcObject") is None
        with page.expect_download() as download:  # it is in no folder yet
            page.click("#save a")
        with Image.open(download.value.path()) as picture:
            assert picture.size == (640, 480)


def test_a_digit_that_is_drawn_is_read(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.ready().page
        page.click("#draw")
        place = page.locator("#pad").bounding_box()
        ring = [(128 + 52 * np.sin(turn), 128 - 88 * np.cos(turn)) for turn in np.linspace(0, 2 * np.pi, 24)]
        for i, (x, y) in enumerate(ring):
            page.mouse.move(place["x"] + x, place["y"] + y)
            if i == 0:
                page.mouse.down()
        page.mouse.up()
        visit.labelled("drawing.png")
        assert visit.best() == "0"


def test_a_digit_is_drawn_by_keys(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.ready().page
        page.focus("#draw")
        page.keyboard.press("Enter")
        page.keyboard.press("Space")
        for _ in range(16):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        visit.labelled("drawing.png")
        assert visit.best() == "1"


def test_maps_are_those_of_the_service_and_large_on_a_click(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.ready().page
        visit.choose("7-1.png", SEVEN)
        visit.settled()
        sizes = page.eval_on_selector_all("#maps canvas", "all => all.map(one => [one.width, one.height])")
        assert sizes == [[16, 16]] * 4 + [[8, 8]] * 2 + [[4, 4]] * 2
        page.click("#maps button >> nth=0")
        assert page.locator("#large").is_visible()
        answer = httpx.post(f"{server.url}/features?features=stem", content=SEVEN, headers={"Accept": "application/x-npy"})
        magnitude = np.abs(np.load(io.BytesIO(answer.content))).mean(0)
        shown = re.findall(r"[\d.]+(?= \()", page.locator("#large-text").inner_text())
        np.testing.assert_allclose([float(one) for one in shown], [magnitude.min(), magnitude.max()], rtol=5e-3)
        page.keyboard.press("Escape")
        assert page.locator("#large").is_hidden()


def test_principal_components_are_those_of_numpy(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        channels, height, width = 24, 9, 13
        maps = np.random.default_rng(0).normal(size=(channels, height * width)).astype(np.float32)
        maps *= np.linspace(3, 1, channels, dtype=np.float32)[:, None] ** 2
        components = visit.page.evaluate(
            """async ([shape, values]) => {
                const {principalComponents} = await import("/web/maps.js");
                return principalComponents({shape, values: new Float32Array(values)}).map(one => [...one]);
            }""",
            [[channels, height, width], maps.ravel().tolist()],
        )
        centred = maps - maps.mean(1, keepdims=True)
        wanted = np.linalg.svd(centred, full_matrices=False)
        for component, direction, size in zip(components, wanted[2], wanted[1], strict=False):
            assert abs(np.dot(component, direction)) / size == pytest.approx(1, abs=1e-3)


def test_the_point_under_the_pointer_shows_what_it_sees(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.ready().page
        visit.choose("7-1.png", SEVEN)
        visit.settled()
        told = httpx.post(f"{server.url}/attention", content=SEVEN).json()["layers"]
        captions = page.locator("#layers span").all_inner_texts()
        assert captions == [f"{one['stage']}.{one['layer']}, dilation {one['dilation']}" for one in told]
        before = page.evaluate("document.getElementById('view').toDataURL()")
        box = page.locator("#view").bounding_box()
        with page.expect_response("**/attention?*"):
            page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.9)
        playwright.expect(page.locator("#commands")).to_contain_text("y=0.90")
        assert page.evaluate("document.getElementById('view').toDataURL()") != before
        page.click("#layers button >> nth=1")  # dilation 4: nine keys, four apart
        assert page.locator("#layers button >> nth=1").get_attribute("aria-pressed") == "true"
        playwright.expect(page.locator("#view")).to_have_attribute("aria-label", re.compile("dilation 4: 9 keys"))
        mean = page.evaluate("document.getElementById('view').toDataURL()")
        page.select_option("#head", "0")  # the only head there is in stage 1
        assert page.evaluate("document.getElementById('view').toDataURL()") == mean


def test_weights_of_a_head_and_their_mean(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        layer = httpx.post(f"{server.url}/attention", content=SEVEN).json()["layers"][-1]
        weights = visit.page.evaluate(
            """async layer => {
                const {weightsOf} = await import("/web/neighborhoods.js");
                return [weightsOf(layer, null), weightsOf(layer, 2)];
            }""",
            layer,
        )
        np.testing.assert_allclose(weights[0], np.mean(layer["weights"], 0), rtol=1e-6)
        np.testing.assert_array_equal(weights[1], layer["weights"][2])


def test_the_point_moves_by_keys(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.ready().page
        visit.choose("7-1.png", SEVEN)
        visit.settled()
        page.focus("#view")
        page.keyboard.press("ArrowLeft")  # from column 8 of 16 to the middle of column 7
        playwright.expect(page.locator("#commands")).to_contain_text("x=0.4688")


def test_the_curl_lines_do_what_they_say(server: Server, browser: Any, tmp_path: Path) -> None:
    with visiting(browser, server.url) as visit:
        name = "it's a 7.png"
        visit.ready().choose(name, SEVEN)
        visit.labelled(name)
        (tmp_path / name).write_bytes(SEVEN)
        lines = visit.page.locator("#commands code").all_inner_texts()
        assert len(lines) == 3
        outputs = [
            subprocess.run(f"{line} -sS", shell=True, cwd=tmp_path, capture_output=True, check=True, timeout=30)
            for line in lines
        ]
        assert json.loads(outputs[0].stdout)["predictions"][0]["label"] == "7"
        assert (tmp_path / "maps.safetensors").stat().st_size > 4 * (2 * 32 * 256 + 64 * 64 + 128 * 16)
        assert len(json.loads(outputs[2].stdout)["layers"]) == 6


def test_what_is_wrong_is_said_in_words(server: Server, browser: Any) -> None:
    with visiting(browser, server.url, faults=True) as visit:
        visit.ready().choose("7-1.png", SEVEN)
        visit.settled()
        visit.choose("paper.pdf", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n")
        playwright.expect(visit.page.locator("#error")).to_contain_text("PDF")
        assert visit.page.locator("#labels li").count() == 0  # nothing of the picture before stands beside it
        assert visit.page.locator("#layers-section").is_hidden()
        visit.choose("7-1.png", SEVEN)
        visit.settled()
        assert visit.page.locator("#error").is_hidden()


def test_a_format_that_the_browser_cannot_show_is_classified_all_the_same(server: Server, browser: Any) -> None:
    tiff = io.BytesIO()
    Image.open(io.BytesIO(SEVEN)).save(tiff, "TIFF")
    with visiting(browser, server.url) as visit:
        visit.ready().choose("scan.tiff", tiff.getvalue())
        visit.labelled("which this browser cannot show")
        assert visit.best() == "7"


def test_a_key_is_asked_for_where_one_is_wanted(browser: Any) -> None:
    with Server(api_keys="secret") as server, visiting(browser, server.url, faults=True) as visit:
        page = visit.page
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#error")).to_contain_text("key")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#model")).to_contain_text("digits")
        visit.choose("7-1.png", SEVEN)
        visit.settled()
        assert visit.best() == "7"
        assert "secret" not in page.locator("#commands").inner_text()
        assert "X-API-Key: $KEY" in page.locator("#commands").inner_text()


def test_a_service_that_has_ended_is_missed_in_words(browser: Any) -> None:
    with Server() as server, visiting(browser, server.url, faults=True) as visit:
        visit.ready()
        server.stop()
        visit.choose("7-1.png", SEVEN)
        playwright.expect(visit.page.locator("#error")).to_contain_text("does not answer")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_scheme(server: Server, browser: Any, scheme: str) -> None:
    phone = {"width": 360, "height": 740}
    with visiting(browser, server.url, color_scheme=scheme, viewport=phone, has_touch=True) as visit:
        page = visit.ready().page
        visit.choose("7-1.png", SEVEN)
        visit.settled()
        assert page.evaluate("document.documentElement.scrollWidth") == phone["width"]
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = np.mean([int(part) for part in re.findall(r"\d+", paper)])
        assert (brightness > 128) == (scheme == "light")
        page.tap("#view", position={"x": 20, "y": 20})
        playwright.expect(page.locator("#commands")).to_contain_text("y=0.06")


def test_pictures_of_the_page_for_the_documentation(server: Server, browser: Any) -> None:
    """DINAT_SCREENSHOTS names the folder that they are to be written to."""
    folder = os.environ.get("DINAT_SCREENSHOTS")
    if not folder:
        pytest.skip("set DINAT_SCREENSHOTS to a folder")
    for scheme, width, layer in [("light", 1200, 3), ("dark", 420, 1)]:
        with visiting(browser, server.url, color_scheme=scheme, viewport={"width": width, "height": 800}) as visit:
            visit.ready().choose("7-1.png", SEVEN)
            visit.settled()
            visit.page.click(f"#layers button >> nth={layer}")
            visit.page.evaluate("scrollTo(0, 0)")
            visit.page.screenshot(path=f"{folder}/page-{scheme}.png", full_page=True)


def test_the_page_is_small_and_names_no_other_host() -> None:
    files = [path.read_text() for path in WEB.iterdir()]
    assert sum(len(text.encode()) for text in files) < 80_000
    links = {link for text in files for link in re.findall(r"(?:src|href|import|from|url)\W{0,3}(https?://[^\"')\s]+)", text)}
    assert not links
