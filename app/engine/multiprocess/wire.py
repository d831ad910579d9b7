"""Messages between the engine process and frontend processes, and their encoding.

A frontend process sends JobMessage, CancelMessage and ReadyMessage; the engine process sends LoadedMessage, FailedMessage and
ResultsMessage. A message is encoded as what Channel.send takes: a list of its kind and its fields in the order in which they
are declared, arrays, and file descriptors. Only this module knows that form.

The messages of each image are not frozen dataclasses: creating one of those takes several times as long.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import numpy as np
import torch

from dinat.app.engine.multiprocess.channel import Arrays
from dinat.app.engine.runtimes.runtime import Array, Disabled, InferenceOptions, InferenceResult, LoadedModel
from dinat.app.errors import ServiceError
from dinat.model import DinatConfig, DinatImageProcessor
from dinat.model.neighborhoods import Neighborhood

Encoded = tuple[list[Any], Arrays, Sequence[int]]
"""Body, arrays and file descriptors."""


@dataclass(slots=True)
class JobMessage:
    """Run a job.

    Attributes:
        number: Identifies the job on this connection.
        slot: The shared slot that the job holds. The engine process frees it.
        shape: (H, W, 3) of the pixels.
        dtype: NumPy's name of the pixels' dtype, as in array.dtype.str.
        arrived: Seconds of time.monotonic; see Job.
        deadline: See Job.
        decoded: See Job.
        options: What to compute.
        pixels: File descriptor of shared memory with the pixels; None if they are in the slot.
    """

    kind: ClassVar[str] = "job"
    number: int
    slot: int
    shape: Sequence[int]
    dtype: str
    arrived: float
    deadline: float
    decoded: float
    options: InferenceOptions
    pixels: int | None = None

    def encode(self) -> Encoded:
        """See Encoded."""
        options = self.options
        body = [self.kind, self.number, self.slot, self.shape, self.dtype, self.arrived, self.deadline, self.decoded]
        body += options.top_k, sorted(options.features), options.point
        return body, (), () if self.pixels is None else (self.pixels,)

    @classmethod
    def decode(cls, fields: list[Any], arrays: Arrays, descriptors: Sequence[int]) -> "JobMessage":
        """From the fields of an encoded message."""
        number, slot, shape, dtype, arrived, deadline, decoded, top_k, features, point = fields
        options = InferenceOptions(top_k, frozenset(features), None if point is None else (point[0], point[1]))
        pixels = descriptors[0] if descriptors else None
        return cls(number, slot, shape, dtype, arrived, deadline, decoded, options, pixels)


@dataclass(frozen=True, slots=True)
class CancelMessage:
    """Cancel a job."""

    kind: ClassVar[str] = "cancel"
    number: int

    def encode(self) -> Encoded:
        """See Encoded."""
        return [self.kind, self.number], (), ()

    @classmethod
    def decode(cls, fields: list[Any], arrays: Arrays, descriptors: Sequence[int]) -> "CancelMessage":
        """From the fields of an encoded message."""
        return cls(*fields)


@dataclass(frozen=True, slots=True)
class ReadyMessage:
    """The frontend process is ready for requests."""

    kind: ClassVar[str] = "ready"

    def encode(self) -> Encoded:
        """See Encoded."""
        return [self.kind], (), ()

    @classmethod
    def decode(cls, fields: list[Any], arrays: Arrays, descriptors: Sequence[int]) -> "ReadyMessage":
        """From the fields of an encoded message."""
        return cls()


@dataclass(frozen=True, slots=True)
class LoadedMessage:
    """The model is loaded.

    Attributes:
        owner: Number of the frontend process as an owner of slots.
        slot_count: Number of shared slots.
        slot_size: Size of a slot, in bytes.
        slots: File descriptor of the slots' shared memory.
        model: The loaded model.
    """

    kind: ClassVar[str] = "loaded"
    owner: int
    slot_count: int
    slot_size: int
    slots: int
    model: LoadedModel

    def encode(self) -> Encoded:
        """See Encoded."""
        model = self.model
        fields = {
            "config": model.config.to_dict(),
            "processor": model.processor.to_dict(),
            "runtime": model.runtime,
            "device": model.device,
            "precision": model.precision,
            "attention": model.attention,
            "disabled": [[entry.name, entry.reason] for entry in model.disabled],
        }
        return [self.kind, self.owner, self.slot_count, self.slot_size, fields], (), (self.slots,)

    @classmethod
    def decode(cls, fields: list[Any], arrays: Arrays, descriptors: Sequence[int]) -> "LoadedMessage":
        """From the fields of an encoded message."""
        owner, slot_count, slot_size, model = fields
        loaded = LoadedModel(
            DinatConfig.from_dict(model["config"]),
            DinatImageProcessor.from_dict(model["processor"]),
            model["runtime"],
            model["device"],
            model["precision"],
            model["attention"],
            [Disabled(name, reason) for name, reason in model["disabled"]],
        )
        return cls(owner, slot_count, slot_size, descriptors[0], loaded)


@dataclass(frozen=True, slots=True)
class FailedMessage:
    """The engine failed; the reason in one sentence."""

    kind: ClassVar[str] = "failed"
    reason: str

    def encode(self) -> Encoded:
        """See Encoded."""
        return [self.kind, self.reason], (), ()

    @classmethod
    def decode(cls, fields: list[Any], arrays: Arrays, descriptors: Sequence[int]) -> "FailedMessage":
        """From the fields of an encoded message."""
        return cls(*fields)


@dataclass(slots=True)
class JobResult:
    """The result of a job, by the job's number. started, computed: see Job."""

    number: int
    started: float
    computed: float
    result: InferenceResult | Exception


