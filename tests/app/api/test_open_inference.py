"""The Open Inference Protocol, with Triton's client and with raw requests."""

import asyncio
import base64
import io
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from dinat.model import DinatImageProcessor
from tests.app.conftest import DIGITS, Service, running

IMAGES = [(DIGITS / f"{digit}-1.png").read_bytes() for digit in (7, 0, 3)]


@pytest.fixture
def client(service: Service) -> Any:
    url = service.client.base_url
    with triton.InferenceServerClient(f"{url.host}:{url.port}") as client:
        yield client


def image_input(*images: bytes, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    data = list(images) if binary else [base64.b64encode(image) for image in images]
    tensor.set_data_from_numpy(np.array(data, dtype=object), binary_data=binary)
    return tensor


IMAGE = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(IMAGES[0]).decode()]}
EMPTY = {"name": "image", "datatype": "UINT8", "data": []}
PIXEL = {"name": "pixel_values", "datatype": "UINT8", "shape": [1, 1, 1, 3]}


def binary_image(size: int, elements: int = 1) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [elements], "parameters": {"binary_data_size": size}}


def deep(levels: int) -> list[Any]:
    """Return a number that is nested in so many lists."""
    value: list[Any] = [7]
    for _ in range(levels - 1):
        value = [value]
    return value


def head(*inputs: dict[str, Any]) -> bytes:
    return json.dumps({"inputs": inputs}, separators=(",", ":")).encode()


def test_server_and_model_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    (model,) = client.get_model_repository_index()
    assert (model["name"], model["state"]) == ("digits", "READY")
    metadata = client.get_model_metadata("digits")
    assert (metadata["name"], metadata["versions"]) == ("digits", ["1"])
    assert {"name": "logits", "datatype": "FP32", "shape": [-1, 10]} in metadata["outputs"]
    assert {tensor["name"] for tensor in metadata["inputs"]} == {"image", "pixel_values"}


def test_repository_index_lists_models_that_are_ready(service: Service) -> None:
    index = partial(service.client.post, "/v2/repository/index")
    every = index().json()
    assert every == index(json={"ready": False}).json() == index(json={"ready": True}).json()
    for body in ({"ready": "true"}, {"Ready": True}, [], "x"):
        assert index(json=body).status_code == 422
    with running(model="/no/such/folder") as failed:
        index = partial(failed.client.post, "/v2/repository/index")
        assert [model["state"] for model in index().json()] == ["UNAVAILABLE"]
        assert index(json={"ready": True}).json() == []


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_image_input_and_all_outputs(client: Any, binary_in: bool, binary_out: bool) -> None:
    names = ["labels", "class_ids", "scores", "logits", "stage2", "pooled", "hidden_states.1"]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    response = client.infer("digits", [image_input(*IMAGES, binary=binary_in)], outputs=outputs, request_id="mine")
    assert response.get_response()["id"] == "mine"
    labels = response.as_numpy("labels")
    assert [label.decode() if isinstance(label, bytes) else label for label in labels[:, 0]] == ["7", "0", "3"]
    class_ids, scores, logits = (response.as_numpy(name) for name in ("class_ids", "scores", "logits"))
    assert class_ids[:, 0].tolist() == logits.argmax(1).tolist() == [7, 0, 3]
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    expected = -np.sort(-exponentials / exponentials.sum(1, keepdims=True))
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert response.as_numpy("stage2").shape == (3, 64, 8, 8)
    assert response.as_numpy("pooled").shape == (3, 128)
    assert response.as_numpy("hidden_states.1").shape[:2] == (3, 64)


def test_default_outputs_exclude_feature_maps(client: Any) -> None:
    response = client.infer("digits", [image_input(IMAGES[0])]).get_response()
    assert [output["name"] for output in response["outputs"]] == ["logits", "scores", "class_ids", "labels"]


def test_classification_extension(client: Any) -> None:
    for name in ("scores", "logits"):
        output = triton.InferRequestedOutput(name, class_count=2)
        first, second = client.infer("digits", [image_input(IMAGES[0])], outputs=[output]).as_numpy(name)[0]
        value, class_id, label = first.decode().split(":")
        assert (class_id, label) == ("7", "7")
        assert float(value) > float(second.decode().split(":")[0])


def test_pixel_values_give_the_same_logits_as_the_file(client: Any) -> None:
    image = Image.open(io.BytesIO(IMAGES[0])).convert("RGB")
    normalized = DinatImageProcessor.from_pretrained("digits")(image).numpy()
    pixels = np.asarray(image)[None]
    expected = client.infer("digits", [image_input(IMAGES[0])]).as_numpy("logits")
    for binary in (True, False):
        for values, datatype in ((normalized, "FP32"), (pixels, "UINT8")):
            tensor = triton.InferInput("pixel_values", list(values.shape), datatype)
            tensor.set_data_from_numpy(values, binary_data=binary)
            np.testing.assert_allclose(client.infer("digits", [tensor]).as_numpy("logits"), expected, atol=1e-4)


