"""Every setting of the service, once: environment DINAT_*, a .env file, or flags of `dinat serve`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dinat.app.host import cores
from dinat.model.native import default_cache


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """Read once at start-up and passed down. A wrong value stops start-up with one line that names it (see explain)."""

    model_config = SettingsConfigDict(env_prefix="DINAT_", env_file=".env", extra="ignore", frozen=True)

    model: str = Field("digits", description='checkpoint: a folder, a Hub id, a .pth file, or "digits"')
    name: str | None = Field(None, min_length=1, description="by what name clients know the model, if not by MODEL")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    device: str = Field("auto", description='"cuda" (every GPU), "cuda:1", "cpu"; "auto": cuda where there is a GPU, else cpu')
    runtime: Literal["auto", "torch", "openvino", "onnxruntime"] = Field(
        "auto",
        description="auto: PyTorch on a GPU, or a CPU with AVX-512 and a C compiler; else OpenVINO where it is installed",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="auto: bf16 where the GPU or the CPU is fast at it, else fp32"
    )
    attention: Literal["auto", "reference", "tiled", "compiled", "natten", "triton"] = Field(
        "auto",
        description="attention backend; auto: on a GPU the fastest of those there, timed at start; on a CPU compiled, or tiled",
    )
    self_check: bool = Field(
        True, description="at start a GPU shows right numbers before it serves; off starts sooner, and trusts it"
    )
    max_batch: int | None = Field(
        None, ge=1, le=1024, description="pictures per batch; 64 on a GPU, on a CPU 8 or two a core if not set"
    )
    cache_dir: Path = Field(
        default_factory=default_cache,
        description="where graphs and compiled graphs are kept; ~/.cache/dinat-serve if not set",
    )
    max_wait_ms: float = Field(0, ge=0, description="longest an idle engine waits for a batch to fill; 0 for not at all")
    queue_limit: int = Field(128, ge=1, description="pictures that may wait, those being decoded counted; beyond it, 503")
    deadline_ms: int = Field(
        30_000, ge=1, description="longest a request may take; X-Deadline-Ms asks for less; beyond it, 504"
    )
    lame_duck_seconds: float = Field(
        1, ge=0, description="how long new work is still taken after SIGTERM, while /health/ready says 503 already"
    )
    drain_seconds: float = Field(30, ge=0, description="longest that work already taken may go on after SIGTERM")
    max_connections: int = Field(1024, ge=1, description="connections at once; further ones get 503 and are closed")
    upload_seconds: float = Field(30, gt=0, description="longest the upload of a request may take; beyond it, 408")
    download_seconds: float = Field(
        60, gt=0, description="longest a client may take to read a response; beyond it, disconnected"
    )
    max_upload_bytes: int = Field(20 * 2**20, ge=1, description="largest request body, in bytes")
    max_pixels: int = Field(50_000_000, ge=1, description="largest picture, width times height")
    decode: Literal["exact", "draft"] = Field(
        "exact", description="draft: large JPEGs are scaled while they are decoded; faster, not the same to the bit"
    )
    decode_threads: int = Field(
        default_factory=cores,
        ge=1,
        description="threads that decode and resize, in each front end; together one per core, two at least, if not set",
    )
    frontends: Annotated[int, Field(ge=1, le=128)] | Literal["auto"] = Field(
        "auto",
        description="processes that read, decode and answer, before one that computes; auto: one for each core but two beside "
        "a GPU, and 1, which computes too, on a CPU",
    )
    api_keys: Keys = Field((), description="comma list; if any, a request must carry one as Bearer or X-API-Key")
    keyless: Names = Field(("health", "metrics"), description="doors that want no API key: health, metrics")
    cors_origins: Names = Field((), description="comma list of origins whose pages may call, or *")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal, else json")
    otlp_endpoint: str | None = Field(None, description="where to send OpenTelemetry traces (extra: tracing); none if not set")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(
        8000,
        ge=0,
        le=65535,
        validation_alias=AliasChoices("port", "DINAT_PORT", "AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT"),
        description="port to listen on; 0 for a free one. AIP_HTTP_PORT and SAGEMAKER_BIND_TO_PORT say it too",
    )
    aip_predict_route: str = Field(
        "/predict",
        pattern="^/",
        validation_alias=AliasChoices("aip_predict_route", "AIP_PREDICT_ROUTE"),
        description="where Vertex AI asks for predictions (AIP_PREDICT_ROUTE)",
    )
    aip_health_route: str | None = Field(
        None,
        pattern="^/",
        validation_alias=AliasChoices("aip_health_route", "AIP_HEALTH_ROUTE"),
        description="where Vertex AI asks after the service's health, beside /health (AIP_HEALTH_ROUTE)",
    )

    @property
    def served_name(self) -> str:
        """By what name clients know the model."""
        return self.name or self.model

    def for_frontend(self, frontends: int) -> "Settings":
        """The settings of one of several front ends: its share of what all of them may have together."""
        threads = self.decode_threads if "decode_threads" in self.model_fields_set else max(2, math.ceil(cores() / frontends))
        return self.model_copy(
            update={"decode_threads": threads, "max_connections": math.ceil(self.max_connections / frontends)}
        )


def explain(error: ValidationError, named: Callable[[str], str] = lambda field: f"DINAT_{field.upper()}=") -> str:
    """One line that names every wrong setting and what is wrong with it. named: a field, as whoever gave it calls it."""
    return "; ".join(
        f"{named(str(fault['loc'][0]))}{fault['input']!r}: {fault['msg']}" if fault["loc"] else fault["msg"]
        for fault in error.errors()
    )
