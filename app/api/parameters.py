"""What a request may say beside its picture."""

from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.engine.runtime import Wanted
from app.errors import Unprocessable
from model.config import DinatConfig

FeatureFormat = Literal["json", "base64"]


class Parameters(BaseModel):
    """The query of /classify and /classify/batch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: Annotated[int | None, Field(description="how many labels, 1 to the number of labels; 5, or all if fewer")] = None
    features: Annotated[
        str, Field(description="maps to return, by comma: stem, stage1, ..., pooled, hidden_states", examples=["stage4,pooled"])
    ] = ""
    feature_format: Annotated[FeatureFormat, Field(description="how the maps' values are written")] = "json"

    def wanted(self, config: DinatConfig) -> Wanted:
        """What is asked for, checked against what the network has. Raises Unprocessable."""
        top_k = min(5, config.num_labels) if self.top_k is None else self.top_k
        if not 1 <= top_k <= config.num_labels:
            raise Unprocessable(f"top_k is {top_k}, allowed are 1 to {config.num_labels}")
        names = frozenset(name.strip() for name in self.features.split(",") if name.strip())
        unknown = sorted(names - set(config.feature_names))
        if unknown:
            raise Unprocessable(f"features names {', '.join(unknown)}, allowed are {', '.join(config.feature_names)}")
        return Wanted(top_k, names)


DEFAULTS = Parameters()
DEADLINE = "X-Deadline-Ms"


def read_parameters(request: Request) -> Parameters:
    """The parameters in a request's query. Raises Unprocessable for one that is unknown, repeated or wrong.

    FastAPI's own reading takes a third of the time that it spends on a request, for parameters that most do not have.
    """
    if not request.scope["query_string"]:
        return DEFAULTS
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in given:
            raise Unprocessable(f"{name} is given twice: say it once")
        given[name] = value
    try:
        return Parameters.model_validate(given)
    except ValidationError as error:
        faults = [_fault(str(fault["loc"][0]), fault) for fault in error.errors()]
        raise Unprocessable("; ".join(faults)) from None


def _fault(name: str, fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        return f"{name} is no parameter here, allowed are {', '.join(Parameters.model_fields)}"
    return f"{name}: {fault['msg']}"


def read_deadline(request: Request) -> int | None:
    """How long the caller waits, in milliseconds, if it says so. Raises Unprocessable."""
    given = request.headers.get(DEADLINE)
    if given is None:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise Unprocessable(f"{DEADLINE} is {given!r}: milliseconds, a whole number from 1 on")
    return int(given)


def _openapi() -> list[dict[str, Any]]:
    fields = Parameters.model_json_schema()["properties"]
    query = [
        {"name": name, "in": "query", "required": False, "description": field.pop("description"), "schema": field}
        for name, field in fields.items()
    ]
    deadline = {
        "name": DEADLINE,
        "in": "header",
        "required": False,
        "description": "how long the caller waits; the service's own limit caps it",
        "schema": {"type": "integer", "minimum": 1},
    }
    return [*query, deadline]


OPENAPI_PARAMETERS = _openapi()
"""How OpenAPI describes them."""
