"""Request bodies in the forms that clients send."""

import base64
import gzip
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinat.app import main
from dinat.app.api.base64_images import decode_base64
from dinat.app.api.json_limits import load_json, message_limits
from dinat.app.api.middleware import SINGLE_FIELDS
from tests.app.conftest import Service
from tests.app.sample_images import encoded, noise


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)


def with_chunk(png: bytes, extra: bytes) -> bytes:
    """Insert a chunk after the header of a PNG."""
    return png[:33] + extra + png[33:]


def label(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["predictions"][0]["label"])


def check_rejected(response: httpx.Response, status: int, *details: str) -> None:
    assert (response.status_code, response.json()["status"]) == (status, status), response.text
    for detail in details:
        assert detail in response.json()["detail"], response.text


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("place", ["query", "form", "JSON", "JSON, as text", "query and form"])
def test_parameters_are_read_from_every_place(service: Service, seven: bytes, place: str) -> None:
    request: dict[str, Any] = {
        "query": {"content": seven, "params": {"top_k": 2}},
        "form": {"files": {"image": seven}, "data": {"top_k": "2"}},
        "JSON": {"json": {"image": in_base64(seven), "top_k": 2}},
        "JSON, as text": {"json": {"image": in_base64(seven), "top_k": "2"}},
        "query and form": {"files": {"image": seven}, "data": {"top_k": "2"}, "params": {"top_k": 2}},
    }[place]
    response = service.client.post("/classify", **request)
    assert label(response) == "7"
    assert len(response.json()["predictions"]) == 2


def test_parameters_of_predict_may_be_in_the_query(service: Service, seven: bytes) -> None:
    body = {"instances": [{"b64": in_base64(seven)}], "parameters": {"features": "pooled"}}
    (prediction,) = service.client.post("/predict?top_k=2", json=body).json()["predictions"]
    assert (len(prediction["predictions"]), list(prediction["features"])) == (2, ["pooled"])
    check_rejected(service.client.post("/predict?top=2", json=body), 422, "unknown parameter top")


@pytest.mark.parametrize("name", [name.decode() for name in SINGLE_FIELDS])
def test_header_field_that_may_occur_once_is_rejected_if_it_is_repeated(service: Service, seven: bytes, name: str) -> None:
    headers = [(name, "1"), (name.title(), "2")]
    response = service.client.post("/classify", content=seven, headers=headers)
    check_rejected(response, 400, f"the request has more than one {name}: send it once")


def test_features_may_be_a_list_in_json(service: Service, seven: bytes) -> None:
    body = {"image": in_base64(seven), "features": ["pooled", "stage2"], "feature_format": "base64"}
    assert set(service.client.post("/classify", json=body).json()["features"]) == {"pooled", "stage2"}
    batch = {"images": [in_base64(seven)] * 2, "features": "pooled", "top_k": 1}
    results = service.client.post("/classify/batch", json=batch).json()["results"]
    assert [(len(result["predictions"]), list(result["features"])) for result in results] == [(1, ["pooled"])] * 2


@pytest.mark.parametrize(
    ("request_", "details"),
    [
        ({"params": {"topk": 1}}, ["unknown parameter topk", "did you mean top_k?"]),
        ({"params": {"TopK": 1}}, ["did you mean top_k?"]),
        ({"params": {"feature": "stage1"}}, ["did you mean features?"]),
        ({"params": {"color": "red"}}, ["unknown parameter color, supported are features, feature_format, top_k"]),
        ({"params": [("top_k", 1), ("top_k", 2)]}, ["top_k occurs twice in the query"]),
        ({"params": {"top_k": 2}, "data": {"top_k": "3"}}, ["top_k is '2' in the query and '3' in the form"]),
        ({"data": {"top_k": ["2", "2"]}}, ["top_k occurs twice in the form"]),
        ({"data": {"topk": "2"}}, ["did you mean top_k?"]),
        ({"data": {"top_k": "many"}}, ["top_k is 'many'", "a number is required"]),
        ({"data": {"top_k": "1_0"}}, ["top_k is '1_0'", "a number is required"]),
        ({"data": {"top_k": " 1"}}, ["top_k is ' 1'", "a number is required"]),
        ({"data": {"top_k": "1.5"}}, ["top_k is '1.5'", "integer"]),
        ({"data": {"top_k": "0"}}, ["top_k must be between 1 and 10, got 0"]),
    ],
)
def test_invalid_parameter_is_named_in_the_error(
    service: Service, seven: bytes, request_: dict[str, Any], details: list[str]
) -> None:
    check_rejected(service.client.post("/classify", files={"image": seven}, **request_), 422, *details)


