"""Every runtime says what PyTorch says, and its graphs are made once."""

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
from dinat.app.engine.runtimes.artifacts import artifact, digest_of
from dinat.app.engine.runtimes.exported_runtime import ExportedRuntime
from dinat.app.engine.runtimes.runtime import InferenceOptions, Runtime
from dinat.app.engine.runtimes.selection import load_runtimes
from dinat.app.settings import Settings
from dinat.model import ConfigError, DinatConfig, DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import open_checkpoint
from examples.digits_data import split
from tests.app.conftest import DIGITS

PICTURES = [Image.open(path).convert("RGB") for path in sorted(DIGITS.glob("*.png"))]
EVERYTHING = frozenset({"stem", "stage1", "stage2", "stage3", "pooled", "hidden_states"})
EXPORTED = ["openvino", "onnxruntime"]

has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def load(runtime: str, **changes: object) -> Runtime:
    (loaded,) = load_runtimes(Settings(_env_file=None, **({"runtime": runtime, "precision": "fp32"} | changes)))
    return loaded


@pytest.fixture(scope="module")
def exact() -> Runtime:
    return load("torch")


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request: pytest.FixtureRequest) -> Runtime:
    return load(request.param)


def logits_of(runtime: Runtime, pictures: Sequence[Image.Image]) -> np.ndarray:
    assert isinstance(runtime, ExportedRuntime)
    return np.concatenate([one[0] for one in runtime.infer([runtime.processor(p).numpy() for p in pictures], features=False)])


def expected_logits(pictures: Sequence[Image.Image]) -> np.ndarray:
    network, processor = DinatForImageClassification.from_pretrained("digits"), DinatImageProcessor.from_pretrained("digits")
    with torch.inference_mode():
        return network(processor(pictures)).logits.numpy()


def test_logits_are_pytorchs(exported: Runtime) -> None:
    np.testing.assert_allclose(logits_of(exported, PICTURES), expected_logits(PICTURES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_labels_and_maps_are_pytorchs_at_every_batch_size(exported: Runtime, exact: Runtime, count: int) -> None:
    pixels = np.stack([exact.processor.resize(picture) for picture in PICTURES[:count]])
    wanted = [InferenceOptions(10, EVERYTHING if i % 2 == 0 else frozenset()) for i in range(count)]
    for got, want in zip(exported.run(pixels, wanted), exact.run(pixels, wanted), strict=True):
        np.testing.assert_array_equal(got.class_ids, want.class_ids)
        np.testing.assert_allclose(got.scores, want.scores, rtol=0, atol=1e-5)
        assert got.features.keys() == want.features.keys()
        for name, value in want.features.items():
            for mine, other in zip(_list(got.features[name]), _list(value), strict=True):
                np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))


def _list(value: object) -> list[np.ndarray]:
    return value if isinstance(value, list) else [np.asarray(value)]


@pytest.mark.skipif(not has_bf16, reason="this processor has no bf16 instructions")
def test_bf16_reads_every_held_out_digit_the_same() -> None:
    held_out = [Image.fromarray(np.asarray(picture)) for picture in split()[2]]
    runtime = load("openvino", precision="bf16")
    got, want = logits_of(runtime, held_out), expected_logits(held_out)
    assert len(held_out) == 360
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))
    assert np.linalg.norm(got - want) <= 0.01 * np.linalg.norm(want)


def test_int8_is_served_from_the_folder_that_quantize_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "digits", str(DIGITS), str(tmp_path)]) == 0
    said = capsys.readouterr().out
    found = re.search(r"On 20 calibration images, .* for 100.0%; .* at most (\S+) \(largest logit: (\S+)\)\.\n", said)
    assert found, said
    difference, largest = map(float, found.groups())
    assert 0 < difference < 0.1 * largest
    default = r"(torch|openvino) in (bf16|fp32): (not )?recommended"
    assert re.search(r"On this CPU it processes [\d.]+ images/s, [\d.]+ times as many as " + default, said)
    runtime = load("openvino", model=str(tmp_path), precision="int8")
    got, want = logits_of(runtime, PICTURES), expected_logits(PICTURES)
    assert np.abs(got - want).max() == pytest.approx(difference, rel=0.2)


@pytest.mark.parametrize(("lanes", "name"), [(16, "torch"), (8, "openvino"), (None, "openvino")])
def test_auto_takes_pytorch_where_its_kernels_are_the_fastest_and_openvino_on_other_cpus(
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
        ({"runtime": "torch", "precision": "int8"}, "int8 is served by OpenVINO alone"),
        ({"runtime": "openvino", "precision": "fp16"}, "precision fp16 is not served by OpenVINO"),
        ({"runtime": "onnxruntime", "precision": "bf16"}, "precision bf16 is not served by ONNX Runtime"),
        ({"runtime": "openvino", "attention": "reference"}, "has attention tiled, not reference"),
        (
            {"runtime": "openvino", "precision": "int8"},
            "precision int8 needs digits/openvino_int8.xml: make it with",
        ),
    ],
)
def test_what_a_runtime_cannot_do_is_said(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**changes)


def test_pictures_that_keep_their_aspect_are_for_pytorch(tmp_path: Path) -> None:
    DinatForImageClassification.from_pretrained("digits").save_pretrained(tmp_path)
    DinatImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="wants pictures of one size"):
        load("openvino", model=str(tmp_path))


def test_a_second_start_exports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("openvino")
    monkeypatch.setattr(
        "dinat.app.engine.runtimes.exported_runtime.export_checkpoint", lambda *_: pytest.fail("exported again")
    )
    again = load("openvino")
    np.testing.assert_array_equal(logits_of(again, PICTURES[:2]), logits_of(first, PICTURES[:2]))


def test_other_weights_or_labels_are_another_graph(tmp_path: Path) -> None:
    config = DinatConfig(embed_dim=8, depths=[1], num_heads=[1], kernel_size=3, dilations=[[1]], num_labels=3)
    names = []
    for seed, labels in ((0, "abc"), (1, "abc"), (1, "abd"), (0, "abc")):
        torch.manual_seed(seed)
        config.id2label = dict(enumerate(labels))
        DinatForImageClassification(config).save_pretrained(tmp_path)
        names.append(digest_of(open_checkpoint(tmp_path), "openvino"))
    assert names[0] == names[3]
    assert len(set(names)) == 3


def _make_slowly(cache: Path, barrier: "threading.Barrier", name: str) -> None:
    def make(folder: Path) -> None:
        (folder / "one").write_text(name)
        barrier.wait(60)  # both have begun, neither has finished
        (folder / "two").write_text(name)

    folder = artifact(cache, "key", make)
    assert (folder / "one").read_text() == (folder / "two").read_text()


def test_two_processes_that_make_the_same_at_once_get_one_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_make_slowly, args=(tmp_path, barrier, name)) for name in ("first", "second")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        artifact(tmp_path, "key", fail)
    assert list(tmp_path.iterdir()) == []
