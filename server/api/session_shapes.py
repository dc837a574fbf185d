"""Sessions and turns as the wire has them."""

from __future__ import annotations

from typing import Any

from server.services import Services
from server.store.records import SessionRecord, TurnRecord


def session_shape(services: Services, record: SessionRecord) -> dict[str, Any]:
    """The session, without its turns."""
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


def turn_shape(services: Services, turn: TurnRecord, *, token_ids: bool = False) -> dict[str, Any]:
    """The turn; one that runs, as far as it is."""
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
    if turn.status == "running" and running is not None:
        document["content"] = [{"type": "text", "text": running.whole_text()}]
        document["num_tokens"] = len(running.resumed_token_ids) + len(running.token_ids)
    if token_ids:
        document["token_ids"] = turn.token_ids
        document["prompt_token_ids"] = turn.prompt_token_ids
        document["replaces_history"] = turn.replaces_history
    return document
