"""What clients send, in every form that was seen to be sent."""

import base64
import gzip
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from dinat.app import main
from tests.app.conftest import Service
from tests.app.sample_images import encoded, noise


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)


def with_chunk(png: bytes, extra: bytes) -> bytes:
    """A PNG with a chunk more, behind its header."""
    return png[:33] + extra + png[33:]


def label(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["predictions"][0]["label"])


def refused(answer: httpx.Response, status: int, *words: str) -> None:
    assert (answer.status_code, answer.json()["status"]) == (status, status), answer.text
    for word in words:
        assert word in answer.json()["detail"], answer.text


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("place", ["query", "form", "JSON", "JSON, as text", "query and form, alike"])
def test_parameters_are_honoured_wherever_they_are(service: Service, seven: bytes, place: str) -> None:
    sent: dict[str, Any] = {
        "query": {"content": seven, "params": {"top_k": 2}},
        "form": {"files": {"image": seven}, "data": {"top_k": "2"}},
        "JSON": {"json": {"image": in_base64(seven), "top_k": 2}},
        "JSON, as text": {"json": {"image": in_base64(seven), "top_k": "2"}},
        "query and form, alike": {"files": {"image": seven}, "data": {"top_k": "2"}, "params": {"top_k": 2}},
    }[place]
    answer = service.client.post("/classify", **sent)
    assert label(answer) == "7"
    assert len(answer.json()["predictions"]) == 2


def test_maps_are_asked_for_by_a_list_in_json(service: Service, seven: bytes) -> None:
    asked = {"image": in_base64(seven), "features": ["pooled", "stage2"], "feature_format": "base64"}
    assert set(service.client.post("/classify", json=asked).json()["features"]) == {"pooled", "stage2"}
    batch = {"images": [in_base64(seven)] * 2, "features": "pooled", "top_k": 1}
    results = service.client.post("/classify/batch", json=batch).json()["results"]
    assert [(len(one["predictions"]), list(one["features"])) for one in results] == [(1, ["pooled"])] * 2


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"params": {"topk": 1}}, ["topk is no parameter here", "did you mean top_k?"]),
        ({"params": {"TopK": 1}}, ["did you mean top_k?"]),
        ({"params": {"feature": "stage1"}}, ["did you mean features?"]),
        ({"params": {"colour": "red"}}, ["colour is no parameter here, allowed are features, feature_format, top_k"]),
        ({"params": [("top_k", 1), ("top_k", 2)]}, ["top_k is given twice in the query"]),
        ({"params": {"top_k": 2}, "data": {"top_k": "3"}}, ["top_k is '2' in the query and '3' in the form"]),
        ({"data": {"top_k": ["2", "2"]}}, ["top_k is given twice in the form"]),
        ({"data": {"topk": "2"}}, ["did you mean top_k?"]),
        ({"data": {"top_k": "many"}}, ["top_k is 'many'", "integer"]),
        ({"data": {"top_k": "0"}}, ["top_k is 0, allowed are 1 to 10"]),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_named(
    service: Service, seven: bytes, sent: dict[str, Any], words: list[str]
) -> None:
    refused(service.client.post("/classify", files={"image": seven}, **sent), 422, *words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": True}, ["top_k is True", "whole number"]),
        ({"top_k": 1.5}, ["top_k is 1.5"]),
        ({"features": [1]}, ["features"]),
        ({"top_k": {"a": 1}}, ["top_k"]),
    ],
)
def test_a_parameter_of_a_wrong_kind_in_json_is_named(
    service: Service, seven: bytes, fields: dict[str, Any], words: list[str]
) -> None:
    refused(service.client.post("/classify", json={"image": in_base64(seven)} | fields), 422, *words)


def test_several_pictures_on_classify_point_to_the_batch(service: Service, seven: bytes) -> None:
    files = [("image", ("a.png", seven)), ("image", ("b.png", seven))]
    refused(service.client.post("/classify", files=files), 400, "2 pictures", "/classify/batch")
    refused(service.client.post("/classify", files=[("image", seven), ("file", seven)]), 400, "/classify/batch")
    refused(service.client.post("/classify", json={"images": [in_base64(seven)]}), 400, "/classify/batch")
    refused(service.client.post("/classify/batch", content=seven), 400, "goes to /classify")


