"""Owners: whose a request is, by its API key.

Everything that outlives a request belongs to an owner, not to a key, so keys can be replaced and an
owner can have several. The file of keys has one key a line; `#` begins a comment:

    owner  sha256-of-a-key  [max_concurrent=N]

Keys are 256 random bits (`headwater key`), so a plain SHA-256 of them cannot be guessed back. The
digest of what a client presents is compared with all digests, each in constant time, whichever
matches. Without a file everybody is one owner and credentials are not looked at.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from server.errors import AuthenticationError

MAX_FILE_BYTES = 1 << 20
_NAME_RULE = "an owner's name is up to 64 letters, digits and . _ @ -, and begins with no sign"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_LIMIT = re.compile(r"max_concurrent=([1-9][0-9]{0,5})")


class OwnersError(Exception):
    """The file of keys cannot be used; one line for each fault, none of which shows a key."""


@dataclass(frozen=True, slots=True)
class Owner:
    """`salt` goes into the root of its KV keys, so that owners share no block. `max_concurrent` is
    how many answers it may have running or waiting; None: as many as the queue takes."""

    name: str
    salt: bytes = field(repr=False)
    max_concurrent: int | None = None


class Owners:
    """Those who may use the server. `warning` is what the operator should mend, if anything."""

    def __init__(
        self,
        secret: bytes,
        keys: Iterable[tuple[bytes, str]] = (),
        limits: dict[str, int] | None = None,
        warning: str | None = None,
    ) -> None:
        """`keys` are (SHA-256 digest of a key, name of its owner)."""
        limits = limits or {}
        self.warning = warning
        self.local = _owner("", secret)
        """Everybody where no keys are set, and the person at the command line. No owner in a file
        has its name, so no key can reach what it left."""
        self._secret = secret
        self._keys = [(digest, _owner(name, secret, limits.get(name))) for digest, name in keys]

    @classmethod
    def load(cls, path: Path | None, secret: bytes) -> Owners:
        """The owners that the file lists; without a file, the one of everybody.

        Raises OwnersError, also for a file without keys."""
        if path is None:
            return cls(secret)
        text, mode = _read(path)
        keys, limits, faults = _parse(text)
        if not keys and not faults:
            faults = ["it holds no keys; `headwater key NAME` makes one"]
        if faults:
            raise OwnersError("\n".join(f"{path}: {fault}" for fault in faults))
        warning = None
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            warning = f"{path} is open to every user of this machine; chmod 600 it"
        return cls(secret, keys.items(), limits, warning)

    @property
    def guarded(self) -> bool:
        """Whether a key is needed."""
        return bool(self._keys)

    @property
    def keys(self) -> list[tuple[bytes, Owner]]:
        """(SHA-256 digest of a key, its owner)."""
        return list(self._keys)

    def derive_key(self, purpose: bytes) -> bytes:
        """32 bytes from the server's secret. `purpose` has a space in it: no owner's name does, so
        it is nobody's salt."""
        return hmac.new(self._secret, purpose, hashlib.sha256).digest()

    def named(self, name: str) -> Owner:
        """The owner of that name, also when no key is theirs any more: what they left is theirs."""
        known = (owner for _, owner in self._keys if owner.name == name)
        return next(known, None) or _owner(name, self._secret)

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Owner:
        """Whose a request with these headers is. Raises AuthenticationError."""
        if not self._keys:
            return self.local
        key = presented_key(headers)
        if key is None:
            raise AuthenticationError(
                "this server needs an API key; send it as `Authorization: Bearer KEY` or "
                "`x-api-key: KEY`"
            )
        presented = hashlib.sha256(key).digest()
        found = None
        for digest, owner in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, presented):
                found = owner
        if found is None:
            raise AuthenticationError(
                "the API key is not one of this server's; check it, or ask the operator for one"
            )
        return found


def make_key() -> str:
    """A fresh key of 256 random bits."""
    return f"hw-{secrets.token_urlsafe(32)}"


def key_line(name: str, key: str, max_concurrent: int | None = None) -> str:
    """The line of the file that lets `key` in. Raises OwnersError for a name it cannot hold."""
    if not _NAME.fullmatch(name):
        raise OwnersError(f"{_NAME_RULE}; got {name[:80]!r}")
    line = f"{name} {hashlib.sha256(key.encode()).hexdigest()}"
    return line if max_concurrent is None else f"{line} max_concurrent={max_concurrent}"


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key of the first `Authorization: Bearer`, else of the first `x-api-key`."""
    api_key = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer" and key.strip():
                return key.strip()
        elif name == b"x-api-key" and api_key is None and value.strip():
            api_key = value.strip()
    return api_key


# ------------------------------------------------------------------------------------- details


def _owner(name: str, secret: bytes, max_concurrent: int | None = None) -> Owner:
    salt = hmac.new(secret, name.encode(), hashlib.sha256).digest()
    return Owner(name, salt, max_concurrent)


def _read(path: Path) -> tuple[str, int]:
    """The text of the file, and its mode."""
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise OwnersError(
            f"the API keys cannot be read from {path}: {error.strerror}; see --api-keys-file"
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise OwnersError(f"{path}: over {MAX_FILE_BYTES} bytes; is this the file of API keys?")
    try:
        return data.decode(), mode
    except UnicodeDecodeError:
        raise OwnersError(f"{path}: it is not UTF-8 text; is this the file of API keys?") from None


def _parse(text: str) -> tuple[dict[bytes, str], dict[str, int], list[str]]:
    """The owners of the digests, the limits of the owners, and what is wrong."""
    keys: dict[bytes, str] = {}
    limits: dict[str, int] = {}
    faults: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        fault = _parse_line(words, keys, limits)
        if fault:
            faults.append(f"line {number}: {fault}")
    return keys, limits, faults


def _parse_line(words: list[str], keys: dict[bytes, str], limits: dict[str, int]) -> str | None:
    """File one line; returns what is wrong with it. What may be a key is never repeated."""
    name, *rest = words
    if not _NAME.fullmatch(name):
        return _NAME_RULE
    if not rest or not _DIGEST.fullmatch(rest[0]):
        return (
            "after the owner must come the SHA-256 of a key, 64 hexadecimal digits, as "
            "`headwater key` prints it"
        )
    digest = bytes.fromhex(rest[0])
    if digest in keys:
        return "this key is there twice"
    for word in rest[1:]:
        limit = _LIMIT.fullmatch(word)
        if limit is None:
            return "after the SHA-256 only max_concurrent=N may come, with N from 1 to 999999"
        if limits.setdefault(name, int(limit[1])) != int(limit[1]):
            return f"the owner {name} has another max_concurrent above; one holds for all its keys"
    keys[digest] = name
    return None
