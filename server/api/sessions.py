"""/v1/sessions: conversations as trees of turns. What makes answers in them is in `turns`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from server.api.session_bodies import Fork, NewSession, SessionChange
from server.api.session_fields import Defaults
from server.api.session_shapes import session_shape, turn_shape
from server.errors import InvalidRequest
from server.owners import Owner
from server.responses import json_response
from server.services import Caller, Services, Shared
from server.store.records import IdempotencyRecord, SessionRecord
from server.transcript import Transcript, exported, grammars, imported, markdown

router = APIRouter()

MAX_QUERY_CHARACTERS = 1000


@router.post("/v1/sessions", operation_id="create_session")
async def create_session(
    body: NewSession, request: Request, services: Shared, owner: Caller
) -> Response:
    """A new session, without turns."""
    defaults = body.defaults or Defaults()
    await defaults.check(services)
    record = SessionRecord.new(
        owner.name,
        title=body.title,
        instructions=body.instructions,
        metadata=body.metadata or {},
        defaults=defaults.model_dump(exclude_none=True),
        overflow=body.overflow or "error",
    )

    async def make(idempotency: IdempotencyRecord | None) -> SessionRecord:
        await services.store.create_session(record, idempotency)
        return record

    return await _created(services, request, owner, make)


@router.get("/v1/sessions", operation_id="list_sessions")
async def list_sessions(
    services: Shared,
    owner: Caller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=64)] = None,
    q: Annotated[str | None, Query(max_length=MAX_QUERY_CHARACTERS)] = None,
) -> Response:
    """Newest first; `q` is looked for in titles and texts."""
    try:
        records, has_more = await services.store.sessions(
            owner.name, limit=limit, after=after, query=q
        )
    except LookupError:
        raise InvalidRequest(f"`after`: there is no session {after!r}", param="after") from None
    data = [session_shape(services, record) for record in records]
    return json_response(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": has_more,
        }
    )


@router.post("/v1/sessions/import", operation_id="import_session")
async def import_session(
    body: Transcript, request: Request, services: Shared, owner: Caller
) -> Response:
    """A session from what `export` gave: new ids, the same turns and tokens."""

    async def make(idempotency: IdempotencyRecord | None) -> SessionRecord:
        for grammar in grammars(body):
            await services.grammars.check(grammar, param="turns")
        record, turns = await asyncio.to_thread(
            imported,
            body,
            owner.name,
            services.tokenizer,
            services.sessions.fingerprint,
            services.files.config.vocab_size,
        )
        await services.store.copy_path(turns, record, [], 0, idempotency)
        return record

    return await _created(services, request, owner, make)


@router.get("/v1/sessions/{id}", operation_id="read_session")
async def read_session(
    id: str,
    services: Shared,
    owner: Caller,
    include: Annotated[list[Literal["token_ids"]] | None, Query()] = None,
) -> Response:
    """The session, and its turns from the root to its head."""
    record = await services.sessions.get(owner, id)
    path = await services.sessions.path(record, record.head)
    ids = "token_ids" in (include or [])
    turns = [turn_shape(services, turn, token_ids=ids) for turn in path]
    return json_response({**session_shape(services, record), "turns": turns})


@router.patch("/v1/sessions/{id}", operation_id="change_session")
async def change_session(id: str, body: SessionChange, services: Shared, owner: Caller) -> Response:
    """Another title, other metadata or defaults; another head: rewind (null: to the beginning), or
    switch branch."""
    record = await services.sessions.get(owner, id)
    given = body.model_fields_set
    fields: dict[str, Any] = {}
    if "title" in given:
        fields["title"] = body.title
    if body.metadata is not None:
        fields["metadata"] = body.metadata
    if body.defaults is not None:
        await body.defaults.check(services)
        fields["defaults"] = body.defaults.model_dump(exclude_none=True)
    if "head" in given:
        await services.sessions.set_head(owner, record.id, body.head)
    if fields:
        await services.store.update_session(record.id, **fields, updated_at=time.time())
    return json_response(session_shape(services, await services.sessions.get(owner, id)))


@router.delete("/v1/sessions/{id}", operation_id="delete_session", status_code=204)
async def delete_session(id: str, services: Shared, owner: Caller) -> Response:
    """All of it: tokens, text, logs, and KV that no other session uses."""
    await services.sessions.delete(owner, id)
    return Response(status_code=204)


@router.get("/v1/sessions/{id}/tree", operation_id="read_tree")
async def read_tree(id: str, services: Shared, owner: Caller) -> Response:
    """All turns, in the order in which they were made."""
    record = await services.sessions.get(owner, id)
    turns = await services.store.turns(record.id)
    return json_response(
        {
            "object": "session.tree",
            "session": record.id,
            "head": record.head,
            "turns": [turn_shape(services, turn) for turn in turns],
        }
    )


@router.get("/v1/sessions/{id}/cache", operation_id="read_cache")
async def read_cache(id: str, services: Shared, owner: Caller) -> Response:
    """Where the session's KV is, and why its last answer computed what it did."""
    return json_response(await services.sessions.cache(owner, id))


@router.get("/v1/sessions/{id}/export", operation_id="export_session")
async def export_session(
    id: str, services: Shared, owner: Caller, format: Literal["json", "markdown"] = "json"
) -> Response:
    """All of the session as JSON, or the path to its head as Markdown."""
    record = await services.sessions.get(owner, id)
    if format == "markdown":
        path = await services.sessions.path(record, record.head)
        return Response(markdown(record, path), media_type="text/markdown; charset=utf-8")
    return json_response(exported(record, await services.store.turns(record.id)))


@router.post("/v1/sessions/{id}/fork", operation_id="fork_session")
async def fork_session(
    id: str, body: Fork, request: Request, services: Shared, owner: Caller
) -> Response:
    """A new session that begins as this one does."""

    async def make(idempotency: IdempotencyRecord | None) -> SessionRecord:
        return await services.sessions.fork(
            owner, id, body.at, body.token, body.replace, idempotency
        )

    return await _created(services, request, owner, make)


async def _created(
    services: Services,
    request: Request,
    owner: Owner,
    make: Callable[[IdempotencyRecord | None], Awaitable[SessionRecord]],
) -> Response:
    """The session that `make` stores, or that the first request with this key made."""
    async with services.idempotency.once(request, owner) as once:
        if once.made is None:
            services.refuse_when_draining()
            once.made = (await make(once.record)).id
        assert isinstance(once.made, str)
        record = await services.sessions.get(owner, once.made)
    return json_response(session_shape(services, record))
