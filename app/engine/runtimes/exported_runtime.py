"""Runtimes of exported graphs, on the CPU: the part that OpenVINO and ONNX Runtime share."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import structlog
import torch

from dinat.app.engine.runtimes.artifacts import cached_artifact, checkpoint_digest, digest, run_in_subprocess
from dinat.app.engine.runtimes.runtime import (
    LOGITS,
    Array,
    Disabled,
    InferenceOptions,
    InferenceResult,
    rank,
    run_examples,
    to_pixel_values,
)
from dinat.model import ConfigError, DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dinat.model.cpu.resize import Pixels
from dinat.model.export import FORMATS, export, output_names

log = structlog.get_logger("dinat")

CLASSIFICATION_OUTPUTS = 2
"""Outputs that classification computes: logits and pooled. Pooled is free, and keeps the last layer norm in float32."""


class ExportedRuntime:
    """A Runtime that runs an exported graph. The graph returns all feature maps; it is exported once and cached.

    Attributes:
        file_format: Format of the graph; see dinat.model.export.
        packages: Packages whose versions are part of the cache key.
        graph_batch: Batch size of the graph; None if it is dynamic.
    """

    name: str
    file_format: str
    packages: tuple[str, ...]
    graph_batch: int | None
    device = "cpu"
    precision: str
    lanes = 1
    disabled: Sequence[Disabled] = ()
    default_batch = 8

    def __init__(self, checkpoint: Checkpoint, cache: Path) -> None:
        """Load the graph from the cache, or export it. Raises CheckpointError, ConfigError, ExportError."""
        self._source, self.config = checkpoint.source, checkpoint.config
        if self.config.num_labels == 0:
            raise ConfigError(f"{checkpoint.source} has no classifier: it cannot be served")
        self.processor = DinatImageProcessor.from_pretrained(checkpoint)
        features = ["pooled", *(name for name in self.config.feature_names if name != "pooled")]
        self._outputs = output_names(self.config.num_layers, features)
        self._cache = cache
        file = f"model{FORMATS[self.file_format][0]}"

        def build(folder: Path) -> None:
            log.info("exporting graph", model=checkpoint.source, runtime=self.name, cache=str(cache))
            arguments = (checkpoint.source, checkpoint.revision, folder / file, self.file_format, self.graph_batch, features)
            run_in_subprocess(export_checkpoint, *arguments)  # export needs several times the memory of inference

        self._digest = checkpoint_digest(checkpoint, "torch", *self.packages)
        key = digest(self._digest, self.file_format, self.processor.to_dict(), self.graph_batch)
        self.graph = cached_artifact(cache, key, build) / file

    def infer(self, pixel_values: Sequence[Array], features: bool) -> list[list[Array]]:
        """Run the graph.

        Args:
            pixel_values: One (1, 3, H, W) array for each image.
            features: Whether to compute all outputs of the graph, or only the first CLASSIFICATION_OUTPUTS.

        Returns:
            For each image its outputs, (1, ...) each.
        """
        raise NotImplementedError

    def run(self, pixels: Pixels | Array, options: Sequence[InferenceOptions]) -> list[InferenceResult]:
        """See Runtime."""
        outputs: list[list[Array]] = [[] for _ in pixels]
        for features in (False, True):
            selected = [i for i, image_options in enumerate(options) if bool(image_options.features - {LOGITS}) is features]
            inputs = [
                to_pixel_values(self.processor, torch.from_numpy(pixels[i : i + 1])).contiguous().numpy() for i in selected
            ]
            for i, output in zip(selected, self.infer(inputs, features) if selected else [], strict=True):
                outputs[i] = output
        scores, classes = rank(torch.from_numpy(np.concatenate([output[0] for output in outputs])), self.config)
        return [
            InferenceResult(
                classes[i, : image_options.top_k].numpy(),
                scores[i, : image_options.top_k].numpy(),
                {name: self._feature(name, outputs[i]) for name in sorted(image_options.features)},
            )
            for i, image_options in enumerate(options)
        ]

    def _feature(self, name: str, outputs: list[Array]) -> Array | list[Array]:
        """A feature map of an image by name, or a list of them for hidden_states."""
        if name == "hidden_states":
            return [output[0] for part, output in zip(self._outputs, outputs, strict=True) if part.startswith(name)]
        feature_map: Array = outputs[0 if name == LOGITS else self._outputs.index(name)][0]
        return feature_map

    def attention(self) -> dict[str, str]:
        """See Runtime."""
        return dict.fromkeys(self.config.stage_names[1:], "tiled")

    def warm(self, max_batch: int) -> int:
        """See Runtime."""
        for count in sorted({1, max_batch}):
            run_examples(self, self._source, count)
        return max_batch

    def memory(self) -> int | None:
        """See Runtime."""
        return None

    def is_out_of_memory(self, error: Exception) -> bool:
        """See Runtime."""
        return isinstance(error, MemoryError) or "bad_alloc" in str(error) or "Failed to allocate memory" in str(error)


def export_checkpoint(
    source: str, revision: str | None, path: Path, file_format: str, batch: int | None, features: Sequence[str]
) -> None:
    """Export a checkpoint with dinat.model.export.export. All arguments can be pickled, for run_in_subprocess."""
    checkpoint = open_checkpoint(source, revision=revision)
    network = DinatForImageClassification.from_pretrained(checkpoint)
    export(network, DinatImageProcessor.from_pretrained(checkpoint), path, file_format, batch=batch, features=features)