@pytest.mark.parametrize(
    ("fields", "details"),
    [
        ({"top_k": True}, ["top_k is True", "a number is required"]),
        ({"top_k": 1.5}, ["top_k is 1.5"]),
        ({"features": [1]}, ["features"]),
        ({"top_k": {"a": 1}}, ["top_k"]),
    ],
)
def test_parameter_of_wrong_type_in_json_is_named_in_the_error(
    service: Service, seven: bytes, fields: dict[str, Any], details: list[str]
) -> None:
    check_rejected(service.client.post("/classify", json={"image": in_base64(seven)} | fields), 422, *details)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify", '{"image": "IMAGE", "top_k": 1, "top_k": 2}'),
        ("/classify", '{"image": "data:image/png;base64,IMAGE", "top_k": 1, "top_k": 1}'),
        ("/classify", '{"image": "x", "image": "IMAGE"}'),
        ("/classify", '{"image": "IMAGE", "top_k": 1, "top\\u005fk": 2}'),
        ("/classify/batch", '{"images": ["IMAGE"], "images": ["IMAGE"]}'),
        ("/", '{"inputs": "IMAGE", "parameters": {"top_k": 1, "top_k": 2}}'),
        ("/predict", '{"instances": [{"b64": "IMAGE"}, {"b64": "x", "b64": "IMAGE"}]}'),
        (
            "/v2/models/digits/infer",
            '{"id": "a\\":", "id": "b", "inputs": [{"name": "image", "data": ["IMAGE"]}]}',
        ),
    ],
)
def test_repeated_key_in_json_is_rejected(service: Service, seven: bytes, path: str, body: str) -> None:
    content = body.replace("IMAGE", in_base64(seven))
    response = service.client.post(path, content=content, headers={"Content-Type": "application/json"})
    check_rejected(response, 422, "a key occurs twice in an object of the JSON: send it once")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.text(':,"\\{}[]a\n', max_size=4),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(':,"\\ab', max_size=3), values, max_size=3),
)


@settings(max_examples=1000)
@given(JSON_VALUES, st.booleans())
def test_json_without_repeated_keys_is_read(value: Any, escape: bool) -> None:
    assert load_json(json.dumps(value, ensure_ascii=escape).encode(), message_limits(128)) == value


def test_several_images_to_classify_are_rejected_naming_the_batch_endpoint(service: Service, seven: bytes) -> None:
    files = [("image", ("a.png", seven)), ("image", ("b.png", seven))]
    check_rejected(service.client.post("/classify", files=files), 400, "2 images", "/classify/batch")
    check_rejected(service.client.post("/classify", files=[("image", seven), ("file", seven)]), 400, "/classify/batch")
    check_rejected(service.client.post("/classify", json={"images": [in_base64(seven)]}), 400, "/classify/batch")
    check_rejected(service.client.post("/classify/batch", content=seven), 400, "one image to /classify")


@pytest.mark.parametrize(
    ("content_type", "before"),
    [
        ("application/json", b""),
        ("application/json", b"\xef\xbb\xbf"),  # PowerShell, .NET
        ("application/json; charset=utf-8", b"\r\n "),
        ("text/json", b""),
        ("application/vnd.api+json", b""),
        ("text/plain;charset=UTF-8", b""),  # fetch() with a string
        ("application/x-www-form-urlencoded", b""),  # curl -d
        ("application/octet-stream", b"\xef\xbb\xbf\n"),
        (None, b""),
    ],
)
def test_json_of_any_client_is_read(service: Service, seven: bytes, content_type: str | None, before: bytes) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    one = before + json.dumps({"image": in_base64(seven), "top_k": 2}).encode()
    response = service.client.post("/classify", content=one, headers=headers)
    assert (label(response), len(response.json()["predictions"])) == ("7", 2)
    several = before + json.dumps({"images": [in_base64(seven)]}).encode()
    results = service.client.post("/classify/batch", content=several, headers=headers).json()["results"]
    assert results[0]["predictions"][0]["label"] == "7"
    task = before + json.dumps({"inputs": in_base64(seven), "parameters": {"top_k": 2}}).encode()
    ranked = service.client.post("/", content=task, headers=headers).json()
    assert (ranked[0]["label"], len(ranked)) == ("7", 2)


