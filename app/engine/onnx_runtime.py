"""The network in ONNX Runtime, on a CPU. Imports onnxruntime, which is an extra."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from app.engine.exported_runtime import ExportedRuntime
from app.engine.runtime import Array
from model import ConfigError


class OnnxRuntime(ExportedRuntime):
    """A Runtime that computes a batch at once, in float32."""

    name = "onnxruntime"
    file_format = "onnx"
    suffix = ".onnx"
    packages = ("onnxruntime", "onnxscript")
    precision = "fp32"

    def __init__(self, source: str, revision: str | None, precision: str, cache: Path) -> None:
        """Load the checkpoint, from the cache if it was served before. Raises CheckpointError, ConfigError, ExportError."""
        if precision not in ("auto", "fp32"):
            raise ConfigError(f"precision {precision} is not served by ONNX Runtime: take auto or fp32")
        super().__init__(source, revision, cache)
        self._labels = self._open(features=False)

    @cached_property
    def _with_features(self) -> Any:
        return self._open(features=True)

    def infer(self, pixel_values: Sequence[Array], features: bool) -> list[list[Array]]:
        """See ExportedRuntime."""
        session = self._with_features if features else self._labels
        outputs = session.run(None, {"pixel_values": np.concatenate(pixel_values)})
        return [[output[i : i + 1] for output in outputs] for i in range(len(pixel_values))]

    def _open(self, features: bool) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(self._graph(features), options, providers=["CPUExecutionProvider"])
