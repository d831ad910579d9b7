"""A checkpoint as a graph on disk, run on the CPU by a runtime of its own. One subclass for each such runtime."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import structlog
import torch

from dinat.app.engine.runtimes.artifacts import artifact, digest, digest_of, in_own_process
from dinat.app.engine.runtimes.runtime import (
    LOGITS,
    Array,
    Disabled,
    InferenceOptions,
    InferenceResult,
    examples,
    prepared,
    rank,
)
from dinat.model import ConfigError, DinatForImageClassification, DinatImageProcessor
from dinat.model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dinat.model.cpu.resize import Pixels
from dinat.model.export import FORMATS, export, output_names

log = structlog.get_logger("dinat")

LABELS = 2
"""Outputs that every picture needs: logits and pooled. The latter costs nothing, and keeps the last layer norm in float32."""


class ExportedRuntime:
    """What runtimes of exported graphs share. The graph gives every map; it is made once and kept in a cache."""

    name: str
    file_format: str
    packages: tuple[str, ...]
    graph_batch: int | None
    """Pictures that the graph takes at once, None for any number."""
    device = "cpu"
    precision: str
    lanes = 1
    disabled: Sequence[Disabled] = ()
    default_batch = 8

    def __init__(self, checkpoint: Checkpoint, cache: Path) -> None:
        """Find or make the graph. Raises CheckpointError, ConfigError, ExportError."""
        self.config = checkpoint.config
        if self.config.num_labels == 0:
            raise ConfigError(f"{checkpoint.source} has no classifier: it cannot be served")
        self.processor = DinatImageProcessor.from_pretrained(checkpoint)
        features = ["pooled", *(name for name in self.config.feature_names if name != "pooled")]
        self._outputs = output_names(self.config.num_layers, features)
        self._cache = cache
        file = f"model{FORMATS[self.file_format][0]}"

        def make(folder: Path) -> None:
            log.info("making the graph, once for this checkpoint", model=checkpoint.source, runtime=self.name, cache=str(cache))
            arguments = (checkpoint.source, checkpoint.revision, folder / file, self.file_format, self.graph_batch, features)
            in_own_process(export_checkpoint, *arguments)  # it takes several times the memory that serving does

        self._digest = digest_of(checkpoint, "torch", *self.packages)
        key = digest(self._digest, self.file_format, self.processor.to_dict(), self.graph_batch)
        self.graph = artifact(cache, key, make) / file

    def infer(self, pixel_values: Sequence[Array], features: bool) -> list[list[Array]]:
        """The graph's first outputs for each picture, (1, ...) each: LABELS of them, or all if features are wanted.

        pixel_values: (1, 3, H, W) each.
        """
        raise NotImplementedError

    def run(self, pixels: Pixels | Array, wanted: Sequence[InferenceOptions]) -> list[InferenceResult]:
        """See Runtime."""
        outputs: list[list[Array]] = [[] for _ in pixels]
        for features in (False, True):
            chosen = [i for i, want in enumerate(wanted) if bool(want.features - {LOGITS}) is features]
            inputs = [prepared(self.processor, torch.from_numpy(pixels[i : i + 1])).contiguous().numpy() for i in chosen]
            for i, output in zip(chosen, self.infer(inputs, features) if chosen else [], strict=True):
                outputs[i] = output
        scores, classes = rank(torch.from_numpy(np.concatenate([output[0] for output in outputs])), self.config)
        return [
            InferenceResult(
                classes[i, : want.top_k].numpy(),
                scores[i, : want.top_k].numpy(),
                {name: self._feature(name, outputs[i]) for name in sorted(want.features)},
            )
            for i, want in enumerate(wanted)
        ]

    def _feature(self, name: str, outputs: list[Array]) -> Array | list[Array]:
        """A picture's map, or its maps, by name."""
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
            self.run(examples(self.processor, count), [InferenceOptions(top_k=1)] * count)
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
    """dinat.model.export.export of a checkpoint, in a form that another process can be asked for."""
    checkpoint = open_checkpoint(source, revision=revision)
    network = DinatForImageClassification.from_pretrained(checkpoint)
    export(network, DinatImageProcessor.from_pretrained(checkpoint), path, file_format, batch=batch, features=features)
