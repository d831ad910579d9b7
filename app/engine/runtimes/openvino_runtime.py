"""The network in OpenVINO: the fastest on a CPU. Imports openvino, which is an extra."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import torch

from dinat.app.engine.runtimes.artifacts import artifact, digest
from dinat.app.engine.runtimes.exported_runtime import LABELS, ExportedRuntime
from dinat.app.engine.runtimes.runtime import Array
from dinat.model import ConfigError
from dinat.model.checkpoints.checkpoint import Checkpoint
from dinat.model.export import INT8

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""OpenVINO's name of each precision; int8 is in the graph itself, and what it leaves as it is runs in float32."""


def resolve_precision(asked: str) -> str:
    """auto: bf16 where the processor has instructions for it. Raises ConfigError for one that a CPU does not compute in."""
    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if asked == "auto":
        return "bf16" if has_bf16 else "fp32"
    if asked not in HINTS:
        raise ConfigError(f"precision {asked} is not served by OpenVINO on a CPU: take one of auto, {', '.join(HINTS)}")
    if asked == "bf16" and not has_bf16:
        raise ConfigError("precision bf16 is not there: this processor has no instructions for it; take fp32")
    return asked


@dataclass
class Compiled:
    """A compiled graph as a queue of requests, one for each of its streams, and the mapped file that holds its weights."""

    queue: Any
    blob: npt.NDArray[np.uint8]


class OpenVinoRuntime(ExportedRuntime):
    """A Runtime that computes every picture on its own: one a core when there are several, a single one on all cores.

    That beats batches: nothing waits for the other cores after each layer, and a picture's maps stay in its core's cache.
    """

    name = "openvino"
    file_format = "openvino"
    packages = ("openvino",)
    graph_batch = 1

    def __init__(self, checkpoint: Checkpoint, precision: str, cache: Path) -> None:
        """Find or make the graph. Raises CheckpointError, ConfigError, ExportError."""
        self.precision = resolve_precision(precision)
        self._label_graph = Path(checkpoint.source) / INT8 if precision == "int8" else None
        if self._label_graph is not None and not self._label_graph.is_file():
            raise ConfigError(
                f"precision int8 needs {self._label_graph}: make it with `dinat quantize {checkpoint.source} PICTURES FOLDER`, "
                "and serve that folder"
            )
        super().__init__(checkpoint, cache)
        self._cores = torch.get_num_threads()
        self.default_batch = max(8, 2 * self._cores)
        self._core = openvino.Core()

    def infer(self, pixel_values: Sequence[Array], features: bool) -> list[list[Array]]:
        """See ExportedRuntime."""
        outputs: list[list[Array]] = [[] for _ in pixel_values]

        def take(request: Any, i: int) -> None:
            outputs[i] = [np.array(tensor.data, dtype=np.float32) for tensor in request.output_tensors]

        def compute(compiled: Compiled, pictures: range) -> None:
            compiled.queue.set_callback(take)
            for i in pictures:
                compiled.queue.start_async([pixel_values[i]], userdata=i)
            compiled.queue.wait_all()

        count = len(pixel_values)
        together = 0 if count == 1 else count - 1 if count % self._cores == 1 else count
        if features:
            compute(self._with_features, range(count))
        else:
            if together:
                compute(self._crowd, range(together))
            compute(self._alone, range(together, count))  # the odd one out, on all cores
        return outputs

    @cached_property
    def _alone(self) -> Compiled:
        return self._compile(features=False, streams=1)

    @cached_property
    def _crowd(self) -> Compiled:
        return self._compile(features=False, streams=self._cores) if self._cores > 1 else self._alone

    @cached_property
    def _with_features(self) -> Compiled:
        return self._compile(features=True, streams=self._cores)

    def _compile(self, features: bool, streams: int) -> Compiled:
        """The compiled graph, with as many streams, each with its share of the cores. From the cache where it is there."""
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": self._cores,
        }
        graph = self.graph if features or self._label_graph is None else self._label_graph
        processor = [self._core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        key = digest(self._digest, str(graph), graph.stat().st_mtime_ns, features, processor, sorted(options.items()))

        def make(folder: Path) -> None:
            model = self._core.read_model(graph)
            if not features:
                model = openvino.Model(model.get_results()[:LABELS], model.get_parameters(), "labels")
            compiled = self._core.compile_model(model, "CPU", options)
            (folder / "compiled.blob").write_bytes(compiled.export_model().getbuffer())

        blob = np.memmap(artifact(self._cache, key, make) / "compiled.blob", dtype=np.uint8, mode="c")
        compiled = self._core.import_model(openvino.Tensor(blob, shared_memory=True), "CPU", options)
        return Compiled(openvino.AsyncInferQueue(compiled, streams), blob)
