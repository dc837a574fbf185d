"""The server's secret: what makes the salts of its owners unguessable, kept beside its data."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

NUM_BYTES = 32


class SecretError(Exception):
    """The secret can be neither read nor made; one line says why and what to do."""


def load_secret(data: Path) -> bytes:
    """The 32 bytes of `data`/secret, made at the first start, for their owner's eyes only.

    Without it the KV on disk cannot be found any more; nothing else is lost. Raises SecretError.
    """
    path = data / "secret"
    try:
        if not path.exists():
            data.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make(path)
        secret = path.read_bytes()
    except OSError as error:
        raise SecretError(
            f"the data folder {data} cannot be used: {error.filename}: {error.strerror}; choose "
            "another with HEADWATER_DATA"
        ) from None
    if len(secret) != NUM_BYTES:
        raise SecretError(
            f"{path} should have {NUM_BYTES} bytes and has {len(secret)}; restore it, or delete "
            "it to have a new one made (what is cached on disk is then computed again)"
        )
    return secret


def _make(path: Path) -> None:
    """Written whole under another name and then linked, so that servers that start at the same
    time agree on one."""
    draft = path.with_name(f"secret.{secrets.token_hex(8)}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(NUM_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
