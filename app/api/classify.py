"""POST /classify and /classify/batch: labels of images, and optionally feature maps."""

from typing import Any

from fastapi import APIRouter, Request, Response

from dinat.app.api.app_state import engine_of
from dinat.app.api.bodies import openapi_batch_body, openapi_body, read_one, read_several
from dinat.app.api.inference import infer, infer_one
from dinat.app.api.parameters import OPENAPI_PARAMETERS, Parameters
from dinat.app.api.problems import problem_fields
from dinat.app.api.response_size import estimate_size, measure_size, reserve_response
from dinat.app.api.results import classification, json_fragments, json_response
from dinat.app.api.schemas import PROBLEMS, BatchClassification, Classification
from dinat.app.errors import ServiceError

router = APIRouter(tags=["classify"], responses=PROBLEMS)

PROBLEM_BYTES = 512
"""Bytes of an error in a batch, about."""


@router.post(
    "/classify",
    response_model=Classification,
    openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": openapi_body(Parameters)},
)
async def classify(request: Request) -> Response:
    """Classify one image, sent as multipart field `image`, as the body, or as base64 in JSON."""
    return await classify_body(request)


async def classify_body(request: Request, body: bytes | None = None) -> Response:
    """Classify the image of a request, whose body may have been read."""
    engine = engine_of(request)
    loaded = engine.loaded  # read once: engine.loaded raises while the engine restarts
    image, parameters = await read_one(request, Parameters, body)
    options, encoding = parameters.options(loaded.config), parameters.feature_format
    reserve_response(request, estimate_size(loaded, options.features, encoding, options.top_k))
    result = await infer_one(request, image, options)

    def build() -> dict[str, Any]:
        body = {"model": engine.settings.served_name, **classification(result, loaded.config, encoding)}
        return body | {"request_id": request.state.request_id}

    return await json_response(request, build, reserve_response(request, measure_size(result, encoding)))


@router.post(
    "/classify/batch",
    response_model=BatchClassification,
    openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": openapi_batch_body(Parameters)},
)
async def classify_batch(request: Request) -> Response:
    """Classify several images, sent as repeated multipart fields `image`, or as base64 in JSON.

    Results are in the order of the images. An image that cannot be classified has an error in its place and does not affect
    the others.
    """
    engine = engine_of(request)
    loaded = engine.loaded
    images, parameters = await read_several(request, Parameters)
    options, encoding = parameters.options(loaded.config), parameters.feature_format
    reserve_response(request, estimate_size(loaded, options.features, encoding, options.top_k, len(images)))
    valid = [image for image in images if isinstance(image, bytes)]
    inferred = iter(await infer(request, valid, options))
    results = [next(inferred) if isinstance(image, bytes) else image for image in images]
    request_id = request.state.request_id

    def build() -> dict[str, Any]:
        bodies = (
            {"error": problem_fields(request_id, result.status, result.detail)}
            if isinstance(result, ServiceError)
            else classification(result, loaded.config, encoding)
            for result in results
        )
        return {"model": engine.settings.served_name, "results": json_fragments(bodies), "request_id": request_id}

    size = sum(PROBLEM_BYTES if isinstance(result, ServiceError) else measure_size(result, encoding) for result in results)
    return await json_response(request, build, reserve_response(request, size))
