"""What a request may say beside its picture."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dinat.app.engine.runtimes.runtime import InferenceOptions
from dinat.app.errors import Unprocessable
from dinat.model.config import DinatConfig

FeatureFormat = Literal["json", "base64"]


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a whole number is wanted")
    return value


def _list(value: object) -> object:
    return ",".join(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value


class _Asked(BaseModel):
    """What every door that gives maps has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: Annotated[
        str,
        BeforeValidator(_list),
        Field(description="maps to return, by comma: stem, stage1, ..., pooled, hidden_states", examples=["stage4,pooled"]),
    ] = ""
    feature_format: Annotated[FeatureFormat, Field(description="how the maps' values are written in JSON")] = "json"

    def names(self, config: DinatConfig) -> frozenset[str]:
        """The maps that are asked for, checked against what the network has. Raises Unprocessable."""
        names = frozenset(name.strip() for name in self.features.split(",") if name.strip())
        unknown = sorted(names - set(config.feature_names))
        if unknown:
            raise Unprocessable(f"features names {', '.join(unknown)}, allowed are {', '.join(config.feature_names)}")
        return names


class Parameters(_Asked):
    """Those of /classify and /classify/batch."""

    top_k: Annotated[
        int | None,
        BeforeValidator(_number),
        Field(description="how many labels, 1 to the number of labels; 5, or all if fewer"),
    ] = None

    def wanted(self, config: DinatConfig) -> InferenceOptions:
        """What is asked for, checked against what the network has. Raises Unprocessable."""
        top_k = min(5, config.num_labels) if self.top_k is None else self.top_k
        if not 1 <= top_k <= config.num_labels:
            raise Unprocessable(f"top_k is {top_k}, allowed are 1 to {config.num_labels}")
        return InferenceOptions(top_k, self.names(config))


class FeatureParameters(_Asked):
    """Those of /features. Without `features`, every stage's map."""

    feature_dtype: Annotated[Literal["float32", "float16"], Field(description="the maps' numbers")] = "float32"

    def wanted(self, config: DinatConfig) -> InferenceOptions:
        """What is asked for, checked against what the network has. Raises Unprocessable."""
        return InferenceOptions(1, self.names(config) or frozenset(config.stage_names[1:]))


DEADLINE = "X-Deadline-Ms"

Given = tuple[str, Any]
Kind = TypeVar("Kind", bound=BaseModel)


def read_parameters(request: Request, kind: type[Kind], place: str = "the body", beside: Iterable[Given] = ()) -> Kind:
    """The parameters in a request's query, and those beside its picture, in `place`.

    Raises Unprocessable for one that is unknown or wrong, that is given twice in one place, or differently in both.
    FastAPI's own reading takes a third of the time that it spends on a request, for parameters that most do not have.
    """
    query = _once("the query", request.query_params.multi_items()) if request.scope["query_string"] else {}
    body = _once(place, beside)
    for name in query.keys() & body.keys():
        if query[name] != str(body[name]):
            raise Unprocessable(f"{name} is {query[name]!r} in the query and {str(body[name])!r} in {place}: say it once")
    given = query | body
    if not given:
        return kind()
    known = kind.model_fields
    for name in given:
        if name not in known:
            raise Unprocessable(f"{name} is no parameter here{_meant(name, known)}, allowed are {', '.join(known)}")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise Unprocessable(faults(error)) from None


def faults(error: ValidationError) -> str:
    """Everything that is wrong, in one sentence: where, what was given, what is wanted."""
    return "; ".join(f"{'.'.join(map(str, one['loc']))} is {one['input']!r}: {one['msg']}"[:500] for one in error.errors())


def _once(place: str, given: Iterable[Given]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given:
        if name in found:
            raise Unprocessable(f"{name} is given twice in {place}: say it once")
        found[name] = value
    return found


def _meant(name: str, known: Iterable[str]) -> str:
    """What was perhaps meant."""
    plain = {one.replace("_", ""): one for one in known}
    close = get_close_matches(name.lower().replace("_", "").replace("-", ""), plain, 1)
    return f": did you mean {plain[close[0]]}?" if close else ""


def read_deadline(request: Request) -> int | None:
    """How long the caller waits, in milliseconds, if it says so. Raises Unprocessable."""
    given = request.headers.get(DEADLINE)
    if given is None:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise Unprocessable(f"{DEADLINE} is {given!r}: milliseconds, a whole number from 1 on")
    return int(given)


def openapi_parameters(kind: type[BaseModel]) -> list[dict[str, Any]]:
    """How OpenAPI describes parameters in the query."""
    return [
        {"name": name, "in": "query", "required": False, "description": field.pop("description"), "schema": field}
        for name, field in kind.model_json_schema()["properties"].items()
    ]


DEADLINE_PARAMETER: dict[str, Any] = {
    "name": DEADLINE,
    "in": "header",
    "required": False,
    "description": "how long the caller waits; the service's own limit caps it",
    "schema": {"type": "integer", "minimum": 1},
}
OPENAPI_PARAMETERS = [*openapi_parameters(Parameters), DEADLINE_PARAMETER]