def test_body_that_is_not_json_is_named(service: Service, seven: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    check_rejected(service.client.post("/classify", content=seven, headers=headers), 400, "it is an image: send it without")
    utf16 = json.dumps({"image": in_base64(seven)}).encode("utf-16")
    check_rejected(service.client.post("/classify", content=utf16, headers=headers), 400, "it is UTF-16: send UTF-8")
    task = {"inputs": in_base64(seven)}
    check_rejected(service.client.post("/classify", json=task), 400, "it has inputs: see POST / and POST /predict")


def part(headers: str, content: bytes, name: str = "image") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{headers}\r\n\r\n'.encode() + content + b"\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        '; filename="x.png"\r\nContent-Type: image/png',
        "\r\nContent-Type: image/png",  # requests: files={"image": (None, data, "image/png")}
        "\r\nContent-Type: application/octet-stream",  # aiohttp: add_field("image", data)
        "\r\ncontent-type: IMAGE/JPEG",
        "",
        "; filename*=UTF-8''x.png",
    ],
)
def test_part_with_an_image_is_an_image(service: Service, seven: bytes, headers: str) -> None:
    body = part(headers, seven) + part("\r\nContent-Type: text/plain", b"2", "top_k") + b"--b--\r\n"
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for preamble in (b"", b"\r\n", b"This is a message with multiple parts in MIME format.\r\n"):
        response = service.client.post("/classify", content=preamble + body, headers=form)
        assert (label(response), len(response.json()["predictions"])) == ("7", 2)


def test_transfer_encodings_of_parts(service: Service, seven: bytes) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    text = base64.encodebytes(seven).replace(b"\n", b"\r\n")
    encoded_part = part('; filename="x.png"\r\nContent-Type: image/png\r\nContent-Transfer-Encoding: base64', text)
    assert label(service.client.post("/classify", content=encoded_part + b"--b--\r\n", headers=form)) == "7"
    quoted = part("\r\nContent-Transfer-Encoding: quoted-printable", b"=89PNG")
    check_rejected(service.client.post("/classify", content=quoted + b"--b--\r\n", headers=form), 400, "quoted-printable")


@pytest.mark.parametrize("name", ["image[]", "file[]", "images", "images[]", "files"])
def test_field_names_of_lists(service: Service, seven: bytes, name: str) -> None:
    """axios and PHP's clients add [] to the names of lists; the JSON of /classify/batch has images."""
    one = service.client.post("/classify", files={name: ("7.png", seven)})
    assert one.json()["predictions"][0]["label"] == "7"
    several = service.client.post("/classify/batch", files=[(name, ("7.png", seven))] * 2).json()["results"]
    assert [result["predictions"][0]["label"] for result in several] == ["7", "7"]


@pytest.mark.parametrize("before", ["top_k=2&", "top_k=2&feature_format=json&", ""])
@pytest.mark.parametrize("name", ["image", "images%5B%5D", "file"])
def test_image_anywhere_in_a_url_encoded_form(service: Service, seven: bytes, before: str, name: str) -> None:
    body = f"{before}{name}={quote(base64.b64encode(seven).decode())}"
    answer = service.client.post("/classify", content=body, headers={"content-type": "application/x-www-form-urlencoded"})
    assert (answer.json()["predictions"][0]["label"], len(answer.json()["predictions"])) == ("7", 2 if before else 5)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"json": {"photo": "x", "id": 1}}, "no string field image (fields: photo, id): send"),
        ({"json": {}}, "no string field image (fields: none): send"),
        ({"json": {"image": None}}, "no string field image (image is null): send"),
        ({"json": {"image": ["x"]}}, "no string field image (image is a list): send"),
        ({"json": {"image": {"b64": "x"}}}, "no string field image (image is an object): send"),
        ({"json": {"image": True}}, "no string field image (image is a boolean): send"),
        ({"json": {"image": "gs://bucket/1.png"}}, "image is a URL, and URLs are not fetched"),
        ({"json": {"image": "file:///1.png"}}, "image is a URL, and URLs are not fetched"),
        (
            {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
            "no boundary: do not set it, the HTTP client does",
        ),
        ({"content": b"x", "headers": {"content-type": "multipart/mixed; boundary=x"}}, "multipart/mixed is not supported"),
        ({"content": b"aGVsbG8K" * 20}, "the image is base64: send it in JSON"),
        ({"content": b"data:image/png;base64,aGVsbG8K"}, "the image is base64: send it in JSON"),
    ],
)
def test_cause_of_a_body_without_an_image_is_named(service: Service, body: dict[str, Any], detail: str) -> None:
    answer = service.client.post("/classify", **body)
    assert (400 <= answer.status_code < 500, detail in answer.json()["detail"]) == (True, True), answer.text


