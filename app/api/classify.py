"""POST /classify and /classify/batch: labels of images, and optionally feature maps."""

from fastapi import APIRouter, Request, Response

from dinat.app.api.bodies import OPENAPI_BATCH_BODY, OPENAPI_BODY, read_one, read_several
from dinat.app.api.inference import infer, infer_one
from dinat.app.api.parameters import OPENAPI_PARAMETERS, Parameters
from dinat.app.api.problems import problem_fields
from dinat.app.api.results import classification, json_response
from dinat.app.api.schemas import PROBLEMS, BatchClassification, Classification
from dinat.app.engine.engine import Engine
from dinat.app.errors import ServiceError

router = APIRouter(tags=["classify"], responses=PROBLEMS)


@router.post(
    "/classify", response_model=Classification, openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": OPENAPI_BODY}
)
async def classify(request: Request) -> Response:
    """Classify one image, sent as multipart field `image`, as the body, or as base64 in JSON."""
    engine: Engine = request.app.state.engine
    config = engine.loaded.config  # read once: engine.loaded raises as soon as the service drains
    image, parameters = await read_one(request, Parameters)
    options = parameters.options(config)
    result = await infer_one(request, image, options)
    body = {"model": engine.settings.served_name, **classification(result, config, parameters.feature_format)}
    return await json_response(request, body | {"request_id": request.state.request_id}, bool(options.features))


@router.post(
    "/classify/batch",
    response_model=BatchClassification,
    openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": OPENAPI_BATCH_BODY},
)
async def classify_batch(request: Request) -> Response:
    """Classify several images, sent as repeated multipart fields `image`, or as base64 in JSON.

    Results are in the order of the images. An image that cannot be classified has an error in its place and does not affect
    the others.
    """
    engine: Engine = request.app.state.engine
    config = engine.loaded.config
    images, parameters = await read_several(request, Parameters)
    options = parameters.options(config)
    valid = [image for image in images if isinstance(image, bytes)]
    inferred = iter(await infer(request, valid, options))
    results = [next(inferred) if isinstance(image, bytes) else image for image in images]
    request_id = request.state.request_id
    body = {
        "model": engine.settings.served_name,
        "results": [
            {"error": problem_fields(request_id, result.status, result.detail)}
            if isinstance(result, ServiceError)
            else classification(result, config, parameters.feature_format)
            for result in results
        ],
        "request_id": request_id,
    }
    return await json_response(request, body, bool(options.features))
