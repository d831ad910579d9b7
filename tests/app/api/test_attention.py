import base64
import io

import pytest
import torch
from PIL import Image

from dinat.model import DinatForImageClassification, DinatImageProcessor
from dinat.model.neighborhoods import neighborhoods
from tests.app.conftest import Service


def test_neighborhoods_match_the_network(service: Service, seven: bytes) -> None:
    pixels = DinatImageProcessor.from_pretrained("digits")(Image.open(io.BytesIO(seven)))
    expected = neighborhoods(DinatForImageClassification.from_pretrained("digits"), pixels, 0.25, 0.75)
    layers = service.client.post("/attention", content=seven, params={"y": 0.25, "x": 0.75}).json()["layers"]
    assert [(layer["stage"], layer["layer"], layer["dilation"]) for layer in layers] == [
        (1, 1, 1),
        (1, 2, 4),
        (2, 1, 1),
        (2, 2, 2),
        (3, 1, 1),
        (3, 2, 1),
    ]
    for neighborhood, layer in zip(expected, layers, strict=True):
        assert (list(neighborhood.size), list(neighborhood.query)) == (layer["size"], layer["query"])
        assert (neighborhood.rows, neighborhood.columns) == (layer["rows"], layer["columns"])
        torch.testing.assert_close(torch.tensor(layer["weights"]), neighborhood.weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "detail"),
    [
        ({"y": 1.5}, "y is '1.5'"),
        ({"x": "left"}, "x is 'left'"),
        ({"z": 1}, "unknown parameter z"),
        ({"x": "nan"}, "x is 'nan'"),
    ],
)
def test_invalid_point_is_rejected(service: Service, seven: bytes, parameters: dict[str, object], detail: str) -> None:
    response = service.client.post("/attention", content=seven, params=parameters)
    assert response.status_code == 422
    assert detail in response.json()["detail"]


def test_boolean_is_no_coordinate(service: Service, seven: bytes) -> None:
    body = {"image": base64.b64encode(seven).decode(), "y": True}
    response = service.client.post("/attention", json=body)
    assert (response.status_code, response.json()["detail"]) == (422, "y is True: Value error, a number is required")


def test_point_in_a_form_and_default_center(service: Service, seven: bytes) -> None:
    form = service.client.post("/attention", files={"image": seven}, data={"y": "0.5", "x": "0.5"}).json()["layers"]
    assert form == service.client.post("/attention", content=seven).json()["layers"]
    assert service.client.post("/attention", content=b"text").status_code == 415
