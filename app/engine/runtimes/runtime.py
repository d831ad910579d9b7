"""What the engine asks of whoever computes, and what passes between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinat.model.config import DinatConfig
from dinat.model.cpu.resize import Pixels
from dinat.model.image_processor import DinatImageProcessor
from dinat.model.neighborhoods import Neighborhood

Array = npt.NDArray[np.float32]


LOGITS = "logits"
"""What may be wanted beside the network's maps: what comes before the scores, in the order of the classes."""


@dataclass(frozen=True)
class InferenceOptions:
    """What a request wants of a picture.

    top_k: 1 to the number of labels.  features: some of config.feature_names, and LOGITS.  point: (y, x), 0 to 1 each, whose
    neighborhoods are wanted, and nothing else.
    """

    top_k: int
    features: frozenset[str] = frozenset()
    point: tuple[float, float] | None = None


@dataclass(frozen=True)
class InferenceResult:
    """What the network says of a picture.

    class_ids: (top_k,) int64 and scores: (top_k,) float32, best first, ties by class.  features: by name, (C, h, w) float32
    maps, (C,) for pooled, a list of maps for hidden_states, (num_labels,) for LOGITS.  seconds: what each part took, in order:
    decode, queue (until its batch ran), compute (its whole batch).
    """

    class_ids: npt.NDArray[np.int64]
    scores: Array
    features: dict[str, Array | list[Array]]
    neighborhoods: Sequence[Neighborhood] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Disabled:
    """What was meant to serve, was seen to fail or to give wrong numbers, and does not serve.

    name: such as "attention natten", "precision bf16", "CUDA graphs" or "device cuda:1".  reason: a sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class LoadedModel:
    """What serves, once it is loaded and warm.  device, attention: in words; the latter for each stage."""

    config: DinatConfig
    processor: DinatImageProcessor
    runtime: str
    device: str
    precision: str
    attention: dict[str, str]
    disabled: Sequence[Disabled] = ()


class DeviceUnusable(Exception):
    """On this device no way of computing gives right numbers."""


class DeviceLost(BaseException):
    """The device answers nothing any more. Not an Exception: no smaller batch helps."""


class Runtime(Protocol):
    """A loaded classifier, on one device."""

    name: str
    device: str
    precision: str
    config: DinatConfig
    processor: DinatImageProcessor
    default_batch: int
    """Pictures per batch where MAX_BATCH is not set."""
    lanes: int
    """Calls of run that may overlap: 1, or more where one batch uploads while another computes."""

    @property
    def disabled(self) -> Sequence[Disabled]:
        """What warm has found that does not serve."""

    def run(self, pixels: Pixels | Array, wanted: Sequence[InferenceOptions]) -> list[InferenceResult]:
        """Classify a batch. pixels: (B, H, W, 3), uint8 as processor.resize gives each, or float32, normalised already."""

    def attention(self) -> dict[str, str]:
        """The attention backend of each stage."""

    def warm(self, max_batch: int) -> int:
        """Make what is made once, and see that it computes rightly. The largest batch that fits, at most max_batch.

        Raises DeviceUnusable.
        """

    def memory(self) -> int | None:
        """Bytes in use on the device, or None where that is the process's own memory."""

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether an error of run says that the batch was too large; frees what can be freed."""


def examples(processor: DinatImageProcessor, count: int) -> Pixels:
    """(count, H, W, 3) uint8: noise, of the size that processor.resize gives."""
    random = np.random.default_rng(0)
    height, width, channels = processor.resize(random.integers(0, 256, (480, 640, 3), dtype=np.uint8)).shape
    return random.integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def prepared(processor: DinatImageProcessor, pixels: Tensor) -> Tensor:
    """(B, H, W, 3), as Runtime.run takes it -> (B, 3, H, W) float32, normalised."""
    return processor.normalize(pixels) if pixels.dtype == torch.uint8 else pixels.permute(0, 3, 1, 2)


def devices(runtimes: Sequence[Runtime]) -> str:
    """Their devices in words: cuda:0, cuda:1."""
    return ", ".join(runtime.device for runtime in runtimes)


def rank(logits: Tensor, config: DinatConfig) -> tuple[Tensor, Tensor]:
    """Scores, best first, and their classes: both (B, num_labels). Ties by class; float32.

    Scores are what transformers' image-classification pipeline makes of logits: softmax, sigmoid, or nothing for regression.
    """
    logits = logits.float()
    if config.problem_type == "regression":
        scores = logits
    elif config.problem_type == "multi_label_classification" or config.num_labels == 1:
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(dim=-1)
    values, classes = scores.sort(descending=True, stable=True)
    return values, classes
