"""The web page in a real browser: Debian's Chromium, which can reach no host but the service."""

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

from tests.e2e.processes import DIGITS, Server, free_port

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian's package of that name)"),
]

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


def test_chosen_image_is_classified(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        visit.wait_until_ready().choose("7-1.png", SEVEN)
        visit.wait_for_image("7-1.png")
        predictions = httpx.post(f"{server.url}/classify", content=SEVEN).json()["predictions"]
        rows = visit.page.locator("#labels li").all_inner_texts()
        expected = [[prediction["label"], f"{100 * prediction['score']:.1f} %"] for prediction in predictions]
        assert [row.split("\n") for row in rows] == expected
        widths = visit.page.eval_on_selector_all(".track > span", "bars => bars.map(bar => parseFloat(bar.style.width))")
        np.testing.assert_allclose(widths, [100 * prediction["score"] for prediction in predictions], rtol=1e-4)
        entries = visit.page.locator("#times dt").all_inner_texts()
        assert entries == ["decode", "queue", "compute", "encode", "other", "total in the service", "round trip"]


def test_dropped_and_pasted_images_are_classified(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.wait_until_ready().page
        for event, property, name in [("drop", "dataTransfer", "dropped.png"), ("paste", "clipboardData", "pasted.png")]:
            page.evaluate(
                """([event, property, name, bytes]) => {
                    const files = new DataTransfer();
                    files.items.add(new File([new Uint8Array(bytes)], name));
                    const dispatched = event === "drop" ? new DragEvent(event, {[property]: files, bubbles: true})
                        : new ClipboardEvent(event, {[property]: files, bubbles: true});
                    document.body.dispatchEvent(dispatched);
                }""",
                [event, property, name, list(SEVEN)],
            )
            visit.wait_for_image(name)
            assert visit.best_label() == "7"


@pytest.mark.slow
def test_paste_button_reads_the_clipboard(server: Server, browser: Any) -> None:
    with visiting(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as visit:
        page = visit.wait_until_ready().page
        page.evaluate(
            """async bytes => navigator.clipboard.write([new ClipboardItem(
                {"image/png": new Blob([new Uint8Array(bytes)], {type: "image/png"})})])""",
            list(SEVEN),
        )
        page.click("#paste")
        visit.wait_for_image("pasted.png")
        assert visit.best_label() == "7"


@pytest.mark.slow
def test_camera_image_is_classified_and_can_be_saved(server: Server, browser: Any) -> None:
    with visiting(browser, server.url, permissions=["camera"]) as visit:
        page = visit.wait_until_ready().page
        page.click("#camera")
        playwright.expect(page.locator("#video")).to_have_js_property("videoWidth", 640)
        page.click("#capture")
        visit.wait_for_image("camera.png")
        assert page.evaluate("document.getElementById('video').srcObject") is None
        with page.expect_download() as download:
            page.click("#save a")
        with Image.open(download.value.path()) as image:
            assert image.size == (640, 480)


def test_drawn_digit_is_classified(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.wait_until_ready().page
        page.click("#draw")
        box = page.locator("#pad").bounding_box()
        ring = [(128 + 52 * np.sin(angle), 128 - 88 * np.cos(angle)) for angle in np.linspace(0, 2 * np.pi, 24)]
        for i, (x, y) in enumerate(ring):
            page.mouse.move(box["x"] + x, box["y"] + y)
            if i == 0:
                page.mouse.down()
        page.mouse.up()
        visit.wait_for_image("drawing.png")
        assert visit.best_label() == "0"


@pytest.mark.slow
def test_digit_drawn_by_keyboard_is_classified(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.wait_until_ready().page
        page.focus("#draw")
        page.keyboard.press("Enter")
        page.keyboard.press("Space")
        for _ in range(16):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        visit.wait_for_image("drawing.png")
        assert visit.best_label() == "1"


def test_feature_maps_match_the_service_and_enlarge_on_click(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.wait_until_ready().page
        visit.choose("7-1.png", SEVEN)
        visit.wait_for_results()
        sizes = page.eval_on_selector_all("#feature-maps canvas", "all => all.map(canvas => [canvas.width, canvas.height])")
        assert sizes == [[16, 16]] * 4 + [[8, 8]] * 2 + [[4, 4]] * 2
        page.click("#feature-maps button >> nth=0")
        assert page.locator("#large").is_visible()
        response = httpx.post(f"{server.url}/features?features=stem", content=SEVEN, headers={"Accept": "application/x-npy"})
        magnitude = np.abs(np.load(io.BytesIO(response.content))).mean(0)
        shown = re.findall(r"[\d.]+(?= \()", page.locator("#large-text").inner_text())
        np.testing.assert_allclose([float(number) for number in shown], [magnitude.min(), magnitude.max()], rtol=5e-3)
        page.keyboard.press("Escape")
        assert page.locator("#large").is_hidden()


@pytest.mark.slow
def test_principal_components_match_numpy(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        channels, height, width = 24, 9, 13
        feature_map = np.random.default_rng(0).normal(size=(channels, height * width)).astype(np.float32)
        feature_map *= np.linspace(3, 1, channels, dtype=np.float32)[:, None] ** 2
        components = visit.page.evaluate(
            """async ([shape, values]) => {
                const {principalComponents} = await import("/web/feature_maps.js");
                return principalComponents({shape, values: new Float32Array(values)}).map(component => [...component]);
            }""",
            [[channels, height, width], feature_map.ravel().tolist()],
        )
        centered = feature_map - feature_map.mean(1, keepdims=True)
        _, singular_values, directions = np.linalg.svd(centered, full_matrices=False)
        for component, direction, singular_value in zip(components, directions, singular_values, strict=False):
            assert abs(np.dot(component, direction)) / singular_value == pytest.approx(1, abs=1e-3)


def test_neighborhoods_follow_the_pointer(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.wait_until_ready().page
        visit.choose("7-1.png", SEVEN)
        visit.wait_for_results()
        layers = httpx.post(f"{server.url}/attention", content=SEVEN).json()["layers"]
        captions = page.locator("#layers span").all_inner_texts()
        assert captions == [f"{layer['stage']}.{layer['layer']}, dilation {layer['dilation']}" for layer in layers]
        before = page.evaluate("document.getElementById('view').toDataURL()")
        box = page.locator("#view").bounding_box()
        with page.expect_response("**/attention?*"):
            page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.9)
        playwright.expect(page.locator("#commands")).to_contain_text("y=0.90")
        assert page.evaluate("document.getElementById('view').toDataURL()") != before
        page.click("#layers button >> nth=1")  # dilation 4: nine keys, four positions apart
        assert page.locator("#layers button >> nth=1").get_attribute("aria-pressed") == "true"
        playwright.expect(page.locator("#view")).to_have_attribute("aria-label", re.compile("dilation 4: 9 keys"))
        mean = page.evaluate("document.getElementById('view').toDataURL()")
        page.select_option("#head", "0")  # stage 1 has one head
        assert page.evaluate("document.getElementById('view').toDataURL()") == mean


@pytest.mark.slow
def test_attention_weights_of_a_head_and_their_mean(server: Server, browser: Any) -> None:
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


@pytest.mark.slow
def test_arrow_keys_move_the_point(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.wait_until_ready().page
        visit.choose("7-1.png", SEVEN)
        visit.wait_for_results()
        page.focus("#view")
        page.keyboard.press("ArrowLeft")  # from column 8 of 16 to the center of column 7
        playwright.expect(page.locator("#commands")).to_contain_text("x=0.4688")


def test_curl_commands_work(server: Server, browser: Any, tmp_path: Path) -> None:
    with visiting(browser, server.url) as visit:
        name = "it's a 7.png"
        visit.wait_until_ready().choose(name, SEVEN)
        visit.wait_for_image(name)
        (tmp_path / name).write_bytes(SEVEN)
        commands = visit.page.locator("#commands code").all_inner_texts()
        assert len(commands) == 3
        outputs = [
            subprocess.run(f"{command} -sS", shell=True, cwd=tmp_path, capture_output=True, check=True, timeout=30)
            for command in commands
        ]
        assert json.loads(outputs[0].stdout)["predictions"][0]["label"] == "7"
        assert (tmp_path / "features.safetensors").stat().st_size > 4 * (2 * 32 * 256 + 64 * 64 + 128 * 16)
        assert len(json.loads(outputs[2].stdout)["layers"]) == 6


def test_error_is_shown_without_earlier_results(server: Server, browser: Any) -> None:
    with visiting(browser, server.url, expect_errors=True) as visit:
        visit.wait_until_ready().choose("7-1.png", SEVEN)
        visit.wait_for_results()
        visit.choose("paper.pdf", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n")
        playwright.expect(visit.page.locator("#error")).to_contain_text("PDF")
        assert visit.page.locator("#labels li").count() == 0
        assert visit.page.locator("#layers-section").is_hidden()
        visit.choose("7-1.png", SEVEN)
        visit.wait_for_results()
        assert visit.page.locator("#error").is_hidden()


@pytest.mark.slow
def test_format_unsupported_by_the_browser_is_classified(server: Server, browser: Any) -> None:
    tiff = io.BytesIO()
    Image.open(io.BytesIO(SEVEN)).save(tiff, "TIFF")
    with visiting(browser, server.url) as visit:
        visit.wait_until_ready().choose("scan.tiff", tiff.getvalue())
        visit.wait_for_image("not supported by this browser")
        assert visit.best_label() == "7"


@pytest.mark.slow
def test_api_key_form_is_shown_if_required(browser: Any) -> None:
    with Server(api_keys="secret") as server, visiting(browser, server.url, expect_errors=True) as visit:
        page = visit.page
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#error")).to_contain_text("key")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#model")).to_contain_text("digits")
        visit.choose("7-1.png", SEVEN)
        visit.wait_for_results()
        assert visit.best_label() == "7"
        assert "secret" not in page.locator("#commands").inner_text()
        assert "X-API-Key: $KEY" in page.locator("#commands").inner_text()


@pytest.mark.slow
def test_stopped_service_is_reported(browser: Any) -> None:
    with Server() as server, visiting(browser, server.url, expect_errors=True) as visit:
        visit.wait_until_ready()
        server.stop()
        visit.choose("7-1.png", SEVEN)
        playwright.expect(visit.page.locator("#error")).to_contain_text("does not respond")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_follows_the_color_scheme(server: Server, browser: Any, scheme: str) -> None:
    phone = {"width": 360, "height": 740}
    with visiting(browser, server.url, color_scheme=scheme, viewport=phone, has_touch=True) as visit:
        page = visit.wait_until_ready().page
        visit.choose("7-1.png", SEVEN)
        visit.wait_for_results()
        assert page.evaluate("document.documentElement.scrollWidth") == phone["width"]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = np.mean([int(value) for value in re.findall(r"\d+", background)])
        assert (brightness > 128) == (scheme == "light")
        page.tap("#view", position={"x": 20, "y": 20})
        playwright.expect(page.locator("#commands")).to_contain_text("y=0.06")


def test_api_documentation_works_under_its_content_security_policy(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        execute_health_check(visit.page, f"{server.url}/docs")


def execute_health_check(page: Any, url: str) -> None:
    """Send GET /health/live from the documentation."""
    page.goto(url)
    page.click(".opblock-summary:has-text('/health/live')")
    page.click("button:has-text('Try it out')")
    page.click("button:has-text('Execute')")
    playwright.expect(page.locator(".live-responses-table .response-col_status").last).to_have_text("200")


NGINX = """
daemon off;
pid nginx.pid;
error_log stderr warn;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server {{
        listen 127.0.0.1:{port};
        location /dinat/ {{
            proxy_pass http://127.0.0.1:{server_port}{path};
        }}
    }}
}}
"""


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("path", [pytest.param("/", id="removed"), pytest.param("", id="passed on")])
def test_page_and_documentation_at_a_path_of_a_proxy(browser: Any, tmp_path: Path, path: str) -> None:
    port = free_port()
    with Server(root_path="/dinat") as server:
        (tmp_path / "conf").write_text(NGINX.format(port=port, server_port=server.url.rpartition(":")[2], path=path))
        with subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "conf"), "-e", "stderr"]) as proxy:
            try:
                with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:
                    assert client.get(f"http://127.0.0.1:{port}/dinat/health").status_code == 200
                with visiting(browser, f"http://127.0.0.1:{port}/dinat") as visit:
                    visit.wait_until_ready().choose("7.png", SEVEN)
                    visit.wait_for_image("7.png")
                    assert visit.best_label() == "7"
                    execute_health_check(visit.page, f"http://127.0.0.1:{port}/dinat/docs")
            finally:
                proxy.terminate()


def test_screenshots_for_the_documentation(server: Server, browser: Any) -> None:
    """Write screenshots to the folder DINAT_SCREENSHOTS."""
    folder = os.environ.get("DINAT_SCREENSHOTS")
    if not folder:
        pytest.skip("set DINAT_SCREENSHOTS to a folder")
    for scheme, width, layer in [("light", 1200, 3), ("dark", 420, 1)]:
        with visiting(browser, server.url, color_scheme=scheme, viewport={"width": width, "height": 800}) as visit:
            visit.wait_until_ready().choose("7-1.png", SEVEN)
            visit.wait_for_results()
            visit.page.click(f"#layers button >> nth={layer}")
            visit.page.evaluate("scrollTo(0, 0)")
            visit.page.screenshot(path=f"{folder}/page-{scheme}.png", full_page=True)


def test_page_is_small_and_links_to_no_other_host() -> None:
    files = [path.read_text() for path in WEB.iterdir()]
    assert sum(len(text.encode()) for text in files) < 80_000
    links = {link for text in files for link in re.findall(r"(?:src|href|import|from|url)\W{0,3}(https?://[^\"')\s]+)", text)}
    assert not links