@pytest.mark.parametrize(
    "content_type",
    ["application/x-www-form-urlencoded", "image/jpeg", "text/plain", "application/pdf", "binary/octet-stream", None],
)
def test_the_bytes_say_what_they_are_whatever_they_are_called(service: Service, seven: bytes, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert label(service.client.post("/classify", content=seven, headers=headers)) == "7"


def test_curl_as_people_write_it(service: Service, seven: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(seven)
    for words in (
        ["--data-binary", f"@{path}"],
        ["-F", f"image=@{path}", "-F", "top_k=1"],
        ["-F", f"file=@{path};type=text/plain"],
        ["-T", str(path), "-X", "POST"],
        ["--data-urlencode", f"image={in_base64(seven)}"],
    ):
        done = subprocess.run(["curl", "-sS", *words, f"{service.client.base_url}/classify"], capture_output=True, check=True)
        assert b'"label":"7"' in done.stdout, (words, done.stdout)


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "GZIP"])
def test_compressed_bodies_are_read(service: Service, seven: bytes, encoding: str) -> None:
    body = zlib.compress(seven) if encoding == "deflate" else gzip.compress(seven)
    assert label(service.client.post("/classify", content=body, headers={"Content-Encoding": encoding})) == "7"


def test_a_compressed_form_is_read(service: Service, seven: bytes) -> None:
    request = httpx.Request("POST", "http://x/", files={"image": seven}, data={"top_k": "1"})
    headers = {"Content-Type": request.headers["content-type"], "Content-Encoding": "gzip"}
    assert label(service.client.post("/classify", content=gzip.compress(request.read()), headers=headers)) == "7"


def test_compressed_bodies_that_are_not_read_say_so(service: Service, seven: bytes) -> None:
    other = service.client.post("/classify", content=seven, headers={"Content-Encoding": "br"})
    refused(other, 415, "Content-Encoding br")
    assert other.headers["accept-encoding"] == "gzip, deflate"
    headers = {"Content-Encoding": "gzip"}
    refused(service.client.post("/classify", content=seven, headers=headers), 400, "said to be gzip, and is not")
    refused(service.client.post("/classify", content=gzip.compress(seven)[:-9], headers=headers), 400, "ends too soon")
    bomb = gzip.compress(bytes(50 * 2**20))
    refused(service.client.post("/classify", content=bomb, headers=headers), 413, "when it is decompressed")
    refused(service.client.post("/classify", content=gzip.compress(seven)), 415, "Content-Encoding: gzip")


def test_base64_as_tools_write_it(service: Service, seven: bytes) -> None:
    lines = base64.encodebytes(seven).decode()
    assert lines.count("\n") > 2
    urlsafe = base64.urlsafe_b64encode(seven).decode()
    for text in (lines, lines.replace("\n", "\r\n"), urlsafe, urlsafe.rstrip("="), f"data:image/png;base64,{lines}"):
        assert label(service.client.post("/classify", json={"image": text})) == "7"


def test_json_that_is_nested_deeply_is_400(service: Service) -> None:
    for body in (b'{"image":' + b"[" * 200_000, b"[" * 200_000 + b"]" * 200_000):
        refused(service.client.post("/classify", content=body, headers={"Content-Type": "application/json"}), 400, "not JSON")


def test_a_picture_as_text_in_a_form(service: Service, seven: bytes) -> None:
    assert label(service.client.post("/classify", files={"image": (None, in_base64(seven))})) == "7"
    found = service.client.post("/classify", files={"image": (None, "x.png")})
    refused(found, 400, "the field image is text that is no base64, 'x.png'", "-F image=@picture.jpg")
    refused(service.client.post("/classify", files={"picture": seven}), 400, "its fields are: picture")


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/model", "/metrics", "/openapi.json"])
def test_head_is_get_without_a_body(service: Service, path: str) -> None:
    got, head = service.client.get(path), service.client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert service.client.get(path).status_code == 200  # on the same connection


def test_text_in_a_png_is_not_looked_at(service: Service, seven: bytes) -> None:
    huge = zlib.compress(b"prompt " * 450_000)
    for extra in (
        chunk(b"zTXt", b"parameters\0\0" + huge),
        chunk(b"iTXt", b"x\0\1\0\0\0" + huge),
        chunk(b"tEXt", b"a\0b", crc=1),
        chunk(b"zTXt", b"a\0\0not zlib"),
    ):
        assert label(service.client.post("/classify", content=with_chunk(seven, extra))) == "7"