def test_client_sends_a_part_without_a_file_name(service: Service, seven: bytes) -> None:
    files: Any = {"image": (None, seven, "image/png")}
    assert label(service.client.post("/classify", files=files)) == "7"


def test_base64_that_a_form_changed_is_restored(service: Service) -> None:
    image = encoded(noise(64, 64, seed=3))
    text = in_base64(image)
    assert text.count("+") > 20
    expected = label(service.client.post("/classify", content=image))
    urlencoded = {"Content-Type": "application/x-www-form-urlencoded"}
    for form in (f"image={text}", f"image={text.replace('+', '%2B')}", f"image=data:image/png;base64,{text}"):
        assert label(service.client.post("/classify", content=form, headers=urlencoded)) == expected
    wrapped = " ".join(text[i : i + 76] for i in range(0, len(text), 76))
    twice = quote(text, safe="")
    indented = "\n  ".join(text[i : i + 76] for i in range(0, len(text), 76))
    for value in (text.replace("+", " "), wrapped, twice, indented, f"data:image/png;base64,{twice}"):
        assert decode_base64(value) == image
        assert label(service.client.post("/classify", json={"image": value})) == expected
    check_rejected(service.client.post("/classify", json={"image": str(text.encode())}), 422, "is the repr of bytes")


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=400), st.integers(1, 20))
def test_base64_in_lines_of_any_length_is_decoded(data: bytes, width: int) -> None:
    text = in_base64(data)
    lines = [text[i : i + 4 * width] for i in range(0, len(text), 4 * width)]
    for separator in ("\n", "\r\n", "\n\t", "\r\n  ", " "):
        assert decode_base64(separator.join(lines)) == data


@pytest.mark.parametrize(
    "content_type",
    ["application/x-www-form-urlencoded", "image/jpeg", "text/plain", "application/pdf", "binary/octet-stream", None],
)
def test_raw_body_is_read_with_any_content_type(service: Service, seven: bytes, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert label(service.client.post("/classify", content=seven, headers=headers)) == "7"


def test_common_curl_commands(service: Service, seven: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(seven)
    for arguments in (
        ["--data-binary", f"@{path}"],
        ["-F", f"image=@{path}", "-F", "top_k=1"],
        ["-F", f"file=@{path};type=text/plain"],
        ["-T", str(path), "-X", "POST"],
        ["--data-urlencode", f"image={in_base64(seven)}"],
    ):
        done = subprocess.run(
            ["curl", "-sS", *arguments, f"{service.client.base_url}/classify"], capture_output=True, check=True
        )
        assert b'"label":"7"' in done.stdout, (arguments, done.stdout)


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "GZIP"])
def test_compressed_body_is_read(service: Service, seven: bytes, encoding: str) -> None:
    body = zlib.compress(seven) if encoding == "deflate" else gzip.compress(seven)
    assert label(service.client.post("/classify", content=body, headers={"Content-Encoding": encoding})) == "7"


def test_compressed_form_is_read(service: Service, seven: bytes) -> None:
    request = httpx.Request("POST", "http://x/", files={"image": seven}, data={"top_k": "1"})
    headers = {"Content-Type": request.headers["content-type"], "Content-Encoding": "gzip"}
    assert label(service.client.post("/classify", content=gzip.compress(request.read()), headers=headers)) == "7"


def test_invalid_compressed_body_is_rejected(service: Service, seven: bytes) -> None:
    unsupported = service.client.post("/classify", content=seven, headers={"Content-Encoding": "br"})
    check_rejected(unsupported, 415, "Content-Encoding br")
    assert unsupported.headers["accept-encoding"] == "gzip, deflate"
    headers = {"Content-Encoding": "gzip"}
    check_rejected(service.client.post("/classify", content=seven, headers=headers), 400, "the body is not valid gzip")
    check_rejected(service.client.post("/classify", content=gzip.compress(seven)[:-9], headers=headers), 400, "it is truncated")
    bomb = gzip.compress(bytes(50 * 2**20))
    check_rejected(service.client.post("/classify", content=bomb, headers=headers), 413, "the decompressed body is larger than")
    check_rejected(service.client.post("/classify", content=gzip.compress(seven)), 415, "Content-Encoding: gzip")


