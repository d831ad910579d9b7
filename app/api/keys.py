"""API keys: from a setting, and from a file that may change while the service runs."""

import hmac
import time
from hashlib import sha256
from pathlib import Path

import structlog

from dinat.app.api.page import FILES, PAGE
from dinat.app.errors import Unauthorized
from dinat.app.settings import Settings, read_keys

log = structlog.get_logger("dinat")

CHECK_SECONDS = 1.0
"""Interval in which the file is checked for changes."""

WARN_SECONDS = 60.0
"""Interval in which it is logged that the file cannot be read."""


class ApiKeys:
    """Requires one of API_KEYS or API_KEYS_FILE, as `Authorization: Bearer KEY` or `X-API-Key: KEY`, except for KEYLESS.

    The web page is public as well: it has no secrets, and a browser cannot send a key for it. The page asks the user for one.

    Args:
        settings: Settings of the service.
    """

    def __init__(self, settings: Settings) -> None:
        self._fixed = [key.get_secret_value() for key in settings.api_keys]
        self._file = settings.api_keys_file
        self._keyless = tuple(f"/{name}" for name in settings.keyless)
        self._version: object = None
        self._checked = self._warned = -WARN_SECONDS
        self._keys: dict[str, bytes] = {}
        self._set(self._fixed)

    def identify(self, method: str, path: str, headers: dict[bytes, bytes]) -> str | None:
        """Return which key a request has, as the first digits of its SHA-256, or None if it has none and requires none.

        Raises:
            Unauthorized: The request requires a key and has no valid one.
        """
        if self._file is not None and time.monotonic() >= self._checked + CHECK_SECONDS:
            self._read(self._file)
        if not self._keys and self._file is None:
            return None
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        sent = (token.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b""))
        # a list: compares all, in constant time
        valid = [name for name, key in self._keys.items() for candidate in sent if hmac.compare_digest(candidate, key)]
        if valid:
            return valid[0]
        if any(path == prefix or path.startswith(f"{prefix}/") for prefix in self._keyless):
            return None
        if method in ("GET", "HEAD") and (path == PAGE or path.startswith(f"{FILES}/")):
            return None
        raise Unauthorized(
            "an API key is required: send it as Authorization: Bearer KEY or X-API-Key: KEY", {"WWW-Authenticate": "Bearer"}
        )

    def _read(self, file: Path) -> None:
        """Read the file if it has changed. A file without keys or that cannot be read changes nothing."""
        self._checked = time.monotonic()
        try:
            status = file.stat()
            version = (status.st_mtime_ns, status.st_size, status.st_ino)
            if version == self._version:
                return
            self._set([*self._fixed, *read_keys(file)])
        except (OSError, ValueError) as error:
            version = None
            if self._checked >= self._warned + WARN_SECONDS:
                self._warned = self._checked
                log.warning("the API keys remain as they were", file=str(file), reason=str(error))
        else:
            log.info("API keys", keys=list(self._keys))
        self._version = version

    def _set(self, keys: list[str]) -> None:
        self._keys = {sha256(key.encode()).hexdigest()[:8]: key.encode() for key in keys}
