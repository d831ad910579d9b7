"""A network as one graph of plain operators, for runtimes that know nothing of this project.

The tiled attention exports as it is: gathers, matrix products and softmax. What a user of the file needs besides (labels,
preprocessing, configuration) is in its metadata.
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
"""How far an exported output may be from PyTorch's, of the largest value of that output. Rounding is a tenth of it or less."""


class Graph(nn.Module):
    """pixel_values (B, 3, H, W) -> logits (B, num_labels), then every map that was asked for. Names: output_names."""

    def __init__(self, network: DinatForImageClassification, features: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.features = features

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of output_names."""
        logits, maps = self.network.classify(pixel_values, self.features)
        flat = [logits]
        for name in self.features:
            value = maps[name]
            flat += value if isinstance(value, list) else [value]
        return tuple(flat)


def output_names(stages: int, features: Sequence[str]) -> list[str]:
    """Names of a graph's outputs: logits, the features; hidden_states become hidden_states.0 and so on.

    stages: config.num_layers.
    """
    names = ["logits"]
    for name in features:
        names += [f"{name}.{i}" for i in range(stages + 1)] if name == "hidden_states" else [name]
    return names


def metadata(network: DinatForImageClassification, processor: DinatImageProcessor, features: Sequence[str]) -> dict[str, str]:
    """What an exported file says of itself, each value as JSON: labels, image_processor, config, outputs."""
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
    """Write a network to a file that its runtime opens without this project.

    network: float32, on the CPU.  path: of the file; OpenVINO's format is two, .xml and .bin beside it.  file_format: onnx,
    openvino or torch-export.  batch: pictures per call, None for any number.  size: (height, width) in pixels, the processor's
    if None.  features: maps to give besides logits, as /classify names them.

    The file is run on random pictures and compared with PyTorch before it takes its place. Returns the largest difference,
    relative to the largest value of that output.  Raises ExportError: unknown format or feature, a package that is missing,
    an input of no fixed size, outputs that differ.
    """
    path = Path(path)
    if file_format not in FORMATS:
        raise ExportError(f"format {file_format!r} is not known: take one of {', '.join(FORMATS)}")
    suffix, write, load = FORMATS[file_format]
    if path.suffix != suffix:
        raise ExportError(f"a file of format {file_format} is named *{suffix}, got {path.name}")
    known = network.config.feature_names
    unknown = [name for name in features if name not in known]
    if unknown:
        raise ExportError(f"features {', '.join(unknown)} are not known: take some of {', '.join(known)}")
    size = size or processor.output_size
    if size is None:
        raise ExportError("the image processor keeps the aspect of pictures, a graph has one input size: give it")
    names = output_names(network.config.num_layers, features)
    graph = Graph(network, features).eval()
    with _quietly(), tempfile.TemporaryDirectory(dir=_made(path.parent)) as folder:
        temporary = Path(folder) / path.name
        shape = (batch, network.config.num_channels, *size)
        write(trace(graph, batch, size), temporary, names, metadata(network, processor, features), shape)
        difference = _compare(load(temporary), graph, names, [batch] if batch else [1, 2], size)
        for written in sorted(Path(folder).iterdir(), reverse=True):  # OpenVINO's .bin comes after its .xml
            os.replace(written, path.with_name(written.name))
    return difference


def trace(graph: Graph, batch: int | None, size: tuple[int, int]) -> ExportedProgram:
    """The graph as PyTorch's exported program."""
    example = torch.zeros(batch or 2, graph.network.config.num_channels, *size)
    with torch.no_grad(), _by_tiles(graph.network):
        graph(example[:1])  # makes the tables of positions, of real tensors; tracing would make them of symbols
        dynamic = {} if batch else {0: torch.export.Dim("batch", min=1)}
        return torch.export.export(graph, (example,), dynamic_shapes=(dynamic,))


@contextmanager
def _by_tiles(network: nn.Module) -> Iterator[None]:
    """Within it, attention is of plain operators."""
    layers = [module for module in network.modules() if isinstance(module, NeighborhoodSelfAttention)]
    before = [layer.backend for layer in layers]
    for layer in layers:
        layer.backend = "tiled"
    try:
        yield
    finally:
        for layer, backend in zip(layers, before, strict=True):
            layer.backend = backend


Shape = tuple[int | None, int, int, int]
"""Of the input: (B, C, H, W), B None for any."""
Outputs = list[npt.NDArray[np.float32]]
Run = Callable[[npt.NDArray[np.float32]], Outputs]


def _write_onnx(program: ExportedProgram, path: Path, names: Sequence[str], about: dict[str, str], shape: Shape) -> None:
    _require("onnx", "onnx", "onnxruntime", "onnxscript")
    written = torch.onnx.export(program, input_names=["pixel_values"], output_names=list(names), dynamo=True, verbose=False)
    assert written is not None
    written.model.metadata_props.update(about)
    written.save(path)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: list(session.run(None, {"pixel_values": pixels}))


def _write_openvino(program: ExportedProgram, path: Path, names: Sequence[str], about: dict[str, str], shape: Shape) -> None:
    _require("cpu", "openvino")
    import openvino

    model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({"pixel_values"})
    for output, name in zip(model.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    model.reshape({"pixel_values": [-1 if side is None else side for side in shape]})
    for name, value in about.items():
        model.set_rt_info(value, ["dinat", name])
    openvino.save_model(model, path, compress_to_fp16=False)


def _load_openvino(path: Path) -> Run:
    import openvino

    model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: [np.array(output) for output in model(pixels).values()]


def _write_torch(program: ExportedProgram, path: Path, names: Sequence[str], about: dict[str, str], shape: Shape) -> None:
    torch.export.save(program, path, extra_files={f"{name}.json": value for name, value in about.items()})


def _load_torch(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda pixels: [output.detach().numpy() for output in module(torch.from_numpy(pixels))]


def _require(extra: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ExportError(f"{' and '.join(missing)} not installed: pip install 'dinat-serve[{extra}]'")


Write = Callable[[ExportedProgram, Path, Sequence[str], dict[str, str], Shape], None]
INT8 = "openvino_int8.xml"
"""The quantised graph in a checkpoint's folder; its weights are beside it."""
CALIBRATION = 300
"""Pictures that ranges are taken from, at most: NNCF's default."""


@dataclass(frozen=True)
class Quantised:
    """How a quantised graph compares with the one it was made of, over the calibration pictures.

    same_top1: the share of pictures with the same best class.  difference: the largest of any logit, and largest: the largest
    logit itself.
    """

    pictures: int
    same_top1: float
    difference: float
    largest: float


def quantize(
    network: DinatForImageClassification, processor: DinatImageProcessor, pictures: Sequence[Image.Image], folder: str | Path
) -> Quantised:
    """Write openvino_int8.xml and .bin into a folder: 8-bit integers by NNCF's post-training quantisation.

    network: float32, on the CPU.  pictures: like those the network will meet; a few hundred are enough.
    Raises ExportError without the extra int8, and where there is no picture.
    """
    _require("int8", "nncf", "openvino")
    import nncf
    import openvino

    if not pictures:
        raise ExportError("there is no picture to calibrate with")
    with tempfile.TemporaryDirectory(dir=_made(Path(folder))) as temporary, _quietly():
        export(network, processor, Path(temporary) / "float.xml", "openvino", batch=1, features=["pooled"])
        model = openvino.Core().read_model(Path(temporary) / "float.xml")
        pixels = [processor(picture).numpy() for picture in pictures[:CALIBRATION]]
        small = nncf.quantize(model, nncf.Dataset(pixels), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(pixels))
        for name, value in metadata(network, processor, ["pooled"]).items():
            small.set_rt_info(value, ["dinat", name])
        openvino.save_model(small, Path(temporary) / INT8)
        runs = [openvino.compile_model(one, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) for one in (model, small)]
        exact, quantised = (np.concatenate([np.array(run(one)["logits"]) for one in pixels]) for run in runs)
        for name in (Path(INT8).with_suffix(".bin").name, INT8):
            os.replace(Path(temporary) / name, Path(folder) / name)
    return Quantised(
        pictures=len(pixels),
        same_top1=float((exact.argmax(1) == quantised.argmax(1)).mean()),
        difference=float(np.abs(exact - quantised).max()),
        largest=float(np.abs(exact).max()),
    )


FORMATS: dict[str, tuple[str, Write, Callable[[Path], Run]]] = {
    "onnx": (".onnx", _write_onnx, _load_onnx),
    "openvino": (".xml", _write_openvino, _load_openvino),
    "torch-export": (".pt2", _write_torch, _load_torch),
}
"""How each format is named, written, and opened by its own runtime."""


def format_of(path: Path) -> str:
    """The format that a file's name says. Raises ExportError."""
    for name, (suffix, _, _) in FORMATS.items():
        if path.suffix == suffix:
            return name
    raise ExportError(f"{path.name} names no format: end it in {', '.join(suffix for suffix, _, _ in FORMATS.values())}")


def _compare(run: Run, graph: Graph, names: Sequence[str], batches: Sequence[int], size: tuple[int, int]) -> float:
    """The largest difference of any output, relative to its largest value. Raises ExportError beyond TOLERANCE."""
    worst = 0.0
    for batch in batches:
        pixels = torch.randn(batch, graph.network.config.num_channels, *size, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = graph(pixels)
        for name, got, want in zip(names, run(pixels.numpy()), expected, strict=True):
            difference = float((torch.from_numpy(got) - want).abs().max() / want.abs().max())
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"{name} of the exported graph differs from PyTorch's by {difference:.1e} of its largest value"
                )
            worst = max(worst, difference)
    return worst


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what PyTorch's and OpenVINO's converters say of each other's deprecations and of packages not needed here."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
