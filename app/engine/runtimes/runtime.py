"""The interface between the engine and its runtimes: options, results, and the Runtime protocol."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinat.model.config import DinatConfig
from dinat.model.cpu.resize import Pixels
from dinat.model.errors import CheckpointError
from dinat.model.image_processor import DinatImageProcessor
from dinat.model.neighborhoods import Neighborhood

Array = npt.NDArray[np.float32]


LOGITS = "logits"
"""Name of the logits among the features: the network's output before scores, in the order of the classes."""


@dataclass(frozen=True)
class InferenceOptions:
    """What to compute for an image.

    Attributes:
        top_k: Number of classes to return, 1 to the number of labels.
        features: Feature maps to return: names of config.feature_names, and LOGITS.
        point: (y, x), each 0 to 1. If set, only the neighborhoods of this point are computed.
    """

    top_k: int
    features: frozenset[str] = frozenset()
    point: tuple[float, float] | None = None


@dataclass(frozen=True)
class InferenceResult:
    """The result of an image.

    Attributes:
        class_ids: (top_k,) int64, best first; equal scores in the order of the classes.
        scores: (top_k,) float32.
        features: By name: (C, h, w) float32 feature maps, (C,) for pooled, a list of maps for hidden_states, (num_labels,)
            for LOGITS.
        neighborhoods: Of InferenceOptions.point, one for each layer.
        seconds: Time of each part, in order: decode, queue (until its batch started), compute (its whole batch).
    """

    class_ids: npt.NDArray[np.int64]
    scores: Array
    features: dict[str, Array | list[Array]]
    neighborhoods: Sequence[Neighborhood] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether no score and no weight of a neighborhood is NaN or infinite."""
        return bool(np.isfinite(self.scores).all()) and all(
            bool(neighborhood.weights.isfinite().all()) for neighborhood in self.neighborhoods
        )


@dataclass(frozen=True)
class Disabled:
    """Something that failed, or returned wrong numbers, at startup and is therefore not used.

    Attributes:
        name: Such as "attention natten", "precision bf16", "CUDA graphs" or "device cuda:1".
        reason: A sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class LoadedModel:
    """A model that is loaded and warmed up.

    Attributes:
        runtime: Name of the runtime.
        device: Names of the devices, such as "cuda:0, cuda:1".
        precision: Name of the precision.
        attention: Names of the attention backends, by stage.
        disabled: What failed at startup.
    """

    config: DinatConfig
    processor: DinatImageProcessor
    runtime: str
    device: str
    precision: str
    attention: dict[str, str]
    disabled: Sequence[Disabled] = ()


class DeviceUnusable(Exception):
    """The device returns wrong numbers, also in float32."""


class DeviceLost(BaseException):
    """The device no longer responds. Not an Exception: a smaller batch does not help."""


class Runtime(Protocol):
    """A loaded classifier on one device."""

    name: str
    device: str
    precision: str
    config: DinatConfig
    processor: DinatImageProcessor
    default_batch: int
    """Images per batch if MAX_BATCH is not set."""
    lanes: int
    """Number of threads that may call run at once: 1, or more if one batch uploads while another computes."""

    @property
    def disabled(self) -> Sequence[Disabled]:
        """What the self-check in warm disabled."""

    def run(self, pixels: Pixels | Array, options: Sequence[InferenceOptions]) -> list[InferenceResult]:
        """Classify a batch.

        Args:
            pixels: (B, H, W, 3), uint8 as processor.resize returns, or float32, already normalized.
            options: One for each image.
        """

    def attention(self) -> dict[str, str]:
        """The attention backend of each stage."""

    def warm(self, max_batch: int) -> int:
        """Warm up and run the self-check.

        Returns:
            The largest batch that fits into memory, at most max_batch.

        Raises:
            DeviceUnusable: The device failed its self-check.
            CheckpointError: The checkpoint returns scores that are not finite.
        """

    def memory(self) -> int | None:
        """Bytes in use on the device; None if the device uses the memory of the process."""

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether an error of run means that the batch was too large. Frees cached memory."""


def examples(processor: DinatImageProcessor, count: int) -> Pixels:
    """Random images for warm-up, (count, H, W, 3) uint8, of the size that processor.resize returns."""
    random = np.random.default_rng(0)
    height, width, channels = processor.resize(random.integers(0, 256, (480, 640, 3), dtype=np.uint8)).shape
    return random.integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def to_pixel_values(processor: DinatImageProcessor, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert pixels as Runtime.run takes them, (B, H, W, 3), to the network's input, (B, 3, H, W), normalized."""
    return processor.normalize(pixels, dtype) if pixels.dtype == torch.uint8 else pixels.permute(0, 3, 1, 2).to(dtype)


def run_examples(runtime: Runtime, source: str, count: int) -> None:
    """Run a batch of `examples` on a runtime. Raises CheckpointError if the scores are not finite; it names `source`."""
    results = runtime.run(examples(runtime.processor, count), [InferenceOptions(top_k=1)] * count)
    if not all(result.is_finite for result in results):
        raise CheckpointError(describe_not_finite(source, runtime.precision))


def describe_not_finite(source: str, precision: str) -> str:
    """Return a sentence about scores that are not finite, from a checkpoint in a precision."""
    overflow = ", or its values exceed the range of fp16: set precision fp32" if precision == "fp16" else ""
    return (
        f"the network returned scores that are not finite (NaN or infinite): the checkpoint {source} is broken, as after a "
        f"training that diverged{overflow}"
    )


def device_names(runtimes: Sequence[Runtime]) -> str:
    """The devices of runtimes, such as "cuda:0, cuda:1"."""
    return ", ".join(runtime.device for runtime in runtimes)


def rank(logits: Tensor, config: DinatConfig) -> tuple[Tensor, Tensor]:
    """Compute scores and sort them, best first; equal scores in the order of the classes.

    Scores follow the image-classification pipeline of transformers: softmax, sigmoid, or the logits for regression. Those of an
    infinite logit are NaN; NaN is sorted first.

    Args:
        logits: (B, num_labels).
        config: Its problem_type selects the scores.

    Returns:
        Scores, float32, and their classes, int64: both (B, num_labels).
    """
    logits = logits.float()
    if config.problem_type == "regression":
        scores = logits
    elif config.problem_type == "multi_label_classification" or config.num_labels == 1:
        scores = logits.sigmoid().masked_fill(logits == math.inf, math.nan)
    else:
        scores = logits.softmax(dim=-1)
    values, classes = scores.sort(descending=True, stable=True)
    return values, classes
