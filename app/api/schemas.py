"""Response schemas for OpenAPI."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Prediction(BaseModel):
    """A label and its score."""

    label: str = Field(examples=["tabby, tabby cat"])
    class_id: int = Field(examples=[281])
    score: float = Field(description="softmax probability over all labels", examples=[0.91])


class FeatureMap(BaseModel):
    """A feature map, channels first."""

    shape: list[int] = Field(examples=[[512, 7, 7]])
    dtype: str = Field(examples=["float32"])
    data: Any = Field(description="nested lists, or base64 of the row-major little-endian values, depending on feature_format")


class Classification(BaseModel):
    """The best labels of an image, and the requested feature maps."""

    model: str = Field(examples=["shi-labs/dinat-mini-in1k-224"])
    predictions: list[Prediction]
    features: dict[str, FeatureMap | list[FeatureMap]] | None = Field(None, description="only if requested")
    request_id: str


class Result(BaseModel):
    """The result of one image of several: predictions, and features if requested, or an error."""

    predictions: list[Prediction] | None = None
    features: dict[str, FeatureMap | list[FeatureMap]] | None = None
    error: "Problem | None" = None


class BatchClassification(BaseModel):
    """The results of several images, in order."""

    model: str
    results: list[Result]
    request_id: str


class LayerNeighborhood(BaseModel):
    """The neighborhood of one query, in one layer."""

    stage: int
    layer: int
    dilation: int
    size: list[int] = Field(description="height and width of the layer's feature map", examples=[[56, 56]])
    query: list[int] = Field(description="row and column of the query", examples=[[28, 28]])
    rows: list[int] = Field(description="rows of the keys; those not below the height are padding")
    columns: list[int] = Field(description="columns of the keys; those not below the width are padding")
    weights: list[list[list[float]]] = Field(
        description="attention weights by head, row and column; they sum to 1 for each head"
    )


class AttentionOfPoint(BaseModel):
    """The neighborhoods of one point of an image, in every layer."""

    layers: list[LayerNeighborhood] = Field(description="layers from first to last")
    request_id: str


class Problem(BaseModel):
    """An error, in the format of RFC 9457."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "about:blank",
                "title": "Unprocessable Entity",
                "status": 422,
                "detail": "top_k must be between 1 and 1000, got 1001",
                "request_id": "6f1c8f2a5d0e4b6f9a3b7c1d2e4f5a6b",
            }
        }
    )

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    error: str | None = Field(None, description="the same as detail, on endpoints of other services' protocols")


class Process(BaseModel):
    """One of the service's processes."""

    model_config = ConfigDict(from_attributes=True)

    name: str = Field(examples=["frontend-1"])
    pid: int
    state: str = Field(examples=["ready"], description="state as reported by the process")
    restarts: int = Field(description="number of times the process was restarted")


class Health(BaseModel):
    """Whether the service is healthy, and the reason if it is not."""

    status: str = Field(examples=["ready"], description="ready, loading, draining or failed")
    detail: str = Field(examples=["the service is ready"])
    model: str
    processes: list[Process] | None = Field(None, description="only if the service has several processes")


class Disabled(BaseModel):
    """A component that failed the self-check at startup and is disabled."""

    name: str = Field(examples=["attention natten"])
    reason: str


class ModelCard(BaseModel):
    """Description of the active model."""

    model: str
    labels: list[str]
    config: dict[str, Any]
    input_size: dict[str, Any] = Field(description="settings of the image processor: size, resample and so on")
    runtime: str
    device: str
    precision: str
    attention: dict[str, str] = Field(description="attention backend of each stage")
    disabled: list[Disabled]
    features: list[str] = Field(description="allowed values of the parameter features")


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description, "content": {"application/problem+json": {}}}
    for status, description in {
        400: "No image, or the body is malformed",
        401: "An API key is required",
        408: "The upload took too long",
        413: "Too many bytes, or too many pixels",
        414: "The path is too long",
        415: "The image format is not supported",
        422: "The image is damaged, or a parameter is invalid",
        503: "The queue is full (Retry-After gives the seconds to wait), or the service is loading, draining or failed",
        504: "The deadline has passed",
    }.items()
}

NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "There is no model of this name", "content": {"application/problem+json": {}}}
}
