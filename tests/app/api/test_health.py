import threading
from typing import Any

import pytest
from openapi_spec_validator import validate

from dinat.app.engine.local_backend import LocalBackend
from dinat.model.native import library
from tests.app.conftest import Service, running


def test_ready(service: Service) -> None:
    for path in ("/health", "/health/ready", "/health/live"):
        response = service.client.get(path)
        assert response.status_code == 200
        assert response.json() == {"status": "ready", "detail": "the service is ready", "model": "digits"}


def test_loading_is_live_but_not_ready(seven: bytes) -> None:
    may_load = threading.Event()

    class SlowToLoad(LocalBackend):
        def load(self) -> Any:
            assert may_load.wait(60)
            return super().load()

    with running(SlowToLoad, wait=False) as service:
        try:
            assert service.client.get("/health/live").status_code == 200
            ready = service.client.get("/health/ready")
            assert ready.status_code == 503
            assert ready.json()["status"] == "loading"
            rejected = service.client.post("/classify", content=seven)
            assert rejected.status_code == 503
            assert "is loading" in rejected.json()["detail"]
            assert int(rejected.headers["retry-after"]) >= 1
        finally:
            may_load.set()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": "/no/such/folder"}, "'/no/such/folder' does not exist"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"device": "abacus"}, "unknown device 'abacus': set auto, cpu, cuda or cuda:N"),
    ],
)
def test_model_that_fails_to_load_is_neither_live_nor_ready(settings: dict[str, str], reason: str, seven: bytes) -> None:
    with running(**settings) as service:
        for path in ("/health", "/health/live", "/health/ready"):
            response = service.client.get(path)
            assert response.status_code == 503
            assert response.json()["status"] == "failed"
            assert reason in response.json()["detail"]
        assert reason in service.client.post("/classify", content=seven).json()["detail"]


def test_model(service: Service) -> None:
    model = service.client.get("/model").json()
    assert model["model"] == "digits"
    assert model["labels"] == list("0123456789")
    assert model["config"]["depths"] == [2, 2, 2]
    assert model["input_size"]["size"] == 64
    kernels = library()
    by_torch = kernels is not None and kernels.lanes == 16
    assert (model["runtime"], model["device"], model["precision"]) == ("torch" if by_torch else "openvino", "cpu", "fp32")
    assert model["attention"] == dict.fromkeys(("stage1", "stage2", "stage3"), "compiled" if by_torch else "tiled")
    assert model["features"] == ["stem", "stage1", "stage2", "stage3", "pooled", "hidden_states"]


def test_openapi_is_valid_and_lists_all_bodies_and_errors(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    validate(document)
    classify = document["paths"]["/classify"]["post"]
    assert set(classify["requestBody"]["content"]) == {
        "multipart/form-data",
        "image/*",
        "application/octet-stream",
        "application/json",
    }
    assert {"200", "400", "413", "415", "422", "503"} <= set(classify["responses"])


def test_openapi_describes_the_parameters_alike_in_the_query_a_form_and_json(service: Service) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    for path in ("/classify", "/classify/batch", "/features", "/attention", "/invocations"):
        operation = paths[path]["post"]
        query = {one["name"] for one in operation["parameters"] if one["in"] == "query"}
        for media_type in ("multipart/form-data", "application/json"):
            properties = operation["requestBody"]["content"][media_type]["schema"]["properties"]
            assert properties.keys() - {"image", "images"} == query
    y = paths["/attention"]["post"]["parameters"][0]
    assert (y["name"], y["schema"]["minimum"], y["schema"]["maximum"]) == ("y", 0, 1)


def test_unknown_query_parameters_are_rejected_by_every_operation_with_a_body(service: Service) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    assert len(paths) > 15
    for path in (path for path, item in paths.items() if "post" in item):
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        response = service.client.post(path.replace("{name}", "digits"), params={"unheard": "x"}, json=content.get("example"))
        assert response.status_code in (400, 422), path
        assert "query" in response.text or "unheard" in response.text


def test_examples_in_openapi_are_answered(service: Service) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    for path in ("/", "/classify", "/classify/batch", "/features", "/attention", "/predict", "/v2/models/{name}/infer"):
        example = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["example"]
        response = service.client.post(path.format(name="digits"), json=example)
        assert response.status_code == 200, (path, response.text)
        assert "error" not in response.text