@dataclass(slots=True)
class ResultsMessage:
    """Results of several jobs. rate: see Backend."""

    kind: ClassVar[str] = "results"
    rate: float | None
    results: Sequence[JobResult]

    def encode(self) -> Encoded:
        """See Encoded."""
        arrays: list[Array] = []
        results = [[job.number, job.started, job.computed, *_encode_result(job.result, arrays)] for job in self.results]
        return [self.kind, self.rate, results], arrays, ()

    @classmethod
    def decode(cls, fields: list[Any], arrays: Arrays, descriptors: Sequence[int]) -> "ResultsMessage":
        """From the fields of an encoded message."""
        rate, results = fields
        return cls(
            rate,
            [
                JobResult(number, started, computed, _DECODE_RESULT[kind](result, arrays))
                for number, started, computed, kind, *result in results
            ],
        )


Message = JobMessage | CancelMessage | ReadyMessage | LoadedMessage | FailedMessage | ResultsMessage

_MESSAGES: Mapping[str, type[Message]] = {
    message_type.kind: message_type
    for message_type in (JobMessage, CancelMessage, ReadyMessage, LoadedMessage, FailedMessage, ResultsMessage)
}


def decode(body: Any, arrays: Arrays, descriptors: Sequence[int]) -> Message:
    """Decode what Channel received. The message owns the descriptors; arrays keep their shared memory."""
    kind, *fields = body
    return _MESSAGES[kind].decode(fields, arrays, descriptors)


def _encode_result(result: InferenceResult | Exception, arrays: list[Array]) -> list[Any]:
    """Kind and fields of a result. Feature maps and weights are appended to `arrays`; the fields hold their indices."""
    if isinstance(result, ServiceError):
        return ["service_error", int(result.status), result.detail, result.headers]
    if isinstance(result, Exception):
        return ["error", f"{type(result).__name__}: {result}"]
    features: dict[str, int | list[int]] = {}
    for name, value in result.features.items():
        first = len(arrays)
        if isinstance(value, list):
            arrays.extend(value)
            features[name] = list(range(first, len(arrays)))
        else:
            arrays.append(value)
            features[name] = first
    neighborhoods = []
    for one in result.neighborhoods:
        neighborhoods.append([one.stage, one.layer, one.dilation, one.size, one.query, one.rows, one.columns, len(arrays)])
        arrays.append(one.weights.numpy())
    return ["result", result.class_ids, result.scores, features, neighborhoods]


def _decode_inference_result(fields: list[Any], arrays: Arrays) -> InferenceResult:
    class_ids, scores, indices, encoded = fields
    features = {name: arrays[at] if isinstance(at, int) else [arrays[index] for index in at] for name, at in indices.items()}
    neighborhoods = [
        Neighborhood(stage, layer, dilation, (h, w), (y, x), rows, columns, torch.from_numpy(np.array(arrays[at])))
        for stage, layer, dilation, (h, w), (y, x), rows, columns, at in encoded
    ]
    return InferenceResult(np.array(class_ids, np.int64), np.array(scores, np.float32), features, neighborhoods)


def _decode_service_error(fields: list[Any], arrays: Arrays) -> ServiceError:
    status, detail, headers = fields
    error = ServiceError(detail, headers)
    error.status = HTTPStatus(status)
    return error


def _decode_error(fields: list[Any], arrays: Arrays) -> RuntimeError:
    return RuntimeError(*fields)


_DECODE_RESULT: Mapping[str, Callable[[list[Any], Arrays], InferenceResult | Exception]] = {
    "result": _decode_inference_result,
    "service_error": _decode_service_error,
    "error": _decode_error,
}
