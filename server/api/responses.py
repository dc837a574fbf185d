"""/v1/responses: answers that are kept, and can be gone on from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from server.api.answers import wait_for_all
from server.api.response_fields import ResponseRequest
from server.api.response_order import order_of
from server.errors import NotFound, StreamExpired
from server.events import Delta, Done, Failed, Paused
from server.generation import Generation
from server.reader import read
from server.response_view import ResponseView
from server.responses import json_response
from server.responses_wire import input_items
from server.services import Caller, Services, Shared
from server.sse import EventStream, comment_frame, event_frame

router = APIRouter()

Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]
After = Annotated[str | None, Query(max_length=64)]


@router.post("/v1/responses", operation_id="create_response")
async def create_response(
    body: ResponseRequest, request: Request, services: Shared, owner: Caller
) -> Response:
    """An answer, whole or as a stream of server-sent events, or in the background."""
    body.check()
    order = await order_of(services, body)
    async with services.idempotency.once(request, owner) as once:
        if isinstance(once.made, str):
            stored = await services.responses.find(owner, once.made.replace("gen_", "resp_", 1))
            if stored.generation is None:
                view = ResponseView.of(services, stored)
                return json_response(await view.told(), headers=view.headers)
            generation = stored.generation
        elif once.made is not None:
            generation = once.made[0]
        else:
            generation = await services.responses.create(owner, order, once.record)
            once.made = generation.id if order.store else [generation]
    turn = generation.durable.turn if generation.durable is not None else None
    view = ResponseView(services, order.echo if turn is None else None, generation, turn)
    if body.stream:
        return _stream(services, view, generation, -1)
    if not order.background and not await wait_for_all(request, [generation], services.generations):
        return Response(status_code=499)
    return json_response(await view.told(), headers=view.headers)


@router.post("/v1/responses/input_tokens", operation_id="count_response_tokens")
async def count_response_tokens(body: ResponseRequest, services: Shared, owner: Caller) -> Response:
    """How many tokens a response's prompt has: instructions, tools, and what comes before."""
    body.check()
    count = await services.responses.count(owner, await order_of(services, body))
    return json_response({"object": "response.input_tokens", "input_tokens": count})


@router.get("/v1/responses/{id}", operation_id="read_response")
async def read_response(
    id: str,
    services: Shared,
    owner: Caller,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """The response as it is now; or its events, those after the number `starting_after`."""
    stored = await services.responses.find(owner, id)
    view = ResponseView.of(services, stored)
    if not stream:
        return json_response(await view.told(), headers=view.headers)
    if stored.generation is None:
        raise StreamExpired(
            f"the events of {id} can no longer be read, it ended too long ago or was made with "
            "another model; ask for it without `stream`"
        )
    after = -1 if starting_after is None else starting_after
    return _stream(services, view, stored.generation, after)


@router.post("/v1/responses/{id}/cancel", operation_id="cancel_response")
async def cancel_response(id: str, services: Shared, owner: Caller) -> Response:
    """Stop it, if it still runs; what it said is kept."""
    stored = await services.responses.find(owner, id)
    await services.responses.cancel(stored)
    view = ResponseView.of(services, stored)
    return json_response(await view.told(), headers=view.headers)


@router.delete("/v1/responses/{id}", operation_id="delete_response")
async def delete_response(id: str, services: Shared, owner: Caller) -> Response:
    """Its end; other responses that build on it are kept."""
    stored = await services.responses.find(owner, id)
    await services.responses.delete(owner, stored)
    return json_response({"id": id, "object": "response", "deleted": True})


@router.get("/v1/responses/{id}/input_items", operation_id="list_input_items")
async def list_input_items(
    id: str,
    services: Shared,
    owner: Caller,
    limit: Limit = 20,
    order: Order = "desc",
    after: After = None,
) -> Response:
    """What was put in for this response, without what came before it."""
    stored = await services.responses.find(owner, id)
    turns = await services.responses.input_turns(stored)
    items = [item for turn in turns for item in input_items(turn)]
    return json_response(page(items, limit, order, after))


def page(
    items: Sequence[dict[str, Any]], limit: int, order: Order, after: str | None
) -> dict[str, Any]:
    """A list of OpenAI's. `items` are in the order of the conversation. Raises NotFound."""
    found = list(items if order == "asc" else reversed(items))
    if after is not None:
        place = next((i for i, item in enumerate(found) if item["id"] == after), None)
        if place is None:
            raise NotFound(f"`after`: there is no item {after!r}", param="after")
        found = found[place + 1 :]
    shown = found[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(found) > limit,
    }


def _stream(services: Services, view: ResponseView, generation: Generation, after: int) -> Response:
    return EventStream(
        _frames(services, view, generation, after),
        on_close=lambda: services.generations.leave([generation]),
        send_timeout=services.settings.send_timeout,
        headers=view.headers,
    )


async def _frames(
    services: Services, view: ResponseView, generation: Generation, after: int
) -> AsyncIterator[bytes]:
    """The events with a number above `after`. They are all made again for whoever comes back:
    a number is a place in that order, and nothing else is known of it."""
    walk = view.walk()

    def frames(events: Sequence[dict[str, Any]]) -> bytes:
        new = (event for event in events if event["sequence_number"] > after)
        return b"".join(event_frame(event["type"], event) for event in new)

    yield frames(walk.start()) or comment_frame("going on")
    async for batch in read([generation], 0):
        sent = []
        for _, event in batch:
            match event:
                case Delta():
                    new = range(event.end - len(event.token_ids), event.end)
                    sent += [frames(view.fed(walk, at)) for at in new]
                case Paused():
                    sent.append(comment_frame("the engine is being restarted"))
                case Done() | Failed():
                    if isinstance(event, Failed):
                        services.metrics.errors.labels(event.error.code).inc()
                    last = view.ended(walk)
                    if view.ends_again:  # what comes now is said to whoever is there
                        sent.append(event_frame(last[-1]["type"], last[-1]))
                    else:
                        sent.append(frames(last))
        if any(sent):
            yield b"".join(sent)
