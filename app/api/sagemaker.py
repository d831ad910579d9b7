"""The container interface of Amazon SageMaker: GET /ping and POST /invocations, on port 8080.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from dinat.app.api.bodies import content_type, openapi_body, read_body
from dinat.app.api.classify import classify_body
from dinat.app.api.health import NOT_READY, plain_text_readiness
from dinat.app.api.hugging_face import classify_task
from dinat.app.api.json_limits import is_json
from dinat.app.api.parameters import OPENAPI_PARAMETERS, Parameters
from dinat.app.api.schemas import PROBLEMS, Classification

INPUTS, IMAGE = b'"inputs"', b'"image"'

router = APIRouter(tags=["SageMaker"], responses=PROBLEMS)


@router.get("/ping", response_class=PlainTextResponse, responses=NOT_READY)
async def ping(request: Request) -> Response:
    """Readiness: 200 if the service accepts requests."""
    return plain_text_readiness(request)


@router.post(
    "/invocations",
    response_model=Classification,
    openapi_extra={"parameters": OPENAPI_PARAMETERS, "requestBody": openapi_body(Parameters)},
)
async def invocations(request: Request) -> Response:
    """Classify one image, as POST /classify; or as POST / if it is JSON with `inputs`, as for Hugging Face's containers."""
    body = await read_body(request)
    if is_json(content_type(request), body) and INPUTS in body and IMAGE not in body:  # base64 has no quotes
        return await classify_task(request, body)
    return await classify_body(request, body)