def test_base64_variants_are_decoded(service: Service, seven: bytes) -> None:
    lines = base64.encodebytes(seven).decode()
    assert lines.count("\n") > 2
    urlsafe = base64.urlsafe_b64encode(seven).decode()
    for text in (lines, lines.replace("\n", "\r\n"), urlsafe, urlsafe.rstrip("="), f"data:image/png;base64,{lines}"):
        assert label(service.client.post("/classify", json={"image": text})) == "7"


def test_deeply_nested_json_is_rejected(service: Service) -> None:
    headers = {"Content-Type": "application/json"}
    for depth, status, detail in ((1500, 400, "not JSON"), (200_000, 413, "lists and objects")):
        for body in (b'{"image":' + b"[" * depth, b"[" * depth + b"]" * depth):
            check_rejected(service.client.post("/classify", content=body, headers=headers), status, detail)


@pytest.mark.parametrize(
    ("headers", "status", "detail"),
    [
        ({"X-Deadline-Ms": "9" * 5000}, 422, "X-Deadline-Ms must be an integer"),
        ({"X-Deadline-Ms": "0" * 5000}, 422, "X-Deadline-Ms must be an integer"),
        ({"X-Deadline-Ms": "inf"}, 422, "X-Deadline-Ms must be an integer"),
        ({"X-Deadline-Ms": "-1"}, 422, "X-Deadline-Ms must be an integer"),
        ({"Content-Encoding": "x" * 5000}, 415, "Content-Encoding xxx"),
        ({"Content-Type": "multipart/form-data; boundary=b; charset=undefined"}, 400, "charset 'undefined' is not supported"),
        ({"Content-Type": "multipart/form-data; boundary=b; charset=idna"}, 400, "charset 'idna' is not supported"),
        ({"Content-Type": "multipart/form-data; boundary=" + "b" * 5000}, 400, "the form is malformed"),
        ({"Content-Type": "multipart/form-data; boundary="}, 400, "the form is malformed"),
    ],
)
def test_invalid_header_is_rejected(service: Service, seven: bytes, headers: dict[str, str], status: int, detail: str) -> None:
    response = service.client.post("/classify", content=seven, headers=headers)
    check_rejected(response, status, detail)
    assert len(response.content) < 1000


def test_deadline_may_exceed_that_of_the_service(service: Service, seven: bytes) -> None:
    assert label(service.client.post("/classify", content=seven, headers={"X-Deadline-Ms": "0000999999999"})) == "7"


@pytest.mark.parametrize("top_k", ["9" * 5000, "9" * 4000, "inf", "nan", "1e400", "-1"])
def test_extreme_number_is_rejected_in_every_place(service: Service, seven: bytes, top_k: str) -> None:
    text, headers = in_base64(seven), {"Content-Type": "application/json"}
    for response, statuses in (
        (service.client.post("/classify", content=seven, params={"top_k": top_k}), {422}),
        (service.client.post("/classify", files={"image": seven}, data={"top_k": top_k}), {422}),
        (service.client.post("/classify", content=f'{{"image":"{text}","top_k":{top_k}}}', headers=headers), {400, 422}),
        (
            service.client.post("/", content=f'{{"inputs":"{text}","parameters":{{"top_k":{top_k}}}}}', headers=headers),
            {400, 422},
        ),
        (service.client.post("/attention", content=seven, params={"y": top_k}), {422}),
    ):
        assert response.status_code in statuses, response.text
        assert len(response.content) < 1000


def test_number_of_parameters_and_fields_is_limited(service: Service, seven: bytes) -> None:
    query = "&".join(f"p{n}=1" for n in range(65))
    check_rejected(service.client.post(f"/classify?{query}", content=seven), 422, "the query has more than 64 parameters")
    parts = [(f"p{n}", (None, "1")) for n in range(200)]
    check_rejected(service.client.post("/classify", files=parts), 413, "the form has more than 192 parts")
    body = "image=&" + "&".join(f"p{n}=1" for n in range(64))
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    check_rejected(service.client.post("/classify", content=body, headers=headers), 413, "more than 64 fields")
    images = [("image", seven)] * 129
    check_rejected(service.client.post("/classify/batch", files=images), 413, "129 images, at most 128 can be queued")


