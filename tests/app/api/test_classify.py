import base64
import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from dinat.model import DinatBackbone, DinatForImageClassification, DinatImageProcessor
from tests.app.conftest import DIGITS, Service, server_timing
from tests.app.sample_images import encoded, noise, png_bomb


def classify(service: Service, picture: bytes, **parameters: Any) -> httpx.Response:
    return service.client.post("/classify", files={"image": ("picture", picture)}, params=parameters)


def check_problem(response: httpx.Response, status: int, detail: str) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}
    assert problem["status"] == status
    assert detail in problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]


def test_the_digit_is_read_and_the_answer_has_the_documented_form(service: Service, seven: bytes) -> None:
    answer = classify(service, seven).json()
    assert set(answer) == {"model", "predictions", "request_id"}
    assert answer["model"] == "digits"
    assert len(answer["predictions"]) == 5
    best = answer["predictions"][0]
    assert (best["label"], best["class_id"]) == ("7", 7)
    scores = [prediction["score"] for prediction in answer["predictions"]]
    assert scores == sorted(scores, reverse=True)


def test_scores_are_those_of_the_network_called_directly(service: Service) -> None:
    picture = noise(333, 500)
    network, processor = DinatForImageClassification.from_pretrained("digits"), DinatImageProcessor.from_pretrained("digits")
    with torch.inference_mode():
        expected = network(processor(picture)).logits.softmax(dim=-1)[0]
    answer = classify(service, encoded(picture), top_k=10).json()
    scores = torch.zeros(10)
    for prediction in answer["predictions"]:
        scores[prediction["class_id"]] = prediction["score"]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_every_form_of_body_gives_the_same_answer(service: Service, seven: bytes) -> None:
    client, text = service.client, base64.b64encode(seven).decode()
    answers = [
        client.post("/classify", files={"image": ("seven.png", seven, "image/png")}),
        client.post("/classify", files={"file": ("seven.png", seven, "image/png")}),
        client.post("/classify", content=seven, headers={"content-type": "image/png"}),
        client.post("/classify", content=seven, headers={"content-type": "application/octet-stream"}),
        client.post("/classify", content=seven),
        client.post("/classify", json={"image": text}),
        client.post("/classify", json={"image": f"data:image/png;base64,{text}"}),
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert len({str(answer.json()["predictions"]) for answer in answers}) == 1


@pytest.mark.parametrize("top_k", [1, 10])
def test_top_k(service: Service, seven: bytes, top_k: int) -> None:
    assert len(classify(service, seven, top_k=top_k).json()["predictions"]) == top_k


def test_features_are_those_of_the_backbone(service: Service, seven: bytes) -> None:
    stages = ["stem", "stage1", "stage2", "stage3"]
    backbone = DinatBackbone.from_pretrained("digits", out_features=stages)
    pixels = DinatImageProcessor.from_pretrained("digits")(Image.open(DIGITS / "7-1.png"))
    with torch.inference_mode():
        expected = backbone(pixels).feature_maps
        whole = DinatForImageClassification.from_pretrained("digits")(pixels, output_hidden_states=True)
    answer = classify(service, seven, features=",".join([*stages, "hidden_states", "pooled"])).json()
    for stage, feature_map in zip(stages, expected, strict=True):
        given = answer["features"][stage]
        assert given["shape"] == list(feature_map.shape[1:])
        assert given["dtype"] == "float32"
        np.testing.assert_allclose(given["data"], feature_map[0].numpy(), rtol=0, atol=1e-5)
    assert len(answer["features"]["hidden_states"]) == 4
    for given, state in zip(answer["features"]["hidden_states"], whole.reshaped_hidden_states, strict=True):
        np.testing.assert_allclose(given["data"], state[0].numpy(), rtol=0, atol=1e-5)
    assert answer["features"]["pooled"]["shape"] == [128]


def test_features_as_base64_are_the_same_numbers(service: Service, seven: bytes) -> None:
    plain = classify(service, seven, features="stage3").json()["features"]["stage3"]
    packed = classify(service, seven, features=" stage3 ,", feature_format="base64").json()["features"]["stage3"]
    values = np.frombuffer(base64.b64decode(packed["data"]), dtype="<f4").reshape(packed["shape"])
    np.testing.assert_array_equal(values, np.array(plain["data"], dtype=np.float32))


@pytest.mark.parametrize(
    ("picture", "status", "detail"),
    [
        (b"", 400, "the picture is empty"),
        (b"hello, I am a text file", 415, "the picture is text: read are JPEG, PNG"),
        (encoded(noise(64, 64))[:5000], 422, "the picture is damaged"),
        (encoded(noise(64, 64), "JPEG")[:-900], 422, "the picture is damaged"),
        (png_bomb(30_000, 30_000), 413, "30000x30000 = 900,000,000 pixels, at most 50,000,000"),
        (encoded(noise(1400, 1400)), 413, "larger than 4,194,304 bytes"),
    ],
    ids=["empty", "text", "truncated PNG", "truncated JPEG", "bomb", "upload"],
)
def test_bad_pictures_get_their_status_and_the_next_request_works(
    service: Service, seven: bytes, picture: bytes, status: int, detail: str
) -> None:
    for send in (
        lambda: classify(service, picture),
        lambda: service.client.post("/classify", content=picture),
        lambda: service.client.post("/classify", json={"image": base64.b64encode(picture).decode()}),
    ):
        check_problem(send(), status, detail)
        assert classify(service, seven).json()["predictions"][0]["label"] == "7"


@pytest.mark.parametrize(
    ("parameters", "detail"),
    [
        ({"top_k": 0}, "top_k is 0, allowed are 1 to 10"),
        ({"top_k": 1001}, "top_k is 1001, allowed are 1 to 10"),
        ({"top_k": "many"}, "top_k is 'many': Input should be a valid integer"),
        ({"features": "stage9"}, "features names stage9, allowed are stem, stage1, stage2, stage3, pooled, hidden_states"),
        ({"feature_format": "xml"}, "feature_format is 'xml': Input should be 'json' or 'base64'"),
    ],
)
def test_bad_parameters_are_named_with_what_is_allowed(
    service: Service, seven: bytes, parameters: dict[str, Any], detail: str
) -> None:
    check_problem(classify(service, seven, **parameters), 422, detail)


@pytest.mark.parametrize(
    ("request_", "status", "detail"),
    [
        ({"data": {"image": "no text!"}, "files": {"x": b"y"}}, 400, "the field image is text that is no base64, 'no text!'"),
        ({"files": {"x": b"y"}}, 400, "the form has no field named image, its fields are: x"),
        ({"files": {"image": b"x", "note": b"y"}}, 422, "note is no parameter here"),
        ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "the form"),
        ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data"}}, 400, "the form is broken"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "the body is not JSON"),
        ({"json": {"picture": "x"}}, 400, "no text in a field image"),
        ({"json": [1]}, 400, "the JSON is list, an object is wanted"),
        ({"json": {"image": "not base64!"}}, 422, "image is not base64"),
        ({"json": {"image": "data:image/png,abc"}}, 422, "data: URL that is not base64"),
        ({"json": {"image": "https://example.org/cat.jpg"}}, 422, "nothing is fetched here"),
        ({"data": {"image": "no text!"}}, 400, "the field image is text that is no base64"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "the picture is text"),
    ],
)
def test_broken_bodies_are_named(service: Service, request_: dict[str, Any], status: int, detail: str) -> None:
    check_problem(service.client.post("/classify", **request_), status, detail)


