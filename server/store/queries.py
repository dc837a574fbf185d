"""What the store reads. Each function takes a connection and runs in one snapshot."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sqlalchemy import CTE, Column, Connection, Table, exists, or_, select, tuple_

from server.store.records import (
    GenerationLog,
    GenerationRecord,
    IdempotencyRecord,
    SessionRecord,
    TurnRecord,
)
from server.store.schema import (
    dropped_block,
    fold,
    generation,
    generation_tokens,
    idempotency,
    session,
    turn,
)


def _columns(table: Table, record: type[Any]) -> list[Column[Any]]:
    return [table.c[field.name] for field in fields(record) if field.name in table.c]


_SESSION = _columns(session, SessionRecord)
_TURN = _columns(turn, TurnRecord)
_GENERATION = _columns(generation, GenerationRecord)
_IDEMPOTENCY = _columns(idempotency, IdempotencyRecord)


def find_session(connection: Connection, owner: str, session_id: str) -> SessionRecord | None:
    row = connection.execute(
        select(*_SESSION).where(session.c.owner == owner, session.c.id == session_id)
    ).one_or_none()
    return None if row is None else SessionRecord(**row._mapping)


def list_sessions(
    connection: Connection, owner: str, limit: int, after: str | None, query: str | None
) -> tuple[list[SessionRecord], bool]:
    newest = tuple_(session.c.updated_at, session.c.id)
    statement = (
        select(*_SESSION)
        .where(session.c.owner == owner, session.c.listed.is_(True))
        .order_by(session.c.updated_at.desc(), session.c.id.desc())
        .limit(limit + 1)
    )
    if after is not None:
        last = find_session(connection, owner, after)
        if last is None:
            raise LookupError(f"there is no session {after!r} to list after")
        statement = statement.where(newest < (last.updated_at, last.id))
    if query:
        sought = fold(query)
        statement = statement.where(
            or_(
                session.c.search.contains(sought, autoescape=True),
                exists().where(
                    turn.c.session == session.c.id, turn.c.search.contains(sought, autoescape=True)
                ),
            )
        )
    found = [SessionRecord(**row._mapping) for row in connection.execute(statement)]
    return found[:limit], len(found) > limit


def list_old_unlisted(connection: Connection, before: float) -> list[tuple[str, str]]:
    rows = connection.execute(
        select(session.c.owner, session.c.id)
        .where(session.c.listed.is_(False), session.c.updated_at < before)
        .order_by(session.c.updated_at)
        .limit(100)
    )
    return [(row.owner, row.id) for row in rows]


def find_turn(connection: Connection, session_id: str, turn_id: str) -> TurnRecord | None:
    row = connection.execute(
        select(*_TURN).where(turn.c.session == session_id, turn.c.id == turn_id)
    ).one_or_none()
    return None if row is None else TurnRecord(**row._mapping)


def list_turns(connection: Connection, session_id: str) -> list[TurnRecord]:
    rows = connection.execute(
        select(*_TURN).where(turn.c.session == session_id).order_by(turn.c.number)
    )
    return [TurnRecord(**row._mapping) for row in rows]


def path_to(session_id: str, turn_id: str) -> CTE:
    """Number, id and parent of the turn and of all above it."""
    here = turn.alias()
    path = (
        select(here.c.number, here.c.id, here.c.parent)
        .where(here.c.session == session_id, here.c.id == turn_id)
        .cte("path", recursive=True)
    )
    above = turn.alias()
    return path.union_all(
        select(above.c.number, above.c.id, above.c.parent).where(
            above.c.session == session_id, above.c.id == path.c.parent
        )
    )


def find_path(connection: Connection, session_id: str, turn_id: str) -> list[TurnRecord]:
    path = path_to(session_id, turn_id)
    # A parent was there before its children: the numbers are in the order of the path.
    rows = connection.execute(
        select(*_TURN).join(path, turn.c.number == path.c.number).order_by(turn.c.number)
    )
    return [TurnRecord(**row._mapping) for row in rows]


def find_generation(
    connection: Connection, owner: str, generation_id: str
) -> GenerationRecord | None:
    row = connection.execute(
        select(*_GENERATION).where(generation.c.owner == owner, generation.c.id == generation_id)
    ).one_or_none()
    return None if row is None else GenerationRecord(**row._mapping)


def find_log(connection: Connection, generation_id: str) -> GenerationLog:
    token_ids: list[int] = []
    logprobs: list[bytes] = []
    for row in connection.execute(
        select(
            generation_tokens.c.position,
            generation_tokens.c.token_ids,
            generation_tokens.c.logprobs,
        )
        .where(generation_tokens.c.generation == generation_id)
        .order_by(generation_tokens.c.position)
    ):
        if row.position != len(token_ids):
            break
        token_ids += row.token_ids
        if row.logprobs is not None:
            logprobs.append(row.logprobs)
    return token_ids, logprobs


def list_running(
    connection: Connection,
) -> list[tuple[GenerationRecord, list[int], list[bytes]]]:
    rows = connection.execute(
        select(*_GENERATION)
        .where(generation.c.status == "running")
        .order_by(generation.c.created_at, generation.c.id)
    ).all()
    running = [GenerationRecord(**row._mapping) for row in rows]
    return [(record, *find_log(connection, record.id)) for record in running]


def find_idempotency(connection: Connection, owner: str, key: str) -> IdempotencyRecord | None:
    row = connection.execute(
        select(*_IDEMPOTENCY).where(idempotency.c.owner == owner, idempotency.c.key == key)
    ).one_or_none()
    return None if row is None else IdempotencyRecord(**row._mapping)


def list_dropped_blocks(connection: Connection) -> list[bytes]:
    return list(connection.scalars(select(dropped_block.c.key).order_by(dropped_block.c.key)))
