"""/v1/conversations: sessions in OpenAI's words. A conversation's items are the turns up to its
head; a turn that answers may be several items."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from server.api.body import Part
from server.api.response_fields import InputItem, Items, messages_of
from server.api.responses import After, Limit, Order, page
from server.api.session_fields import Metadata
from server.errors import InvalidRequest, NotFound
from server.owners import Owner
from server.responses import json_response
from server.responses_wire import turn_items
from server.services import Caller, Services, Shared
from server.store.records import SessionRecord, TurnRecord
from server.turns import new_turns

router = APIRouter()

MAX_NEW_ITEMS = 20


class NewConversation(Part):
    items: Items | None = None
    metadata: Metadata | None = None


class ConversationChange(Part):
    metadata: Metadata | None = None


class NewItems(Part):
    items: Annotated[list[InputItem], Field(min_length=1, max_length=MAX_NEW_ITEMS, fail_fast=True)]


@router.post("/v1/conversations", operation_id="create_conversation")
async def create_conversation(
    body: NewConversation, request: Request, services: Shared, owner: Caller
) -> Response:
    """A new conversation, with the items that it begins with."""
    messages = messages_of(body.items or [], "items")
    async with services.idempotency.once(request, owner) as once:
        if not isinstance(once.made, str):
            services.refuse_when_draining()
            record = SessionRecord.new(owner.name, metadata=body.metadata or {})
            turns: list[TurnRecord] = []
            if messages:
                sessions = services.sessions
                extension = await sessions.extend(record, [], messages, None, None)
                turns = new_turns(record.id, [], messages, extension, sessions.fingerprint)
                record.head = turns[-1].id
            if once.record is not None:
                once.record.target = record.id
            await services.store.begin(
                turns,
                None,
                head=None,
                updated_at=record.updated_at,
                idempotency=once.record,
                session=record,
            )
            once.made = record.id
        record = await services.responses.conversation(owner, once.made)
    return json_response(_conversation(record))


@router.get("/v1/conversations/{id}", operation_id="read_conversation")
async def read_conversation(id: str, services: Shared, owner: Caller) -> Response:
    """The conversation, without its items."""
    return json_response(_conversation(await _find(services, owner, id)))


@router.post("/v1/conversations/{id}", operation_id="change_conversation")
async def change_conversation(
    id: str, body: ConversationChange, services: Shared, owner: Caller
) -> Response:
    """Other metadata."""
    record = await _find(services, owner, id)
    if body.metadata is not None:
        await services.store.update_session(
            record.id, metadata=body.metadata, updated_at=time.time()
        )
    return json_response(_conversation(await _find(services, owner, id)))


@router.delete("/v1/conversations/{id}", operation_id="delete_conversation")
async def delete_conversation(id: str, services: Shared, owner: Caller) -> Response:
    """Its end, with all of its items and responses."""
    record = await _find(services, owner, id)
    await services.sessions.delete(owner, record.id)
    return json_response({"id": id, "object": "conversation.deleted", "deleted": True})


@router.get("/v1/conversations/{id}/items", operation_id="list_conversation_items")
async def list_conversation_items(
    id: str,
    services: Shared,
    owner: Caller,
    limit: Limit = 20,
    order: Order = "desc",
    after: After = None,
) -> Response:
    """The items up to the head."""
    record = await _find(services, owner, id)
    path = await services.sessions.path(record, record.head)
    items = [item for turn in path for item in turn_items(turn)]
    return json_response(page(items, limit, order, after))


@router.post("/v1/conversations/{id}/items", operation_id="create_conversation_items")
async def create_conversation_items(
    id: str, body: NewItems, request: Request, services: Shared, owner: Caller
) -> Response:
    """Append items, without an answer."""
    messages = messages_of(body.items, "items")
    if not messages:
        raise InvalidRequest("`items` has nothing that can be kept", param="items")
    record = await _find(services, owner, id)
    async with services.idempotency.once(request, owner) as once:
        if once.made is None:
            services.refuse_when_draining()
            last = await services.sessions.add(
                owner, record.id, messages, on_busy="queue", idempotency=once.record
            )
            once.made = f"{record.id}/{last.id}"
        assert isinstance(once.made, str)
        path = await services.sessions.path(record, once.made.partition("/")[2])
    items = [item for turn in path[-len(messages) :] for item in turn_items(turn)]
    return json_response(page(items, len(items), "asc", None))


@router.get("/v1/conversations/{id}/items/{item_id}", operation_id="read_conversation_item")
async def read_conversation_item(
    id: str, item_id: str, services: Shared, owner: Caller
) -> Response:
    """One item."""
    record = await _find(services, owner, id)
    path = await services.sessions.path(record, record.head)
    return json_response(_locate(path, item_id)[1])


@router.delete("/v1/conversations/{id}/items/{item_id}", operation_id="delete_conversation_item")
async def delete_conversation_item(
    id: str, item_id: str, services: Shared, owner: Caller
) -> Response:
    """The conversation goes on without the item, and without those of the same answer."""
    record = await _find(services, owner, id)
    async with services.sessions.free(owner, record.id, "queue") as session:
        path = await services.sessions.path(session, session.head)
        place, _ = _locate(path, item_id)
        await services.sessions.leave_out(session, path, place)
    return json_response(_conversation(await _find(services, owner, id)))


# -------------------------------------------------------------------------------------- details


async def _find(services: Services, owner: Owner, id: str) -> SessionRecord:
    if not id.startswith("conv_"):
        raise NotFound(f"there is no conversation {id[:64]!r}")
    return await services.responses.conversation(owner, id.replace("conv_", "sess_", 1))


def _locate(path: list[TurnRecord], item_id: str) -> tuple[int, dict[str, Any]]:
    """Which turn of the path has the item, and the item. Raises NotFound."""
    for place, turn in enumerate(path):
        for item in turn_items(turn):
            if item["id"] == item_id:
                return place, item
    raise NotFound(f"the conversation has no item {item_id[:80]!r}")


def _conversation(record: SessionRecord) -> dict[str, Any]:
    return {
        "id": record.id.replace("sess_", "conv_", 1),
        "object": "conversation",
        "created_at": int(record.created_at),
        "metadata": record.metadata,
    }
