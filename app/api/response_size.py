"""The size of responses, estimated from shapes, and its limits."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from fastapi import Request

from dinat.app.api.app_state import engine_of
from dinat.app.api.budgets import Reservation
from dinat.app.engine.runtimes.runtime import InferenceResult, LoadedModel
from dinat.app.errors import TooLarge

Encoding = Literal["json", "base64", "binary"]

BYTES_PER_VALUE: Mapping[Encoding, float] = {"json": 18, "base64": 16 / 3, "binary": 4}
"""Maximum bytes of an encoded float32: a JSON number has at most 17 characters, and a comma."""

LABEL_BYTES = 64
"""Bytes of a label, on average at most."""

PREDICTION_BYTES = LABEL_BYTES + 64
"""Bytes of a prediction in JSON: label, class id and score."""

ADVICE = "request fewer feature maps or images, or use /features with Accept: application/x-npz or feature_format=base64"


def reserve_response(request: Request, size: float, advice: str = ADVICE) -> int:
    """Check the size of a response, and reserve it until the response is sent.

    Args:
        request: The request. A further call for it replaces its reservation.
        size: Estimated size in bytes.
        advice: End of the error message.

    Returns:
        The size, as an integer.

    Raises:
        TooLarge: The response would be larger than MAX_RESPONSE_BYTES.
        Unavailable: The responses in flight leave no memory for it.
    """
    engine = engine_of(request)
    reservation: Reservation = request.state.response_bytes
    limit = engine.settings.max_response_bytes
    if size > limit:
        raise TooLarge(f"the response would have about {math.ceil(size):,} bytes, the maximum is {limit:,}: {advice}")
    reservation.hold(math.ceil(size))
    return math.ceil(size)


def feature_values(loaded: LoadedModel) -> dict[str, int] | None:
    """Return the number of values of each feature map of an image, by name; None if it depends on the image.

    The names are those of config.feature_names, and hidden_states.0, hidden_states.1, ...
    """
    config, size = loaded.config, loaded.processor.output_size
    if size is None:
        return None
    height, width = (-(-side // 4) for side in size)  # two convolutions of stride 2
    stages = []
    for stage in range(config.num_layers):
        stages.append(config.channels_of(stage) * height * width)
        height, width = -(-height // 2), -(-width // 2)
    states = [*stages, stages[-1]]  # each after the downsampler, which the last stage does not have
    values = {"stem": stages[0], **{f"stage{i + 1}": values for i, values in enumerate(stages)}}
    values |= {"pooled": config.hidden_size, "hidden_states": sum(states)}
    return values | {f"hidden_states.{i}": values for i, values in enumerate(states)}


def estimate_size(loaded: LoadedModel, names: Iterable[str], encoding: Encoding, top_k: int, images: int = 1) -> float:
    """Estimate the bytes of predictions and feature maps. Feature maps whose size depends on the image count as 0."""
    known = feature_values(loaded) or {}
    return images * (top_k * PREDICTION_BYTES + sum(known.get(name, 0) for name in names) * BYTES_PER_VALUE[encoding])


def measure_size(result: InferenceResult, encoding: Encoding) -> float:
    """Return the bytes that the predictions and feature maps of a result have at most once they are encoded."""
    arrays = [array for feature in result.features.values() for array in (feature if isinstance(feature, list) else [feature])]
    return len(result.class_ids) * PREDICTION_BYTES + sum(array.size for array in arrays) * BYTES_PER_VALUE[encoding]
