"""Records for the tests, with what a test does not care about filled in."""

from __future__ import annotations

from typing import Any

from server.store.records import (
    GenerationRecord,
    IdempotencyRecord,
    SessionRecord,
    TurnRecord,
)


def a_session(id: str, owner: str = "ann", **fields: Any) -> SessionRecord:
    return SessionRecord(
        **{"id": id, "owner": owner, "created_at": 1000.5, "updated_at": 1000.5, **fields}
    )


def a_turn(id: str, session: str = "s", parent: str | None = None, **fields: Any) -> TurnRecord:
    given = {"role": "user", "tokenizer": "tok", "created_at": 1001.25, **fields}
    return TurnRecord(id=id, session=session, parent=parent, **given)


def a_text_turn(id: str, text: str, session: str = "s", parent: str | None = None) -> TurnRecord:
    return a_turn(id, session, parent, content=[{"type": "text", "text": text}])


def a_generation(id: str, owner: str = "ann", **fields: Any) -> GenerationRecord:
    given = {
        "kind": "turn",
        "prompt_token_ids": [1, 2],
        "params": b"\x81\xa0",
        "created_at": 1002.0,
        **fields,
    }
    return GenerationRecord(id=id, owner=owner, **given)


def a_request(key: str, owner: str = "ann", **fields: Any) -> IdempotencyRecord:
    given = {"body_hash": "h", "target": "gen_1", "created_at": 1003.0, **fields}
    return IdempotencyRecord(owner=owner, key=key, **given)


ENDED: dict[str, Any] = {
    "status": "complete",
    "finish_reason": "stop",
    "error": None,
    "usage": None,
    "ended_at": 2000.0,
    "turn": None,
    "blocks": [],
}
