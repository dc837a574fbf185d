"""/v1/sessions/{id}/turns, regenerate, continue, cancel: what makes answers in a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import find_generation
from server.api.session_bodies import Continue, NewTurn, Regenerate
from server.api.session_shapes import turn_shape
from server.api.streams import cancelled, event_frames, stream_response
from server.errors import Conflict, HeadwaterError, ServerError
from server.events import Failed
from server.generation import Generation
from server.owners import Owner
from server.reader import read
from server.responses import json_response
from server.services import Caller, Services, Shared
from server.sse import EventStream, comment_frame, event_frame
from server.store.errors import StoreError
from server.store.records import IdempotencyRecord, TurnRecord

router = APIRouter()

QUIET_SECONDS = 1.0  # a stream that waits longer for its session begins with comments


@router.post("/v1/sessions/{id}/turns", operation_id="append_turn")
async def append_turn(
    id: str, body: NewTurn, request: Request, services: Shared, owner: Caller
) -> Response:
    """Append, and answer."""
    parent: str | Literal[False] | None = False
    if "parent" in body.model_fields_set:
        parent = body.parent

    async def make(idempotency: IdempotencyRecord | None) -> Generation | TurnRecord:
        session = await services.sessions.get(owner, id)
        if body.answer is False:
            services.refuse_when_draining()
            return await services.sessions.add(
                owner,
                id,
                body.messages(),
                parent=parent,
                on_busy=body.on_busy or "error",
                idempotency=idempotency,
            )
        return await services.sessions.append(
            owner,
            id,
            body.messages(),
            await body.wish(services, session),
            parent=parent,
            on_busy=body.on_busy or "error",
            idempotency=idempotency,
        )

    stream = bool(body.stream) and body.answer is not False
    return await _answered(services, request, owner, make, stream=stream)


@router.post("/v1/sessions/{id}/regenerate", operation_id="regenerate_turn")
async def regenerate(
    id: str, body: Regenerate, request: Request, services: Shared, owner: Caller
) -> Response:
    """Another answer to the same turn."""

    async def make(idempotency: IdempotencyRecord | None) -> Generation:
        session = await services.sessions.get(owner, id)
        wish = await body.wish(services, session)
        return await services.sessions.regenerate(
            owner, id, body.turn, wish, on_busy=body.on_busy or "error", idempotency=idempotency
        )

    return await _answered(services, request, owner, make, stream=bool(body.stream))


@router.post("/v1/sessions/{id}/continue", operation_id="continue_turn")
async def continue_turn(
    id: str, body: Continue, request: Request, services: Shared, owner: Caller
) -> Response:
    """Go on with an answer that did not come to its end."""

    async def make(idempotency: IdempotencyRecord | None) -> Generation:
        return await services.sessions.resume(
            owner,
            id,
            max_tokens=body.max_tokens,
            on_busy=body.on_busy or "error",
            idempotency=idempotency,
        )

    return await _answered(services, request, owner, make, stream=bool(body.stream))


@router.post("/v1/sessions/{id}/cancel", operation_id="cancel_turn")
async def cancel_turn(id: str, services: Shared, owner: Caller) -> Response:
    """Stop the running generation; what it said is kept."""
    record = await services.sessions.get(owner, id)
    running = services.sessions.generating(record.id)
    if running is None:
        raise Conflict("nothing is running in this session that could be cancelled")
    return json_response(await cancelled(services, running))


async def _answered(
    services: Services,
    request: Request,
    owner: Owner,
    make: Callable[[IdempotencyRecord | None], Awaitable[Generation | TurnRecord]],
    *,
    stream: bool,
) -> Response:
    """What `make` starts, or what the first request with this key started: the answer's turn once
    it is whole, or its events. It goes on without a reader. A turn that has no answer is told as
    it is."""

    async def begin() -> Generation | TurnRecord:
        async with services.idempotency.once(request, owner) as once:
            if once.made is None:
                made = await make(once.record)
                session = f"{made.session}/" if isinstance(made, TurnRecord) else ""
                once.made = session + made.id
            assert isinstance(once.made, str)
            session_id, _, turn_id = once.made.partition("/")
            if turn_id:
                record = await services.sessions.get(owner, session_id)
                return (await services.sessions.path(record, turn_id))[-1]
            return await find_generation(services, owner, once.made)

    beginning = asyncio.create_task(begin())
    if stream:
        await asyncio.wait({beginning}, timeout=QUIET_SECONDS)
        if not beginning.done():
            return _stream_when_begun(services, beginning)
    generation = await beginning
    if isinstance(generation, TurnRecord):
        return json_response(turn_shape(services, generation))
    if stream:
        return stream_response(services, generation, 0)
    async for batch in read([generation], 0):
        for _, event in batch:
            if isinstance(event, Failed):
                raise event.error
    durable = generation.durable
    if durable is None or durable.turn is None:
        raise ServerError("the answer has no turn")
    return json_response(
        turn_shape(services, durable.turn), headers={"x-headwater-generation": generation.id}
    )


def _stream_when_begun(
    services: Services, beginning: asyncio.Task[Generation | TurnRecord]
) -> Response:
    """The events of what waits for its session. It is refused by an event, and goes on waiting
    when its reader leaves."""

    async def frames() -> AsyncIterator[bytes]:
        yield comment_frame("waiting for the session")
        try:
            generation = await asyncio.shield(beginning)
        except (HeadwaterError, StoreError) as error:
            if isinstance(error, StoreError):
                error = ServerError(f"nothing was changed: {error}")
            services.metrics.errors.labels(error.code).inc()
            yield event_frame("error", error.body())
            return
        assert isinstance(generation, Generation)  # what has no answer has no stream
        async for frame in event_frames(services, generation, None):
            yield frame

    # Somebody must look at an error that comes when no reader is there.
    beginning.add_done_callback(lambda task: task.cancelled() or task.exception())
    return EventStream(frames(), on_close=lambda: None, send_timeout=services.settings.send_timeout)
