"""Export a network as one graph of standard operators, for runtimes without this project.

Attention is exported by the tiled backend: gathers, matrix products and softmax. The file's metadata contains labels,
preprocessing and configuration.
"""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import ExportedProgram

from dinat.model.dinat import DinatForImageClassification, NeighborhoodSelfAttention
from dinat.model.errors import ExportError
from dinat.model.image_processor import DinatImageProcessor

TOLERANCE = 1e-4
"""Largest allowed difference from PyTorch, relative to the largest value of an output. Rounding causes a tenth or less."""


class Graph(nn.Module):
    """pixel_values (B, num_channels, H, W) -> logits (B, num_labels) and the requested features, named by output_names."""

    def __init__(self, network: DinatForImageClassification, features: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.features = features

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of output_names."""
        logits, features = self.network.classify(pixel_values, self.features)
        outputs = [logits]
        for name in self.features:
            value = features[name]
            outputs += value if isinstance(value, list) else [value]
        return tuple(outputs)


def output_names(stages: int, features: Sequence[str]) -> list[str]:
    """Return the names of a graph's outputs: logits, then the features.

    Args:
        stages: Number of stages, config.num_layers.
        features: Names of features; hidden_states becomes hidden_states.0, hidden_states.1 and so on.
    """
    names = ["logits"]
    for name in features:
        names += [f"{name}.{i}" for i in range(stages + 1)] if name == "hidden_states" else [name]
    return names


def metadata(network: DinatForImageClassification, processor: DinatImageProcessor, features: Sequence[str]) -> dict[str, str]:
    """Return the metadata of an exported file, each value as JSON: labels, image_processor, config, outputs."""
    config = network.config.to_dict()
    labels = [network.config.id2label[i] for i in range(network.num_labels)]
    values = {
        "labels": labels,
        "image_processor": processor.to_dict(),
        "config": {name: value for name, value in config.items() if name not in ("id2label", "label2id")},
        "outputs": output_names(network.config.num_layers, features),
    }
    return {name: json.dumps(value) for name, value in values.items()}


def export(
    network: DinatForImageClassification,
    processor: DinatImageProcessor,
    path: str | Path,
    file_format: str,
    *,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    features: Sequence[str] = (),
) -> float:
    """Export a network to a file that runs without this project.

    Before the file is moved to its path, it is run on random images and compared with PyTorch.

    Args:
        network: float32, on the CPU.
        processor: Image processor, for the metadata and the input size.
        path: Path of the file. For OpenVINO, an .xml file; the weights are written to a .bin file next to it.
        file_format: onnx, openvino or torch-export.
        batch: Batch size, None for a dynamic one.
        size: (height, width) of the input in pixels; the image processor's if None.
        features: Outputs in addition to logits, from config.feature_names.

    Returns:
        The largest difference from PyTorch, relative to the largest value of that output.

    Raises:
        ExportError: The format or a feature is unknown, a package is missing, the input has no fixed size, or the outputs
            differ from PyTorch's.
    """
    path = Path(path)
    if file_format not in FORMATS:
        raise ExportError(f"format {file_format!r} is not known: use one of {', '.join(FORMATS)}")
    suffix, write, load = FORMATS[file_format]
    if path.suffix != suffix:
        raise ExportError(f"a file of format {file_format} must be named *{suffix}, got {path.name}")
    known = network.config.feature_names
    unknown = [name for name in features if name not in known]
    if unknown:
        raise ExportError(f"features {', '.join(unknown)} are not known: use {', '.join(known)}")
    size = size or processor.output_size
    if size is None:
        raise ExportError("the image processor keeps the aspect ratio, but a graph has one input size: specify it")
    names = output_names(network.config.num_layers, features)
    graph = Graph(network, features).eval()
    with _without_warnings(), tempfile.TemporaryDirectory(dir=_created(path.parent)) as folder:
        temporary = Path(folder) / path.name
        shape = (batch, network.config.num_channels, *size)
        write(trace(graph, batch, size), temporary, names, metadata(network, processor, features), shape)
        difference = _compare(load(temporary), graph, names, [batch] if batch else [1, 2], size)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # OpenVINO: .xml first, then .bin
            os.replace(file, path.with_name(file.name))
    return difference


def trace(graph: Graph, batch: int | None, size: tuple[int, int]) -> ExportedProgram:
    """Trace a graph to an ExportedProgram. batch: batch size, None for a dynamic one.  size: (height, width) in pixels."""
    example = torch.zeros(batch or 2, graph.network.config.num_channels, *size)
    with torch.no_grad(), _tiled_attention(graph.network):
        graph(example[:1])  # fills the caches of positions with real tensors; tracing would create symbolic ones
        dynamic = {} if batch else {0: torch.export.Dim("batch", min=1)}
        return torch.export.export(graph, (example,), dynamic_shapes=(dynamic,))


@contextmanager
def _tiled_attention(network: nn.Module) -> Iterator[None]:
    """Use the tiled backend, which consists of standard operators, in all layers."""
    layers = [module for module in network.modules() if isinstance(module, NeighborhoodSelfAttention)]
    backends = [layer.backend for layer in layers]
    for layer in layers:
        layer.backend = "tiled"
    try:
        yield
    finally:
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend


Shape = tuple[int | None, int, int, int]
"""Input shape (B, C, H, W), with B None for a dynamic batch size."""
Outputs = list[npt.NDArray[np.float32]]
Run = Callable[[npt.NDArray[np.float32]], Outputs]


def _write_onnx(program: ExportedProgram, path: Path, names: Sequence[str], info: dict[str, str], shape: Shape) -> None:
    _require("onnx", "onnx", "onnxruntime", "onnxscript")
    onnx_program = torch.onnx.export(
        program, input_names=["pixel_values"], output_names=list(names), dynamo=True, verbose=False
    )
    assert onnx_program is not None
    onnx_program.model.metadata_props.update(info)
    onnx_program.save(path)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: list(session.run(None, {"pixel_values": pixels}))


def _write_openvino(program: ExportedProgram, path: Path, names: Sequence[str], info: dict[str, str], shape: Shape) -> None:
    _require("cpu", "openvino")
    import openvino

    model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({"pixel_values"})
    for output, name in zip(model.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    model.reshape({"pixel_values": [-1 if side is None else side for side in shape]})
    for name, value in info.items():
        model.set_rt_info(value, ["dinat", name])
    openvino.save_model(model, path, compress_to_fp16=False)


def _load_openvino(path: Path) -> Run:
    import openvino

    model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: [np.array(output) for output in model(pixels).values()]


def _write_torch(program: ExportedProgram, path: Path, names: Sequence[str], info: dict[str, str], shape: Shape) -> None:
    torch.export.save(program, path, extra_files={f"{name}.json": value for name, value in info.items()})


def _load_torch(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda pixels: [output.detach().numpy() for output in module(torch.from_numpy(pixels))]


def _require(extra: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ExportError(f"{' and '.join(missing)} not installed: pip install 'dinat-serve[{extra}]'")


Write = Callable[[ExportedProgram, Path, Sequence[str], dict[str, str], Shape], None]
INT8 = "openvino_int8.xml"
"""Name of the quantized graph in a checkpoint's folder; its weights are in the .bin file of the same name."""
MAX_CALIBRATION_IMAGES = 300
"""Images used for calibration, at most: NNCF's default."""


@dataclass(frozen=True)
class QuantizationReport:
    """Comparison of a quantized graph with the float32 graph on the calibration images.

    Attributes:
        images: Number of calibration images.
        top1_agreement: Fraction of images with the same top-1 class.
        max_difference: Largest absolute difference of a logit.
        max_logit: Largest absolute value of a logit.
    """

    images: int
    top1_agreement: float
    max_difference: float
    max_logit: float


def quantize(
    network: DinatForImageClassification, processor: DinatImageProcessor, images: Sequence[Image.Image], folder: str | Path
) -> QuantizationReport:
    """Write openvino_int8.xml and .bin into a folder: a graph with 8-bit integers, by NNCF's post-training quantization.

    Args:
        network: float32, on the CPU.
        processor: Image processor of the network.
        images: Calibration images, similar to those the network will classify; a few hundred are sufficient.
        folder: Folder, which is created if missing.

    Raises:
        ExportError: The packages of the extra int8 are not installed, or there are no images.
    """
    _require("int8", "nncf", "openvino")
    import nncf
    import openvino

    if not images:
        raise ExportError("quantization requires at least one calibration image")
    with tempfile.TemporaryDirectory(dir=_created(Path(folder))) as temporary, _without_warnings():
        export(network, processor, Path(temporary) / "float.xml", "openvino", batch=1, features=["pooled"])
        model = openvino.Core().read_model(Path(temporary) / "float.xml")
        pixels = [processor(image).numpy() for image in images[:MAX_CALIBRATION_IMAGES]]
        int8_model = nncf.quantize(model, nncf.Dataset(pixels), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(pixels))
        for name, value in metadata(network, processor, ["pooled"]).items():
            int8_model.set_rt_info(value, ["dinat", name])
        openvino.save_model(int8_model, Path(temporary) / INT8)
        runs = [openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) for graph in (model, int8_model)]
        exact, quantized = (np.concatenate([np.array(run(x)["logits"]) for x in pixels]) for run in runs)
        for name in (Path(INT8).with_suffix(".bin").name, INT8):
            os.replace(Path(temporary) / name, Path(folder) / name)
    return QuantizationReport(
        images=len(pixels),
        top1_agreement=float((exact.argmax(1) == quantized.argmax(1)).mean()),
        max_difference=float(np.abs(exact - quantized).max()),
        max_logit=float(np.abs(exact).max()),
    )


