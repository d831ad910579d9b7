"""Why the service could not do what it was asked for."""

from http import HTTPStatus


class ServiceError(Exception):
    """An error with an HTTP status. detail: one sentence that names the value, what is allowed and what to do."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(self, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers


class BadRequest(ServiceError):
    """The request is broken."""

    status = HTTPStatus.BAD_REQUEST


class NoImage(BadRequest):
    """There is no picture in the request, or its form is broken."""


class NotFound(ServiceError):
    """There is nothing of that name."""

    status = HTTPStatus.NOT_FOUND


class NotAcceptable(ServiceError):
    """None of the types that the client would have is written here."""

    status = HTTPStatus.NOT_ACCEPTABLE


class TooLarge(ServiceError):
    """Too many bytes, or too many pixels."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class UnsupportedImage(ServiceError):
    """Not a picture format that is read here."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class Unprocessable(ServiceError):
    """A damaged picture, or a parameter outside what is allowed."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class Unauthorized(ServiceError):
    """An API key is wanted."""

    status = HTTPStatus.UNAUTHORIZED


class HeadTooLarge(ServiceError):
    """The head of the request has too many bytes or headers."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE


class UploadTooSlow(ServiceError):
    """The body did not come in time."""

    status = HTTPStatus.REQUEST_TIMEOUT


class DeadlinePassed(ServiceError):
    """The answer did not come within the deadline."""

    status = HTTPStatus.GATEWAY_TIMEOUT


class Unavailable(ServiceError):
    """The service cannot take work now."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