def test_long_values_are_shortened_in_errors(service: Service, seven: bytes) -> None:
    long = "x" * 20_000
    for response in (
        service.client.post("/classify", content=seven, params={long: "1"}),
        service.client.post("/classify", content=seven, params={"top_k": long}),
        service.client.post("/classify", content=seven, params={"features": long[:900]}),
        service.client.post("/classify", json={"image": in_base64(seven), long: 1}),
        service.client.post("/classify", json={"image": in_base64(seven), "top_k": [[long] * 50] * 50}),
        service.client.post("/classify", files={long: seven}),
        service.client.post("/predict", json={"instances": [long] * 100}),
        service.client.post("/features", content=seven, headers={"Accept": f"{long}, {long}"}),
        service.client.post(f"/models/{long}", content=seven),
        service.client.post(f"/v2/models/{long}/infer", content=seven),
        service.client.get(f"/health/{long}"),
    ):
        assert 400 <= response.status_code < 500
        assert len(response.content) < 3000, response.text


def test_validation_errors_are_counted(service: Service) -> None:
    response = service.client.post("/predict", json={"instances": [0] * 100})
    check_rejected(response, 422, "instances.0 is 0: ", "instances.4 is 0: ", "and 95 more errors")
    assert "instances.5" not in response.json()["detail"]


def test_truncated_form_is_rejected(service: Service, seven: bytes) -> None:
    request = httpx.Request("POST", "http://x/", files=[("image", seven), ("image", seven)])
    headers = {"Content-Type": request.headers["content-type"]}
    response = service.client.post("/classify/batch", content=request.read()[:-200], headers=headers)
    check_rejected(response, 400, "the form is malformed: it is truncated")


def test_data_after_a_compressed_body_is_rejected(service: Service, seven: bytes) -> None:
    body = gzip.compress(seven) * 2
    response = service.client.post("/classify", content=body, headers={"Content-Encoding": "gzip"})
    check_rejected(response, 400, "data follows its end")


def test_large_bodies_are_read_in_every_format(service: Service, seven: bytes) -> None:
    """Bodies above 64 KiB are parsed in a thread."""
    image = seven + bytes(200_000)  # Pillow ignores what follows a PNG
    text = in_base64(image)
    for request in (
        {"files": {"image": image}},
        {"files": {"image": (None, text)}},
        {"json": {"image": text}},
        {"data": {"image": text}},
        {"content": image},
        {"content": gzip.compress(image), "headers": {"Content-Encoding": "gzip"}},
    ):
        assert label(service.client.post("/classify", **request)) == "7"  # type: ignore[arg-type]
    batch = service.client.post("/classify/batch", files=[("image", image)] * 3).json()["results"]
    assert [result["predictions"][0]["label"] for result in batch] == ["7"] * 3


def test_image_as_text_in_a_form(service: Service, seven: bytes) -> None:
    assert label(service.client.post("/classify", files={"image": (None, in_base64(seven))})) == "7"
    path = service.client.post("/classify", files={"image": (None, "x.png")})
    check_rejected(path, 400, "the field image is neither a file nor base64, got 'x.png'", "-F image=@image.jpg")
    check_rejected(service.client.post("/classify", files={"photo": seven}), 400, "no field image (fields: photo)")


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/model", "/metrics", "/openapi.json"])
def test_head_is_get_without_a_body(service: Service, path: str) -> None:
    got, head = service.client.get(path), service.client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert service.client.get(path).status_code == 200  # on the same connection


def test_text_chunks_in_a_png_are_ignored(service: Service, seven: bytes) -> None:
    huge = zlib.compress(b"prompt " * 450_000)
    for extra in (
        chunk(b"zTXt", b"parameters\0\0" + huge),
        chunk(b"iTXt", b"x\0\1\0\0\0" + huge),
        chunk(b"tEXt", b"a\0b", crc=1),
        chunk(b"zTXt", b"a\0\0not zlib"),
    ):
        assert label(service.client.post("/classify", content=with_chunk(seven, extra))) == "7"


