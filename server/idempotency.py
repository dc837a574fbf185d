"""Idempotency keys: a request that is sent twice is done once.

A key belongs to its owner. The first request with it does the work, the others wait for what it
made and answer with that; one that fails, or that ended since its client left, leaves the key free.
What is durable remembers its key in the store, in the transaction that makes it, so that it holds
across a restart of the server too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import Request

from server.errors import IdempotencyConflict, InvalidRequest
from server.generation import Generation
from server.generations import Generations
from server.owners import Owner
from server.store.records import IdempotencyRecord
from server.store.store import Store

MAX_KEY_CHARACTERS = 255
# Beyond these, plain requests (that no store remembers) are forgotten early: so many, or with so
# many tokens in their prompts and answers (some 150 MB).
MAX_ENTRIES, MAX_TOKENS = 4096, 1 << 22
LOOKED_AT = 64  # entries a request looks at, to drop those that are over

Made = str | list[Generation]
"""What a request made: the id of something stored, or generations that are in memory only."""


@dataclass(slots=True)
class Once:
    """`made`: what an earlier request with this key made; answer with that. Else do the work, with
    `record` going into the store if it is durable, and set `made`."""

    made: Made | None = None
    record: IdempotencyRecord | None = None


@dataclass(slots=True)
class _Entry:
    body_hash: str
    created: float
    made: asyncio.Future[Made | None]
    replaces: bool = False  # what the store still has of the key

    @property
    def num_tokens(self) -> int:
        """What it keeps in memory."""
        made = self.made.result() if self.made.done() else None
        if not isinstance(made, list):
            return 0
        return sum(g.num_prompt_tokens + g.num_output_tokens for g in made)


class Idempotency:
    """The keys of the last `retention` seconds."""

    def __init__(self, store: Store, generations: Generations, retention: float) -> None:
        self._store = store
        self._generations = generations
        self._retention = retention
        self._entries: dict[tuple[str, str], _Entry] = {}  # oldest first
        self._num_tokens = 0  # when they were last counted, less what was dropped since
        self._num_looks = 0

    @contextlib.asynccontextmanager
    async def once(self, request: Request, owner: Owner) -> AsyncIterator[Once]:
        """Around the work of a request. Raises IdempotencyConflict for a key with another body."""
        key = request.headers.get("idempotency-key")
        if key is None:
            yield Once()
            return
        if not 1 <= len(key) <= MAX_KEY_CHARACTERS:
            raise InvalidRequest(
                f"`Idempotency-Key` must have 1 to {MAX_KEY_CHARACTERS} characters, got {len(key)}",
                param="Idempotency-Key",
            )
        body = await request.body()
        head = f"{request.method} {request.scope['path']}\n".encode()
        body_hash = hashlib.sha256(head + body).hexdigest()
        made = await self._earlier(owner.name, key, body_hash)
        if made is not None:
            yield Once(made)
            return
        entry = self._entries[owner.name, key]
        once = Once(
            record=IdempotencyRecord(
                owner=owner.name,
                key=key,
                body_hash=body_hash,
                target="",
                created_at=time.time(),
                replaces_before=math.inf if entry.replaces else time.time() - self._retention,
            )
        )
        try:
            yield once
        finally:
            if once.made is None:
                del self._entries[owner.name, key]
            entry.made.set_result(once.made)

    async def _earlier(self, owner: str, key: str, body_hash: str) -> Made | None:
        """What the key stands for; None when it is now this request's, with an open entry."""
        self._forget_old()
        while True:
            entry = self._entries.get((owner, key))
            if entry is None:
                entry = _Entry(body_hash, time.time(), asyncio.get_running_loop().create_future())
                self._entries[owner, key] = entry
                stored = await self._stored(owner, key, entry)
                if stored is None:
                    return None
                entry.body_hash, entry.created = stored.body_hash, stored.created_at
                entry.made.set_result(stored.target)
            if entry.body_hash != body_hash:
                raise IdempotencyConflict(
                    "this `Idempotency-Key` was used with another request; take a new key for each"
                )
            made = await asyncio.shield(entry.made)
            if made is not None and not await self._was_left(owner, made):
                return made
            if self._entries.get((owner, key)) is entry:
                del self._entries[owner, key]

    async def _stored(self, owner: str, key: str, entry: _Entry) -> IdempotencyRecord | None:
        try:
            stored = await self._store.idempotent(owner, key)
            entry.replaces = stored is not None and await self._was_left(owner, stored.target)
        except BaseException:
            self._entries.pop((owner, key)).made.set_result(None)
            raise
        if stored is None or stored.created_at < time.time() - self._retention:
            return None
        return None if entry.replaces else stored

    async def _was_left(self, owner: str, made: Made) -> bool:
        """Whether it was ended before its end, and does not outlive its client: nothing came of
        it that anybody would want a second time."""
        if not isinstance(made, str):
            return any(generation.cancelled for generation in made)
        live = self._generations[made]
        if live is not None:
            return live.cancelled and live.durable is not None and live.durable.kind == "response"
        record = await self._store.generation(owner, made) if made.startswith("gen_") else None
        return record is not None and (record.kind, record.status) == ("response", "interrupted")

    def _forget_old(self) -> None:
        if self._num_looks % LOOKED_AT == 0:
            self._num_tokens = sum(entry.num_tokens for entry in self._entries.values())
        self._num_looks += 1
        oldest = time.time() - self._retention
        for slot, entry in list(itertools.islice(self._entries.items(), LOOKED_AT)):
            full = len(self._entries) > MAX_ENTRIES or self._num_tokens > MAX_TOKENS
            if entry.made.done() and (full or entry.created < oldest):
                self._num_tokens -= entry.num_tokens
                del self._entries[slot]