FORMATS: dict[str, tuple[str, Write, Callable[[Path], Run]]] = {
    "onnx": (".onnx", _write_onnx, _load_onnx),
    "openvino": (".xml", _write_openvino, _load_openvino),
    "torch-export": (".pt2", _write_torch, _load_torch),
}
"""Suffix of each format, and functions to write a file and to load it in its runtime."""


def format_of(path: Path) -> str:
    """Return the format for a file's suffix. Raises ExportError if there is none."""
    for name, (suffix, _, _) in FORMATS.items():
        if path.suffix == suffix:
            return name
    raise ExportError(f"{path.name} has no known suffix: use {', '.join(suffix for suffix, _, _ in FORMATS.values())}")


def _compare(run: Run, graph: Graph, names: Sequence[str], batches: Sequence[int], size: tuple[int, int]) -> float:
    """Return the largest difference of an output, relative to its largest value. Raises ExportError if above TOLERANCE."""
    largest = 0.0
    for batch in batches:
        pixels = torch.randn(batch, graph.network.config.num_channels, *size, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = graph(pixels)
        for name, output, reference in zip(names, run(pixels.numpy()), expected, strict=True):
            difference = float((torch.from_numpy(output) - reference).abs().max() / reference.abs().max())
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"{name} of the exported graph differs from PyTorch's by {difference:.1e} of its largest value"
                )
            largest = max(largest, difference)
    return largest


def _created(folder: Path) -> Path:
    """Create a folder if missing, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress deprecation warnings of PyTorch's and OpenVINO's converters, and warnings about optional packages."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