def test_png_without_its_palette_is_rejected(service: Service) -> None:
    png = encoded(Image.new("P", (8, 8)))
    start = png.index(b"PLTE") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    response = service.client.post("/classify", content=png[:start] + png[end:])
    check_rejected(response, 422, "the image is damaged: its structure is invalid")


def test_png_with_wrong_checksum_is_rejected(service: Service, seven: bytes) -> None:
    idat = seven.index(b"IDAT")
    length = struct.unpack(">I", seven[idat - 4 : idat])[0]
    crc = idat + 4 + length
    check_rejected(service.client.post("/classify", content=seven[:crc] + b"\0\0\0\0" + seven[crc + 4 :]), 422, "damaged")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (375, 500), (17, 33)])
def test_jpeg_may_lack_only_its_end_marker(service: Service, progressive: bool, size: tuple[int, int]) -> None:
    whole = encoded(noise(*size), "JPEG", quality=90, progressive=progressive)
    expected = service.client.post("/classify", content=whole).json()["predictions"]
    for missing in (1, 2):
        assert service.client.post("/classify", content=whole[:-missing]).json()["predictions"] == expected
    for missing in (len(whole) // 2, len(whole) // 10):
        check_rejected(service.client.post("/classify", content=whole[:-missing]), 422, "damaged")


def test_avif_and_heic(service: Service, seven: bytes) -> None:
    image = Image.open(io.BytesIO(seven)).convert("RGB")
    assert label(service.client.post("/classify", content=encoded(image, "AVIF", quality=95))) == "7"
    import pillow_heif

    pillow_heif.register_heif_opener()
    assert label(service.client.post("/classify", content=encoded(image, "HEIF", quality=95))) == "7"


def test_heic_without_the_extra_names_the_package_to_install(seven: bytes) -> None:
    code = (
        "import io, sys; sys.modules['pillow_heif'] = None\n"
        "from dinat.app.images import decode\n"
        "decode(sys.stdin.buffer.read(), 10**6)"
    )
    heic = encoded(Image.open(io.BytesIO(seven)).convert("RGB"), "HEIF")
    done = subprocess.run([sys.executable, "-c", code], input=heic, capture_output=True, timeout=60, check=False)
    assert b"UnsupportedImage: the image is HEIC, which requires the extra heif: pip install 'dinat-serve[heif]'" in done.stderr


@pytest.mark.parametrize(
    ("image", "detail"),
    [
        (Image.fromarray(np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)), "floating-point"),
        (Image.fromarray(np.arange(64 * 64, dtype=np.int32).reshape(64, 64)), "32-bit signed integer"),
    ],
)
def test_samples_without_defined_range_are_rejected(service: Service, image: Image.Image, detail: str) -> None:
    check_rejected(
        service.client.post("/classify", content=encoded(image, "TIFF")), 422, detail, "send 8 or 16 bits per sample"
    )


def test_16_bit_samples_are_scaled(service: Service, seven: bytes) -> None:
    gray = np.asarray(Image.open(io.BytesIO(seven)).convert("L")).astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        assert label(service.client.post("/classify", content=encoded(Image.fromarray(gray), kind))) == "7"


@pytest.mark.parametrize(
    ("body", "format_"),
    [
        (b"<!DOCTYPE html><html>", "a web page (HTML)"),
        (b"\n <html lang=en>", "a web page (HTML)"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<svg/>", "SVG"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b'["x"]', "JSON"),
        (b"hello", "text"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"\0\0\0\x20ftypisom....", "a video (MP4)"),
        (b"\0\1\2\3\4\5\6\7", "in an unknown format"),
    ],
)
def test_other_file_types_are_named_in_the_error(service: Service, body: bytes, format_: str) -> None:
    check_rejected(service.client.post("/classify", content=body), 415, f"the image is {format_}", "JPEG, PNG")


def test_api_documentation_loads_no_other_host(service: Service) -> None:
    page = service.client.get("/docs")
    assert page.status_code == 200
    assert "//cdn" not in page.text
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert asset in page.text
        assert len(service.client.get(f"/static-offline-docs/{asset}").content) > 100_000


def test_uvicorn_loads_the_application_by_name() -> None:
    code = "from uvicorn import Config; c = Config('dinat.app.main:app'); c.load(); print(type(c.loaded_app).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().endswith("Middleware")
    with pytest.raises(AttributeError, match="no attribute nothing"):
        main.nothing  # noqa: B018
