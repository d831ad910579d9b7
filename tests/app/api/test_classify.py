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


def classify(service: Service, image: bytes, **parameters: Any) -> httpx.Response:
    return service.client.post("/classify", files={"image": ("image", image)}, params=parameters)


def check_problem(response: httpx.Response, status: int, detail: str) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}
    assert problem["status"] == status
    assert detail in problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]


def test_digit_is_classified_in_the_documented_format(service: Service, seven: bytes) -> None:
    answer = classify(service, seven).json()
    assert set(answer) == {"model", "predictions", "request_id"}
    assert answer["model"] == "digits"
    assert len(answer["predictions"]) == 5
    best = answer["predictions"][0]
    assert (best["label"], best["class_id"]) == ("7", 7)
    scores = [prediction["score"] for prediction in answer["predictions"]]
    assert scores == sorted(scores, reverse=True)


def test_scores_match_the_network(service: Service) -> None:
    image = noise(333, 500)
    network, processor = DinatForImageClassification.from_pretrained("digits"), DinatImageProcessor.from_pretrained("digits")
    with torch.inference_mode():
        expected = network(processor(image)).logits.softmax(dim=-1)[0]
    answer = classify(service, encoded(image), top_k=10).json()
    scores = torch.zeros(10)
    for prediction in answer["predictions"]:
        scores[prediction["class_id"]] = prediction["score"]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_every_body_format_gives_the_same_predictions(service: Service, seven: bytes) -> None:
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


def test_features_match_the_backbone(service: Service, seven: bytes) -> None:
    stages = ["stem", "stage1", "stage2", "stage3"]
    backbone = DinatBackbone.from_pretrained("digits", out_features=stages)
    pixels = DinatImageProcessor.from_pretrained("digits")(Image.open(DIGITS / "7-1.png"))
    with torch.inference_mode():
        expected = backbone(pixels).feature_maps
        output = DinatForImageClassification.from_pretrained("digits")(pixels, output_hidden_states=True)
    answer = classify(service, seven, features=",".join([*stages, "hidden_states", "pooled"])).json()
    for stage, feature_map in zip(stages, expected, strict=True):
        returned = answer["features"][stage]
        assert returned["shape"] == list(feature_map.shape[1:])
        assert returned["dtype"] == "float32"
        np.testing.assert_allclose(returned["data"], feature_map[0].numpy(), rtol=0, atol=1e-5)
    assert len(answer["features"]["hidden_states"]) == 4
    for returned, state in zip(answer["features"]["hidden_states"], output.reshaped_hidden_states, strict=True):
        np.testing.assert_allclose(returned["data"], state[0].numpy(), rtol=0, atol=1e-5)
    assert answer["features"]["pooled"]["shape"] == [128]


def test_features_in_base64_have_the_same_values(service: Service, seven: bytes) -> None:
    plain = classify(service, seven, features="stage3").json()["features"]["stage3"]
    packed = classify(service, seven, features=" stage3 ,", feature_format="base64").json()["features"]["stage3"]
    values = np.frombuffer(base64.b64decode(packed["data"]), dtype="<f4").reshape(packed["shape"])
    np.testing.assert_array_equal(values, np.array(plain["data"], dtype=np.float32))


@pytest.mark.parametrize(
    ("image", "status", "detail"),
    [
        (b"", 400, "the image is empty"),
        (b"hello, I am a text file", 415, "the image is text: supported formats are JPEG, PNG"),
        (encoded(noise(64, 64))[:5000], 422, "the image is damaged"),
        (encoded(noise(64, 64), "JPEG")[:-900], 422, "the image is damaged"),
        (png_bomb(30_000, 30_000), 413, "30000x30000 = 900,000,000 pixels, the maximum is 50,000,000"),
        (encoded(noise(1400, 1400)), 413, "larger than 4,194,304 bytes"),
    ],
    ids=["empty", "text", "truncated PNG", "truncated JPEG", "bomb", "upload"],
)
def test_invalid_image_gets_its_status_and_the_next_request_works(
    service: Service, seven: bytes, image: bytes, status: int, detail: str
) -> None:
    for send in (
        lambda: classify(service, image),
        lambda: service.client.post("/classify", content=image),
        lambda: service.client.post("/classify", json={"image": base64.b64encode(image).decode()}),
    ):
        check_problem(send(), status, detail)
        assert classify(service, seven).json()["predictions"][0]["label"] == "7"


@pytest.mark.parametrize(
    ("parameters", "detail"),
    [
        ({"top_k": 0}, "top_k must be between 1 and 10, got 0"),
        ({"top_k": 1001}, "top_k must be between 1 and 10, got 1001"),
        ({"top_k": "many"}, "top_k is 'many': Value error, a number is required"),
        ({"features": "stage9"}, "features must be among stem, stage1, stage2, stage3, pooled, hidden_states, got stage9"),
        ({"feature_format": "xml"}, "feature_format is 'xml': Input should be 'json' or 'base64'"),
    ],
)
def test_invalid_parameter_is_named_with_allowed_values(
    service: Service, seven: bytes, parameters: dict[str, Any], detail: str
) -> None:
    check_problem(classify(service, seven, **parameters), 422, detail)


