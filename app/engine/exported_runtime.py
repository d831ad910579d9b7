"""A checkpoint as a graph on disk, run on the CPU by a runtime of its own. One subclass for each such runtime."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from app.engine.artefacts import artefact, digest, digest_of
from app.engine.runtime import Answer, Array, Wanted, rank
from model import ConfigError, DinatForImageClassification, DinatImageProcessor
from model.checkpoint import open_checkpoint
from model.export import export, output_names
from model.image_processor import Pixels

POOLED = ("pooled",)
"""What the graph for labels alone gives besides them: it costs nothing, and keeps the last layer norm in float32."""


class ExportedRuntime:
    """What runtimes of exported graphs share. Graphs are made once and kept in a cache.

    Two graphs: one gives labels, the other every map as well; that one is opened when a map is first asked for.
    """

    name: str
    file_format: str
    suffix: str
    packages: tuple[str, ...]
    device = "cpu"
    precision: str
    default_batch = 8

    def __init__(self, source: str, revision: str | None, cache: Path) -> None:
        """Read the checkpoint's configuration. Raises CheckpointError, ConfigError."""
        self._source, self._revision, self._cache = source, revision, cache
        self._checkpoint = open_checkpoint(source, revision=revision)
        self.config = self._checkpoint.config
        if self.config.num_labels == 0:
            raise ConfigError(f"{source} has no classifier: it cannot be served")
        self.processor = DinatImageProcessor.from_pretrained(source, revision=revision)
        self._digest = digest_of(self._checkpoint, "torch", *self.packages)

    def infer(self, pixel_values: Sequence[Array], features: bool) -> list[list[Array]]:
        """The graph's outputs for each picture, (1, ...) each.  pixel_values: (1, 3, H, W) each."""
        raise NotImplementedError

    def run(self, pixels: Sequence[Pixels], wanted: Sequence[Wanted]) -> list[Answer]:
        """See Runtime."""
        outputs: list[list[Array]] = [[] for _ in pixels]
        for features in (False, True):
            chosen = [i for i, want in enumerate(wanted) if bool(want.features) is features]
            inputs = [self.processor.normalize(torch.from_numpy(pixels[i][None].copy())).contiguous().numpy() for i in chosen]
            for i, output in zip(chosen, self.infer(inputs, features) if chosen else [], strict=True):
                outputs[i] = output
        scores, classes = rank(torch.from_numpy(np.concatenate([output[0] for output in outputs])), self.config)
        names = output_names(self.config.num_layers, self.config.feature_names)
        answers = []
        for i, want in enumerate(wanted):
            maps = {name: output[0] for name, output in zip(names, outputs[i], strict=False)} if want.features else {}
            features_wanted: dict[str, Array | list[Array]] = {
                name: [maps[part] for part in output_names(self.config.num_layers, [name])[1:]]
                if name == "hidden_states"
                else maps[name]
                for name in sorted(want.features)
            }
            answers.append(Answer(classes[i, : want.top_k].numpy(), scores[i, : want.top_k].numpy(), features_wanted))
        return answers

    def attention(self) -> dict[str, str]:
        """See Runtime."""
        return dict.fromkeys(self.config.stage_names[1:], "tiled")

    def batch_sizes(self, max_batch: int) -> Sequence[int]:
        """See Runtime."""
        return sorted({1, max_batch})

    def memory(self) -> int | None:
        """See Runtime."""
        return None

    def is_out_of_memory(self, error: Exception) -> bool:
        """See Runtime."""
        return isinstance(error, MemoryError) or "bad_alloc" in str(error) or "Failed to allocate memory" in str(error)

    def _graph(self, features: bool) -> Path:
        """The graph's file, made if it is not in the cache."""
        names = self.config.feature_names if features else POOLED
        file = f"model{self.suffix}"

        def make(folder: Path) -> None:
            network = DinatForImageClassification.from_pretrained(self._source, revision=self._revision)
            export(network, self.processor, folder / file, self.file_format, features=names, batch=self._batch)

        key = digest(self._digest, self.file_format, self.processor.output_size, self._batch, names)
        return artefact(self._cache, key, make) / file

    _batch: int | None = None
    """Pictures that the graph takes at once, None for any number."""
