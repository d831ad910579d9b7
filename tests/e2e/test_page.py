"""The web page in a real browser: Debian's Chromium, which can reach no host but the service."""

import io
import json
import os
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.e2e.browser import MARKS, SEVEN, playwright, visiting
from tests.e2e.processes import Server, free_port

pytestmark = MARKS

WEB = Path(__file__).parents[2] / "app" / "web"


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


def test_first_visit_describes_the_model_and_offers_samples_of_its_labels(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.wait_until_ready().page
        names, facts = (page.locator(f"#model-facts {tag}").all_inner_texts() for tag in ("dt", "dd"))
        described = httpx.get(f"{server.url}/model").json()
        assert dict(zip(names, facts, strict=True)) == {
            "Labels": "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
            "Input": "64\u00d764 pixels",
            "Network": "6 layers in 3 stages",
            "Neighborhood": "3\u00d73 keys, dilation 1 to 4",
            "Runtime": f"{described['runtime']} on cpu, {described['precision']}",
            "Attention": described["attention"]["stage1"],
        }
        assert page.locator("#result-section").is_hidden()
        samples = page.locator("#samples button")
        assert samples.count() >= 3
        for i in range(samples.count()):
            samples.nth(i).click()
            label = samples.nth(i).get_attribute("title")
            visit.wait_for_image(f"{label}.png")
            playwright.expect(page.locator("#labels li > span").first).to_have_text(str(label))


@pytest.mark.slow
def test_samples_of_other_models_are_drawings_of_their_labels(server: Server, browser: Any) -> None:
    described = httpx.get(f"{server.url}/model").json()
    labels = [f"tench, {i}" for i in range(990)] + [
        "daisy",
        "analog clock",
        "traffic light, traffic signal",
        "crossword puzzle",
    ]
    processor = {"do_resize": True, "size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}
    with visiting(browser, server.url) as visit:
        page = visit.wait_until_ready().page
        page.route("**/model", lambda route: route.fulfill(json=described | {"labels": labels, "input_size": processor}))
        page.reload()
        samples = page.locator("#samples button")
        playwright.expect(samples).to_have_count(4)
        assert page.locator("#model-facts dd").all_inner_texts()[:2] == [
            "994: tench, tench, tench, tench, tench and 989 more",
            "224\u00d7224 pixels from the center of the image",
        ]
        for i, name in enumerate(["daisy", "clock", "traffic-light", "crossword"]):
            samples.nth(i).click()
            visit.wait_for_image(f"{name}.png")


@pytest.mark.slow
def test_no_samples_are_offered_if_none_has_a_label_of_the_model(server: Server, browser: Any) -> None:
    described = httpx.get(f"{server.url}/model").json()
    with visiting(browser, server.url) as visit:
        page = visit.wait_until_ready().page
        page.route("**/model", lambda route: route.fulfill(json=described | {"labels": ["cat", "dog"]}))
        page.reload()
        playwright.expect(page.locator("#model-facts")).to_contain_text("2: cat, dog")
        assert page.locator("#samples-panel").is_hidden()


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
        page.click("#clear")
        playwright.expect(page.locator("#result-section")).to_be_hidden()
        playwright.expect(page.locator("#caption")).to_have_text("")
        playwright.expect(page.locator("#pen-state")).to_have_text("The drawing is cleared.")
        visit.choose("7-1.png", SEVEN)
        visit.wait_for_image("7-1.png")
        page.click("#clear")  # removes no other image
        assert visit.best_label() == "7"


@pytest.mark.slow
def test_digit_drawn_by_keyboard_is_classified(server: Server, browser: Any) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.wait_until_ready().page
        page.focus("#draw")
        page.keyboard.press("Enter")
        page.keyboard.press("Space")
        playwright.expect(page.locator("#pen-state")).to_have_text("The pen is lowered.")
        for _ in range(16):
            page.keyboard.press("ArrowDown")
        pad, pen = page.locator("#pad").bounding_box(), page.locator("#pen").bounding_box()
        assert pen["y"] + pen["height"] / 2 - pad["y"] == pytest.approx(64 + 16 * 8)
        page.keyboard.press("Space")
        playwright.expect(page.locator("#pen-state")).to_have_text("The pen is lifted.")
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
        playwright.expect(page.locator("#view")).to_have_attribute("aria-valuetext", re.compile("dilation 4: 9 keys"))
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
        page.keyboard.press("ArrowLeft")  # from column 9 of 16 to the center of column 8
        playwright.expect(page.locator("#commands")).to_contain_text("x=0.4688")
        playwright.expect(page.locator("#view")).to_have_attribute("aria-valuetext", re.compile("row 9, column 8;"))
        for key, number in [("End", 256), ("ArrowUp", 240), ("Home", 1), ("ArrowUp", 1)]:
            page.keyboard.press(key)
            playwright.expect(page.locator("#view")).to_have_attribute("aria-valuenow", str(number))


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
        for result in ("#labels", "#view", "#feature-maps-section", "#layers-section"):
            assert visit.page.locator(result).is_hidden()
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
        side = page.locator("#view").bounding_box()["height"]
        page.tap("#view", position={"x": side / 16, "y": side / 16})
        playwright.expect(page.locator("#commands")).to_contain_text("y=0.06")


@pytest.mark.parametrize(("height", "count"), [(844, 5), (664, 1)])
def test_labels_of_a_chosen_image_are_visible_on_a_phone(server: Server, browser: Any, height: int, count: int) -> None:
    """Without scrolling; the browser's bars take 180 pixels of the larger height."""
    phone = {"width": 390, "height": height}
    with visiting(browser, server.url, viewport=phone, has_touch=True, is_mobile=True) as visit:
        visit.wait_until_ready().choose("7-1.png", SEVEN)
        visit.wait_for_results()
        assert visit.page.evaluate("scrollY") == 0
        for i in range(count):
            playwright.expect(visit.page.locator("#labels li").nth(i)).to_be_in_viewport(ratio=1)


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
            visit.wait_until_ready()
            for _ in range(5):  # the first image takes longer
                with visit.page.expect_response("**/attention?*"):
                    visit.choose("7-1.png", SEVEN)
            visit.page.click(f"#layers button >> nth={layer}")
            visit.page.evaluate("scrollTo(0, 0)")
            visit.page.screenshot(path=f"{folder}/page-{scheme}.png", full_page=True)


def test_page_is_small_and_links_to_no_other_host() -> None:
    files = [path.read_text() for path in WEB.rglob("*") if path.is_file()]
    assert sum(len(text.encode()) for text in files) < 80_000
    links = {link for text in files for link in re.findall(r"(?:src|href|import|from|url)\W{0,3}(https?://[^\"')\s]+)", text)}
    assert not links


@pytest.mark.slow
def test_the_example_for_browsers_works_from_another_origin(browser: Any, tmp_path: Path) -> None:
    text = (WEB.parents[1] / "docs" / "clients.md").read_text()
    (example,) = re.findall(r"```html\n(.*?)```", text, re.DOTALL)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as pages:
        threading.Thread(target=pages.serve_forever).start()
        origin = f"http://127.0.0.1:{pages.server_port}"
        try:
            with Server(cors_origins=origin) as server:
                (tmp_path / "index.html").write_text(example.replace("http://localhost:8000", server.url))
                page = browser.new_page()
                page.goto(origin)
                page.set_input_files("#file", {"name": "7.png", "mimeType": "image/png", "buffer": SEVEN})
                playwright.expect(page.locator("#label")).to_have_text("7")
                page.close()
        finally:
            pages.shutdown()
