"""Every message round-trips through a channel."""

import asyncio
import os

import numpy as np
import pytest
import torch

from dinat.app.engine.multiprocess import wire
from dinat.app.engine.multiprocess.channel import mapped, share
from dinat.app.engine.multiprocess.wire import (
    CancelMessage,
    FailedMessage,
    JobMessage,
    JobResult,
    LoadedMessage,
    Message,
    ReadyMessage,
    ResultsMessage,
)
from dinat.app.engine.runtimes.runtime import Disabled, InferenceOptions, InferenceResult, LoadedModel
from dinat.app.errors import ServiceError, Unavailable
from dinat.model import DinatConfig, DinatImageProcessor
from dinat.model.neighborhoods import Neighborhood
from tests.app.engine.multiprocess.test_channel import Pair


def round_trip(message: Message) -> Message:
    """Send a message through a channel, and return what arrives."""

    async def main() -> Message:
        pair = Pair()
        pair.one.send(*message.encode())
        received = wire.decode(*await pair.next())
        pair.one.close()
        pair.two.close()
        return received

    return asyncio.run(main())


def results_of(*results: InferenceResult | Exception) -> list[InferenceResult | Exception]:
    """Results after a round trip in one message."""
    sent = [JobResult(n, 1.5 + n, 2.25 + n, result) for n, result in enumerate(results)]
    received = round_trip(ResultsMessage(123.5, sent))
    assert isinstance(received, ResultsMessage)
    assert received.rate == 123.5
    assert [(job.number, job.started, job.computed) for job in received.results] == [
        (job.number, job.started, job.computed) for job in sent
    ]
    return [job.result for job in received.results]


def inference_result(seed: int, **changes: object) -> InferenceResult:
    random = np.random.default_rng(seed)
    fields = {"class_ids": random.integers(0, 1000, 5), "scores": random.random(5, dtype=np.float32), "features": {}}
    return InferenceResult(**(fields | changes))  # type: ignore[arg-type]


def assert_labels_equal(received: InferenceResult | Exception, sent: InferenceResult) -> InferenceResult:
    assert isinstance(received, InferenceResult)
    assert (received.class_ids.dtype, received.scores.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(received.class_ids, sent.class_ids)
    np.testing.assert_array_equal(received.scores, sent.scores)
    return received


@pytest.mark.parametrize(
    "message",
    [
        JobMessage(7, 3, [64, 48, 3], "|u1", 1.25, 31.25, 1.5, InferenceOptions(5)),
        JobMessage(8, 0, [1, 1, 3], "<f4", 0.1, 0.2, 0.3, InferenceOptions(1, frozenset({"stem", "stage2"}), (0.0, 1.0))),
        CancelMessage(7),
        ReadyMessage(),
        FailedMessage("the model 'x' cannot be loaded"),
        ResultsMessage(None, []),
    ],
    ids=lambda message: type(message).__name__,
)
def test_message_without_arrays_round_trips(message: Message) -> None:
    assert round_trip(message) == message


def test_job_message_passes_pixels_by_file_descriptor() -> None:
    pixels = np.random.default_rng(0).random((4, 5, 3), dtype=np.float32)
    descriptor = share([pixels])
    options = InferenceOptions(2)
    received = round_trip(JobMessage(1, 2, pixels.shape, pixels.dtype.str, 1.0, 2.0, 1.5, options, descriptor))
    os.close(descriptor)
    assert isinstance(received, JobMessage)
    assert received.pixels is not None
    np.testing.assert_array_equal(mapped(received.pixels, received.shape, received.dtype), pixels)


def test_loaded_message_round_trips() -> None:
    model = LoadedModel(
        DinatConfig.preset("mini"),
        DinatImageProcessor(size=224, resample=3),
        "torch",
        "cuda:0, cuda:1",
        "bf16",
        {"stage1": "triton", "stage2": "tiled"},
        [Disabled("attention natten", "no kernel image is available"), Disabled("device cuda:2", "wrong numbers")],
    )
    descriptor = os.memfd_create("test")
    received = round_trip(LoadedMessage(2, 128, 12_288, descriptor, model))
    assert isinstance(received, LoadedMessage)
    assert os.fstat(received.slots).st_ino == os.fstat(descriptor).st_ino
    os.close(received.slots)
    os.close(descriptor)
    assert (received.owner, received.slot_count, received.slot_size) == (2, 128, 12_288)
    loaded = received.model
    assert loaded.config.to_dict() == model.config.to_dict()
    assert loaded.processor.to_dict() == model.processor.to_dict()
    assert (loaded.runtime, loaded.device, loaded.precision) == (model.runtime, model.device, model.precision)
    assert loaded.attention == model.attention
    assert loaded.disabled == model.disabled


def test_plain_results_of_a_batch_share_one_message() -> None:
    sent = [inference_result(seed) for seed in range(5)]
    for received, expected in zip(results_of(*sent), sent, strict=True):
        assert_labels_equal(received, expected)


def test_feature_maps_round_trip() -> None:
    random = np.random.default_rng(1)
    features = {
        "stage2": random.random((64, 8, 8), dtype=np.float32),
        "hidden_states": [random.random((4, n, n), dtype=np.float32) for n in (8, 4, 2)],
        "pooled": random.random(128, dtype=np.float32),
    }
    sent = [inference_result(0, features=features), inference_result(1), inference_result(2, features=features)]
    for received, expected in zip(results_of(*sent), sent, strict=True):
        result = assert_labels_equal(received, expected)
        assert result.features.keys() == expected.features.keys()
        for name, value in expected.features.items():
            actual = result.features[name]
            assert isinstance(actual, list) == isinstance(value, list)
            for array, other in zip(*(x if isinstance(x, list) else [x] for x in (actual, value)), strict=True):
                np.testing.assert_array_equal(array, other)


def test_neighborhoods_round_trip() -> None:
    neighborhoods = [
        Neighborhood(stage, 1, stage + 1, (14, 10), (3, 9), [0, 2, 4], [5, 7, 9], torch.rand(2, 3, 3)) for stage in (1, 2)
    ]
    (received,) = results_of(inference_result(0, neighborhoods=neighborhoods))
    assert isinstance(received, InferenceResult)
    for actual, expected in zip(received.neighborhoods, neighborhoods, strict=True):
        torch.testing.assert_close(actual.weights, expected.weights, rtol=0, atol=0)
        fields = ("stage", "layer", "dilation", "size", "query", "rows", "columns")
        assert [getattr(actual, name) for name in fields] == [getattr(expected, name) for name in fields]


def test_service_error_keeps_status_detail_and_headers() -> None:
    with_headers, without = results_of(Unavailable("the service is stopping", {"Retry-After": "1"}), ServiceError("failed"))
    assert isinstance(with_headers, ServiceError)
    assert isinstance(without, ServiceError)
    assert (with_headers.status, with_headers.detail, with_headers.headers) == (
        503,
        "the service is stopping",
        {"Retry-After": "1"},
    )
    assert (without.status, without.detail, without.headers) == (500, "failed", None)


def test_other_exceptions_become_runtime_errors() -> None:
    (received,) = results_of(ValueError("wrong shape"))
    assert isinstance(received, RuntimeError)
    assert str(received) == "ValueError: wrong shape"
