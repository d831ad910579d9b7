import httpx
import pytest

from dinat.app.api.negotiation import negotiate
from tests.app.conftest import Service

JSON, NPY, NPZ = "application/json", "application/x-npy", "application/x-npz"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("text/html, */*;q=0.1", JSON),
        (NPZ, NPZ),
        (NPZ.upper(), NPZ),
        (f"{NPZ}, {JSON}", NPZ),
        (f"{JSON}, {NPZ}", JSON),
        (f"{JSON};q=0.5, {NPZ}", NPZ),
        (f"{JSON} ; Q = 0.5, {NPZ};q=0.4", JSON),
        (f"*/*;q=0.1, {NPZ};q=0.2", NPZ),
        (f"{JSON};q=0", None),
        (f"{JSON};q=0.000, {NPZ};q=0", None),
        (f"{JSON};q=0, */*", NPY),
        (f"*/*, {JSON};q=0", NPY),  # the more specific range, wherever it is
        (f"{JSON};q=0, application/*;q=0, */*", None),
        (f"application/*;q=0, {NPZ};q=0.3", NPZ),
        (f"{JSON};charset=utf-8", JSON),
        (f"{JSON};version=1;q=0", None),
        (f"{JSON};q=much", JSON),
        (f"{JSON};q=nan", JSON),
        (f"{JSON}, {JSON};q=0", JSON),
        (" , ,", JSON),
        ("text/html", None),
        ("text/*, image/png", None),
    ],
)
def test_media_type_by_weight_and_specificity(accept: str, expected: str | None) -> None:
    assert negotiate(accept, [JSON, NPY, NPZ]) == expected


def test_features_honour_weights_of_all_accept_headers(service: Service, seven: bytes) -> None:
    def post(*accept: str) -> httpx.Response:
        headers = [("accept", value) for value in accept]
        client = httpx.Client(base_url=service.client.base_url)
        client.headers.pop("accept")
        with client:
            return client.post("/features", content=seven, headers=headers)

    rejected = post(f"{JSON};q=0")
    assert (rejected.status_code, f"Accept is {JSON};q=0: supported are {JSON}" in rejected.json()["detail"]) == (406, True)
    assert post(f"{JSON};q=0.1, {NPZ};q=0.9").headers["content-type"] == NPZ
    assert post(f"{JSON};q=0.1", NPZ).headers["content-type"] == NPZ
    assert post().headers["content-type"] == JSON
    assert post(f"{JSON}," * 99).headers["content-type"] == JSON
    rejected = post("," * 60_000)
    assert (rejected.status_code, "Accept has more than 2,000 characters" in rejected.json()["detail"]) == (406, True)