@pytest.mark.parametrize(
    ("request_", "status", "detail"),
    [
        (
            {"data": {"image": "no text!"}, "files": {"x": b"y"}},
            400,
            "the field image is neither a file nor base64, got 'no text!'",
        ),
        ({"files": {"x": b"y"}}, 400, "the form has no field image (fields: x)"),
        ({"files": {"image": b"x", "note": b"y"}}, 422, "unknown parameter note"),
        ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "the form"),
        ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data"}}, 400, "the form is malformed"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "the body is not JSON"),
        ({"json": {"photo": "x"}}, 400, "no string field image"),
        ({"json": [1]}, 400, "the JSON must be an object, got list"),
        ({"json": {"image": "not base64!"}}, 422, "image is not base64"),
        ({"json": {"image": "data:image/png,abc"}}, 422, "data: URL that is not base64"),
        ({"json": {"image": "https://example.org/cat.jpg"}}, 422, "URLs are not fetched"),
        ({"data": {"image": "no text!"}}, 400, "the field image is neither a file nor base64"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "the image is text"),
    ],
)
def test_malformed_body_is_described_in_the_error(service: Service, request_: dict[str, Any], status: int, detail: str) -> None:
    check_problem(service.client.post("/classify", **request_), status, detail)


def test_upload_without_a_length_is_stopped_at_the_limit(service: Service) -> None:
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while sent < 2**26:
            sent += 2**16
            yield bytes(2**16)

    with contextlib.suppress(httpx.WriteError):  # the server may close before the client has read the response
        check_problem(service.client.post("/classify", content=endless()), 413, "larger than 4,194,304 bytes")
    assert sent < 2**26


def test_image_of_one_pixel(service: Service) -> None:
    assert classify(service, encoded(Image.new("RGB", (1, 1)))).status_code == 200


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(service: Service, kind: str) -> None:
    image = encoded(Image.open(DIGITS / "3-1.png"), kind)
    assert classify(service, image).json()["predictions"][0]["label"] == "3"


def test_exif_orientation_is_applied(service: Service) -> None:
    image = Image.open(DIGITS / "4-1.png")
    rotated = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = classify(service, encoded(image), top_k=10).json()["predictions"]
    assert classify(service, encoded(rotated, exif=exif), top_k=10).json()["predictions"] == upright
    assert classify(service, encoded(rotated), top_k=10).json()["predictions"] != upright


def test_concurrent_requests_get_their_own_results(service: Service) -> None:
    paths = sorted(DIGITS.glob("*.png")) * 5

    def request(path: Path) -> str:
        features = {"features": "pooled"} if path.name.endswith("2.png") else {}
        answer = classify(service, path.read_bytes(), top_k=1 + int(path.name[0]), **features).json()
        assert len(answer["predictions"]) == 1 + int(path.name[0])
        assert ("features" in answer) == bool(features)
        return answer["predictions"][0]["label"]

    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(request, paths)) == [path.name[0] for path in paths]


def test_request_id_is_from_the_client_or_new(service: Service, seven: bytes) -> None:
    own = service.client.post("/classify", content=seven, headers={"X-Request-ID": "mine-1"})
    assert own.json()["request_id"] == own.headers["x-request-id"] == "mine-1"
    new = {classify(service, seven).json()["request_id"] for _ in range(2)}
    assert len(new) == 2
    invalid = service.client.post("/classify", content=seven, headers={"X-Request-ID": "a b"})
    assert invalid.json()["request_id"] != "a b"


@pytest.mark.parametrize("path", ["/classify", "/features", "/attention", "/"])
def test_server_timing_has_every_stage(service: Service, seven: bytes, path: str) -> None:
    stages = server_timing(service.client.post(path, content=seven))
    assert list(stages) == ["decode", "queue", "compute", "encode", "total"]
    assert all(milliseconds >= 0 for milliseconds in stages.values())
    assert stages["decode"] > 0 and stages["compute"] > 0
    total = stages.pop("total")
    assert sum(stages.values()) <= total + 0.03  # every value is rounded


def test_batch_has_no_server_timing(service: Service, seven: bytes) -> None:
    answer = service.client.post("/classify/batch", files=[("image", seven), ("image", seven)])
    assert answer.status_code == 200
    assert "server-timing" not in answer.headers


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/health/nowhere", 404), ("GET", "/classify", 405)])
def test_wrong_path_or_method_is_a_problem(service: Service, method: str, path: str, status: int) -> None:
    check_problem(service.client.request(method, path), status, f"{method} {path}")
