"""Synchronous and asynchronous HTTP clients of the service.

    with DinatClient("http://localhost:8000") as client:
        print(client.classify("image.jpg").best.label)

Requests are built without a connection (`_classify` and so on), so that both clients share them and differ only in sending.
"""

import asyncio
import io
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Generic, Self, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from safetensors.numpy import load

from dinat.app.images import TRANSPOSE
from dinat.model.image_processor import to_rgb

T = TypeVar("T")

ImageInput = (
    bytes | bytearray | memoryview | str | PathLike[str] | BinaryIO | Image.Image | npt.NDArray[np.uint8 | np.uint16 | np.bool_]
)
"""An encoded image (bytes or a binary file), the path of a file, a Pillow image, or an array (H, W), (H, W, 3) or (H, W, 4)."""

FeatureMaps = dict[str, npt.NDArray[np.float32]]
"""Feature maps by name: (C, h, w), or (C,) for pooled. hidden_states has one entry each: hidden_states.0, ..."""

RETRY_SECONDS = 60.0

CONNECTION_LOST = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
"""Errors of a connection that was established and ended without a response."""


class DinatServiceError(Exception):
    """The service answered with an error.

    Attributes:
        status: HTTP status.
        detail: Message of the service.
        request_id: ID of the request in the service's log.
    """

    def __init__(self, status: int, detail: str, request_id: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail, self.request_id = status, detail, request_id


@dataclass(frozen=True)
class Prediction:
    """A label with its class index and score."""

    label: str
    class_id: int
    score: float


@dataclass(frozen=True)
class Classification:
    """Predictions for an image, best first."""

    predictions: Sequence[Prediction]

    @property
    def best(self) -> Prediction:
        """The prediction with the highest score."""
        return self.predictions[0]


@dataclass(frozen=True)
class Health:
    """Health of the service.

    Attributes:
        ready: Whether the service accepts images.
        status: State of the service.
        detail: Reason if it is not ready.
    """

    ready: bool
    status: str
    detail: str


@dataclass(frozen=True)
class ModelCard:
    """The served model.

    Attributes:
        model: Name of the model.
        labels: Names of its classes.
        features: Names of its feature maps.
        more: All other fields of GET /model.
    """

    model: str
    labels: Sequence[str]
    features: Sequence[str]
    more: Mapping[str, Any]


@dataclass(frozen=True)
class _Call(Generic[T]):
    """A request, and how to parse its response."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    options: Mapping[str, Any] = field(default_factory=dict)
    accepted: Sequence[int] = (200,)


_Outcome = httpx.Response | httpx.TransportError
"""The outcome of a request: a response, or a lost connection."""


class _RetryBudget:
    """Decides whether and when to retry a request."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._attempts = 0

    def delay(self, outcome: _Outcome, accepted: Sequence[int]) -> float | None:
        """Return the seconds to wait before a retry, or None if the outcome is final or the budget is exhausted.

        A busy service is retried after its Retry-After header. A lost connection, or a 5xx response of a proxy (which is not a
        problem document of this service), is retried with exponential backoff: 0.1 s, doubled up to 5 s. Requests are
        idempotent.
        """
        retry_after = ""
        if isinstance(outcome, httpx.Response):
            retry_after = outcome.headers.get("retry-after", "")
            if outcome.status_code in accepted or outcome.status_code < 500:
                return None
            if _is_problem(outcome) and not retry_after.isdecimal():
                return None
        if retry_after.isdecimal():
            seconds = float(retry_after)
        else:
            seconds = min(5.0, 0.1 * 2**self._attempts)
            self._attempts += 1
        return seconds if time.monotonic() + seconds <= self._deadline else None


HttpT = TypeVar("HttpT", httpx.Client, httpx.AsyncClient)


class _Client(ABC, Generic[HttpT]):
    """Configuration of both clients, and their connections."""

    def __init__(self, url: str, api_key: str | None = None, retry_seconds: float = RETRY_SECONDS, timeout: float = 60) -> None:
        self._retry_seconds = retry_seconds
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        url = url.strip().rstrip("/")
        url = url if "://" in url else f"http://{url}"  # as curl does
        self._options: dict[str, Any] = {"base_url": url, "headers": headers, "timeout": timeout}
        self._proxy = _proxy(url)
        self._http: HttpT = self._connect()

    @abstractmethod
    def _connect(self) -> HttpT:
        """Return an HTTP client with this configuration."""


class DinatClient(_Client[httpx.Client]):
    """Synchronous client of the service. Its connections are closed by close, or at the end of a with statement.

    A request is retried while the service is busy or loading, and if an instance of it crashes. All methods raise
    DinatServiceError for an error response, and httpx.TransportError if the service cannot be reached.

    Args:
        url: Address of the service, such as "http://localhost:8000".
        api_key: API key, sent as a Bearer token.
        retry_seconds: Longest time to retry a request; 0 disables retries.
        timeout: Timeout of httpx, in seconds.
    """

    def _connect(self) -> httpx.Client:
        return httpx.Client(**self._options, transport=httpx.HTTPTransport(proxy=self._proxy))

    def __enter__(self) -> Self:
        if self._http.is_closed:
            self._http = self._connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _send(self, call: _Call[T]) -> T:
        retries = _RetryBudget(self._retry_seconds)
        while True:
            try:
                outcome: _Outcome = self._http.request(call.method, call.path, **call.options)
            except CONNECTION_LOST as error:
                outcome = error
            delay = retries.delay(outcome, call.accepted)
            if delay is None:
                return _parse(call, outcome)
            time.sleep(delay)

    def classify(self, image: ImageInput, top_k: int | None = None) -> Classification:
        """Classify an image. top_k: number of labels; 5, or all if there are fewer, if None."""
        return self._send(_classify(image, top_k))

    def classify_batch(
        self, images: Sequence[ImageInput], top_k: int | None = None
    ) -> list[Classification | DinatServiceError]:
        """Classify several images in one request. An image that fails has an error in its place; see classify."""
        return self._send(_classify_batch(images, top_k))

    def features(self, image: ImageInput, names: Sequence[str] | str = ()) -> FeatureMaps:
        """Return feature maps of an image; those of every stage if no name is passed. A text is comma-separated."""
        return self._send(_features(image, names))

    def model(self) -> ModelCard:
        """Return the served model."""
        return self._send(_MODEL)

    def health(self) -> Health:
        """Return the health of the service, without waiting until it is ready."""
        return self._send(_HEALTH)


class AsyncDinatClient(_Client[httpx.AsyncClient]):
    """Asynchronous client of the service; see DinatClient."""

    def _connect(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._options, transport=httpx.AsyncHTTPTransport(proxy=self._proxy))

    async def __aenter__(self) -> Self:
        if self._http.is_closed:
            self._http = self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _send(self, call: _Call[T]) -> T:
        retries = _RetryBudget(self._retry_seconds)
        while True:
            try:
                outcome: _Outcome = await self._http.request(call.method, call.path, **call.options)
            except CONNECTION_LOST as error:
                outcome = error
            delay = retries.delay(outcome, call.accepted)
            if delay is None:
                return _parse(call, outcome)
            await asyncio.sleep(delay)

    async def classify(self, image: ImageInput, top_k: int | None = None) -> Classification:
        """See DinatClient."""
        return await self._send(_classify(image, top_k))

    async def classify_batch(
        self, images: Sequence[ImageInput], top_k: int | None = None
    ) -> list[Classification | DinatServiceError]:
        """See DinatClient."""
        return await self._send(_classify_batch(images, top_k))

    async def features(self, image: ImageInput, names: Sequence[str] | str = ()) -> FeatureMaps:
        """See DinatClient."""
        return await self._send(_features(image, names))

    async def model(self) -> ModelCard:
        """See DinatClient."""
        return await self._send(_MODEL)

    async def health(self) -> Health:
        """See DinatClient."""
        return await self._send(_HEALTH)


def _classify(image: ImageInput, top_k: int | None) -> _Call[Classification]:
    return _Call(
        "POST",
        "/classify",
        lambda response: _classification(response.json()),
        {"content": _image_bytes(image), "params": _query(top_k=top_k)},
    )


def _classify_batch(images: Sequence[ImageInput], top_k: int | None) -> _Call[list[Classification | DinatServiceError]]:
    if isinstance(images, bytes | bytearray | memoryview | str | PathLike | Image.Image | np.ndarray):
        raise TypeError(f"images must be a list, got {type(images).__name__}: use classify for one image")
    files = [("image", (f"{i}", _image_bytes(image))) for i, image in enumerate(images)]
    if not files:
        raise ValueError("images is empty: send at least one")

    def parse(response: httpx.Response) -> list[Classification | DinatServiceError]:
        results = response.json()["results"]
        return [_error(result["error"]) if "error" in result else _classification(result) for result in results]

    return _Call("POST", "/classify/batch", parse, {"files": files, "params": _query(top_k=top_k)})


def _features(image: ImageInput, names: Sequence[str] | str) -> _Call[FeatureMaps]:
    return _Call(
        "POST",
        "/features",
        lambda response: dict(sorted(load(response.content).items())),
        {
            "content": _image_bytes(image),
            "params": _query(features=names if isinstance(names, str) else ",".join(names)),
            "headers": {"Accept": "application/vnd.safetensors"},
        },
    )


def _model_card(response: httpx.Response) -> ModelCard:
    body = response.json()
    return ModelCard(body.pop("model"), body.pop("labels"), body.pop("features"), body)


def _health(response: httpx.Response) -> Health:
    body = response.json()
    return Health(response.status_code == 200, body["status"], body["detail"])


_MODEL = _Call("GET", "/model", _model_card)
_HEALTH = _Call("GET", "/health", _health, accepted=(200, 503))


def _parse(call: _Call[T], outcome: _Outcome) -> T:
    if isinstance(outcome, httpx.TransportError):
        raise outcome
    if outcome.status_code in call.accepted:
        return call.parse(outcome)
    try:
        body = outcome.json()
    except ValueError:  # the response of a proxy
        body = {}
    fields = body if isinstance(body, dict) else {}
    raise _error({"status": outcome.status_code, "detail": outcome.text[:200]} | fields)


def _is_problem(response: httpx.Response) -> bool:
    return str(response.headers.get("content-type", "")).startswith("application/problem+json")


def _error(problem: Mapping[str, Any]) -> DinatServiceError:
    return DinatServiceError(int(problem["status"]), str(problem["detail"]), str(problem.get("request_id", "")))


def _classification(body: Mapping[str, Any]) -> Classification:
    return Classification([Prediction(**prediction) for prediction in body["predictions"]])


def _query(**parameters: object) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value not in (None, "")}


