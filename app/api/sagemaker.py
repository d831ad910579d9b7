"""Amazon SageMaker's contract for a container: GET /ping and POST /invocations, on port 8080.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from http import HTTPStatus

from fastapi import APIRouter, Request, Response

from app.api.bodies import OPENAPI_BODY
from app.api.classify import classify
from app.api.parameters import OPENAPI_PARAMETERS
from app.api.schemas import PROBLEMS, Classification
from app.engine.core import State
from app.engine.engine import Engine

router = APIRouter(tags=["SageMaker"], responses=PROBLEMS)


@router.get("/ping", responses={503: {"description": "Not now"}})
async def ping(request: Request) -> Response:
    """200 once pictures are taken."""
    engine: Engine = request.app.state.engine
    ready = engine.state is State.READY
    return Response(engine.why_not_ready(), HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, media_type="text/plain")


@router.post(
    "/invocations",
    response_model=Classification,
    openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": OPENAPI_BODY},
)
async def invocations(request: Request) -> Response:
    """What POST /classify takes and gives."""
    return await classify(request)
