"""Endpoints for other services' clients, tested with these clients; and /features."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from safetensors.numpy import load

from tests.app.conftest import DIGITS, Service, running
from tests.app.sample_images import encoded, noise

IMAGE_OF_TWO_PIXELS = base64.b64encode(encoded(noise(2, 1))).decode()


@pytest.fixture
def hugging_face(service: Service) -> InferenceClient:
    return InferenceClient(model=str(service.client.base_url))


def test_hugging_face_client_with_every_input_type(hugging_face: InferenceClient, seven: bytes, tmp_path: Path) -> None:
    path = tmp_path / "seven.png"
    path.write_bytes(seven)
    for image in (seven, str(path), path):  # the input types of this version of the client
        best = hugging_face.image_classification(image)[0]
        assert best.label == "7"
        assert 0.9 < best.score <= 1


def test_hugging_face_parameters(hugging_face: InferenceClient, service: Service, seven: bytes) -> None:
    assert len(hugging_face.image_classification(seven, top_k=2)) == 2
    assert len(hugging_face.image_classification(seven, top_k=1000)) == 10
    softmax, sigmoid, none = (
        hugging_face.image_classification(seven, function_to_apply=function, top_k=10)  # type: ignore[arg-type]
        for function in ("softmax", "sigmoid", "none")
    )
    assert [item.label for item in softmax] == [item.label for item in sigmoid] == [item.label for item in none]
    logits = np.array([item.score for item in none])
    np.testing.assert_allclose([item.score for item in sigmoid], 1 / (1 + np.exp(-logits)), atol=1e-6)
    np.testing.assert_allclose([item.score for item in softmax], np.exp(logits) / np.exp(logits).sum(), atol=1e-6)
    expected = service.client.post("/classify?top_k=10", content=seven).json()["predictions"]
    np.testing.assert_allclose([item.score for item in softmax], [prediction["score"] for prediction in expected], atol=1e-6)


def test_hugging_face_parameters_in_the_query_and_options(service: Service, seven: bytes) -> None:
    assert len(service.client.post("/?top_k=2", content=seven).json()) == 2
    task = {"inputs": base64.b64encode(seven).decode(), "options": {"wait_for_model": True, "use_cache": False}}
    assert len(service.client.post("/models/digits?top_k=3", json=task).json()) == 3
    twice = service.client.post("/?top_k=3", json=task | {"parameters": {"top_k": 2}})
    assert (twice.status_code, "top_k is '3' in the query and '2' in the JSON" in twice.json()["error"]) == (422, True)
    boolean = service.client.post("/", json=task | {"parameters": {"top_k": True}})
    assert (boolean.status_code, "top_k is True" in boolean.json()["error"]) == (422, True)
    unknown = service.client.post("/?topk=2", content=seven)
    assert (unknown.status_code, "did you mean top_k?" in unknown.json()["error"]) == (422, True)
    option = service.client.post("/", json=task | {"options": {"wait": True}})
    assert (option.status_code, "options.wait" in option.json()["error"]) == (422, True)


def test_hugging_face_task_at_sagemaker_endpoint(service: Service, seven: bytes) -> None:
    task = {"inputs": base64.b64encode(seven).decode(), "parameters": {"top_k": 2}}
    ranked = service.client.post("/invocations", json=task).json()
    assert (ranked[0]["label"], len(ranked)) == ("7", 2)


def test_vertex_instances_of_other_models(service: Service, seven: bytes) -> None:
    text = base64.b64encode(seven).decode()
    instances = [
        {"b64": text},
        {"image_bytes": {"b64": text}},
        {"bytes_inputs": {"b64": text}},
        {"content": text},
        {"image": text},
    ]
    predictions = service.client.post("/predict", json={"instances": instances}).json()["predictions"]
    assert [prediction["predictions"][0]["label"] for prediction in predictions] == ["7"] * 5


def test_content_type_of_open_inference_requests(service: Service, seven: bytes) -> None:
    text = base64.b64encode(seven).decode()

    def send(content_type: object, place: str) -> httpx.Response:
        image: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
        body: dict[str, Any] = {"inputs": [image]}
        (image if place == "input" else body)["parameters"] = {"content_type": content_type}
        return service.client.post("/v2/models/digits/infer", json=body)

    for place in ("input", "request"):
        for content_type in ("base64", "image/png", "pillow_image"):
            outputs = send(content_type, place).json()["outputs"]
            assert next(output["data"][0] for output in outputs if output["name"] == "labels") == "7"
        for other in ("pd", 1):
            rejected = send(other, place)
            assert (rejected.status_code, f"content_type {other!r}" in rejected.json()["error"]) == (400, True)


def test_hugging_face_endpoint_by_model_name(service: Service, seven: bytes) -> None:
    body = {"inputs": base64.b64encode(seven).decode(), "parameters": {"top_k": 1}}
    (best,) = service.client.post("/models/digits", json=body).json()
    assert best["label"] == "7"
    missing = service.client.post("/models/other/model", json=body)
    assert (missing.status_code, missing.json()["error"]) == (404, "model other/model is not found, this service has digits")


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"json": {"inputs": "eA==", "parameters": {"threshold": 1}}}, 422, "threshold"),
        ({"json": {"input": "eA=="}}, 422, "inputs"),
        ({"json": {"inputs": "eA==", "parameters": {"function_to_apply": "relu"}}}, 422, "relu"),
        ({"json": {"inputs": "eA=="}}, 415, "the image is text"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "not JSON"),
        ({"content": b""}, 400, "empty"),
    ],
)
def test_hugging_face_endpoint_rejects_invalid_requests(
    service: Service, body: dict[str, Any], status: int, detail: str
) -> None:
    response = service.client.post("/", **body)
    assert response.status_code == status
    assert detail in response.json()["error"]


def test_hugging_face_client_raises_the_error(hugging_face: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError, match="415"):
        hugging_face.image_classification(b"text")


def test_sagemaker_endpoints(service: Service, seven: bytes) -> None:
    assert service.client.get("/ping").status_code == 200
    for body in (
        {"content": seven, "headers": {"Content-Type": "application/x-image"}},
        {"content": seven, "headers": {"Content-Type": "image/png", "Accept": "application/json"}},
        {"json": {"image": base64.b64encode(seven).decode(), "top_k": 2}},
    ):
        response = service.client.post("/invocations", **body)  # type: ignore[arg-type]
        assert response.json()["predictions"][0]["label"] == "7"
    assert "error" in service.client.post("/invocations", content=b"text").json()


def test_vertex_endpoints(seven: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    three = (DIGITS / "3-1.png").read_bytes()
    instances = [{"b64": base64.b64encode(data).decode()} for data in (seven, three)]
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/v1/endpoints/5/deployedModels/6:predict")
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/v1/endpoints/5/deployedModels/6")
    with running() as service:
        assert service.client.get("/v1/endpoints/5/deployedModels/6").status_code == 200
        url = "/v1/endpoints/5/deployedModels/6:predict"
        body = service.client.post(url, json={"instances": instances, "parameters": {"top_k": 1}}).json()
        labels = [[item["label"] for item in prediction["predictions"]] for prediction in body["predictions"]]
        assert labels == [["7"], ["3"]]
        invalid = service.client.post(url, json={"instances": [instances[0], {"b64": "eA=="}]})
        assert (invalid.status_code, invalid.json()["error"][:18]) == (415, "instance 2 of 2: t")
        for body, detail in (
            ({"instances": []}, "instances"),
            ({"instances": [{"photo": "x"}]}, "b64"),
            ({"instances": instances, "parameters": {"topk": 1}}, "topk"),
        ):
            invalid = service.client.post(url, json=body)
            assert invalid.status_code == 422
            assert detail in invalid.json()["error"]


@pytest.mark.parametrize(
    ("variable", "port"), [("DINAT_PORT", 8123), ("AIP_HTTP_PORT", 8124), ("SAGEMAKER_BIND_TO_PORT", 8125)]
)
def test_port_is_read_from_platform_variables(variable: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinat.app.settings import Settings

    monkeypatch.setenv(variable, str(port))
    assert Settings(_env_file=None).port == port
    assert Settings(_env_file=None, port=9000).port == 9000


def features(service: Service, image: bytes, media_type: str, **parameters: str) -> httpx.Response:
    return service.client.post("/features", content=image, params=parameters, headers={"Accept": media_type})


def test_feature_maps_are_equal_in_every_format(service: Service, seven: bytes) -> None:
    names = "stage1,stage3,pooled,hidden_states"
    returned = features(service, seven, "application/json", features=names).json()["features"]
    expected = {name: np.array(returned[name]["data"], np.float32) for name in ("stage1", "stage3", "pooled")}
    expected |= {f"hidden_states.{i}": np.array(state["data"], np.float32) for i, state in enumerate(returned["hidden_states"])}
    npz = np.load(io.BytesIO(features(service, seven, "application/x-npz", features=names).content))
    tensors = load(features(service, seven, "application/vnd.safetensors", features=names).content)
    assert set(npz) == set(tensors) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(npz[name], values)
        np.testing.assert_array_equal(tensors[name], values)
    npy = np.load(io.BytesIO(features(service, seven, "application/x-npy", features="stage3").content))
    np.testing.assert_array_equal(npy, expected["stage3"])
    half = load(features(service, seven, "application/vnd.safetensors", features="stage3", feature_dtype="float16").content)
    np.testing.assert_array_equal(half["stage3"], expected["stage3"].astype(np.float16))
    packed = features(service, seven, "*/*", features="stage3", feature_dtype="float16", feature_format="base64").json()
    values = np.frombuffer(base64.b64decode(packed["features"]["stage3"]["data"]), "<f2")
    np.testing.assert_array_equal(values, expected["stage3"].astype(np.float16).ravel())


def test_features_default_to_all_stages(service: Service, seven: bytes) -> None:
    assert set(load(features(service, seven, "application/vnd.safetensors").content)) == {"stage1", "stage2", "stage3"}


def test_unsupported_feature_requests_are_rejected(service: Service, seven: bytes) -> None:
    several = features(service, seven, "application/x-npy", features="stage1,stage2")
    assert (several.status_code, "holds one feature map, got 2" in several.json()["detail"]) == (422, True)
    other = features(service, seven, "image/png")
    assert (other.status_code, "application/x-npz" in other.json()["detail"]) == (406, True)
    unknown = features(service, seven, "*/*", top_k="1")
    assert (unknown.status_code, "unknown parameter top_k" in unknown.json()["detail"]) == (422, True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", {"instances": [{"b64": IMAGE_OF_TWO_PIXELS}]}),
        (
            "/v2/models/digits/infer",
            {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [IMAGE_OF_TWO_PIXELS]}]},
        ),
        ("/classify", {"image": IMAGE_OF_TWO_PIXELS}),
    ],
)
def test_image_with_too_many_pixels_is_413_everywhere(path: str, body: dict[str, object]) -> None:
    with running(max_pixels=1) as service:
        response = service.client.post(path, json=body)
        assert response.status_code == 413
        assert "1x2 = 2 pixels, the maximum is 1" in response.json()["detail"]


def test_json_is_recognised_alike_at_every_endpoint(service: Service, seven: bytes) -> None:
    """SageMaker's clients send JSON with other media types too."""
    task = json.dumps({"inputs": base64.b64encode(seven).decode(), "parameters": {"top_k": 2}}).encode()
    for media_type in ("application/json", "application/vnd.api+json", "text/plain", "application/x-www-form-urlencoded", ""):
        for path in ("/invocations", "/", "/models/digits"):
            answer = service.client.post(path, content=task, headers={"content-type": media_type})
            assert next(item["label"] for item in answer.json()) == "7", (media_type, path, answer.text)
            assert len(answer.json()) == 2


def test_forms_at_hugging_face_endpoints(service: Service, seven: bytes) -> None:
    for path in ("/", "/models/digits"):
        answer = service.client.post(path, files={"image": ("7.png", seven)}, data={"top_k": "3"})
        assert (answer.json()[0]["label"], len(answer.json())) == ("7", 3)
    text = base64.b64encode(seven).decode()
    assert service.client.post("/", data={"image": text}).json()[0]["label"] == "7"
    missing = service.client.post("/models/digits", files={"inputs": ("7.png", seven)})
    assert (missing.status_code, "no field image (fields: inputs)" in missing.json()["detail"]) == (400, True)


def test_image_or_form_at_a_json_endpoint_is_named(service: Service, seven: bytes) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("an image", {"content": seven}),
        ("an image", {"content": seven, "headers": {"content-type": "application/json"}}),
        ("a form", {"files": {"image": ("7.png", seven)}}),
    ]
    for kind, body in bodies:
        answer = service.client.post("/predict", **body)
        expected = f"/predict requires JSON, the body is {kind}: send it to POST /classify"
        assert (answer.status_code, answer.json()["detail"]) == (400, expected)
