"""Amazon SageMaker's contract for a container: GET /ping and POST /invocations, on port 8080.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from dinat.app.api.bodies import OPENAPI_BODY
from dinat.app.api.classify import classify
from dinat.app.api.health import NOT_NOW, ready_in_words
from dinat.app.api.parameters import OPENAPI_PARAMETERS
from dinat.app.api.schemas import PROBLEMS, Classification

router = APIRouter(tags=["SageMaker"], responses=PROBLEMS)


@router.get("/ping", response_class=PlainTextResponse, responses=NOT_NOW)
async def ping(request: Request) -> Response:
    """200 once pictures are taken."""
    return ready_in_words(request)


@router.post(
    "/invocations",
    response_model=Classification,
    openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": OPENAPI_BODY},
)
async def invocations(request: Request) -> Response:
    """What POST /classify takes and gives."""
    return await classify(request)
