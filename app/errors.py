"""Errors of the service, each with an HTTP status."""

from http import HTTPStatus


class ServiceError(Exception):
    """Base class of errors that are returned to the client with an HTTP status.

    Args:
        detail: One sentence that names the value, what is allowed and what to do.
        headers: Additional response headers.
    """

    status = HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(self, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers

    def at(self, place: str) -> "ServiceError":
        """Return this error with the place where it occurred, such as "instance 2 of 3", before its detail."""
        error: ServiceError = type(self).__new__(type(self))  # subclasses have other arguments
        ServiceError.__init__(error, f"{place}: {self.detail}", self.headers)
        return error


class BadRequest(ServiceError):
    """The request is malformed."""

    status = HTTPStatus.BAD_REQUEST


class NoImage(BadRequest):
    """The request contains no image, or its body is malformed."""


class NotFound(ServiceError):
    """The requested resource does not exist."""

    status = HTTPStatus.NOT_FOUND


class NotAcceptable(ServiceError):
    """None of the media types in the Accept header is supported."""

    status = HTTPStatus.NOT_ACCEPTABLE


class TooLarge(ServiceError):
    """The request has too many bytes or pixels."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class UnsupportedImage(ServiceError):
    """The image format or the content encoding is not supported."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class Unprocessable(ServiceError):
    """The image is damaged, or a parameter is outside its allowed range."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class Unauthorized(ServiceError):
    """The request requires an API key."""

    status = HTTPStatus.UNAUTHORIZED


class PathTooLong(ServiceError):
    """The path of the request has too many characters."""

    status = HTTPStatus.REQUEST_URI_TOO_LONG


class HeadTooLarge(ServiceError):
    """The head of the request has too many bytes or headers."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE


class UnsupportedCoding(ServiceError):
    """The request has a transfer coding other than chunked (RFC 9112, 6.1)."""

    status = HTTPStatus.NOT_IMPLEMENTED


class UploadTooSlow(ServiceError):
    """The request body was not received in time."""

    status = HTTPStatus.REQUEST_TIMEOUT


class DeadlinePassed(ServiceError):
    """The result was not ready before the deadline."""

    status = HTTPStatus.GATEWAY_TIMEOUT


class BrokenModel(ServiceError):
    """The network returned scores that are not finite."""


class Unavailable(ServiceError):
    """The service cannot accept work now."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
