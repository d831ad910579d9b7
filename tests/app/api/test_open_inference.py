"""The Open Inference Protocol, by Triton's own client and by hand."""

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from dinat.model import DinatImageProcessor
from tests.app.conftest import DIGITS, Service, running

PICTURES = [(DIGITS / f"{digit}-1.png").read_bytes() for digit in (7, 0, 3)]


@pytest.fixture
def client(service: Service) -> Any:
    url = service.client.base_url
    with triton.InferenceServerClient(f"{url.host}:{url.port}") as client:
        yield client


def images(*pictures: bytes, binary: bool = True) -> triton.InferInput:
    one = triton.InferInput("image", [len(pictures)], "BYTES")
    data = list(pictures) if binary else [base64.b64encode(picture) for picture in pictures]
    one.set_data_from_numpy(np.array(data, dtype=object), binary_data=binary)
    return one


WHOLE = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(PICTURES[0]).decode()]}
EMPTY = {"name": "image", "datatype": "UINT8", "data": []}


def one_image(size: int, elements: int = 1) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [elements], "parameters": {"binary_data_size": size}}


def head(*inputs: dict[str, Any]) -> bytes:
    return json.dumps({"inputs": inputs}, separators=(",", ":")).encode()


def test_the_server_says_what_it_is(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    (one,) = client.get_model_repository_index()
    assert (one["name"], one["state"]) == ("digits", "READY")
    said = client.get_model_metadata("digits")
    assert (said["name"], said["versions"]) == ("digits", ["1"])
    assert {"name": "logits", "datatype": "FP32", "shape": [-1, 10]} in said["outputs"]
    assert {one["name"] for one in said["inputs"]} == {"image", "pixel_values"}


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_pictures_in_and_labels_out(client: Any, binary_in: bool, binary_out: bool) -> None:
    names = ["labels", "class_ids", "scores", "logits", "stage2", "pooled", "hidden_states.1"]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    answer = client.infer("digits", [images(*PICTURES, binary=binary_in)], outputs=outputs, request_id="mine")
    assert answer.get_response()["id"] == "mine"
    labels = answer.as_numpy("labels")
    assert [label.decode() if isinstance(label, bytes) else label for label in labels[:, 0]] == ["7", "0", "3"]
    class_ids, scores, logits = (answer.as_numpy(name) for name in ("class_ids", "scores", "logits"))
    assert class_ids[:, 0].tolist() == logits.argmax(1).tolist() == [7, 0, 3]
    powers = np.exp(logits - logits.max(1, keepdims=True))
    expected = -np.sort(-powers / powers.sum(1, keepdims=True))
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert answer.as_numpy("stage2").shape == (3, 64, 8, 8)
    assert answer.as_numpy("pooled").shape == (3, 128)
    assert answer.as_numpy("hidden_states.1").shape[:2] == (3, 64)


def test_without_outputs_all_that_is_not_a_map_is_given(client: Any) -> None:
    said = client.infer("digits", [images(PICTURES[0])]).get_response()
    assert [one["name"] for one in said["outputs"]] == ["logits", "scores", "class_ids", "labels"]


def test_classification(client: Any) -> None:
    for name in ("scores", "logits"):
        output = triton.InferRequestedOutput(name, class_count=2)
        first, second = client.infer("digits", [images(PICTURES[0])], outputs=[output]).as_numpy(name)[0]
        value, class_id, label = first.decode().split(":")
        assert (class_id, label) == ("7", "7")
        assert float(value) > float(second.decode().split(":")[0])


def test_pixels_in_either_form_give_what_the_file_gives(client: Any) -> None:
    image = Image.open(io.BytesIO(PICTURES[0])).convert("RGB")
    normalised = DinatImageProcessor.from_pretrained("digits")(image).numpy()
    pixels = np.asarray(image)[None]
    expected = client.infer("digits", [images(PICTURES[0])]).as_numpy("logits")
    for binary in (True, False):
        for values, datatype in ((normalised, "FP32"), (pixels, "UINT8")):
            one = triton.InferInput("pixel_values", list(values.shape), datatype)
            one.set_data_from_numpy(values, binary_data=binary)
            np.testing.assert_allclose(client.infer("digits", [one]).as_numpy("logits"), expected, atol=1e-4)


def test_the_asynchronous_client_and_compressed_bodies(service: Service) -> None:
    url = service.client.base_url

    async def ask() -> list[str]:
        async with triton_aio.InferenceServerClient(f"{url.host}:{url.port}") as client:
            answers = await asyncio.gather(
                *(
                    client.infer("digits", [images(picture)], request_compression_algorithm=how)
                    for picture, how in zip(PICTURES, ("gzip", "deflate", None), strict=True)
                )
            )
            return [answer.as_numpy("labels")[0, 0].decode() for answer in answers]

    assert asyncio.run(ask()) == ["7", "0", "3"]


def test_errors_reach_tritons_client(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="model other is not here, digits is"):
        client.get_model_metadata("other")
    with pytest.raises(InferenceServerException, match="picture 2 of 2: the picture is text"):
        client.infer("digits", [images(PICTURES[0], b"text")])
    with pytest.raises(InferenceServerException, match="output nothing is not there"):
        client.infer("digits", [images(PICTURES[0])], outputs=[triton.InferRequestedOutput("nothing")])
    with pytest.raises(InferenceServerException, match="sequence_id"):
        client.infer("digits", [images(PICTURES[0])], sequence_id=5)
    with pytest.raises(InferenceServerException, match="deadline"):
        client.infer("digits", [images(PICTURES[0])], timeout=1)
    assert client.infer("digits", [images(PICTURES[0])], timeout=10_000_000).as_numpy("class_ids")[0, 0] == 7


@pytest.mark.parametrize(
    ("asked", "detail"),
    [
        ({}, "no list of inputs"),
        ({"inputs": "x"}, "no list of inputs"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": ["eA=="]}]}, "shape [2] is 2 elements"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1], "data": []}]}, "shape is [-1]"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [7]}]}, "base64 of a picture's file"),
        ({"inputs": [{"name": "image", "datatype": "FP32", "shape": [1], "data": [7]}]}, "image is BYTES"),
        ({"inputs": [{"name": "image", "datatype": "FP64", "shape": [1], "data": [7]}]}, "datatype FP64 is not read"),
        ({"inputs": [{"name": "other", "datatype": "FP32", "shape": [1], "data": [7]}]}, "image or pixel_values"),
        ({"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 2, 2], "data": [0] * 12}]}, "(B, 3, 64, 64)"),
        ({"inputs": [{"name": "pixel_values", "datatype": "UINT8", "shape": [1, 3, 2], "data": [0] * 6}]}, "(B, H, W, 3)"),
        ({"inputs": [{"name": "pixel_values", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, 300]}]}, "no UINT8"),
        ({"inputs": [one_image(9)]}, "0 bytes are left"),
        ({"inputs": [WHOLE | {"parameters": [1]}]}, "parameters of input image is list"),
        ({"inputs": [WHOLE], "parameters": [None, None]}, "parameters is list, an object is wanted"),
        ({"inputs": [WHOLE | {"shape": [0], "data": []}]}, "input image has no picture"),
        ({"inputs": [{"name": "image", "datatype": "FP32", "shape": []}]}, "input image has no list of data"),
        ({"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [], "data": [1]}]}, "(B, 3, 64, 64) is wanted"),
        ({"inputs": [WHOLE | {"shape": [False], "data": []}]}, "shape is [False]"),
        ({"inputs": [WHOLE], "outputs": "scores"}, "outputs is str, a list is wanted"),
        ({"inputs": [WHOLE], "outputs": ["scores"]}, "output None is not there"),
        ({"inputs": [WHOLE], "outputs": [{"name": "scores", "parameters": 1}]}, "parameters of output scores is int"),
        ({"inputs": [WHOLE], "outputs": [{"name": "scores", "parameters": {"classification": -1}}]}, "classification is -1"),
        ({"inputs": [WHOLE], "parameters": {"timeout": "soon"}}, "timeout is 'soon'"),
        ({"inputs": [EMPTY | {"shape": [2**62, 4]}]}, "is 18446744073709551616 elements"),
        ({"inputs": [EMPTY | {"shape": [0, 2**63]}]}, "shape [0, 9223372036854775808]"),
    ],
)  # fmt: skip
def test_broken_requests_are_named(service: Service, asked: dict[str, Any], detail: str) -> None:
    answer = service.client.post("/v2/models/digits/infer", json=asked)
    assert answer.status_code == 400
    assert detail in answer.json()["error"]
    assert answer.json()["error"] == answer.json()["detail"]


def test_infer_is_asked_by_post(service: Service) -> None:
    answer = service.client.get("/v2/models/digits/infer")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("body", "length", "detail"),
    [
        (b"{", "1", "not JSON"),
        (b"{}", "9", "the body has 2 bytes"),
        (b"{}", "x", "is 'x'"),
        (head(one_image(6)) + b"\x09\0\0\0ab", None, "ends within an element of 9 bytes"),
        (head(one_image(2)) + b"ab", None, "ends within an element's length"),
        (head(one_image(0, elements=0)) + b"ab", None, "2 bytes are left"),
    ],
)  # fmt: skip
def test_broken_binary_requests_are_named(service: Service, body: bytes, length: str | None, detail: str) -> None:
    headers = {"Inference-Header-Content-Length": length or str(body.index(b"}]}") + 3)}
    answer = service.client.post("/v2/models/digits/infer", content=body, headers=headers)
    assert (answer.status_code, detail in answer.json()["error"]) == (400, True), answer.text


def test_clients_know_the_model_by_the_name_that_is_set() -> None:
    with running(name="flowers") as service:
        assert service.client.get("/v2/models/flowers/ready").status_code == 200
        assert service.client.get("/v2/models/digits/ready").status_code == 404
        assert service.client.post("/classify", content=PICTURES[0]).json()["model"] == "flowers"
        assert 'model="flowers"' in service.client.get("/metrics").text
