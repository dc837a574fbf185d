"""Sign-ins: who a browser is that gave its key once, by a cookie.

The cookie holds no key. It is `tag.expires.nonce.mac`: the tag stands for the key that was given
(an HMAC of its digest), and the mac is an HMAC of the rest, both under a key that is derived from
the server's secret. So it outlives a restart, nobody can make one, and it ends when its time is
over, when its key leaves the file of keys, or when its owner signs out. Those that were signed out
before their time are noted in a file, a line each, because a copy may be somewhere.

There is no limit on tries: a key of 256 random bits is not guessed, and every other route would
take the guesses too.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from server.owners import Owner, Owners

log = structlog.get_logger()

LIFETIME = 30 * 86_400
"""How long a sign-in lasts, in seconds."""
_TOKEN = re.compile(r"([0-9a-f]{32}\.([0-9]{1,12})\.([0-9a-f]{32}))\.([0-9a-f]{64})")

Headers = Iterable[tuple[bytes, bytes]]


class SignIns:
    """The sign-ins of `owners`. `cookie` is the name of the cookie: no other server's, since the
    ports of a host share their cookies."""

    def __init__(
        self, owners: Owners, signed_out: Path, clock: Callable[[], float] = time.time
    ) -> None:
        """`signed_out` is the file of those that ended early; it need not exist."""
        self._owners = owners
        self._key = owners.derive_key(b"cookies of sign-ins")
        self._tagged = {self._tag(digest): owner for digest, owner in owners.keys}
        self._path = signed_out
        self._clock = clock
        self._ended = self._read_ended()
        self.cookie = f"headwater-{self._mac('the name')[:8]}"

    def begin(self, api_key: str) -> str | None:
        """The cookie's value for the owner of `api_key`; None where nobody needs a key.

        Raises AuthenticationError."""
        if not self._owners.guarded:
            return None
        key = api_key.strip().encode()
        self._owners.identify([(b"x-api-key", key)])
        tag = self._tag(hashlib.sha256(key).digest())
        text = f"{tag}.{int(self._clock()) + LIFETIME}.{secrets.token_hex(16)}"
        return f"{text}.{self._mac(text)}"

    def find(self, headers: Headers) -> Owner | None:
        """Who signed in with the cookie of these headers; None without one that holds."""
        for text, expires, nonce in self._valid(headers):
            if expires > self._clock() and nonce not in self._ended:
                return self._tagged.get(text.partition(".")[0])
        return None

    def end(self, headers: Headers) -> None:
        """Sign out: the cookie of these headers lets nobody in any more."""
        for _, expires, nonce in self._valid(headers):
            if nonce in self._ended or expires <= self._clock():
                continue
            self._ended[nonce] = expires
            try:
                with self._path.open("a") as file:
                    file.write(f"\n{nonce} {expires}\n")  # the last line may be broken
            except OSError as error:  # it holds until the server ends
                log.error("sign_out_not_stored", path=str(self._path), reason=error.strerror)

    # --------------------------------------------------------------------------------- details

    def _valid(self, headers: Headers) -> Iterable[tuple[str, int, str]]:
        """(signed text, expiry, nonce) of the cookies that this server made."""
        for name, value in headers:
            if name != b"cookie":
                continue
            for part in value.decode("latin-1").split(";"):
                cookie, _, token = part.strip().partition("=")
                match = _TOKEN.fullmatch(token) if cookie == self.cookie else None
                if match and hmac.compare_digest(match[4], self._mac(match[1])):
                    yield match[1], int(match[2]), match[3]

    def _mac(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def _tag(self, digest: bytes) -> str:
        return hmac.new(self._key, b"key " + digest, hashlib.sha256).hexdigest()[:32]

    def _read_ended(self) -> dict[str, int]:
        """(nonce, expiry) of the file, without those whose time is over anyway."""
        try:
            lines = self._path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        ended = {}
        for line in lines:
            match = re.fullmatch(r"([0-9a-f]{32}) ([0-9]{1,12})", line)
            if match and int(match[2]) > self._clock():
                ended[match[1]] = int(match[2])
        return ended
