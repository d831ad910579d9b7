"""Every runtime returns the results of PyTorch, and its graphs are exported once."""

import multiprocessing
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino
import pytest
import torch
from PIL import Image

from dinat.app.cli import main
from dinat.app.engine.runtimes import selection
from dinat.app.engine.runtimes.artifacts import cached_artifact, checkpoint_digest
from dinat.app.engine.runtimes.exported_runtime import ExportedRuntime
from dinat.app.engine.runtimes.runtime import InferenceOptions, Runtime
from dinat.app.engine.runtimes.selection import load_runtimes
from dinat.app.settings import Settings
from dinat.model import ConfigError, DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import open_checkpoint
from examples.digits_data import split
from tests.app.conftest import DIGITS

pytestmark = pytest.mark.export

IMAGES = [Image.open(path).convert("RGB") for path in sorted(DIGITS.glob("*.png"))]
ALL_FEATURES = frozenset({"stem", "stage1", "stage2", "stage3", "pooled", "hidden_states"})

has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def load(runtime: str, **changes: object) -> Runtime:
    (loaded,) = load_runtimes(Settings(_env_file=None, **({"runtime": runtime, "precision": "fp32"} | changes)))
    return loaded


@pytest.fixture(scope="module")
def reference() -> Runtime:
    return load("torch")


@pytest.fixture(scope="module", params=["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest) -> Runtime:
    return load(request.param)


def logits_of(runtime: Runtime, images: Sequence[Image.Image]) -> np.ndarray:
    assert isinstance(runtime, ExportedRuntime)
    pixel_values = [runtime.processor(image).numpy() for image in images]
    return np.concatenate([outputs[0] for outputs in runtime.infer(pixel_values, features=False)])


def expected_logits(images: Sequence[Image.Image]) -> np.ndarray:
    network, processor = DinatForImageClassification.from_pretrained("digits"), DinatImageProcessor.from_pretrained("digits")
    with torch.inference_mode():
        return network(processor(images)).logits.numpy()


def test_logits_match_pytorch(exported: Runtime) -> None:
    np.testing.assert_allclose(logits_of(exported, IMAGES), expected_logits(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_labels_and_feature_maps_match_pytorch(exported: Runtime, reference: Runtime, count: int) -> None:
    pixels = np.stack([reference.processor.resize(image) for image in IMAGES[:count]])
    options = [InferenceOptions(10, ALL_FEATURES if i % 2 == 0 else frozenset()) for i in range(count)]
    for actual, expected in zip(exported.run(pixels, options), reference.run(pixels, options), strict=True):
        np.testing.assert_array_equal(actual.class_ids, expected.class_ids)
        np.testing.assert_allclose(actual.scores, expected.scores, rtol=0, atol=1e-5)
        assert actual.features.keys() == expected.features.keys()
        for name, value in expected.features.items():
            for array, other in zip(_list(actual.features[name]), _list(value), strict=True):
                np.testing.assert_allclose(array, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))


def _list(value: object) -> list[np.ndarray]:
    return value if isinstance(value, list) else [np.asarray(value)]


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16, reason="this CPU has no bf16 instructions")
def test_bf16_predicts_the_same_class_for_every_test_digit() -> None:
    images = [Image.fromarray(np.asarray(image)) for image in split()[2]]
    runtime = load("openvino", precision="bf16")
    actual, expected = logits_of(runtime, images), expected_logits(images)
    assert len(images) == 360
    np.testing.assert_array_equal(actual.argmax(1), expected.argmax(1))
    assert np.linalg.norm(actual - expected) <= 0.01 * np.linalg.norm(expected)


@pytest.mark.slow
def test_int8_runs_from_a_folder_that_quantize_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "digits", str(DIGITS), str(tmp_path)]) == 0
    output = capsys.readouterr().out
    found = re.search(r"On 20 calibration images, .* for 100.0%; its logits, up to (\S+), differ by at most (\S+)\.\n", output)
    assert found, output
    largest, difference = map(float, found.groups())
    assert 0 < difference < 0.1 * largest
    rounds = r"\([\d.]+ to [\d.]+ in 5 rounds, in turns\): (not recommended on this CPU|recommended|no recommendation, )"
    default = rf"(torch|openvino) in (bf16|fp32) {rounds}"
    assert re.search(r"On this CPU it processes [\d.]+ images/s, [\d.]+ times as many as " + default, output)
    runtime = load("openvino", model=str(tmp_path), precision="int8")
    actual, expected = logits_of(runtime, IMAGES), expected_logits(IMAGES)
    assert np.abs(actual - expected).max() == pytest.approx(difference, rel=0.2)


