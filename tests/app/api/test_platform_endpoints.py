"""Doors that other people's clients knock at, by those clients."""

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from safetensors.numpy import load

from tests.app.conftest import DIGITS, Service, running


@pytest.fixture
def hugging_face(service: Service) -> InferenceClient:
    return InferenceClient(model=str(service.client.base_url))


def test_hugging_faces_client_in_every_form(hugging_face: InferenceClient, seven: bytes, tmp_path: Path) -> None:
    path = tmp_path / "seven.png"
    path.write_bytes(seven)
    for picture in (seven, str(path), path):  # this version of the client takes no other
        best = hugging_face.image_classification(picture)[0]
        assert best.label == "7"
        assert 0.9 < best.score <= 1


def test_hugging_faces_parameters(hugging_face: InferenceClient, service: Service, seven: bytes) -> None:
    assert len(hugging_face.image_classification(seven, top_k=2)) == 2
    assert len(hugging_face.image_classification(seven, top_k=1000)) == 10
    softmax, sigmoid, none = (
        hugging_face.image_classification(seven, function_to_apply=function, top_k=10)  # type: ignore[arg-type]
        for function in ("softmax", "sigmoid", "none")
    )
    assert [one.label for one in softmax] == [one.label for one in sigmoid] == [one.label for one in none]
    logits = np.array([one.score for one in none])
    np.testing.assert_allclose([one.score for one in sigmoid], 1 / (1 + np.exp(-logits)), atol=1e-6)
    np.testing.assert_allclose([one.score for one in softmax], np.exp(logits) / np.exp(logits).sum(), atol=1e-6)
    expected = service.client.post("/classify?top_k=10", content=seven).json()["predictions"]
    np.testing.assert_allclose([one.score for one in softmax], [one["score"] for one in expected], atol=1e-6)


def test_hugging_faces_door_by_the_models_name(service: Service, seven: bytes) -> None:
    body = {"inputs": base64.b64encode(seven).decode(), "parameters": {"top_k": 1}}
    (best,) = service.client.post("/models/digits", json=body).json()
    assert best["label"] == "7"
    missing = service.client.post("/models/other/model", json=body)
    assert (missing.status_code, missing.json()["error"]) == (404, "model other/model is not here, digits is")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"json": {"inputs": "eA==", "parameters": {"threshold": 1}}}, 422, "threshold"),
        ({"json": {"input": "eA=="}}, 422, "inputs"),
        ({"json": {"inputs": "eA==", "parameters": {"function_to_apply": "relu"}}}, 422, "relu"),
        ({"json": {"inputs": "eA=="}}, 415, "the picture is text"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "not JSON"),
        ({"content": b""}, 400, "empty"),
    ],
)
def test_what_hugging_faces_door_refuses(service: Service, body: dict[str, Any], status: int, words: str) -> None:
    answer = service.client.post("/", **body)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_hugging_faces_client_shows_the_error(hugging_face: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError, match="415"):
        hugging_face.image_classification(b"text")


def test_sagemakers_contract(service: Service, seven: bytes) -> None:
    assert service.client.get("/ping").status_code == 200
    for body in (
        {"content": seven, "headers": {"Content-Type": "application/x-image"}},
        {"content": seven, "headers": {"Content-Type": "image/png", "Accept": "application/json"}},
        {"json": {"image": base64.b64encode(seven).decode(), "top_k": 2}},
    ):
        answer = service.client.post("/invocations", **body)  # type: ignore[arg-type]
        assert answer.json()["predictions"][0]["label"] == "7"
    assert "error" in service.client.post("/invocations", content=b"text").json()


def test_vertexs_contract(seven: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    three = (DIGITS / "3-1.png").read_bytes()
    instances = [{"b64": base64.b64encode(data).decode()} for data in (seven, three)]
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/v1/endpoints/5/deployedModels/6:predict")
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/v1/endpoints/5/deployedModels/6")
    with running() as service:
        assert service.client.get("/v1/endpoints/5/deployedModels/6").status_code == 200
        url = "/v1/endpoints/5/deployedModels/6:predict"
        answer = service.client.post(url, json={"instances": instances, "parameters": {"top_k": 1}}).json()
        assert [[one["label"] for one in picture["predictions"]] for picture in answer["predictions"]] == [["7"], ["3"]]
        bad = service.client.post(url, json={"instances": [instances[0], {"b64": "eA=="}]})
        assert (bad.status_code, bad.json()["error"][:18]) == (415, "instance 2 of 2: t")
        for body, words in (
            ({"instances": []}, "instances"),
            ({"instances": [{"image": "x"}]}, "b64"),
            ({"instances": instances, "parameters": {"topk": 1}}, "topk"),
        ):
            wrong = service.client.post(url, json=body)
            assert wrong.status_code == 422
            assert words in wrong.json()["error"]


@pytest.mark.parametrize(
    ("variable", "port"), [("DINAT_PORT", 8123), ("AIP_HTTP_PORT", 8124), ("SAGEMAKER_BIND_TO_PORT", 8125)]
)
def test_the_port_may_come_from_whoever_runs_the_container(variable: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinat.app.settings import Settings

    monkeypatch.setenv(variable, str(port))
    assert Settings(_env_file=None).port == port
    assert Settings(_env_file=None, port=9000).port == 9000


def features(service: Service, picture: bytes, kind: str, **parameters: str) -> httpx.Response:
    return service.client.post("/features", content=picture, params=parameters, headers={"Accept": kind})


def test_maps_alike_in_every_form(service: Service, seven: bytes) -> None:
    names = "stage1,stage3,pooled,hidden_states"
    said = features(service, seven, "application/json", features=names).json()["features"]
    expected = {name: np.array(said[name]["data"], np.float32) for name in ("stage1", "stage3", "pooled")}
    expected |= {f"hidden_states.{i}": np.array(one["data"], np.float32) for i, one in enumerate(said["hidden_states"])}
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


def test_without_a_name_every_stage_is_given(service: Service, seven: bytes) -> None:
    assert set(load(features(service, seven, "application/vnd.safetensors").content)) == {"stage1", "stage2", "stage3"}


def test_maps_that_cannot_be_written_so_are_named(service: Service, seven: bytes) -> None:
    several = features(service, seven, "application/x-npy", features="stage1,stage2")
    assert (several.status_code, "has one map, 2 are asked for" in several.json()["detail"]) == (422, True)
    other = features(service, seven, "image/png")
    assert (other.status_code, "application/x-npz" in other.json()["detail"]) == (406, True)
    unknown = features(service, seven, "*/*", top_k="1")
    assert (unknown.status_code, "top_k is no parameter here" in unknown.json()["detail"]) == (422, True)