def test_async_client_and_compressed_bodies(service: Service) -> None:
    url = service.client.base_url

    async def infer() -> list[str]:
        async with triton_aio.InferenceServerClient(f"{url.host}:{url.port}") as client:
            responses = await asyncio.gather(
                *(
                    client.infer("digits", [image_input(image)], request_compression_algorithm=compression)
                    for image, compression in zip(IMAGES, ("gzip", "deflate", None), strict=True)
                )
            )
            return [response.as_numpy("labels")[0, 0].decode() for response in responses]

    assert asyncio.run(infer()) == ["7", "0", "3"]


def test_triton_client_raises_the_errors(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="model other is not found, this service has digits"):
        client.get_model_metadata("other")
    with pytest.raises(InferenceServerException, match="image 2 of 2: the image is text"):
        client.infer("digits", [image_input(IMAGES[0], b"text")])
    with pytest.raises(InferenceServerException, match="unknown output nothing"):
        client.infer("digits", [image_input(IMAGES[0])], outputs=[triton.InferRequestedOutput("nothing")])
    with pytest.raises(InferenceServerException, match="sequence_id"):
        client.infer("digits", [image_input(IMAGES[0])], sequence_id=5)
    with pytest.raises(InferenceServerException, match="deadline"):
        client.infer("digits", [image_input(IMAGES[0])], timeout=1)
    assert client.infer("digits", [image_input(IMAGES[0])], timeout=10_000_000).as_numpy("class_ids")[0, 0] == 7


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "no list of inputs"),
        ({"inputs": "x"}, "no list of inputs"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": ["eA=="]}]}, "shape [2] has 2 elements"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1], "data": []}]}, "non-negative integers, got [-1]"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [7]}]}, "base64 of an image file"),
        ({"inputs": [{"name": "image", "datatype": "FP32", "shape": [1], "data": [7]}]}, "image must be BYTES"),
        ({"inputs": [{"name": "image", "datatype": "FP64", "shape": [1], "data": [7]}]}, "datatype FP64 is not supported"),
        ({"inputs": [{"name": "other", "datatype": "FP32", "shape": [1], "data": [7]}]}, "image or pixel_values"),
        ({"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 2, 2], "data": [0] * 12}]}, "(B, 3, 64, 64)"),
        ({"inputs": [{"name": "pixel_values", "datatype": "UINT8", "shape": [1, 3, 2], "data": [0] * 6}]}, "(B, H, W, 3)"),
        ({"inputs": [{"name": "pixel_values", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, 300]}]}, "not UINT8"),
        ({"inputs": [PIXEL | {"data": ["7", "1", "0"]}]}, "the data is not UINT8: it has elements that are not numbers"),
        ({"inputs": [PIXEL | {"data": [7, 1, True]}]}, "the data is not UINT8: it has elements that are not numbers"),
        ({"inputs": [PIXEL | {"data": [[[[7, 1, None]]]]}]}, "the data is not UINT8: it has elements that are not numbers"),
        ({"inputs": [PIXEL | {"data": [0.5, 1, 0]}]}, "the data is not UINT8: it has fractions"),
        ({"inputs": [binary_image(9)]}, "0 bytes are left"),
        ({"inputs": [IMAGE | {"parameters": {"compression": "gzip"}}]}, "input image: unknown parameters compression"),
        ({"inputs": [IMAGE], "timeout": 5}, "the request: unknown members timeout, supported are id, model_name, inputs"),
        ({"inputs": [IMAGE | {"top_k": 5}]}, "input image: unknown members top_k, supported are name, shape, datatype"),
        ({"inputs": [IMAGE], "outputs": [{"name": "labels", "classification": 1}]}, "output labels: unknown members classif"),
        ({"inputs": [IMAGE], "outputs": {}}, "outputs must be a list, got dict"),
        ({"inputs": [IMAGE], "outputs": False}, "outputs must be a list, got bool"),
        ({"inputs": [IMAGE], "parameters": {"binary_data_output": "false"}}, "binary_data_output must be true or false"),
        ({"inputs": [IMAGE], "outputs": [{"name": "labels", "parameters": {"binary_data": 1}}]}, "binary_data must be true"),
        ({"inputs": [IMAGE | {"parameters": [1]}]}, "parameters of input image must be an object, got list"),
        ({"inputs": [IMAGE], "parameters": [None, None]}, "parameters must be an object, got list"),
        ({"inputs": [IMAGE | {"shape": [0], "data": []}]}, "input image has no image"),
        ({"inputs": [{"name": "image", "datatype": "FP32", "shape": []}]}, "input image has neither a list of data"),
        ({"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [], "data": [1]}]}, "shape (B, 3, 64, 64), got []"),
        ({"inputs": [IMAGE | {"shape": [False], "data": []}]}, "non-negative integers, got [False]"),
        ({"inputs": [IMAGE], "outputs": "scores"}, "outputs must be a list, got str"),
        ({"inputs": [IMAGE], "outputs": ["scores"]}, "unknown output None"),
        ({"inputs": [IMAGE], "outputs": [{"name": "scores", "parameters": 1}]}, "output scores must be an object, got int"),
        ({"inputs": [IMAGE], "outputs": [{"name": "scores", "parameters": {"classification": -1}}]}, "scores only, got -1"),
        ({"inputs": [IMAGE], "parameters": {"timeout": "soon"}}, "positive integer (microseconds), got 'soon'"),
        ({"inputs": [EMPTY | {"shape": [2**62, 4]}]}, "shape [4611686018427387904, 4] has a side above 2,147,483,647"),
        ({"inputs": [EMPTY | {"shape": [2**31 - 1] * 8}]}, "elements, the data has 0"),
        ({"inputs": [EMPTY | {"shape": [0, *[2**31 - 1] * 7]}]}, "shape [0, 2147483647"),
        ({"inputs": [EMPTY | {"shape": [1] * 300}]}, "shape has 300 dimensions, the maximum is 8"),
        ({"inputs": [IMAGE | {"data": deep(7)}]}, "an element of BYTES must be base64 of an image file, got int"),
        ({"inputs": [IMAGE | {"data": deep(9)}]}, "nested deeper than 8 dimensions"),
        ({"inputs": [IMAGE | {"data": deep(900)}]}, "nested deeper than 8 dimensions"),
        ({"inputs": [IMAGE, IMAGE]}, "one input is required, image or pixel_values, got 2"),
        ({"inputs": [IMAGE], "outputs": [{"name": "scores"}] * 2}, "output scores is requested twice"),
        ({"inputs": [IMAGE], "id": ["x"] * 1000}, "id must be a string of at most 1000 characters"),
        ({"inputs": [IMAGE], "id": "x" * 1001}, "id must be a string of at most 1000 characters"),
        ({"inputs": [IMAGE | {"parameters": {"binary_data_size": True}}]}, "binary_data_size is True"),
    ],
)  # fmt: skip
def test_invalid_request_is_described_in_the_error(service: Service, body: dict[str, Any], detail: str) -> None:
    response = service.client.post("/v2/models/digits/infer", json=body)
    assert response.status_code == 400
    assert detail in response.json()["error"]
    assert response.json()["error"] == response.json()["detail"]


@pytest.mark.parametrize(("name", "status"), [("digits", 200), (None, 200), ("other", 404), (1, 404)])
def test_model_name_in_the_body_must_be_that_of_the_model(service: Service, name: object, status: int) -> None:
    response = service.client.post("/v2/models/digits/infer", json={"inputs": [IMAGE], "model_name": name})
    assert response.status_code == status, response.text


def test_pixels_may_have_decimal_points(service: Service) -> None:
    outputs = [
        service.client.post("/v2/models/digits/infer", json={"inputs": [PIXEL | {"data": data}]}).json()["outputs"]
        for data in ([7.0, 255.0, 0], [[[[7, 255, 0]]]])
    ]
    assert outputs[0] == outputs[1]


def test_infer_endpoint_requires_post(service: Service) -> None:
    response = service.client.get("/v2/models/digits/infer")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("body", "length", "detail"),
    [
        (b"{", "1", "not JSON"),
        (b"{}", "9", "the body has 2 bytes"),
        (b"{}", "x", "is 'x'"),
        (b"{}", "9" * 5000, "is '999"),
        (head(binary_image(6)) + b"\x09\0\0\0ab", None, "ends within an element of 9 bytes"),
        (head(binary_image(2)) + b"ab", None, "ends within the length of an element"),
        (head(binary_image(0, elements=0)) + b"ab", None, "2 bytes are left"),
    ],
)  # fmt: skip
def test_invalid_binary_request_is_described_in_the_error(
    service: Service, body: bytes, length: str | None, detail: str
) -> None:
    headers = {"Inference-Header-Content-Length": length or str(body.index(b"}]}") + 3)}
    response = service.client.post("/v2/models/digits/infer", content=body, headers=headers)
    assert (response.status_code, detail in response.json()["error"]) == (400, True), response.text


def test_model_name_setting_is_used_by_all_endpoints() -> None:
    with running(name="flowers") as service:
        assert service.client.get("/v2/models/flowers/ready").status_code == 200
        assert service.client.get("/v2/models/digits/ready").status_code == 404
        assert service.client.post("/classify", content=IMAGES[0]).json()["model"] == "flowers"
        assert 'model="flowers"' in service.client.get("/metrics").text
