import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.app.conftest import running


def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_images_and_batches_are_counted(seven: bytes) -> None:
    with running() as service:
        for body in (seven, seven, b"text"):
            service.client.post("/classify", content=body)
        service.client.post("/classify", content=seven, params={"features": "pooled"})
        service.client.post("/classify", content=seven, params={"top_k": 99})  # rejected before its image is queued
        response = service.client.get("/metrics")
        service.client.get("/nowhere")
        after_404 = values(service.client.get("/metrics").text)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    counted = values(response.text)
    assert counted["dinat_requests_total", (("route", "/classify"), ("status", "200"))] == 3
    assert counted["dinat_requests_total", (("route", "/classify"), ("status", "415"))] == 1
    assert counted["dinat_requests_total", (("route", "/classify"), ("status", "422"))] == 1
    assert counted["dinat_images_total", (("outcome", "classified"),)] == 3
    assert counted["dinat_images_total", (("outcome", "rejected"),)] == 1
    assert sum(value for (name, _), value in counted.items() if name == "dinat_images_total") == 4
    assert counted["dinat_batch_size_images_sum", ()] == 3
    assert counted["dinat_queue_depth_images", ()] == 0
    assert counted["dinat_in_flight_bytes", (("kind", "request_bodies"),)] == 0
    assert counted["dinat_in_flight_bytes", (("kind", "responses"),)] == 0
    assert counted["dinat_request_duration_seconds_count", (("route", "/classify"),)] == 5
    for part in ("decode", "queue", "compute", "encode"):
        assert counted["dinat_part_duration_seconds_count", (("part", part),)] == 3
        assert counted["dinat_part_duration_seconds_sum", (("part", part),)] > 0
    assert any(name == "dinat_build_info" and dict(labels)["version"] for name, labels in counted)
    assert any(name == "dinat_model_info" and dict(labels)["model"] == "digits" for name, labels in counted)
    assert after_404["dinat_requests_total", (("route", "none"), ("status", "404"))] == 1
    assert not any("nowhere" in str(labels) for _, labels in after_404)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
def test_promtool_reports_no_problems(seven: bytes) -> None:
    with running() as service:
        service.client.post("/classify", content=seven)
        text = service.client.get("/metrics").text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
