"""Outputs of a request: names, sizes and encoding."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from dinat.app.api.open_inference.tensors import DTYPES, Tensor, check_members, parse_object, pop_bool, show_name
from dinat.app.api.quoting import quote, shorten
from dinat.app.api.response_size import BYTES_PER_VALUE, LABEL_BYTES, feature_values
from dinat.app.api.results import json_array
from dinat.app.engine.runtimes.runtime import LOGITS, InferenceResult, LoadedModel
from dinat.app.errors import BadRequest, TooLarge
from dinat.model import DinatConfig

RANKED: Mapping[str, str] = {"scores": "FP32", "class_ids": "INT64", "labels": "BYTES"}
"""Outputs that are sorted by score, best first, with their datatypes."""

NUMBER_BYTES = 32
"""Bytes of the score and the class id that the classification extension writes before a label."""


@dataclass(frozen=True)
class Output:
    """A requested output.

    Attributes:
        name: Name of the output.
        binary: Whether to return it as a binary tensor instead of in JSON.
        classification: Number of best classes to return as text instead of the values; 0 to return the values.
    """

    name: str
    binary: bool
    classification: int

    @property
    def feature(self) -> str | None:
        """The feature map that it is, or is one of; None for RANKED."""
        return None if self.name in RANKED else self.name.partition(".")[0]


def feature_outputs(config: DinatConfig) -> list[str]:
    """Return the names of the outputs that are feature maps."""
    states = [f"hidden_states.{i}" for i in range(config.num_layers + 1)]
    return [*(name for name in config.feature_names if name != "hidden_states"), *states]


def requested_outputs(body: Mapping[str, Any], config: DinatConfig) -> list[Output]:
    """Return the outputs that the JSON of a request names; by default logits, scores, class_ids and labels.

    Raises BadRequest if one is unknown or invalid, or occurs twice.
    """
    binary_by_default = pop_bool(parse_object(body.get("parameters"), "parameters"), "binary_data_output", False)
    items = body.get("outputs")
    if items is None or items == []:
        items = [{"name": name} for name in (LOGITS, *RANKED)]
    if not isinstance(items, list):
        raise BadRequest(f"outputs must be a list, got {type(items).__name__}")
    known = [LOGITS, *RANKED, *feature_outputs(config)]
    outputs: dict[str, Output] = {}
    for item in items:
        output = _parse_output(item, known, binary_by_default)
        if output.name in outputs:
            raise BadRequest(f"output {output.name} is requested twice")
        outputs[output.name] = output
    return list(outputs.values())


def _parse_output(item: object, known: Sequence[str], binary_by_default: bool) -> Output:
    name = item.get("name") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(name, str) or name not in known:
        raise BadRequest(f"unknown output {show_name(name)}, supported are {', '.join(known)}")
    check_members(item, ("name", "parameters"), f"output {name}")
    parameters = parse_object(item.get("parameters"), f"parameters of output {name}")
    binary, count = pop_bool(parameters, "binary_data", binary_by_default), parameters.pop("classification", 0)
    if parameters:
        raise BadRequest(f"output {name}: unknown parameters {shorten(', '.join(sorted(parameters)))}")
    if type(count) is not int or count < 0 or (count and name not in (LOGITS, "scores")):
        raise BadRequest(
            f"output {name}: classification must be a non-negative integer, for logits or scores only, got {quote(count)}"
        )
    return Output(name, binary, count)


def estimate_size(outputs: Sequence[Output], loaded: LoadedModel, images: int) -> float:
    """Estimate the bytes of the outputs. Feature maps whose size depends on the image count as 0."""
    values = feature_values(loaded) or {}
    return images * sum(_image_size(output, loaded.config.num_labels, values.get(output.name, 0)) for output in outputs)


def measure_size(outputs: Sequence[Output], results: Sequence[InferenceResult], config: DinatConfig) -> float:
    """Return the bytes that the outputs have at most once they are encoded."""
    return sum(
        _image_size(output, config.num_labels, 0 if output.feature is None else _feature(output, result).size)
        for output in outputs
        for result in results
    )


def _image_size(output: Output, labels: int, feature_values: int) -> float:
    """Return the bytes of an output for one image, whose feature map has this number of values."""
    if output.classification:
        return min(output.classification, labels) * (LABEL_BYTES + NUMBER_BYTES)
    if output.name == "labels":
        return labels * LABEL_BYTES
    values = labels if output.name in (LOGITS, *RANKED) else feature_values
    return values * (8 if output.name == "class_ids" else BYTES_PER_VALUE["binary" if output.binary else "json"])


def encode_outputs(
    response: dict[str, Any], outputs: Sequence[Output], results: Sequence[InferenceResult], config: DinatConfig
) -> tuple[bytes, int | None]:
    """Encode a response.

    Args:
        response: Members of its JSON beside the outputs.
        outputs: The requested outputs.
        results: One for each image.
        config: Configuration of the network.

    Returns:
        The body, and the length of its JSON if binary tensors follow it.

    Raises:
        TooLarge: An output differs in shape between the images.
    """
    blobs: list[bytes] = []
    entries = [_encode_output(output, results, config, blobs) for output in outputs]
    head = orjson.dumps({**response, "outputs": entries})
    return (b"".join([head, *blobs]), len(head)) if blobs else (head, None)


def _encode_output(
    output: Output, results: Sequence[InferenceResult], config: DinatConfig, blobs: list[bytes]
) -> dict[str, Any]:
    """Return an output's entry in the response JSON. If the output is binary, its bytes are appended to `blobs`."""
    datatype, values = _values(output, results, config)
    entry: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": list(values.shape)}
    if not output.binary:
        return entry | {"data": values.ravel().tolist() if datatype == "BYTES" else json_array(values.ravel())}
    if datatype == "BYTES":
        encoded = [text.encode() for text in values.ravel().tolist()]
        blob = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    else:
        blob = np.ascontiguousarray(values, DTYPES[datatype]).tobytes()
    blobs.append(blob)
    return entry | {"parameters": {"binary_data_size": len(blob)}}


def _values(output: Output, results: Sequence[InferenceResult], config: DinatConfig) -> tuple[str, Tensor]:
    """Return the datatype and the values of an output."""
    if output.classification:
        return "BYTES", np.array([_best_classes(output, result, config) for result in results], object)
    if output.name == "scores":
        return "FP32", np.stack([result.scores for result in results])
    if output.name == "class_ids":
        return "INT64", np.stack([result.class_ids for result in results])
    if output.name == "labels":
        return "BYTES", np.array([[config.id2label[i] for i in result.class_ids.tolist()] for result in results], object)
    features = [_feature(output, result) for result in results]
    if len({feature.shape for feature in features}) > 1:
        raise TooLarge(f"output {output.name} differs in shape between the images: send images of one size")
    return "FP32", np.stack(features)


def _best_classes(output: Output, result: InferenceResult, config: DinatConfig) -> list[str]:
    """Return the best classes of an image as "value:class id:label", as in the classification extension."""
    class_ids = result.class_ids[: output.classification]
    values = _feature(output, result)[class_ids] if output.name == LOGITS else result.scores
    return [
        f"{value:f}:{class_id}:{config.id2label[class_id]}"
        for class_id, value in zip(class_ids.tolist(), values[: output.classification], strict=True)
    ]


def _feature(output: Output, result: InferenceResult) -> Tensor:
    name, _, index = output.name.partition(".")
    feature = result.features[name]
    return feature[int(index)] if isinstance(feature, list) else feature
