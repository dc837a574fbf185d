"""Settings: every option of `headwater serve`, from the command line, `HEADWATER_*` or `.env`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(value: object) -> object:
    """Bytes from '512MiB', '1.5G' or a plain number. Raises ValueError for anything else."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is not a size; write for example 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


Size = Annotated[int, BeforeValidator(parse_size)]


class Settings(BaseSettings):
    """What the server is started with. Sizes are bytes, times are seconds."""

    model_config = SettingsConfigDict(
        env_prefix="HEADWATER_", env_file=".env", extra="ignore", protected_namespaces=()
    )

    model: str = "smollm2-135m"
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    no_auth: bool = False

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    ops: Literal["auto", "native", "reference", "avx2", "portable"] = "auto"
    quantize: Literal["none", "q4", "q8"] = "none"
    threads: int | None = Field(default=None, ge=1, le=1024)
    max_model_len: int | None = Field(default=None, ge=2)
    max_num_seqs: int = Field(default=32, ge=1, le=1024)
    max_num_batched_tokens: int = Field(default=512, ge=1, le=65536)
    block_size: int = Field(default=16, ge=1, le=256)
    kv_memory: Size | None = Field(default=None, ge=1 << 20)
    check_accounting: bool = False

    max_queue: int = Field(default=256, ge=0)
    engine_timeout: float = Field(default=30.0, gt=0)
    shutdown_grace: float = Field(default=5.0, ge=0)
    send_timeout: float = Field(default=30.0, gt=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
