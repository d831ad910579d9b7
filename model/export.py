"""Export a network as one graph of standard operators, for runtimes without this project.

Attention is exported by tiles: gathers, matrix products and softmax. The file's metadata contains labels, preprocessing and
configuration.
"""

import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dinat.model.dinat import DinatForImageClassification
from dinat.model.errors import ExportError
from dinat.model.image_processor import DinatImageProcessor
from dinat.model.writing import writing

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
    size: tuple[int, int] | Literal["dynamic"] | None = None,
    features: Sequence[str] = (),
    opset: int | None = None,
) -> float:
    """Export a network to a file that runs without this project.

    Before the file is moved to its path, it is run on random images and compared with PyTorch.

    Args:
        network: float32, on the CPU.
        processor: Image processor, for the metadata and the input size.
        path: Path of the file. For OpenVINO, an .xml file; the weights are written to a .bin file next to it.
        file_format: onnx, openvino or torch-export.
        batch: Batch size, None for a dynamic one.
        size: (height, width) of the input in pixels; "dynamic" for any of at least `minimum_side`; the image processor's if
            None. OpenVINO requires a fixed one. A dynamic torch-export file has one operator of this project: import
            dinat.attention before it is loaded.
        features: Outputs in addition to logits, from config.feature_names.
        opset: Version of ONNX's operators, OPSETS; PyTorch's default if None. Old runtimes require an old one.

    Returns:
        The largest difference from PyTorch, relative to the largest value of that output.

    Raises:
        ExportError: The format, a feature or the opset is unknown, a package is missing, the input has no size, or the outputs
            are not finite or differ from PyTorch's.
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
    if opset is not None and (file_format != "onnx" or opset not in OPSETS):
        raise ExportError(f"opset {opset} is not supported: use {OPSETS[0]} to {OPSETS[-1]}, with the format onnx")
    size = size or processor.output_size
    if size is None:
        raise ExportError("the image processor keeps the aspect ratio: specify the size of the input, or dynamic")
    if size == "dynamic" and file_format == "openvino":
        raise ExportError("a graph for OpenVINO has a fixed size: specify it, or use the format onnx")
    names = output_names(network.config.num_layers, features)
    graph = Graph(network, features).eval()
    with writing(path), without_warnings(), tempfile.TemporaryDirectory(dir=create_folder(path.parent)) as folder:
        temporary = Path(folder) / path.name
        shape = (batch, network.config.num_channels, *((None, None) if size == "dynamic" else size))
        options = {} if opset is None else {"opset": opset}
        references = _references(graph, names, shape)
        write(trace(graph, shape), temporary, names, metadata(network, processor, features), shape, **options)
        difference = _compare(load(temporary), references, names)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # OpenVINO: .xml first, then .bin
            os.replace(file, path.with_name(file.name))
    return difference


def minimum_side(stages: int) -> int:
    """Return the smallest height and width of a graph with a dynamic size: torch.export takes a side of 1 for a constant."""
    return int(4 * 2 ** (stages - 1)) + 1


Shape = tuple[int | None, int, int | None, int | None]
"""Input shape (B, C, H, W), with None for what is dynamic."""


def trace(graph: Graph, shape: Shape) -> ExportedProgram:
    """Trace a graph to an ExportedProgram."""
    smallest = minimum_side(graph.network.config.num_layers)
    defaults = (2, 0, 2 * smallest, 3 * smallest)
    example = torch.zeros([default if size is None else size for size, default in zip(shape, defaults, strict=True)])
    lows = {"batch": 1, "channels": 1, "height": smallest, "width": smallest}
    dynamic = {
        axis: torch.export.Dim(name, min=low)
        for axis, (size, (name, low)) in enumerate(zip(shape, lows.items(), strict=True))
        if size is None
    }
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=(dynamic,))


Outputs = list[npt.NDArray[np.float32]]
Run = Callable[[npt.NDArray[np.float32]], Outputs]

OPSETS = range(18, 24)
"""Versions of ONNX's operators that can be written."""


