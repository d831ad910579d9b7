"""Checkpoints whose scores are NaN or infinite, as after a training that diverged: an error, never a label."""

import base64
import csv
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dinat.app.cli import main
from dinat.app.engine.local_backend import LocalBackend
from dinat.app.engine.runtimes.runtime import Runtime, rank
from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor
from tests.app.conftest import DIGITS, Service, running

REASON = "the network returned scores that are not finite (NaN or infinite): the checkpoint"


class _DamagedAfterStartup(LocalBackend):
    """A backend whose network becomes NaN after the self-check."""

    def warm(self, runtime: Runtime, max_batch: int) -> int:
        largest = super().warm(runtime, max_batch)
        runtime._network.classifier.weight.data.fill_(math.nan)  # type: ignore[attr-defined]
        return largest


@pytest.fixture(scope="module")
def damaged() -> Iterator[Service]:
    with running(_DamagedAfterStartup, runtime="torch", aip_predict_route="/predict") as service:
        yield service


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a NaN weight."""
    folder = tmp_path_factory.mktemp("broken")
    network = DinatForImageClassification.from_pretrained("digits")
    network.classifier.bias.data[3] = math.nan
    network.save_pretrained(folder)
    DinatImageProcessor.from_pretrained("digits").save_pretrained(folder)
    return folder


def test_every_endpoint_answers_500_with_the_reason(damaged: Service, seven: bytes) -> None:
    client, text = damaged.client, base64.b64encode(seven).decode()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}
    answers = [
        client.post("/classify", content=seven),
        client.post("/features", content=seven),
        client.post("/", content=seven),
        client.post("/models/digits?function_to_apply=none", content=seven),
        client.post("/invocations", content=seven),
        client.post("/predict", json={"instances": [{"b64": text}]}),
        client.post("/v2/models/digits/infer", json={"inputs": [tensor]}),
    ]
    for answer in answers:
        assert (answer.status_code, f"{REASON} digits is broken" in answer.json()["detail"]) == (500, True), answer.text
    (result,) = client.post("/classify/batch", json={"images": [text]}).json()["results"]
    assert (result["error"]["status"], REASON in result["error"]["detail"]) == (500, True)


def test_broken_checkpoint_fails_at_startup(broken: Path) -> None:
    with warnings.catch_warnings(action="ignore"), running(model=str(broken), runtime="torch") as service:
        ready = service.client.get("/health/ready")
        assert (ready.status_code, f"{REASON} {broken} is broken" in str(service.engine.failure)) == (503, True)


@pytest.mark.parametrize("command", ["classify", "evaluate", "batch", "export"])
def test_commands_name_the_broken_checkpoint(
    command: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data" / "7"
    data.mkdir(parents=True)
    (data / "7.png").write_bytes((DIGITS / "7-1.png").read_bytes())
    runtime = ["--runtime", "torch", "--cache-dir", str(tmp_path / "cache")]
    arguments = {
        "classify": [str(data), "--model", str(broken), "--output", "csv", *runtime],
        "evaluate": [str(broken), str(data.parent), *runtime],
        "batch": [str(data), str(tmp_path / "out"), "--model", str(broken), *runtime],
        "export": [str(broken), str(tmp_path / "broken.onnx")],
    }[command]
    with warnings.catch_warnings(action="ignore"):
        assert main([command, *arguments]) == 1
    captured = capsys.readouterr()
    reason = "logits of the network is not finite" if command == "export" else f"{REASON} {broken} is broken"
    assert (reason in captured.err, list(csv.reader(captured.out.splitlines()))) == (True, [])
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("changes", "logits", "expected"),
    [
        ({}, [0.0, math.nan], [math.nan, math.nan]),
        ({}, [0.0, math.inf], [math.nan, math.nan]),
        ({}, [0.0, -math.inf], [1.0, 0.0]),  # a class that cannot occur
        ({"problem_type": "multi_label_classification"}, [0.0, math.inf], [math.nan, 0.5]),
        ({"problem_type": "multi_label_classification"}, [math.nan, 0.0], [math.nan, 0.5]),
        ({"problem_type": "regression"}, [0.0, math.inf], [math.inf, 0.0]),
    ],
)
def test_scores_of_logits_that_are_not_finite(changes: dict[str, Any], logits: list[float], expected: list[float]) -> None:
    scores, _ = rank(torch.tensor([logits]), DinatConfig(num_labels=2, **changes))
    assert json.dumps(scores[0].tolist()) == json.dumps(expected)