def test_upload_without_a_length_is_stopped_where_it_passes_the_limit(service: Service) -> None:
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while sent < 2**26:
            sent += 2**16
            yield bytes(2**16)

    with contextlib.suppress(httpx.WriteError):  # the server may close before the client has read its answer
        check_problem(service.client.post("/classify", content=endless()), 413, "larger than 4,194,304 bytes")
    assert sent < 2**26


def test_one_by_one_picture(service: Service) -> None:
    assert classify(service, encoded(Image.new("RGB", (1, 1)))).status_code == 200


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(service: Service, kind: str) -> None:
    picture = encoded(Image.open(DIGITS / "3-1.png"), kind)
    assert classify(service, picture).json()["predictions"][0]["label"] == "3"


def test_exif_turn_is_applied(service: Service) -> None:
    image = Image.open(DIGITS / "4-1.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = classify(service, encoded(image), top_k=10).json()["predictions"]
    assert classify(service, encoded(turned, exif=exif), top_k=10).json()["predictions"] == upright
    assert classify(service, encoded(turned), top_k=10).json()["predictions"] != upright


def test_many_at_once_each_get_their_own_answer(service: Service) -> None:
    paths = sorted(DIGITS.glob("*.png")) * 5

    def ask(path: Path) -> str:
        wanted = {"features": "pooled"} if path.name.endswith("2.png") else {}
        answer = classify(service, path.read_bytes(), top_k=1 + int(path.name[0]), **wanted).json()
        assert len(answer["predictions"]) == 1 + int(path.name[0])
        assert ("features" in answer) == bool(wanted)
        return answer["predictions"][0]["label"]

    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(ask, paths)) == [path.name[0] for path in paths]


def test_request_id_is_the_clients_or_a_new_one(service: Service, seven: bytes) -> None:
    own = service.client.post("/classify", content=seven, headers={"X-Request-ID": "mine-1"})
    assert own.json()["request_id"] == own.headers["x-request-id"] == "mine-1"
    new = {classify(service, seven).json()["request_id"] for _ in range(2)}
    assert len(new) == 2
    unfit = service.client.post("/classify", content=seven, headers={"X-Request-ID": "a b"})
    assert unfit.json()["request_id"] != "a b"


@pytest.mark.parametrize("path", ["/classify", "/features", "/attention", "/"])
def test_what_each_part_took_is_told(service: Service, seven: bytes, path: str) -> None:
    parts = server_timing(service.client.post(path, content=seven))
    assert list(parts) == ["decode", "queue", "compute", "encode", "total"]
    assert all(milliseconds >= 0 for milliseconds in parts.values())
    assert parts["decode"] > 0 and parts["compute"] > 0
    total = parts.pop("total")
    assert sum(parts.values()) <= total + 0.03  # each is rounded


def test_several_pictures_have_no_parts_of_their_own(service: Service, seven: bytes) -> None:
    answer = service.client.post("/classify/batch", files=[("image", seven), ("image", seven)])
    assert answer.status_code == 200
    assert "server-timing" not in answer.headers


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/health/nowhere", 404), ("GET", "/classify", 405)])
def test_wrong_paths_and_methods_are_problems_too(service: Service, method: str, path: str, status: int) -> None:
    check_problem(service.client.request(method, path), status, f"{method} {path}")
