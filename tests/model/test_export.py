"""Exported graphs run without this project, and are compared with PyTorch before they are written."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image

from dinat.model import DinatConfig, DinatForImageClassification, DinatImageProcessor, ExportError
from dinat.model.export import FORMATS, Graph, export, format_of, output_names

pytestmark = pytest.mark.export

ROOT = Path(__file__).parents[2]
PROCESSOR = DinatImageProcessor(size={"height": 24, "width": 20})
FEATURES = ("stem", "stage2", "pooled", "hidden_states")


@pytest.fixture(scope="module")
def network() -> DinatForImageClassification:
    torch.manual_seed(0)
    config = DinatConfig(
        embed_dim=8,
        depths=[2, 1],
        num_heads=[1, 2],
        kernel_size=3,
        dilations=[[1, 2], [1]],
        num_labels=4,
        initializer_range=0.3,
    )
    network = DinatForImageClassification(config).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize(
    "file_format", ["torch-export", *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "openvino"))]
)
@pytest.mark.parametrize("batch", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_every_format_matches_pytorch(
    network: DinatForImageClassification, tmp_path: Path, file_format: str, batch: int | None
) -> None:
    path = tmp_path / "new" / f"graph{FORMATS[file_format][0]}"
    assert export(network, PROCESSOR, path, file_format, batch=batch, features=FEATURES) < 1e-5
    assert format_of(path) == file_format
    assert {file.suffix for file in path.parent.iterdir()} == ({".xml", ".bin"} if path.suffix == ".xml" else {path.suffix})
    pixels = torch.randn(batch or 5, 3, 24, 20)
    with torch.inference_mode():
        expected = network(pixels, output_hidden_states=True)
    outputs = dict(zip(output_names(2, FEATURES), FORMATS[file_format][2](path)(pixels.numpy()), strict=True))
    np.testing.assert_allclose(outputs["logits"], expected.logits.numpy(), rtol=0, atol=1e-5)
    for i, state in enumerate(expected.reshaped_hidden_states):
        np.testing.assert_allclose(outputs[f"hidden_states.{i}"], state.numpy(), rtol=0, atol=1e-4)
    assert outputs["stage2"].shape == (batch or 5, 16, 3, 3)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("file_format", "opset"), [("torch-export", None), ("onnx", 18)])
def test_dynamic_size(network: DinatForImageClassification, tmp_path: Path, file_format: str, opset: int | None) -> None:
    path = tmp_path / f"graph{FORMATS[file_format][0]}"
    assert export(network, PROCESSOR, path, file_format, size="dynamic", features=["stage1"], opset=opset) < 1e-5
    run = FORMATS[file_format][2](path)
    sizes = [(1, 9, 9), (2, 24, 20), (1, 61, 40), (3, 33, 130)]
    for batch, height, width in sizes if file_format == "torch-export" else [*sizes, (1, 1, 1), (2, 3, 25)]:
        pixels = torch.randn(batch, 3, height, width)
        with torch.inference_mode():
            expected, features = network.classify(pixels, ["stage1"])
        logits, stage1 = run(pixels.numpy())
        np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(stage1, features["stage1"].numpy(), rtol=0, atol=1e-4)
    if opset:
        content = onnx.load(path)
        assert [(entry.domain, entry.version) for entry in content.opset_import] == [("", opset)]
        assert content.ir_version == 8
        onnx.checker.check_model(content)
        assert str(ROOT).encode() not in path.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter: sizes become constants
@pytest.mark.parametrize("requires_grad", [False, True])
def test_exporter_that_traces(network: DinatForImageClassification, tmp_path: Path, requires_grad: bool) -> None:
    """torch.onnx.export with dynamo=False."""
    logits = Graph(copy.deepcopy(network).requires_grad_(requires_grad), ()).eval()
    options = {"input_names": ["pixel_values"], "dynamic_axes": {"pixel_values": {0: "batch"}}}
    torch.onnx.export(logits, (torch.randn(2, 3, 24, 20),), tmp_path / "traced.onnx", dynamo=False, **options)
    run = FORMATS["onnx"][2](tmp_path / "traced.onnx")
    for batch in (1, 2, 5):
        pixels = torch.randn(batch, 3, 24, 20)
        with torch.inference_mode():
            expected = network(pixels).logits
        np.testing.assert_allclose(run(pixels.numpy())[0], expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_metadata_contains_labels_and_preprocessing(network: DinatForImageClassification, tmp_path: Path) -> None:
    for suffix in (".onnx", ".xml", ".pt2"):
        export(network, PROCESSOR, tmp_path / f"graph{suffix}", format_of(Path(f"x{suffix}")), batch=1)
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
    metadata = [session.get_modelmeta().custom_metadata_map]
    info = openvino.Core().read_model(tmp_path / "graph.xml").get_rt_info()["dinat"]
    metadata.append({name: info[name].value for name in ("labels", "image_processor", "config", "outputs")})
    files = {f"{name}.json": "" for name in metadata[1]}
    torch.export.load(tmp_path / "graph.pt2", extra_files=files)
    metadata.append({name.removesuffix(".json"): value for name, value in files.items()})
    for values in metadata:
        assert json.loads(values["labels"]) == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
        assert DinatImageProcessor.from_dict(json.loads(values["image_processor"])) == PROCESSOR
        assert DinatConfig.from_dict(json.loads(values["config"])).depths == [2, 1]
        assert json.loads(values["outputs"]) == ["logits"]


@pytest.mark.slow
def test_onnx_file_runs_without_this_project(tmp_path: Path) -> None:
    network, processor = DinatForImageClassification.from_pretrained("digits"), DinatImageProcessor.from_pretrained("digits")
    export(network, processor, tmp_path / "digits.onnx", "onnx")
    script = tmp_path / "alone.py"
    script.write_text(
        (ROOT / "examples" / "classify_onnx.py").read_text() + "\nassert not {'dinat', 'torch'} & set(sys.modules)\n"
    )
    image = ROOT / "examples" / "digits" / "7-1.png"
    done = subprocess.run(
        [sys.executable, script, "digits.onnx", image], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True
    )
    with torch.inference_mode():
        scores = network(processor(Image.open(image).convert("RGB"))).logits.softmax(-1)[0]
    top5 = [(float(line.split()[0]), line.split()[1]) for line in done.stdout.splitlines()]
    assert [label for _, label in top5] == [network.config.id2label[i] for i in scores.argsort(descending=True)[:5].tolist()]
    np.testing.assert_allclose([score for score, _ in top5], scores.sort(descending=True).values[:5].numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_graph_with_different_outputs_is_not_written(
    network: DinatForImageClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, write, load = FORMATS["torch-export"]

    def load_inexact(path: Path):  # type: ignore[no-untyped-def]
        run = load(path)
        return lambda pixels: [output + 1e-2 for output in run(pixels)]

    monkeypatch.setitem(FORMATS, "torch-export", (suffix, write, load_inexact))
    with pytest.raises(ExportError, match="logits of the exported graph differs from PyTorch's"):
        export(network, PROCESSOR, tmp_path / "graph.pt2", "torch-export", batch=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "file_format", "options", "message"),
    [
        ("graph.pt2", "torchscript", {}, "format 'torchscript' is not known: use one of onnx, openvino, torch-export"),
        ("graph.pt", "torch-export", {}, r"a file of format torch-export must be named \*.pt2, got graph.pt"),
        ("graph.pt2", "torch-export", {"opset": 18}, "opset 18 is not supported: use 18 to 23, with the format onnx"),
        (
            "graph.xml",
            "openvino",
            {"size": "dynamic"},
            "a graph for OpenVINO has a fixed size: specify it",
        ),
        ("graph.onnx", "onnx", {"opset": 7}, "opset 7 is not supported: use 18 to 23, with the format onnx"),
        ("graph.pt2", "torch-export", {"features": ["stage9"]}, "features stage9 are not known: use stem, stage1"),
    ],
)
def test_invalid_arguments_raise_export_error(
    network: DinatForImageClassification,
    tmp_path: Path,
    file: str,
    file_format: str,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ExportError, match=message):
        export(network, PROCESSOR, tmp_path / file, file_format, **options)


def test_size_is_required_if_the_aspect_ratio_is_preserved(network: DinatForImageClassification, tmp_path: Path) -> None:
    processor = DinatImageProcessor(size={"shortest_edge": 24})
    with pytest.raises(ExportError, match="specify the size of the input, or dynamic"):
        export(network, processor, tmp_path / "graph.pt2", "torch-export")
    assert export(network, processor, tmp_path / "graph.pt2", "torch-export", batch=1, size=(24, 28)) < 1e-5
