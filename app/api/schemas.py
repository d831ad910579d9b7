"""What goes out, as OpenAPI shows it."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Prediction(BaseModel):
    """A label and how sure the network is of it."""

    label: str = Field(examples=["tabby, tabby cat"])
    class_id: int = Field(examples=[281])
    score: float = Field(description="softmax over all labels", examples=[0.91])


class FeatureMap(BaseModel):
    """A map of the network, channels first."""

    shape: list[int] = Field(examples=[[512, 7, 7]])
    dtype: str = Field(examples=["float32"])
    data: Any = Field(description="nested lists, or base64 of the little-endian values, row-major, by feature_format")


class Classification(BaseModel):
    """The best labels of a picture, and the maps that were asked for."""

    model: str = Field(examples=["shi-labs/dinat-mini-in1k-224"])
    predictions: list[Prediction]
    features: dict[str, FeatureMap | list[FeatureMap]] | None = Field(None, description="only when asked for")
    request_id: str


class Result(BaseModel):
    """One picture of several: predictions, and features when asked for, or an error."""

    predictions: list[Prediction] | None = None
    features: dict[str, FeatureMap | list[FeatureMap]] | None = None
    error: "Problem | None" = None


class BatchClassification(BaseModel):
    """The results of several pictures, in order."""

    model: str
    results: list[Result]
    request_id: str


class LayerNeighborhood(BaseModel):
    """The neighborhood of one query, in one layer."""

    stage: int
    layer: int
    dilation: int
    size: list[int] = Field(description="height and width of the layer's map", examples=[[56, 56]])
    query: list[int] = Field(description="row and column in it", examples=[[28, 28]])
    rows: list[int] = Field(description="of the keys; those from the height on are padding")
    columns: list[int] = Field(description="of the keys; those from the width on are padding")
    weights: list[list[list[float]]] = Field(description="for each head, row and column; 1 in sum for each head")


class AttentionOfPoint(BaseModel):
    """What the network sees from one point of a picture."""

    layers: list[LayerNeighborhood] = Field(description="first to last")
    request_id: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "about:blank",
                "title": "Unprocessable Entity",
                "status": 422,
                "detail": "top_k is 1001, allowed are 1 to 1000",
                "request_id": "6f1c8f2a5d0e4b6f9a3b7c1d2e4f5a6b",
            }
        }
    )

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    error: str | None = Field(None, description="the detail once more, at doors whose clients look for it here")


class Process(BaseModel):
    """One of the service's processes."""

    model_config = ConfigDict(from_attributes=True)

    name: str = Field(examples=["frontend-1"])
    pid: int
    state: str = Field(examples=["ready"], description="what it is doing, in its own words")
    restarts: int = Field(description="how often another was started in its place")


class Health(BaseModel):
    """Whether the service can do its work, and if not, why."""

    status: str = Field(examples=["ready"], description="ready, loading, draining or failed")
    detail: str = Field(examples=["the service is ready"])
    model: str
    processes: list[Process] | None = Field(None, description="where the service has several")


class Disabled(BaseModel):
    """What does not serve, since at start it was seen to fail or to compute wrongly."""

    what: str = Field(examples=["attention natten"])
    why: str


class ModelCard(BaseModel):
    """What is being served."""

    model: str
    labels: list[str]
    config: dict[str, Any]
    input_size: dict[str, Any] = Field(description="size, resample and so on: the image processor's settings")
    runtime: str
    device: str
    precision: str
    attention: dict[str, str] = Field(description="attention backend of each stage")
    disabled: list[Disabled]
    features: list[str] = Field(description="what the parameter features may name")


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description, "content": {"application/problem+json": {}}}
    for status, description in {
        400: "No picture, or the form is broken",
        401: "An API key is wanted",
        408: "The upload took too long",
        413: "Too many bytes, or too many pixels",
        415: "Not a picture format that is read here",
        422: "A damaged picture, or a parameter outside what is allowed",
        503: "Too many pictures wait (Retry-After says when to come back), or loading, draining, failed",
        504: "The deadline passed",
    }.items()
}

NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "No model of that name", "content": {"application/problem+json": {}}}
}