def _image_bytes(image: ImageInput) -> bytes:
    """Return an encoded image. What a Pillow image shows is sent as PNG, with its EXIF orientation applied, as by its file."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | PathLike):
        return Path(image).read_bytes()
    if isinstance(image, io.BytesIO):
        return image.getvalue()  # wherever its position is
    if isinstance(image, Image.Image):
        return _png(_oriented(image))
    if hasattr(image, "read"):
        return _read(image)
    return _png(_from_array(image))


def _read(file: Any) -> bytes:
    """Read a file from its position; from its start if it was just written."""
    data: bytes = file.read()
    if not isinstance(data, bytes):
        raise TypeError("the file is open as text: open it with mode 'rb'")
    if not data and file.seekable():
        file.seek(0)
        data = file.read()
    return data


def _png(image: Image.Image) -> bytes:
    if image.mode == "F" and 0 < (maximum := float(np.max(np.asarray(image)))) <= 1:
        raise ValueError(f"a float image of values up to {maximum:g} is black: scale it to 0..255")
    buffer = io.BytesIO()
    (image if image.mode in _PNG_MODES else to_rgb(image)).save(buffer, "PNG")
    return buffer.getvalue()


_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes of Pillow that a PNG represents as they are."""


def _oriented(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, which Pillow reads and does not apply, and a PNG of the pixels would lose."""
    transposed = TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if transposed is None else image.transpose(transposed)


def _from_array(array: npt.ArrayLike) -> Image.Image:
    values = np.asarray(array)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    is_color = values.ndim == 3 and values.shape[2] in (3, 4) and values.dtype == np.uint8
    if not is_color and not (values.ndim == 2 and values.dtype in (np.uint8, np.uint16)):
        raise ValueError(
            f"an array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4), or uint16 of shape (H, W), got {values.dtype} "
            f"{values.shape}"
        )
    return Image.fromarray(values)


def _proxy(url: str) -> str | None:
    """Return the proxy for a URL by the environment, as curl does; None for this host.

    httpx raises for some values of NO_PROXY, such as [::1] and 10.0.0.0/8, and asks a proxy for localhost.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or _bypasses_proxy(host, parts.port, proxies.get("no", "")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _bypasses_proxy(host: str, port: int | None, no_proxy: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    if host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback):
        return True
    for entry in no_proxy.replace(",", " ").split():
        name = entry.lower().removeprefix("*").strip("[].")
        if entry == "*" or f"{host}:{port}" == name or (name and (host == name or host.endswith(f".{name}"))):
            return True
        with suppress(ValueError):  # a name
            if address is not None and address in ip_network(name, strict=False):
                return True
    return False
