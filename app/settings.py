"""Settings of the service, read from DINAT_* environment variables, a .env file, or flags of `dinat serve`."""

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dinat.app.host import cores
from dinat.app.tables import read_text
from dinat.model.native import default_cache


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


SIMILARITY = 0.85
"""Ratio of difflib from which a variable is taken for a misspelt setting."""

ROOT_PATH = r"(/[\w.~-]+)*"
"""Regular expression of a root path; empty for none."""


def read_keys(file: Path) -> tuple[str, ...]:
    """Read API keys from a file, separated by lines or commas, without lines that begin with "#".

    Raises:
        OSError: The file cannot be read.
        ValueError: It has no key, or is not text.
    """
    lines = [line for line in read_text(file).splitlines() if not line.lstrip().startswith("#")]
    keys = tuple(key.strip() for line in lines for key in line.split(",") if key.strip())
    if not keys:
        raise ValueError("it has no key")
    return keys


def _check_keys_file(file: Path | None) -> Path | None:
    if file is not None:
        try:
            read_keys(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"no API key can be read from it: {error}") from None
    return file


def _check_not_empty(value: object) -> object:
    if value == "":
        raise ValueError("it is empty")
    return value


def _check_port(value: object) -> object:
    if isinstance(value, str) and value.startswith("tcp://"):
        raise ValueError(
            "Kubernetes sets this for a Service named dinat: set enableServiceLinks: false in the pod, or a number here"
        )
    return value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """Settings of the service, read once at startup and passed down.

    An empty environment variable is as none. An invalid value stops startup with one line that names it (see `explain`).
    """

    model_config = SettingsConfigDict(
        env_prefix="DINAT_", env_file=".env", env_file_encoding="utf-8-sig", env_ignore_empty=True, extra="ignore", frozen=True
    )

    model: str = Field("digits", min_length=1, description='Checkpoint to load: a folder, a Hub id, a .pth file, or "digits".')
    name: str | None = Field(None, min_length=1, description="Model name shown to clients. Default: the value of MODEL.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id.")
    device: str = Field(
        "auto", description='Device: "cuda" (all GPUs), "cuda:1", "cpu", or "auto" (cuda if there is a GPU, else cpu).'
    )
    runtime: Literal["auto", "torch", "openvino", "onnxruntime"] = Field(
        "auto",
        description="Inference runtime. auto: PyTorch on a GPU, or on a CPU with AVX-512 and a C compiler; "
        "else OpenVINO if it is installed.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="Numerical precision. auto: bf16 if the GPU or CPU has fast bf16, else fp32."
    )
    attention: Literal["auto", "reference", "tiled", "compiled", "natten", "triton"] = Field(
        "auto",
        description="Attention backend. auto: on a GPU the fastest available one, measured at startup; "
        "on a CPU compiled, else tiled.",
    )
    self_check: bool = Field(
        True, description="Run a self-check on each GPU at startup and disable what fails; off skips it and starts faster."
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Number of threads that compute on a CPU. Default: OMP_NUM_THREADS if it is set, else the number of cores "
        "that the affinity and the CPU quota allow.",
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Maximum number of images per batch. Default: 64 on a GPU; on a CPU 8, or 2 per core if that is more.",
    )
    cache_dir: Annotated[Path, BeforeValidator(_check_not_empty)] = Field(
        default_factory=default_cache,
        description="Directory for cached graphs and attention timings. Default: ~/.cache/dinat-serve.",
    )
    max_wait_ms: float = Field(
        0, ge=0, description="Maximum time in ms that an idle engine waits for a batch to fill; 0 disables waiting."
    )
    queue_limit: int = Field(
        128,
        ge=1,
        description="Maximum number of queued images, including those being decoded; further requests get 503.",
    )
    deadline_ms: int = Field(
        30_000,
        ge=1,
        description="Time limit of a request in ms, after which it gets 504; the header X-Deadline-Ms can only shorten it.",
    )
    lame_duck_seconds: float = Field(
        1,
        ge=0,
        description="Time in seconds to keep accepting requests after SIGTERM, while /health/ready already returns 503.",
    )
    drain_seconds: float = Field(30, ge=0, description="Maximum time in seconds to complete accepted requests during shutdown.")
    max_connections: int = Field(
        1024, ge=1, description="Maximum number of open connections; further ones get 503 and are closed."
    )
    upload_seconds: float = Field(30, gt=0, description="Maximum time in seconds to receive a request; slower uploads get 408.")
    download_seconds: float = Field(
        60, gt=0, description="Maximum time in seconds to read a response; slower clients are disconnected."
    )
    max_upload_bytes: int = Field(20 * 2**20, ge=1, description="Maximum size of a request body in bytes; larger ones get 413.")
    max_body_bytes_in_flight: int | None = Field(
        None,
        ge=1,
        description="Maximum size in bytes of all request bodies in flight together, compressed and decompressed, without the "
        "first 64 KiB of each; beyond it, 503. Default: 256 MiB, or MAX_UPLOAD_BYTES if that is more.",
    )
    max_response_bytes: int = Field(
        64 * 2**20,
        ge=1,
        description="Maximum size of a response in bytes, estimated before inference; beyond it, 413.",
    )
    max_response_bytes_in_flight: int | None = Field(
        None,
        ge=1,
        description="Maximum size in bytes of all responses in flight together, without the first 64 KiB of each; beyond it, "
        "503. Default: 4 times MAX_RESPONSE_BYTES.",
    )
    max_pixels: int = Field(50_000_000, ge=1, description="Maximum size of an image in pixels, width times height.")
    decode: Literal["exact", "draft"] = Field(
        "exact",
        description="JPEG decoding. draft downscales large JPEGs while decoding them: faster, but not bit-identical.",
    )
    decode_threads: int = Field(
        default_factory=cores,
        ge=1,
        description="Number of threads per frontend process that decode and resize images, and of processes for large images. "
        "Default: the cores divided by the frontend processes, at least 2 each if there are several.",
    )
    decode_seconds: float = Field(
        10, gt=0, description="Maximum CPU time in seconds to decode an image in a process; beyond it, 422."
    )
    frontends: Annotated[int, Field(ge=1, le=128)] | Literal["auto"] = Field(
        "auto",
        description="Number of frontend processes, which handle HTTP for one engine process; 1 runs both in one process. "
        "auto: one per core except two on a GPU host, else 1.",
    )
    api_keys: Keys = Field(
        (), description="Comma-separated API keys. If set, requests must send one as a Bearer token or as X-API-Key."
    )
    api_keys_file: Annotated[Path | None, BeforeValidator(_check_not_empty), AfterValidator(_check_keys_file)] = Field(
        None,
        description="File with further API keys, one a line. It is read again when it has changed, so that keys can be rotated "
        "without a restart.",
    )
    keyless: Names = Field(
        ("health", "metrics"),
        description="Comma-separated endpoints that do not require an API key, or none. Default: health,metrics.",
    )
    cors_origins: Names = Field(
        (), description="Comma-separated origins whose pages may call the service from a browser, or *."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="Log format. auto: console on a terminal, else json."
    )
    otlp_endpoint: str | None = Field(
        None,
        description="URL to export OpenTelemetry traces to; requires the extra tracing. Default: OTEL_EXPORTER_OTLP_ENDPOINT, "
        "or no traces.",
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: Annotated[int, BeforeValidator(_check_port)] = Field(
        8000,
        ge=0,
        le=65535,
        validation_alias=AliasChoices("port", "DINAT_PORT", "AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT"),
        description="Port to listen on; 0 selects a free one. Also read from AIP_HTTP_PORT and SAGEMAKER_BIND_TO_PORT.",
    )
    root_path: str = Field(
        "",
        pattern=f"^{ROOT_PATH}$",
        description="Path at which a proxy publishes the service, such as /dinat, whether or not the proxy removes it from "
        "requests. Proxies in FORWARDED_ALLOW_IPS may send it as X-Forwarded-Prefix instead. Default: none.",
    )
    aip_predict_route: str = Field(
        "/predict",
        pattern="^/",
        validation_alias=AliasChoices("aip_predict_route", "AIP_PREDICT_ROUTE"),
        description="Path of the prediction endpoint for Vertex AI (AIP_PREDICT_ROUTE).",
    )
    aip_health_route: str | None = Field(
        None,
        pattern="^/",
        validation_alias=AliasChoices("aip_health_route", "AIP_HEALTH_ROUTE"),
        description="Path of an additional health endpoint for Vertex AI (AIP_HEALTH_ROUTE).",
    )

    @property
    def served_name(self) -> str:
        """Model name shown to clients."""
        return self.name or self.model

    @property
    def body_budget(self) -> int:
        """Maximum size in bytes of all request bodies in flight. One body always fits."""
        default = 256 * 2**20
        return max(self.max_upload_bytes, default if self.max_body_bytes_in_flight is None else self.max_body_bytes_in_flight)

    @property
    def response_budget(self) -> int:
        """Maximum size in bytes of all responses in flight. One response always fits."""
        limit = self.max_response_bytes
        return max(limit, 4 * limit if self.max_response_bytes_in_flight is None else self.max_response_bytes_in_flight)

    def for_frontend(self, frontends: int) -> "Settings":
        """Return the settings of one of several frontend processes, with its share of the threads, connections and memory."""
        threads = self.decode_threads if "decode_threads" in self.model_fields_set else max(2, math.ceil(cores() / frontends))
        return self.model_copy(
            update={
                "decode_threads": threads,
                "max_connections": math.ceil(self.max_connections / frontends),
                "max_body_bytes_in_flight": math.ceil(self.body_budget / frontends),
                "max_response_bytes_in_flight": math.ceil(self.response_budget / frontends),
            }
        )


def misspelt_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that are not settings but resemble one, each with its name.

    Others are ignored: Kubernetes sets DINAT_SERVICE_HOST and more for a Service named dinat.
    """
    known = [f"DINAT_{name.upper()}" for name in Settings.model_fields]
    unknown = sorted(name for name in environment if name.upper().startswith("DINAT_") and name.upper() not in known)
    similar = ((name, get_close_matches(name.upper(), known, 1, SIMILARITY)) for name in unknown)
    return {name: matches[0] for name, matches in similar if matches}


def explain(error: ValidationError, prefix: Callable[[str], str] = lambda field: f"DINAT_{field.upper()}=") -> str:
    """Describe every invalid setting in one line.

    Args:
        error: Error of validating `Settings` or another model.
        prefix: Returns the text to write before the value of a field, such as "DINAT_PORT=" or "--port ".
    """
    return "; ".join(
        f"{prefix(str(fault['loc'][0]))}{fault['input']!r}: {fault['msg']}" if fault["loc"] else fault["msg"]
        for fault in error.errors()
    )
