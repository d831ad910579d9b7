"""Every setting of the service, once: environment DINAT_*, a .env file, or flags of `dinat serve`."""

import os
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Read once at start-up and passed down. A wrong value stops start-up with one line that names it (see explain)."""

    model_config = SettingsConfigDict(env_prefix="DINAT_", env_file=".env", extra="ignore", frozen=True)

    model: str = Field("digits", description='checkpoint: a folder, a Hub id, a .pth file, or "digits"')
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    device: str = Field("auto", description='"auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1"')
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 on GPUs fast at it, else fp32")
    attention: Literal["auto", "reference", "tiled"] = Field("auto", description="attention backend")
    max_batch: int | None = Field(None, ge=1, le=1024, description="pictures per batch; 64 on a GPU and 8 on a CPU if not set")
    max_upload_bytes: int = Field(20 * 2**20, ge=1, description="largest request body, in bytes")
    max_pixels: int = Field(50_000_000, ge=1, description="largest picture, width times height")
    decode_threads: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, description="threads that decode and resize; one per core if not set"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 for a free one")


def explain(error: ValidationError) -> str:
    """One line that names every wrong setting and what is wrong with it."""
    faults = [f"DINAT_{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg']}" for e in error.errors()]
    return "; ".join(faults)