def test_a_png_whose_picture_is_damaged_is_refused(service: Service, seven: bytes) -> None:
    at = seven.index(b"IDAT")
    length = struct.unpack(">I", seven[at - 4 : at])[0]
    crc = at + 4 + length
    refused(service.client.post("/classify", content=seven[:crc] + b"\0\0\0\0" + seven[crc + 4 :]), 422, "damaged")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (375, 500), (17, 33)])
def test_a_jpeg_without_its_end_marker_is_read_and_one_cut_before_is_not(
    service: Service, progressive: bool, size: tuple[int, int]
) -> None:
    whole = encoded(noise(*size), "JPEG", quality=90, progressive=progressive)
    expected = service.client.post("/classify", content=whole).json()["predictions"]
    for missing in (1, 2):
        assert service.client.post("/classify", content=whole[:-missing]).json()["predictions"] == expected
    for missing in (len(whole) // 2, len(whole) // 10):
        refused(service.client.post("/classify", content=whole[:-missing]), 422, "damaged")


def test_avif_and_heic(service: Service, seven: bytes) -> None:
    picture = Image.open(io.BytesIO(seven)).convert("RGB")
    assert label(service.client.post("/classify", content=encoded(picture, "AVIF", quality=95))) == "7"
    import pillow_heif

    pillow_heif.register_heif_opener()
    assert label(service.client.post("/classify", content=encoded(picture, "HEIF", quality=95))) == "7"


def test_heic_without_its_extra_says_what_to_install(seven: bytes) -> None:
    code = (
        "import io, sys; sys.modules['pillow_heif'] = None\n"
        "from dinat.app.images import decode\n"
        "decode(sys.stdin.buffer.read(), 10**6)"
    )
    picture = encoded(Image.open(io.BytesIO(seven)).convert("RGB"), "HEIF")
    done = subprocess.run([sys.executable, "-c", code], input=picture, capture_output=True, timeout=60, check=False)
    assert b"UnsupportedImage: the picture is HEIC, which wants the extra heif: pip install 'dinat-serve[heif]'" in done.stderr


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)), "floating point numbers"),
        (Image.fromarray(np.arange(64 * 64, dtype=np.int32).reshape(64, 64)), "whole numbers of 32 bits"),
    ],
)
def test_samples_whose_white_nobody_knows_are_refused(service: Service, image: Image.Image, words: str) -> None:
    refused(service.client.post("/classify", content=encoded(image, "TIFF")), 422, words, "send 8 or 16 bits a sample")


def test_samples_of_16_bits_are_scaled(service: Service, seven: bytes) -> None:
    grey = np.asarray(Image.open(io.BytesIO(seven)).convert("L")).astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        assert label(service.client.post("/classify", content=encoded(Image.fromarray(grey), kind))) == "7"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"<!DOCTYPE html><html>", "a web page (HTML)"),
        (b"\n <html lang=en>", "a web page (HTML)"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<svg/>", "SVG"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b'{"image": "x"}', "JSON"),
        (b"hello", "text"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"\0\0\0\x20ftypisom....", "a film (MP4)"),
        (b"\0\1\2\3\4\5\6\7", "in no format that is known here"),
    ],
)
def test_what_is_no_picture_is_called_by_its_name(service: Service, body: bytes, what: str) -> None:
    refused(service.client.post("/classify", content=body), 415, f"the picture is {what}", "JPEG, PNG")


def test_the_page_of_the_api_asks_no_other_host(service: Service) -> None:
    page = service.client.get("/docs")
    assert page.status_code == 200
    assert "//cdn" not in page.text
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert asset in page.text
        assert len(service.client.get(f"/static-offline-docs/{asset}").content) > 100_000


def test_uvicorn_finds_the_application_by_its_usual_name() -> None:
    code = "from uvicorn import Config; c = Config('app.main:app'); c.load(); print(type(c.loaded_app).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().endswith("Middleware")
    with pytest.raises(AttributeError, match="no attribute nothing"):
        main.nothing  # noqa: B018
