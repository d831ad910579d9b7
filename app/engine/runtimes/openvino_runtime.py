"""The network in OpenVINO, on the CPU. Requires the package openvino, an extra."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import torch

from dinat.app.engine.runtimes.artifacts import cached_artifact, digest
from dinat.app.engine.runtimes.exported_runtime import CLASSIFICATION_OUTPUTS, ExportedRuntime
from dinat.app.engine.runtimes.runtime import Array
from dinat.model import ConfigError
from dinat.model.checkpoints.checkpoint import Checkpoint
from dinat.model.quantization import INT8

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""OpenVINO's name of each precision. int8 is part of the graph; its other operations run in float32."""


def resolve_precision(precision: str) -> str:
    """Resolve "auto" to bf16 if the CPU has instructions for it, else fp32.

    Raises:
        ConfigError: The CPU or OpenVINO does not support the precision.
    """
    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if precision not in HINTS:
        raise ConfigError(f"precision {precision} is not supported by OpenVINO on a CPU: set auto, {', '.join(HINTS)}")
    if precision == "bf16" and not has_bf16:
        raise ConfigError("precision bf16 is not supported by this CPU: set fp32")
    return precision


@dataclass
class Compiled:
    """A compiled graph.

    Attributes:
        queue: openvino.AsyncInferQueue with one request for each stream.
        blob: Memory-mapped file with the weights.
    """

    queue: Any
    blob: npt.NDArray[np.uint8]


class OpenVinoRuntime(ExportedRuntime):
    """A Runtime that computes each image on its own: several images on one core each, a single image on all cores.

    That is faster than batches: no core waits for the others after each layer, and an image's feature maps stay in the cache
    of its core.
    """

    name = "openvino"
    file_format = "openvino"
    packages = ("openvino",)
    graph_batch = 1

    def __init__(self, checkpoint: Checkpoint, precision: str, cache: Path) -> None:
        """Load the graph from the cache, or export it. Raises CheckpointError, ConfigError, ExportError."""
        self.precision = resolve_precision(precision)
        self._int8_graph = Path(checkpoint.source) / INT8 if precision == "int8" else None
        if self._int8_graph is not None and not self._int8_graph.is_file():
            raise ConfigError(
                f"precision int8 requires {self._int8_graph}: create it with "
                f"`dinat quantize {checkpoint.source} IMAGES FOLDER`, and serve that folder"
            )
        super().__init__(checkpoint, cache)
        self._cores = torch.get_num_threads()
        self.default_batch = max(8, 2 * self._cores)
        self._core = openvino.Core()

    def infer(self, pixel_values: Sequence[Array], features: bool) -> list[list[Array]]:
        """See ExportedRuntime."""
        outputs: list[list[Array]] = [[] for _ in pixel_values]

        def on_done(request: Any, i: int) -> None:
            outputs[i] = [np.array(tensor.data, dtype=np.float32) for tensor in request.output_tensors]

        def compute(compiled: Compiled, images: range) -> None:
            compiled.queue.set_callback(on_done)
            for i in images:
                compiled.queue.start_async([pixel_values[i]], userdata=i)
            compiled.queue.wait_all()

        count = len(pixel_values)
        together = 0 if count == 1 else count - 1 if count % self._cores == 1 else count
        if features:
            compute(self._with_features, range(count))
        else:
            if together:
                compute(self._one_image_a_core, range(together))
            compute(self._all_cores, range(together, count))  # the last image, if it would occupy one core alone
        return outputs

    @cached_property
    def _all_cores(self) -> Compiled:
        return self._compile(features=False, streams=1)

    @cached_property
    def _one_image_a_core(self) -> Compiled:
        return self._compile(features=False, streams=self._cores) if self._cores > 1 else self._all_cores

    @cached_property
    def _with_features(self) -> Compiled:
        return self._compile(features=True, streams=self._cores)

    def _compile(self, features: bool, streams: int) -> Compiled:
        """Compile the graph for a number of streams that share the cores, or load it from the cache."""
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": self._cores,
        }
        graph = self.graph if features or self._int8_graph is None else self._int8_graph
        cpu = [self._core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        key = digest(self._digest, str(graph), graph.stat().st_mtime_ns, features, cpu, sorted(options.items()))

        def build(folder: Path) -> None:
            model = self._core.read_model(graph)
            if not features:
                model = openvino.Model(model.get_results()[:CLASSIFICATION_OUTPUTS], model.get_parameters(), "labels")
            compiled = self._core.compile_model(model, "CPU", options)
            (folder / "compiled.blob").write_bytes(compiled.export_model().getbuffer())

        blob = np.memmap(cached_artifact(self._cache, key, build) / "compiled.blob", dtype=np.uint8, mode="c")
        compiled = self._core.import_model(openvino.Tensor(blob, shared_memory=True), "CPU", options)
        return Compiled(openvino.AsyncInferQueue(compiled, streams), blob)
