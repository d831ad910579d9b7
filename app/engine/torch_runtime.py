"""The network in eager PyTorch, on a CPU or a GPU."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from app.engine.runtime import Answer, Array, Wanted, rank
from model import ConfigError, DinatForImageClassification, DinatImageProcessor
from model.image_processor import Pixels

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """A device by its setting. Raises ConfigError where this machine has no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is not known: take auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not served: take auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ConfigError(f"device {device!r} is not there: PyTorch sees {there} CUDA devices; take cpu, or install its driver")
    return chosen


class TorchRuntime:
    """A Runtime, as app.engine.runtime has it."""

    name = "torch"

    def __init__(self, source: str, revision: str | None, device: str, precision: str, attention: str) -> None:
        """Load the checkpoint. Raises CheckpointError, ConfigError."""
        self._device = resolve_device(device)
        self.device = str(self._device)
        self.precision = self._precision(precision)
        self.default_batch = 64 if self._device.type == "cuda" else 8
        self._attention = attention
        self._dtype = PRECISIONS[self.precision]
        self._network = DinatForImageClassification.from_pretrained(
            source, attention=attention, device=self._device, dtype=self._dtype, revision=revision
        )
        self.config = self._network.config
        if self.config.num_labels == 0:
            raise ConfigError(f"{source} has no classifier: it cannot be served")
        self.processor = DinatImageProcessor.from_pretrained(source, revision=revision)

    def run(self, pixels: Sequence[Pixels], wanted: Sequence[Wanted]) -> list[Answer]:
        """See Runtime."""
        with torch.inference_mode():
            batch = self.processor.normalize(torch.from_numpy(np.stack(pixels)).to(self._device)).to(self._dtype)
            names = frozenset().union(*(want.features for want in wanted))
            logits, maps = self._network.classify(batch, names)
            scores, classes = rank(logits, self.config)
            most = max(want.top_k for want in wanted)
            top_scores, top_classes = scores[:, :most].cpu().numpy(), classes[:, :most].cpu().numpy()
            answers = []
            for i, want in enumerate(wanted):
                features = {name: _host(maps[name], i) for name in sorted(want.features)}
                answers.append(Answer(top_classes[i, : want.top_k], top_scores[i, : want.top_k], features))
            return answers

    def attention(self) -> dict[str, str]:
        """See Runtime."""
        return dict.fromkeys(self.config.stage_names[1:], "tiled" if self._attention == "auto" else self._attention)

    def batch_sizes(self, max_batch: int) -> Sequence[int]:
        """See Runtime. Eager PyTorch makes nothing per batch size: the ends of the range are enough."""
        return sorted({1, max_batch})

    def memory(self) -> int | None:
        """See Runtime."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None

    def is_out_of_memory(self, error: Exception) -> bool:
        """See Runtime. On a CPU, PyTorch's allocator raises a plain RuntimeError."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

    def _precision(self, asked: str) -> str:
        if asked == "int8":
            raise ConfigError("precision int8 is served by OpenVINO alone: take runtime openvino, on a CPU")
        if asked != "auto":
            return asked
        fast = self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) >= (8, 0)
        return "bf16" if fast else "fp32"


def _host(maps: Tensor | list[Tensor], i: int) -> Array | list[Array]:
    """One picture's map, or maps, as float32 arrays of their own on the host."""
    if isinstance(maps, list):
        return [np.ascontiguousarray(one[i].float().cpu().numpy()) for one in maps]
    return np.ascontiguousarray(maps[i].float().cpu().numpy())
