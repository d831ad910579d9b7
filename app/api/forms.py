"""Parsing of multipart and URL-encoded forms, with limits on the number of fields."""

from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from dinat.app.api.quoting import quote
from dinat.app.errors import NoImage, TooLarge
from dinat.app.tables import is_utf8

FIELDS_BESIDE_IMAGES = 64
"""Number of form fields that are accepted beside images."""

MAX_HEADER_BYTES = 2048
"""Maximum size of the headers of a part, on average over all parts. Browsers send about 150 bytes."""

MAX_ESCAPES = 1_000_000
"""Maximum number of percent-encoded characters. 20 MB of base64 have 900,000."""

CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin1", "latin-1")

FormItem = tuple[str, str | bytes]
"""Name and content of a field: text, or the bytes of a file."""


MAX_CONTENT_TYPE = 1000
"""Characters of a Content-Type. Parsing its parameters takes more than a microsecond each."""


def parse_multipart(body: bytes, content_type: str, max_images: int) -> list[FormItem]:
    """Parse a multipart form (RFC 7578).

    Args:
        body: The request body.
        content_type: Value of the Content-Type header.
        max_images: Maximum number of images.

    Raises:
        NoImage: The form is malformed, or its charset is not supported.
        TooLarge: There are too many parts.
    """
    if len(content_type) > MAX_CONTENT_TYPE:
        raise NoImage(f"the form is malformed: Content-Type has more than {MAX_CONTENT_TYPE:,} characters")
    _, options = parse_options_header(content_type)
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in CHARSETS:
        raise NoImage(f"the form is malformed: charset {quote(charset)} is not supported, use utf-8")
    boundary = options.get(b"boundary")
    if not boundary:
        raise NoImage("the form is malformed: Content-Type has no boundary: do not set it, the HTTP client does")
    body = _without_preamble(body, b"--" + boundary)
    form = _MultipartForm(max_images)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise NoImage(f"the form is malformed: {error}") from None
    if form.in_part:
        raise NoImage("the form is malformed: it is truncated")
    return form.items


def _without_preamble(body: bytes, delimiter: bytes) -> bytes:
    """Remove the text that may precede the first part (RFC 2046, section 5.1.1)."""
    if body.startswith(delimiter):
        return body
    start = body.find(b"\r\n" + delimiter)
    return body if start < 0 else body[start + 2 :]


def parse_urlencoded(body: bytes) -> list[FormItem]:
    """Parse a URL-encoded form. Raises TooLarge if it has too many fields or escapes."""
    if body.count(b"&") >= FIELDS_BESIDE_IMAGES:
        raise TooLarge(f"the form has more than {FIELDS_BESIDE_IMAGES} fields")
    if body.count(b"%") > MAX_ESCAPES:
        raise TooLarge(
            f"the form has more than {MAX_ESCAPES:,} percent-encoded characters: send the image as multipart/form-data"
        )
    return list(parse_qsl(body.decode("latin-1"), keep_blank_values=True))


class _MultipartForm:
    """Receives the events of the parser.

    Attributes:
        items: The fields of all complete parts.
        in_part: Whether a part has begun and not ended.
    """

    def __init__(self, max_images: int) -> None:
        self.items: list[FormItem] = []
        self.in_part = False
        self._max_images = max_images
        self._max_parts = max_images + FIELDS_BESIDE_IMAGES
        self._header_bytes = 0
        self._name, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._options: dict[bytes, bytes] = {}
        self._content: list[bytes] = []
        self._is_base64 = False

    def callbacks(self) -> dict[str, object]:
        """Return the callbacks for MultipartParser."""
        return {
            "on_part_begin": self._begin_part,
            "on_part_data": lambda data, start, end: self._content.append(data[start:end]),
            "on_part_end": self._end_part,
            "on_header_field": self._add_to_name,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
        }

    def _begin_part(self) -> None:
        if len(self.items) == self._max_parts:
            raise TooLarge(f"the form has more than {self._max_parts} parts: at most {self._max_images} images can be queued")
        self.in_part, self._headers, self._content = True, {}, []

    def _add_to_name(self, data: bytes, start: int, end: int) -> None:
        self._count_header_bytes(end - start)
        self._name += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header_bytes(end - start)
        self._value += data[start:end]

    def _count_header_bytes(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES * (len(self.items) + FIELDS_BESIDE_IMAGES):
            raise TooLarge("the headers of the form's parts are too long")

    def _end_header(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name, self._value = b"", b""

    def _end_headers(self) -> None:
        _, self._options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in self._options:
            raise NoImage("the form is malformed: a part has no name in its Content-Disposition")
        encoding = self._headers.get(b"content-transfer-encoding", b"").strip().lower()
        if encoding == b"quoted-printable":
            raise NoImage("the form is malformed: a part is encoded as quoted-printable, use binary or base64")
        self._is_base64 = encoding == b"base64"

    def _end_part(self) -> None:
        content = b"".join(self._content)
        is_text = self._is_base64 or (not self._is_file and is_utf8(content))
        self.items.append((_decode(self._options[b"name"]), _decode(content) if is_text else content))
        self.in_part, self._content = False, []

    @property
    def _is_file(self) -> bool:
        """Whether a part is a file: it has a file name, or the media type of an image or of any bytes."""
        media_type = self._headers.get(b"content-type", b"").strip().lower()
        return b"filename" in self._options or media_type.startswith((b"image/", b"application/octet-stream"))


def _decode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")
