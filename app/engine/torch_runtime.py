"""The network in eager PyTorch, on a CPU or a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model import ConfigError, DinatForImageClassification, DinatImageProcessor
from model.config import DinatConfig
from model.image_processor import Pixels

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Wanted:
    """What a request wants of a picture. top_k: 1 to the number of labels.  features: names as feature_names gives them."""

    top_k: int
    features: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Answer:
    """What the network says of a picture.

    class_ids: (top_k,) int64 and scores: (top_k,) float32, best first, ties by class.  features: by name, (C, h, w) float32
    maps, (C,) for pooled, a list of maps for hidden_states.
    """

    class_ids: npt.NDArray[np.int64]
    scores: Array
    features: dict[str, Array | list[Array]]


def feature_names(config: DinatConfig) -> list[str]:
    """What a request may ask for besides labels."""
    return [*config.stage_names, "pooled", "hidden_states"]


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
    """A loaded classifier. Not safe for calls from several threads at once."""

    name = "torch"

    def __init__(self, source: str, revision: str | None, device: str, precision: str, attention: str) -> None:
        """Load the checkpoint. Raises CheckpointError, ConfigError."""
        self.device = resolve_device(device)
        self.precision = self._precision(precision)
        self.attention = attention
        self._dtype = PRECISIONS[self.precision]
        self._network = DinatForImageClassification.from_pretrained(
            source, attention=attention, device=self.device, dtype=self._dtype, revision=revision
        )
        self.config = self._network.config
        if self.config.num_labels == 0:
            raise ConfigError(f"{source} has no classifier: it cannot be served")
        self.processor = DinatImageProcessor.from_pretrained(source, revision=revision)

    def run(self, pixels: Sequence[Pixels], wanted: Sequence[Wanted]) -> list[Answer]:
        """Classify a batch. pixels: (H, W, 3) uint8 each, all of one size, as processor.resize gives them."""
        with torch.inference_mode():
            batch = self.processor.normalize(torch.from_numpy(np.stack(pixels)).to(self.device)).to(self._dtype)
            dinat = self._network.dinat
            encoded = dinat.encode(batch)
            pooled = dinat.layernorm(encoded.after[-1]).mean(dim=(1, 2))
            scores, class_ids = self._scores(self._network.classifier(pooled).float()).sort(descending=True, stable=True)
            most = max(want.top_k for want in wanted)
            top_scores, top_ids = scores[:, :most].cpu().numpy(), class_ids[:, :most].cpu().numpy()
            answers = []
            for i, want in enumerate(wanted):
                features: dict[str, Array | list[Array]] = {}
                for name in sorted(want.features):
                    if name == "pooled":
                        features[name] = _host(pooled[i])
                    elif name == "hidden_states":
                        features[name] = [_host(state[i].permute(2, 0, 1)) for state in encoded.after]
                    else:
                        stage = encoded.before[self.config.stage_names.index(name)][i]
                        features[name] = _host(F.layer_norm(stage, stage.shape[-1:]).permute(2, 0, 1))
                answers.append(Answer(top_ids[i, : want.top_k], top_scores[i, : want.top_k], features))
            return answers

    def _precision(self, asked: str) -> str:
        if asked != "auto":
            return asked
        fast = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)
        return "bf16" if fast else "fp32"

    def _scores(self, logits: Tensor) -> Tensor:
        """What transformers' image-classification pipeline makes of the logits."""
        if self.config.problem_type == "regression":
            return logits
        if self.config.problem_type == "multi_label_classification" or self.config.num_labels == 1:
            return logits.sigmoid()
        return logits.softmax(dim=-1)


def _host(x: Tensor) -> Array:
    """A tensor as a float32 array of its own on the host."""
    array: Array = x.float().contiguous().cpu().numpy()
    return array
