"""POST /classify and /classify/batch: the best labels of pictures, and the network's maps of them."""

from fastapi import APIRouter, Request, Response

from dinat.app.api.bodies import OPENAPI_BATCH_BODY, OPENAPI_BODY, read_one, read_several
from dinat.app.api.inference import ask, infer_one
from dinat.app.api.parameters import OPENAPI_PARAMETERS, Parameters
from dinat.app.api.problems import problem_fields
from dinat.app.api.results import in_json, result
from dinat.app.api.schemas import PROBLEMS, BatchClassification, Classification
from dinat.app.engine.engine import Engine
from dinat.app.errors import ServiceError

router = APIRouter(tags=["classify"], responses=PROBLEMS)


@router.post(
    "/classify", response_model=Classification, openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": OPENAPI_BODY}
)
async def classify(request: Request) -> Response:
    """Classify one picture: multipart field `image`, the bytes as the body, or base64 in JSON."""
    engine: Engine = request.app.state.engine
    config = engine.loaded.config  # kept: what was taken is answered also when, by then, nothing more is
    picture, parameters = await read_one(request, Parameters)
    wanted = parameters.wanted(config)
    answer = await infer_one(request, picture, wanted)
    body = {"model": engine.settings.served_name, **result(answer, config, parameters.feature_format)}
    return await in_json(request, body | {"request_id": request.state.request_id}, bool(wanted.features))


@router.post(
    "/classify/batch",
    response_model=BatchClassification,
    openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": OPENAPI_BATCH_BODY},
)
async def classify_batch(request: Request) -> Response:
    """Classify several pictures: repeated multipart fields `image`, or base64 in JSON.

    The results are in order; a picture that cannot be classified has an error in its place and does not spoil the others.
    """
    engine: Engine = request.app.state.engine
    config = engine.loaded.config
    pictures, parameters = await read_several(request, Parameters)
    wanted = parameters.wanted(config)
    taken = [picture for picture in pictures if isinstance(picture, bytes)]
    answers = iter(await ask(request, taken, wanted))
    results = [next(answers) if isinstance(picture, bytes) else picture for picture in pictures]
    request_id = request.state.request_id
    body = {
        "model": engine.settings.served_name,
        "results": [
            {"error": problem_fields(request_id, one.status, one.detail)}
            if isinstance(one, ServiceError)
            else result(one, config, parameters.feature_format)
            for one in results
        ],
        "request_id": request_id,
    }
    return await in_json(request, body, bool(wanted.features))