@pytest.mark.parametrize(("lanes", "name"), [(16, "torch"), (8, "openvino"), (None, "openvino")])
def test_auto_selects_pytorch_with_avx512_kernels_else_openvino(
    lanes: int | None, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(selection, "library", lambda: None if lanes is None else SimpleNamespace(lanes=lanes))
    assert load("auto").name == name
    assert load("auto", attention="tiled").name == "openvino"
    assert load("auto", attention="reference").name == "torch"
    DinatForImageClassification.from_pretrained("digits").save_pretrained(tmp_path)
    DinatImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path)
    assert load("auto", model=str(tmp_path)).name == "torch"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": "torch", "precision": "int8"}, "int8 is only supported by OpenVINO"),
        ({"runtime": "openvino", "precision": "fp16"}, "precision fp16 is not supported by OpenVINO"),
        ({"runtime": "onnxruntime", "precision": "bf16"}, "precision bf16 is not supported by ONNX Runtime"),
        ({"runtime": "openvino", "attention": "reference"}, "supports attention tiled, not reference"),
        (
            {"runtime": "openvino", "precision": "int8"},
            "precision int8 requires digits/openvino_int8.xml: create it with",
        ),
    ],
)
def test_unsupported_setting_is_a_config_error(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**changes)


def test_images_of_varying_size_require_pytorch(tmp_path: Path) -> None:
    DinatForImageClassification.from_pretrained("digits").save_pretrained(tmp_path)
    DinatImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="requires images of one size"):
        load("openvino", model=str(tmp_path))


@pytest.mark.slow
def test_second_start_uses_the_cached_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("openvino")
    monkeypatch.setattr(
        "dinat.app.engine.runtimes.exported_runtime.export_checkpoint", lambda *_: pytest.fail("exported again")
    )
    second = load("openvino")
    np.testing.assert_array_equal(logits_of(second, IMAGES[:2]), logits_of(first, IMAGES[:2]))


def test_digest_depends_on_weights_and_labels(tmp_path: Path) -> None:
    config = DinatConfig(embed_dim=8, depths=[1], num_heads=[1], kernel_size=3, dilations=[[1]], num_labels=3)
    digests = []
    for seed, labels in ((0, "abc"), (1, "abc"), (1, "abd"), (0, "abc")):
        torch.manual_seed(seed)
        config.id2label = dict(enumerate(labels))
        DinatForImageClassification(config).save_pretrained(tmp_path)
        digests.append(checkpoint_digest(open_checkpoint(tmp_path), "openvino"))
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


def _build_slowly(cache: Path, barrier: "threading.Barrier", name: str) -> None:
    def build(folder: Path) -> None:
        (folder / "one").write_text(name)
        barrier.wait(60)  # both processes have started, neither has finished
        (folder / "two").write_text(name)

    folder = cached_artifact(cache, "key", build)
    assert (folder / "one").read_text() == (folder / "two").read_text()


@pytest.mark.slow
def test_two_processes_that_build_at_once_get_one_artifact(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_build_slowly, args=(tmp_path, barrier, name)) for name in ("first", "second")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_failed_build_leaves_no_files(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        cached_artifact(tmp_path, "key", fail)
    assert list(tmp_path.iterdir()) == []
