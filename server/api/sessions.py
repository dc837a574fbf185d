"""/v1/sessions: conversations as trees of turns."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from server.api.answers import find_generation
from server.api.chat import MAX_MESSAGES, ChatMessage
from server.api.session_fields import STRUCTURED, Defaults, Metadata, Text, Title
from server.api.streams import cancelled, stream_response
from server.errors import Conflict, InvalidRequest, ServerError
from server.generation import Failed, Generation, read
from server.idempotency import Once
from server.owners import Owner
from server.responses import json_response
from server.services import Caller, Services, Shared
from server.sessions import OnBusy, Wish
from server.store.records import SessionRecord, TurnRecord
from server.transcript import Transcript, exported, imported, markdown

router = APIRouter()

MAX_QUERY_CHARACTERS = 1000

TurnId = Annotated[str, Field(pattern=r"^turn_[0-9a-f]{32}$")]


class NewSession(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: Title | None = None
    instructions: Text | None = None
    metadata: Metadata = {}
    defaults: Defaults = Defaults()
    overflow: Literal["error", "drop_oldest"] = "error"


class SessionChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: Title | None = None
    metadata: Metadata | None = None
    defaults: Defaults | None = None
    head: TurnId | None = None


class AnswerFields(Defaults):
    """What all that makes an answer has in common."""

    on_busy: OnBusy = "error"

    async def wish(self, services: Services, session: SessionRecord) -> Wish:
        """How the answer is to be drawn: as the body says, else as the session's defaults do.
        A grammar of the body's takes the place of the defaults' one."""
        if (self.n or 1) > 1:
            raise InvalidRequest(
                "`n` must be 1: a turn has one answer, and `regenerate` makes another", param="n"
            )
        own = any(getattr(self, name) is not None for name in STRUCTURED)
        fields = self.model_copy(
            update={
                name: value
                for name, value in Defaults.model_validate(session.defaults)
                if getattr(self, name) is None and not (name in STRUCTURED and own)
            }
        )
        for param, grammar in fields.grammars().items():
            await services.grammars.check(grammar, param=param)
        if fields.top_logprobs is not None and not fields.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
        top = (fields.top_logprobs or 0) if fields.logprobs else None
        return Wish(
            lambda max_tokens: fields.sampling_params(
                services, max_tokens=max_tokens, top_logprobs=top
            ),
            fields.max_tokens,
            fields.stop or [],
        )


class NewTurn(AnswerFields):
    input: str | Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    parent: TurnId | None = None
    answer: bool = True

    def messages(self) -> list[dict[str, Any]]:
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return [message.rendered(i, "input") for i, message in enumerate(self.input)]


class Regenerate(AnswerFields):
    turn: TurnId | None = None


class Continue(BaseModel):
    model_config = ConfigDict(extra="forbid")

    stream: bool | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    on_busy: OnBusy = "error"


class Fork(BaseModel):
    model_config = ConfigDict(extra="forbid")

    at: TurnId | None = None
    token: int | None = Field(default=None, ge=0)
    replace: int | None = Field(default=None, ge=0)


# ------------------------------------------------------------------------------------- sessions


@router.post("/v1/sessions", operation_id="create_session")
async def create_session(
    body: NewSession, request: Request, services: Shared, owner: Caller
) -> Response:
    """A new session, without turns."""
    async with services.idempotency.once(request, owner) as once:
        if isinstance(once.made, str):
            return json_response(_session(services, await services.sessions.get(owner, once.made)))
        now = time.time()
        record = SessionRecord(
            id=f"sess_{secrets.token_hex(16)}",
            owner=owner.name,
            title=body.title,
            instructions=body.instructions,
            metadata=body.metadata,
            defaults=body.defaults.model_dump(exclude_none=True),
            overflow=body.overflow,
            created_at=now,
            updated_at=now,
        )
        if once.record is not None:
            once.record.target = record.id
        await services.store.create_session(record, once.record)
        once.made = record.id
    return json_response(_session(services, record))


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
    data = [_session(services, record) for record in records]
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
    async with services.idempotency.once(request, owner) as once:
        if isinstance(once.made, str):
            return json_response(_session(services, await services.sessions.get(owner, once.made)))
        record, turns = imported(
            body,
            owner.name,
            services.tokenizer,
            services.sessions.fingerprint,
            services.files.config.vocab_size,
        )
        if once.record is not None:
            once.record.target = record.id
        await services.store.copy_path(turns, record, None, once.record)
        once.made = record.id
    return json_response(_session(services, record))


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
    turns = [_turn(services, turn, token_ids=ids) for turn in path]
    return json_response({**_session(services, record), "turns": turns})


@router.patch("/v1/sessions/{id}", operation_id="change_session")
async def change_session(id: str, body: SessionChange, services: Shared, owner: Caller) -> Response:
    """Another title, other metadata or defaults; another head: rewind, or switch branch."""
    record = await services.sessions.get(owner, id)
    given = body.model_fields_set
    fields: dict[str, Any] = {}
    if "title" in given:
        fields["title"] = body.title
    if body.metadata is not None:
        fields["metadata"] = body.metadata
    if body.defaults is not None:
        fields["defaults"] = body.defaults.model_dump(exclude_none=True)
    if body.head is not None:
        await services.sessions.set_head(owner, record.id, body.head)
    if fields:
        await services.store.update_session(record.id, **fields, updated_at=time.time())
    return json_response(_session(services, await services.sessions.get(owner, id)))


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
            "turns": [_turn(services, turn) for turn in turns],
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


# ---------------------------------------------------------------------------------------- turns


@router.post("/v1/sessions/{id}/turns", operation_id="append_turn")
async def append_turn(
    id: str, body: NewTurn, request: Request, services: Shared, owner: Caller
) -> Response:
    """Append, and answer."""
    async with services.idempotency.once(request, owner) as once:
        if once.made is None:
            session = await services.sessions.get(owner, id)
            turn, generation = await services.sessions.append(
                owner,
                id,
                body.messages(),
                await body.wish(services, session),
                parent=body.parent if "parent" in body.model_fields_set else False,
                answer=body.answer,
                on_busy=body.on_busy,
                idempotency=once.record,
            )
            once.made = f"{id}/{turn.id}" if generation is None else generation.id
        answer = await _made(services, owner, once)
    if isinstance(answer, TurnRecord):
        return json_response(_turn(services, answer))
    return await _respond(services, answer, stream=bool(body.stream))


@router.post("/v1/sessions/{id}/regenerate", operation_id="regenerate_turn")
async def regenerate(
    id: str, body: Regenerate, request: Request, services: Shared, owner: Caller
) -> Response:
    """Another answer to the same turn."""
    async with services.idempotency.once(request, owner) as once:
        if once.made is None:
            session = await services.sessions.get(owner, id)
            _, generation = await services.sessions.regenerate(
                owner,
                id,
                body.turn,
                await body.wish(services, session),
                on_busy=body.on_busy,
                idempotency=once.record,
            )
            once.made = generation.id
        answer = await _made(services, owner, once)
    return await _respond(services, answer, stream=bool(body.stream))


@router.post("/v1/sessions/{id}/continue", operation_id="continue_turn")
async def continue_turn(
    id: str, body: Continue, request: Request, services: Shared, owner: Caller
) -> Response:
    """Go on with an answer that did not come to its end."""
    async with services.idempotency.once(request, owner) as once:
        if once.made is None:
            _, generation = await services.sessions.resume(
                owner,
                id,
                max_tokens=body.max_tokens,
                on_busy=body.on_busy,
                idempotency=once.record,
            )
            once.made = generation.id
        answer = await _made(services, owner, once)
    return await _respond(services, answer, stream=bool(body.stream))


@router.post("/v1/sessions/{id}/cancel", operation_id="cancel_turn")
async def cancel_turn(id: str, services: Shared, owner: Caller) -> Response:
    """Stop the running generation; what it said is kept."""
    record = await services.sessions.get(owner, id)
    running = services.sessions.generating(record.id)
    if running is None:
        raise Conflict("nothing is running in this session that could be cancelled")
    return json_response(await cancelled(services, running))


@router.post("/v1/sessions/{id}/fork", operation_id="fork_session")
async def fork_session(
    id: str, body: Fork, request: Request, services: Shared, owner: Caller
) -> Response:
    """A new session that begins as this one does."""
    async with services.idempotency.once(request, owner) as once:
        if isinstance(once.made, str):
            return json_response(_session(services, await services.sessions.get(owner, once.made)))
        fork = await services.sessions.fork(
            owner, id, body.at, body.token, body.replace, once.record
        )
        once.made = fork.id
    return json_response(_session(services, fork))


async def _made(services: Services, owner: Owner, once: Once) -> Generation | TurnRecord:
    """What the request, or the first one with its key, made."""
    assert isinstance(once.made, str)
    session_id, _, turn_id = once.made.partition("/")
    if not turn_id:
        return await find_generation(services, owner, once.made)
    session = await services.sessions.get(owner, session_id)
    return (await services.sessions.path(session, turn_id))[-1]


async def _respond(
    services: Services, generation: Generation | TurnRecord, *, stream: bool
) -> Response:
    """The answer's turn once it is whole, or its events. It goes on without a reader."""
    assert isinstance(generation, Generation)
    if stream:
        return stream_response(services, generation, 0)
    async for batch in read([generation], 0):
        for _, event in batch:
            if isinstance(event, Failed):
                raise event.error
    durable = generation.durable
    if durable is None or durable.turn is None:
        raise ServerError("the answer has no turn")
    turn = _turn(services, durable.turn)
    return json_response(turn, headers={"x-headwater-generation": generation.id})


