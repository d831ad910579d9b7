"""Request parameters beside the image."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dinat.app.api.quoting import MAX_CHARACTERS, quote, shorten
from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.errors import BadRequest, Unprocessable
from dinat.model.config import DinatConfig

FeatureFormat = Literal["json", "base64"]


_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _require_number(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, str) and not _NUMBER.fullmatch(value)):
        raise ValueError("a number is required")
    return value


IS_NUMBER = BeforeValidator(_require_number)
"""Pydantic would convert true to 1, and 1_0 to 10."""


def _join_list(value: object) -> object:
    return ",".join(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value


class _FeatureSelection(BaseModel):
    """Parameters of every endpoint that returns feature maps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: Annotated[
        str,
        BeforeValidator(_join_list),
        Field(
            max_length=1000,
            description="comma-separated feature maps to return: stem, stage1, ..., pooled, hidden_states",
            examples=["stage4,pooled"],
        ),
    ] = ""
    feature_format: Annotated[FeatureFormat, Field(description="encoding of the feature maps' values in JSON")] = "json"

    def feature_names(self, config: DinatConfig) -> frozenset[str]:
        """Return the names of the requested feature maps. Raises Unprocessable for a name that the network does not have."""
        names = frozenset(name.strip() for name in self.features.split(",") if name.strip())
        unknown = sorted(names - set(config.feature_names))
        if unknown:
            raise Unprocessable(f"features must be among {', '.join(config.feature_names)}, got {shorten(', '.join(unknown))}")
        return names


class Parameters(_FeatureSelection):
    """Parameters of /classify and /classify/batch."""

    top_k: Annotated[
        int | None,
        IS_NUMBER,
        Field(description="number of labels to return, from 1 to the number of classes; default 5, or all if there are fewer"),
    ] = None

    def options(self, config: DinatConfig) -> InferenceOptions:
        """Return the inference options for a network with this configuration. Raises Unprocessable."""
        top_k = min(5, config.num_labels) if self.top_k is None else self.top_k
        if not 1 <= top_k <= config.num_labels:
            raise Unprocessable(f"top_k must be between 1 and {config.num_labels}, got {quote(top_k)}")
        return InferenceOptions(top_k, self.feature_names(config))


class FeatureParameters(_FeatureSelection):
    """Parameters of /features. Without `features`, the feature maps of all stages are returned."""

    feature_dtype: Annotated[Literal["float32", "float16"], Field(description="dtype of the feature maps")] = "float32"

    def options(self, config: DinatConfig) -> InferenceOptions:
        """Return the inference options for a network with this configuration. Raises Unprocessable."""
        return InferenceOptions(1, self.feature_names(config) or frozenset(config.stage_names[1:]))


DEADLINE = "X-Deadline-Ms"
MAX_DEADLINE_MS = 2**53
"""Largest integer that every JSON and JavaScript implementation represents exactly."""

MAX_QUERY_PARAMETERS = 64
MAX_DESCRIBED_ERRORS = 5
"""Number of validation errors that an error message describes; of further ones it has only the count."""

NamedValue = tuple[str, Any]
ParametersT = TypeVar("ParametersT", bound=BaseModel)


def read_parameters(
    request: Request, model: type[ParametersT], source: str = "the body", fields: Iterable[NamedValue] = ()
) -> ParametersT:
    """Read the parameters from the query and from the fields beside the image.

    FastAPI's own parameter parsing would take a third of the time that it spends on a request, even without parameters.

    Args:
        request: The request.
        model: Model that the parameters are validated against.
        source: Where `fields` come from, for error messages: "the form" or "the JSON".
        fields: Names and values of the fields beside the image.

    Raises:
        Unprocessable: A parameter is unknown or invalid, occurs twice in one place, or differs between query and fields.
    """
    if request.scope["query_string"].count(b"&") >= MAX_QUERY_PARAMETERS:
        raise Unprocessable(f"the query has more than {MAX_QUERY_PARAMETERS} parameters")
    query = _unique("the query", request.query_params.multi_items()) if request.scope["query_string"] else {}
    body = _unique(source, fields)
    if not query and not body:
        return model()
    known = model.model_fields
    for name in (*query, *body):
        if name not in known:
            shown, suggestion = shorten(name), _suggestion(name, known)
            raise Unprocessable(f"unknown parameter {shown}{suggestion}, supported are {', '.join(known)}")
    for name in query.keys() & body.keys():
        if query[name] != str(body[name]):
            raise Unprocessable(
                f"{name} is {quote(query[name])} in the query and {quote(str(body[name]))} in {source}: send it once"
            )
    values = query | body
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise Unprocessable(describe_errors(error)) from None


def check_no_query(request: Request, advice: str) -> None:
    """Raise BadRequest if the request of an endpoint without query parameters has some."""
    if request.scope["query_string"]:
        raise BadRequest(f"{request.url.path} has no query parameters: {advice}")


def describe_errors(error: ValidationError) -> str:
    """Describe the first validation errors in one sentence, with location, value and message of each, and their number."""
    errors = error.errors(include_url=False, include_context=False)
    described = [
        f"{shorten('.'.join(map(str, entry['loc'])))} is {quote(entry['input'])}: {shorten(entry['msg'])}"
        for entry in errors[:MAX_DESCRIBED_ERRORS]
    ]
    more = len(errors) - len(described)
    return "; ".join([*described, *([f"and {more:,} more errors"] if more else [])])


def _unique(source: str, items: Iterable[NamedValue]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in items:
        if name in values:
            raise Unprocessable(f"{shorten(name)} occurs twice in {source}: send it once")
        values[name] = value
    return values


def _suggestion(name: str, known: Iterable[str]) -> str:
    normalized = {known_name.replace("_", ""): known_name for known_name in known}
    matches = get_close_matches(name[:MAX_CHARACTERS].lower().replace("_", "").replace("-", ""), normalized, 1)
    return f" (did you mean {normalized[matches[0]]}?)" if matches else ""


def parse_integer(text: str, maximum: int) -> int | None:
    """Parse decimal digits. Return None for other text, and for integers above `maximum`."""
    digits = text.lstrip("0") or "0"
    if not (text.isascii() and text.isdecimal()) or len(digits) > len(str(maximum)):
        return None
    value = int(digits)  # Python raises ValueError for more than 4,300 digits
    return value if value <= maximum else None


def read_deadline(request: Request) -> int | None:
    """Return the value of X-Deadline-Ms in milliseconds, or None if the header is missing. Raises Unprocessable."""
    value = request.headers.get(DEADLINE)
    if value is None:
        return None
    milliseconds = parse_integer(value, MAX_DEADLINE_MS)
    if not milliseconds:
        raise Unprocessable(f"{DEADLINE} must be an integer (milliseconds) from 1 to {MAX_DEADLINE_MS:,}, got {quote(value)}")
    return milliseconds


def openapi_parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    """Describe the fields of a model as query parameters for OpenAPI."""
    return [
        {"name": name, "in": "query", "required": False, "description": field.pop("description"), "schema": field}
        for name, field in model.model_json_schema()["properties"].items()
    ]


def openapi_header(name: str, description: str, minimum: int) -> dict[str, Any]:
    """Describe an optional header with an integer for OpenAPI."""
    schema = {"type": "integer", "minimum": minimum}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


DEADLINE_PARAMETER = openapi_header(
    DEADLINE, "maximum time in milliseconds to wait for the answer, capped by the service's own limit", minimum=1
)
OPENAPI_PARAMETERS = [*openapi_parameters(Parameters), DEADLINE_PARAMETER]
