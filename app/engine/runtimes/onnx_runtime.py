"""The network in ONNX Runtime, on a CPU. Imports onnxruntime, which is an extra."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from dinat.app.engine.runtimes.exported_runtime import LABELS, ExportedRuntime
from dinat.app.engine.runtimes.runtime import Array
from dinat.model import ConfigError
from dinat.model.checkpoints.checkpoint import Checkpoint


class OnnxRuntime(ExportedRuntime):
    """A Runtime that computes a batch at once, in float32."""

    name = "onnxruntime"
    file_format = "onnx"
    packages = ("onnxruntime", "onnxscript")
    graph_batch = None
    precision = "fp32"

    def __init__(self, checkpoint: Checkpoint, precision: str, cache: Path) -> None:
        """Find or make the graph. Raises CheckpointError, ConfigError, ExportError."""
        if precision not in ("auto", "fp32"):
            raise ConfigError(f"precision {precision} is not served by ONNX Runtime: take auto or fp32")
        super().__init__(checkpoint, cache)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others want the cores between batches
        self._session = onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])

    def infer(self, pixel_values: Sequence[Array], features: bool) -> list[list[Array]]:
        """See ExportedRuntime."""
        names = self._outputs if features else self._outputs[:LABELS]
        outputs = self._session.run(names, {"pixel_values": np.concatenate(pixel_values)})
        return [[output[i : i + 1] for output in outputs] for i in range(len(pixel_values))]
