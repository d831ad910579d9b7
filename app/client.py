"""A client for the service, and its asynchronous twin.

    with DinatClient("http://localhost:8000") as client:
        print(client.classify("picture.jpg").best.label)

Calls are described once, without a connection (`_classify` and so on); the two clients differ in how they send them.
"""

import asyncio
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors.numpy import load

T = TypeVar("T")

Picture = bytes | str | Path | Image.Image | npt.NDArray[np.uint8]
"""The bytes of a file, its path, a Pillow image, or (H, W, 3) or (H, W) uint8."""

Maps = dict[str, npt.NDArray[np.float32]]
"""By name, (C, h, w); (C,) for pooled; of hidden_states each by itself: hidden_states.0, ..."""

PATIENCE_SECONDS = 60.0

CUT = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
"""A connection that was there, and ended without an answer."""


class DinatServiceError(Exception):
    """The service refused, or failed. status: HTTP's.  detail: a sentence.  request_id: by which its log has it."""

    def __init__(self, status: int, detail: str, request_id: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail, self.request_id = status, detail, request_id


@dataclass(frozen=True)
class Prediction:
    """A label and how sure the network is of it."""

    label: str
    class_id: int
    score: float


@dataclass(frozen=True)
class Classification:
    """What the service says of a picture. predictions: best first."""

    predictions: Sequence[Prediction]

    @property
    def best(self) -> Prediction:
        """The first of them."""
        return self.predictions[0]


@dataclass(frozen=True)
class Health:
    """ready: whether pictures are taken now; detail says why not."""

    ready: bool
    status: str
    detail: str


@dataclass(frozen=True)
class ModelCard:
    """What is being served. more: everything else that GET /model says."""

    model: str
    labels: Sequence[str]
    features: Sequence[str]
    more: Mapping[str, Any]


@dataclass(frozen=True)
class _Call(Generic[T]):
    """A request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    options: Mapping[str, Any] = field(default_factory=dict)
    accepted: Sequence[int] = (200,)


_Said = httpx.Response | httpx.TransportError
"""What came of a request: an answer, or none."""


class _RetryBudget:
    """How long to wait before a call is made once more."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._tries = 0

    def wait(self, said: _Said, accepted: Sequence[int]) -> float | None:
        """Seconds; None if what was said is final, or they would take too long.

        Where the service is busy, as it says. Where an instance died, or its proxy says so in its place (5xx, and no problem of
        this service's), from a tenth of a second on, twice as long each time: to ask twice does no harm.
        """
        after = ""
        if isinstance(said, httpx.Response):
            after = said.headers.get("retry-after", "")
            if said.status_code in accepted or said.status_code < 500 or (_is_problem(said) and not after.isdecimal()):
                return None
        if after.isdecimal():
            seconds = float(after)
        else:
            seconds = min(5.0, 0.1 * 2**self._tries)
            self._tries += 1
        return seconds if time.monotonic() + seconds <= self._until else None


class _Client:
    """What both have. patience: how many seconds to go on asking where the service is busy, or loads, or an instance died."""

    def __init__(self, url: str, api_key: str | None = None, patience: float = PATIENCE_SECONDS, timeout: float = 60) -> None:
        self._patience = patience
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._options: dict[str, Any] = {"base_url": url.rstrip("/"), "headers": headers, "timeout": timeout}


class DinatClient(_Client):
    """Asks the service at `url`, again where that is busy or an instance of it died. Every call raises DinatServiceError."""

    def __enter__(self) -> Self:
        self._http = httpx.Client(**self._options)
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def _do(self, call: _Call[T]) -> T:
        patience = _RetryBudget(self._patience)
        while True:
            try:
                said: _Said = self._http.request(call.method, call.path, **call.options)
            except CUT as cut:
                said = cut
            wait = patience.wait(said, call.accepted)
            if wait is None:
                return _read(call, said)
            time.sleep(wait)

    def classify(self, picture: Picture, top_k: int | None = None) -> Classification:
        """The best labels of a picture."""
        return self._do(_classify(picture, top_k))

    def classify_batch(self, pictures: Sequence[Picture], top_k: int | None = None) -> list[Classification | DinatServiceError]:
        """Those of several, in order; an error in the place of a picture that has one."""
        return self._do(_classify_batch(pictures, top_k))

    def features(self, picture: Picture, names: Sequence[str] = ()) -> Maps:
        """The network's maps of a picture; every stage's if none is named."""
        return self._do(_features(picture, names))

    def model(self) -> ModelCard:
        """What is being served."""
        return self._do(_MODEL)

    def health(self) -> Health:
        """Whether pictures are taken now. Does not wait until they are."""
        return self._do(_HEALTH)


class AsyncDinatClient(_Client):
    """The same, asynchronous."""

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(**self._options)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def _do(self, call: _Call[T]) -> T:
        patience = _RetryBudget(self._patience)
        while True:
            try:
                said: _Said = await self._http.request(call.method, call.path, **call.options)
            except CUT as cut:
                said = cut
            wait = patience.wait(said, call.accepted)
            if wait is None:
                return _read(call, said)
            await asyncio.sleep(wait)

    async def classify(self, picture: Picture, top_k: int | None = None) -> Classification:
        """See DinatClient."""
        return await self._do(_classify(picture, top_k))

    async def classify_batch(
        self, pictures: Sequence[Picture], top_k: int | None = None
    ) -> list[Classification | DinatServiceError]:
        """See DinatClient."""
        return await self._do(_classify_batch(pictures, top_k))

    async def features(self, picture: Picture, names: Sequence[str] = ()) -> Maps:
        """See DinatClient."""
        return await self._do(_features(picture, names))

    async def model(self) -> ModelCard:
        """See DinatClient."""
        return await self._do(_MODEL)

    async def health(self) -> Health:
        """See DinatClient."""
        return await self._do(_HEALTH)


def _classify(picture: Picture, top_k: int | None) -> _Call[Classification]:
    return _Call(
        "POST",
        "/classify",
        lambda response: _classification(response.json()),
        {"content": _bytes(picture), "params": _params(top_k=top_k)},
    )


def _classify_batch(pictures: Sequence[Picture], top_k: int | None) -> _Call[list[Classification | DinatServiceError]]:
    files = [("image", (f"{i}", _bytes(picture))) for i, picture in enumerate(pictures)]

    def read(response: httpx.Response) -> list[Classification | DinatServiceError]:
        return [_error(one["error"]) if "error" in one else _classification(one) for one in response.json()["results"]]

    return _Call("POST", "/classify/batch", read, {"files": files, "params": _params(top_k=top_k)})


def _features(picture: Picture, names: Sequence[str]) -> _Call[Maps]:
    return _Call(
        "POST",
        "/features",
        lambda response: dict(sorted(load(response.content).items())),
        {
            "content": _bytes(picture),
            "params": _params(features=",".join(names)),
            "headers": {"Accept": "application/vnd.safetensors"},
        },
    )


def _model_card(response: httpx.Response) -> ModelCard:
    said = response.json()
    return ModelCard(said.pop("model"), said.pop("labels"), said.pop("features"), said)


def _health(response: httpx.Response) -> Health:
    said = response.json()
    return Health(response.status_code == 200, said["status"], said["detail"])


_MODEL = _Call("GET", "/model", _model_card)
_HEALTH = _Call("GET", "/health", _health, accepted=(200, 503))


def _read(call: _Call[T], response: _Said) -> T:
    if isinstance(response, httpx.TransportError):
        raise response
    if response.status_code in call.accepted:
        return call.read(response)
    try:
        problem = response.json()
    except ValueError:  # not this service's: a proxy's
        problem = {}
    fields = problem if isinstance(problem, dict) else {}
    raise _error({"status": response.status_code, "detail": response.text[:200]} | fields)


def _is_problem(response: httpx.Response) -> bool:
    return str(response.headers.get("content-type", "")).startswith("application/problem+json")


def _error(problem: Mapping[str, Any]) -> DinatServiceError:
    return DinatServiceError(int(problem["status"]), str(problem["detail"]), str(problem.get("request_id", "")))


def _classification(said: Mapping[str, Any]) -> Classification:
    return Classification([Prediction(**one) for one in said["predictions"]])


def _params(**given: object) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value not in (None, "")}


def _bytes(picture: Picture) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return Path(picture).read_bytes()
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, "PNG")
    return buffer.getvalue()
