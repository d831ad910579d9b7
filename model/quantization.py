"""Quantization of a network to 8-bit integers, as a graph for OpenVINO on a CPU."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinat.model.dinat import DinatForImageClassification
from dinat.model.errors import ExportError
from dinat.model.export import create_folder, export, metadata, openvino_options, require_packages, without_warnings
from dinat.model.image_processor import DinatImageProcessor
from dinat.model.writing import writing

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
    require_packages("int8", "nncf", "openvino")
    import nncf
    import openvino

    if not images:
        raise ExportError("quantization requires at least one calibration image")
    with writing(folder), tempfile.TemporaryDirectory(dir=create_folder(Path(folder))) as temporary, without_warnings():
        export(network, processor, Path(temporary) / "float.xml", "openvino", batch=1, features=["pooled"])
        model = openvino.Core().read_model(Path(temporary) / "float.xml")
        pixels = [processor(image).numpy() for image in images[:MAX_CALIBRATION_IMAGES]]
        int8_model = nncf.quantize(model, nncf.Dataset(pixels), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(pixels))
        for name, value in metadata(network, processor, ["pooled"]).items():
            int8_model.set_rt_info(value, ["dinat", name])
        openvino.save_model(int8_model, Path(temporary) / INT8)
        runs = [openvino.compile_model(graph, "CPU", openvino_options()) for graph in (model, int8_model)]
        exact, quantized = (np.concatenate([np.array(run(x)["logits"]) for x in pixels]) for run in runs)
        for name in (Path(INT8).with_suffix(".bin").name, INT8):
            os.replace(Path(temporary) / name, Path(folder) / name)
    return QuantizationReport(
        images=len(pixels),
        top1_agreement=float((exact.argmax(1) == quantized.argmax(1)).mean()),
        max_difference=float(np.abs(exact - quantized).max()),
        max_logit=float(np.abs(exact).max()),
    )
