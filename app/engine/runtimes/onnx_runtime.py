"""The network in ONNX Runtime, on the CPU. Requires the package onnxruntime, an extra."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from dinat.app.engine.runtimes.exported_runtime import CLASSIFICATION_OUTPUTS, ExportedRuntime
from dinat.app.engine.runtimes.runtime import Array
from dinat.model import ConfigError
from dinat.model.checkpoints.checkpoint import Checkpoint


class OnnxRuntime(ExportedRuntime):
    """A Runtime that computes whole batches in float32."""

    name = "onnxruntime"
    file_format = "onnx"
    packages = ("onnxruntime", "onnxscript")
    graph_batch = None
    precision = "fp32"

    def __init__(self, checkpoint: Checkpoint, precision: str, cache: Path) -> None:
        """Load the graph from the cache, or export it. Raises CheckpointError, ConfigError, ExportError."""
        if precision not in ("auto", "fp32"):
            raise ConfigError(f"precision {precision} is not supported by ONNX Runtime: set auto or fp32")
        super().__init__(checkpoint, cache)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves the cores to others between batches
        self._session = onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])

    def infer(self, pixel_values: Sequence[Array], features: bool) -> list[list[Array]]:
        """See ExportedRuntime."""
        names = self._outputs if features else self._outputs[:CLASSIFICATION_OUTPUTS]
        outputs = self._session.run(names, {"pixel_values": np.concatenate(pixel_values)})
        return [[output[i : i + 1] for output in outputs] for i in range(len(pixel_values))]
