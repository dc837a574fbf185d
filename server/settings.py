"""Settings: every option of `headwater serve`, from the command line, `HEADWATER_*` or `.env`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(value: object) -> object:
    """Bytes from '512MiB', '1.5G' or a plain number. Raises ValueError for anything else."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is not a size; write for example 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_size_or_off(value: object) -> object:
    """Bytes, 0 for 'off'. Raises ValueError for what is neither."""
    return 0 if isinstance(value, str) and value.strip().lower() == "off" else parse_size(value)


def split_names(value: object) -> object:
    """The names of a list that is separated by commas, in lower case."""
    if not isinstance(value, str):
        return value
    return tuple(name.strip().lower() for name in value.split(",") if name.strip())


def _is_host(name: str) -> str:
    if not re.fullmatch(r"\*|(\*\.)?[a-z0-9._-]+|[0-9a-f:]+", name):
        raise ValueError(f"{name!r} is not a host; write names without scheme and port")
    return name


def _is_origin(origin: str) -> str:
    if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s@]+", origin):
        raise ValueError(f"{origin!r} is not an origin; write for example https://chat.example.com")
    return origin


Size = Annotated[int, BeforeValidator(parse_size)]
SizeOrOff = Annotated[int, BeforeValidator(parse_size_or_off)]
Hosts = Annotated[
    tuple[Annotated[str, AfterValidator(_is_host)], ...], BeforeValidator(split_names), NoDecode
]
Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_is_origin)], ...], BeforeValidator(split_names), NoDecode
]


class Settings(BaseSettings):
    """What the server is started with. Sizes are bytes, times are seconds."""

    model_config = SettingsConfigDict(
        env_prefix="HEADWATER_", env_file=".env", extra="ignore", protected_namespaces=()
    )

    model: str = "smollm2-135m"
    data: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    no_auth: bool = False
    api_keys_file: Path | None = None
    allowed_hosts: Hosts | None = None
    cors_origins: Origins | None = None

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
    disk_cache: SizeOrOff = Field(default=2 << 30, ge=0)
    check_accounting: bool = False

    max_queue: int = Field(default=256, ge=0)
    engine_timeout: float = Field(default=30.0, gt=0)
    shutdown_grace: float = Field(default=5.0, ge=0)
    send_timeout: float = Field(default=30.0, gt=0)
    store: str | None = None
    stream_retention: float = Field(default=3600.0, gt=0)
    response_retention: float = Field(default=30 * 86_400.0, gt=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def data_folder(self) -> Path:
        """Where the server keeps what outlives it: `data`, else a folder of the user (XDG)."""
        if self.data is not None:
            return self.data
        xdg = os.environ.get("XDG_DATA_HOME", "")
        base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local" / "share"
        return base / "headwater"
