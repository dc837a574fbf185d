"""What the store writes. Each function is one operation: it happens whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, delete, exists, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from server.store import blocks
from server.store.errors import StoreConflict
from server.store.records import (
    GenerationRecord,
    GenerationStatus,
    IdempotencyRecord,
    SessionRecord,
    TokenChunk,
    TurnRecord,
)
from server.store.schema import (
    fold,
    generation,
    generation_tokens,
    idempotency,
    session,
    text_of,
    turn,
    turn_block,
)

# What a turn keeps from its beginning; the rest is known at its end.
_TURN_FIXED = {"id", "session", "parent", "role", "created_at", "number"}


def create_session(
    connection: Connection, record: SessionRecord, request: IdempotencyRecord | None
) -> None:
    _insert_request(connection, request)
    connection.execute(insert(session), _row(record) | {"search": fold(record.title or "")})


def update_session(connection: Connection, session_id: str, values: dict[str, Any]) -> bool:
    if "title" in values:
        values = values | {"search": fold(values["title"] or "")}
    return _update_session(connection, session_id, values)


def delete_session(
    connection: Connection, owner: str, session_id: str, known: Sequence[bytes]
) -> list[bytes] | None:
    mine = session.c.owner == owner, session.c.id == session_id
    if connection.scalar(select(session.c.id).where(*mine)) is None:
        return None
    keys = [*connection.scalars(blocks.keys_of_session(session_id)), *known]
    connection.execute(delete(session).where(*mine))
    return blocks.drop(connection, keys)


def begin(
    connection: Connection,
    turns: Sequence[TurnRecord],
    started: GenerationRecord | None,
    head: tuple[str, str] | None,
    updated_at: float,
    request: IdempotencyRecord | None,
    reopened: TurnRecord | None,
    new_session: SessionRecord | None,
) -> None:
    if new_session is not None:
        create_session(connection, new_session, None)
    _insert_request(connection, request)
    _insert_turns(connection, turns)
    if reopened is not None:
        _update_turn(connection, reopened)
    if started is not None:
        connection.execute(insert(generation), _row(started))
    if head is not None:
        session_id, turn_id = head
        if not _update_session(connection, session_id, {"head": turn_id, "updated_at": updated_at}):
            raise StoreConflict(f"the session {session_id} is gone")
    else:
        touched = {record.session for record in turns}
        if started is not None and started.session is not None:
            touched.add(started.session)
        for session_id in touched:
            _update_session(connection, session_id, {"updated_at": updated_at})


def log_tokens(connection: Connection, chunks: Sequence[TokenChunk]) -> None:
    wanted = {chunk.generation for chunk in chunks}
    # One whose session was deleted meanwhile must not take the tokens of the others with it.
    there = set(
        connection.scalars(select(generation.c.id).where(generation.c.id.in_(sorted(wanted))))
    )
    rows = [_row(chunk) for chunk in chunks if chunk.generation in there]
    if not rows:
        return
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(generation_tokens)
    # A commit whose answer was lost may have happened; what is there is then the chunk's beginning.
    later = {"token_ids": statement.excluded.token_ids, "logprobs": statement.excluded.logprobs}
    statement = statement.on_conflict_do_update(
        index_elements=["generation", "position"], set_=later
    )
    connection.execute(statement, rows)


def finish(
    connection: Connection,
    generation_id: str,
    *,
    status: GenerationStatus,
    finish_reason: str | None,
    error: dict[str, Any] | None,
    usage: dict[str, Any] | None,
    ended_at: float,
    final: TurnRecord | None,
    keys: Sequence[bytes],
    chunks: Sequence[TokenChunk],
    head: str | None,
) -> None:
    connection.execute(
        delete(generation_tokens).where(generation_tokens.c.generation == generation_id)
    )
    log_tokens(connection, chunks)
    mine = generation.c.id == generation_id
    ended = connection.execute(
        update(generation)
        .where(mine)
        .values(
            status=status,
            finish_reason=finish_reason,
            error=error,
            usage=usage,
            ended_at=ended_at,
        )
    )
    if ended.rowcount == 0:
        raise StoreConflict(f"the generation {generation_id} is gone")
    if final is not None:
        _update_turn(connection, final)
        blocks.link(connection, final, keys)
    session_id = connection.scalar(select(generation.c.session).where(mine))
    if session_id is not None:
        changed = {"updated_at": ended_at} | ({} if head is None else {"head": head})
        _update_session(connection, session_id, changed)


def set_crashes(connection: Connection, crashes: Mapping[str, int]) -> None:
    for generation_id, count in crashes.items():
        connection.execute(
            update(generation).where(generation.c.id == generation_id).values(crashes=count)
        )


def expire(connection: Connection, before: float, gone_before: float) -> int:
    connection.execute(delete(idempotency).where(idempotency.c.created_at < before))
    connection.execute(delete(generation).where(generation.c.ended_at < gone_before))
    old = generation.c.ended_at < before, generation.c.usage.is_not(None)
    logs = select(generation.c.id).where(*old)
    connection.execute(delete(generation_tokens).where(generation_tokens.c.generation.in_(logs)))
    emptied: dict[str, Any] = {"usage": None, "prompt_token_ids": [], "resumed_token_ids": []}
    return connection.execute(update(generation).where(*old).values(emptied)).rowcount


def delete_response(connection: Connection, owner: str, generation_id: str) -> list[bytes]:
    mine = generation.c.owner == owner, generation.c.id == generation_id
    found = connection.execute(
        select(generation.c.session, generation.c.turn, session.c.listed)
        .join(session, session.c.id == generation.c.session)
        .where(*mine)
    ).one_or_none()
    if found is None:
        raise StoreConflict(f"the generation {generation_id} is gone")
    connection.execute(delete(generation).where(*mine))
    if found.listed:
        return []
    keys: list[bytes] = []
    at: str | None = found.turn
    while at is not None:
        here = turn.c.session == found.session, turn.c.id == at
        child = exists().where(turn.c.session == found.session, turn.c.parent == at)
        answer = exists().where(generation.c.session == found.session, generation.c.turn == at)
        if connection.scalar(select(child | answer)):
            break
        keys += connection.scalars(select(turn_block.c.key).where(turn_block.c.turn == at))
        parent = connection.scalar(select(turn.c.parent).where(*here))
        connection.execute(delete(turn).where(*here))
        at = parent
    rest = exists().where(turn.c.session == found.session)
    connection.execute(delete(session).where(session.c.id == found.session, ~rest))
    return blocks.drop(connection, keys)


def copy_path(
    connection: Connection,
    turns: Sequence[TurnRecord],
    record: SessionRecord,
    copied: Sequence[tuple[str, str]],
    num_blocks: int,
    request: IdempotencyRecord | None,
) -> None:
    create_session(connection, record, request)
    _insert_turns(connection, turns)
    blocks.copy(connection, copied, num_blocks)


def _row(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _insert_request(connection: Connection, request: IdempotencyRecord | None) -> None:
    if request is None:
        return
    row = _row(request)
    expired = idempotency.c.created_at < row.pop("replaces_before")
    mine = idempotency.c.owner == request.owner, idempotency.c.key == request.key
    connection.execute(delete(idempotency).where(*mine, expired))
    connection.execute(insert(idempotency), row)


def _insert_turns(connection: Connection, turns: Sequence[TurnRecord]) -> None:
    rows = []
    for record in turns:
        row = _row(record) | {"search": fold(text_of(record.content))}
        del row["number"]
        rows.append(row)
    if rows:
        connection.execute(insert(turn), rows)


def _update_turn(connection: Connection, record: TurnRecord) -> None:
    values = {name: value for name, value in _row(record).items() if name not in _TURN_FIXED}
    values["search"] = fold(text_of(record.content))
    statement = update(turn).where(turn.c.id == record.id).values(values)
    if connection.execute(statement).rowcount == 0:
        raise StoreConflict(f"the turn {record.id} is gone")


def _update_session(connection: Connection, session_id: str, values: dict[str, Any]) -> bool:
    statement = update(session).where(session.c.id == session_id).values(values)
    return connection.execute(statement).rowcount == 1