# --------------------------------------------------------------------------------------- shapes


def _session(services: Services, record: SessionRecord) -> dict[str, Any]:
    running = services.sessions.generating(record.id)
    return {
        "id": record.id,
        "object": "session",
        "title": record.title,
        "instructions": record.instructions,
        "metadata": record.metadata,
        "defaults": record.defaults,
        "overflow": record.overflow,
        "head": record.head,
        "model": services.files.name,
        "generating": None if running is None else running.id,
        "created_at": int(record.created_at),
        "updated_at": int(record.updated_at),
    }


def _turn(services: Services, turn: TurnRecord, *, token_ids: bool = False) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": turn.id,
        "object": "session.turn",
        "session": turn.session,
        "parent": turn.parent,
        "role": turn.role,
        "content": turn.content,
        "status": turn.status,
        "finish_reason": turn.finish_reason,
        "generation": turn.generation,
        "num_tokens": len(turn.token_ids),
        "created_at": int(turn.created_at),
    }
    for note in ("rewrite", "dropped"):
        if note in turn.notes:
            document[note] = turn.notes[note]
    running = services.generations[turn.generation] if turn.generation else None
    if turn.status == "running" and running is not None:  # as far as it is
        document["content"] = [{"type": "text", "text": running.whole_text()}]
        document["num_tokens"] = len(running.resumed_token_ids) + len(running.token_ids)
    if token_ids:
        document["token_ids"] = turn.token_ids
        document["prompt_token_ids"] = turn.prompt_token_ids
    return document