def _write_onnx(
    program: ExportedProgram, path: Path, names: Sequence[str], info: dict[str, str], shape: Shape, opset: int | None = None
) -> None:
    require_packages("onnx", "onnx", "onnxruntime", "onnxscript")
    from onnx.helper import OP_SET_ID_VERSION_MAP

    from dinat.model.onnx_attention import translations

    onnx_program = torch.onnx.export(
        program,
        input_names=["pixel_values"],
        output_names=list(names),
        opset_version=opset,
        dynamo=True,
        custom_translation_table=translations(),
        verbose=False,
    )
    assert onnx_program is not None
    model = onnx_program.model
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's notes, with paths of this machine; not known to old runtimes
    if opset is not None:
        model.ir_version = OP_SET_ID_VERSION_MAP["ai.onnx", opset]
    model.metadata_props.update(info)
    onnx_program.save(path)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: list(session.run(None, {"pixel_values": pixels}))


def _write_openvino(program: ExportedProgram, path: Path, names: Sequence[str], info: dict[str, str], shape: Shape) -> None:
    require_packages("cpu", "openvino")
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

    model = openvino.compile_model(path, "CPU", openvino_options())
    return lambda pixels: [np.array(output) for output in model(pixels).values()]


def openvino_options() -> dict[str, str | int]:
    """Return the options of comparisons: float32, and the threads of PyTorch."""
    return {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}


def _write_torch(program: ExportedProgram, path: Path, names: Sequence[str], info: dict[str, str], shape: Shape) -> None:
    buffer = io.BytesIO()  # on a full disk, PyTorch's writer of files aborts the process
    torch.export.save(program, buffer, extra_files={f"{name}.json": value for name, value in info.items()})
    path.write_bytes(buffer.getbuffer())


def _load_torch(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda pixels: [output.detach().numpy() for output in module(torch.from_numpy(pixels))]


def require_packages(extra: str, *packages: str) -> None:
    """Raise ExportError, with the command that installs the extra, if one of its packages is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ExportError(f"{' and '.join(missing)} not installed: pip install 'dinat-serve[{extra}]'")


Write = Callable[..., None]
"""Function of (program, path, names of the outputs, metadata, shape of the input); for onnx also `opset`."""

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


def _references(graph: Graph, names: Sequence[str], shape: Shape) -> list[tuple[Tensor, Sequence[Tensor]]]:
    """Return random inputs and PyTorch's outputs for them. Raises ExportError if an output is not finite."""
    references = []
    for pixels in _examples(graph, shape):
        with torch.inference_mode():
            outputs = graph(pixels)
        for name, output in zip(names, outputs, strict=True):
            if not bool(output.isfinite().all()):
                raise ExportError(f"{name} of the network is not finite (NaN or infinite): the checkpoint is broken")
        references.append((pixels, outputs))
    return references


def _compare(run: Run, references: Sequence[tuple[Tensor, Sequence[Tensor]]], names: Sequence[str]) -> float:
    """Return the largest difference of an output, relative to its largest value. Raises ExportError if above TOLERANCE."""
    largest = 0.0
    for pixels, expected in references:
        for name, output, reference in zip(names, run(pixels.numpy()), expected, strict=True):
            difference = float((torch.from_numpy(output) - reference).abs().max() / reference.abs().max())
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"{name} of the exported graph differs from PyTorch's by {difference:.1e} of its largest value"
                )
            largest = max(largest, difference)
    return largest


def _examples(graph: Graph, shape: Shape) -> Iterator[Tensor]:
    """Yield random inputs of this shape: one and two images, smaller and larger than the windows of the first stage."""
    config = graph.network.config
    smallest, window = minimum_side(config.num_layers), config.kernel_size * max(config.dilations[0])
    random = torch.Generator().manual_seed(0)
    for batch, height, width in ((1, smallest, 4 * window + 9), (2, 4 * window + 30, smallest + 7)):
        sizes = [default if size is None else size for size, default in zip(shape, (batch, 0, height, width), strict=True)]
        yield torch.randn(sizes, generator=random)


def create_folder(folder: Path) -> Path:
    """Create a folder if missing, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def without_warnings() -> Iterator[None]:
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
