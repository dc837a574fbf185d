"""Store: everything that must outlive the server, behind `async` methods that never block the loop.

It knows records, and nothing of tokens' meaning, HTTP or the engine. One thread writes (`writer`),
a few read, each on its own connection.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from server.store import blocks, operations, queries
from server.store.database import NUM_READERS, Database, open_database
from server.store.errors import StoreError
from server.store.failures import is_unreachable, store_error
from server.store.records import (
    GenerationLog,
    GenerationRecord,
    GenerationStatus,
    IdempotencyRecord,
    SessionRecord,
    TokenChunk,
    TurnRecord,
)
from server.store.writer import RETRY_INTERVAL, Writer

T = TypeVar("T")
_SESSION_FIELDS = {"title", "metadata", "defaults", "head", "updated_at"}


class Store:
    """The durable store. Every method raises StoreError; those that write return once it is on the
    disk, and raise StoreConflict where they contradict what is stored. Records are only read."""

    def __init__(self, database: Database, connection: Connection) -> None:
        self._database = database
        self._writer = Writer(database, connection)
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="store-reader")
        self._closed = False

    @classmethod
    def open(cls, url: str | None, folder: Path, address: str | None = None) -> Store:
        """The store in the PostgreSQL database `url`, or else in `folder`; made or brought up to
        date where needed. `address` is told to a second server that wants the same store.

        Raises StoreLocked where another server has it, StoreError where it cannot be used."""
        return cls(*open_database(url, folder, address))

    def close(self) -> None:
        """Writes what is queued, then lets go of the database. Blocks; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._writer.close()
        self._readers.shutdown()
        self._database.close()

    # ------------------------------------------------------------------------------- sessions

    async def create_session(
        self, record: SessionRecord, idempotency: IdempotencyRecord | None = None
    ) -> None:
        """Its id becomes the target of `idempotency`."""
        if idempotency is not None:
            idempotency.target = record.id
        await self._write(operations.create_session, record, idempotency)

    async def session(self, owner: str, id: str) -> SessionRecord | None:
        return await self._read(queries.find_session, owner, id)

    async def sessions(
        self, owner: str, *, limit: int, after: str | None = None, query: str | None = None
    ) -> tuple[list[SessionRecord], bool]:
        """At most `limit` listed sessions, newest first, and whether there are more.

        They come after the session `after`, and have `query` in their title or in a turn's text,
        whatever the case. Raises LookupError where the owner has no session `after`."""
        return await self._read(queries.list_sessions, owner, limit, after, query)

    async def update_session(self, id: str, **fields: Any) -> bool:
        """Sets title, metadata, defaults, head or updated_at; False where there is no session."""
        if unknown := fields.keys() - _SESSION_FIELDS:
            raise TypeError(f"a session's {', '.join(sorted(unknown))} cannot be set")
        return await self._write(operations.update_session, id, fields)

    async def delete_session(
        self, owner: str, id: str, known: Sequence[bytes] = ()
    ) -> list[bytes] | None:
        """Deletes the session with its turns, generations, logs and blocks, those that are `known`
        beside the stored ones among them; None where there is none. Those blocks that no turn has
        any more are dropped, as by `drop_blocks`."""
        return await self._write(operations.delete_session, owner, id, known)

    async def copy_path(
        self,
        turns: Sequence[TurnRecord],
        session: SessionRecord,
        copied: Sequence[tuple[str, str]],
        num_blocks: int,
        idempotency: IdempotencyRecord | None = None,
    ) -> None:
        """Makes `session` with `turns`, parents first. `copied` are the ids of a turn and of its
        copy among them, which shares those blocks of it that are in the first `num_blocks` of the
        sequence. The session's id becomes the target of `idempotency`."""
        if idempotency is not None:
            idempotency.target = session.id
        await self._write(operations.copy_path, turns, session, copied, num_blocks, idempotency)

    # ---------------------------------------------------------------------------------- turns

    async def turn(self, session_id: str, id: str) -> TurnRecord | None:
        return await self._read(queries.find_turn, session_id, id)

    async def path(self, session_id: str, turn_id: str | None) -> list[TurnRecord]:
        """The turns from the root to `turn_id`; none for None or a turn that is not there."""
        if turn_id is None:
            return []
        return await self._read(queries.find_path, session_id, turn_id)

    async def turns(self, session_id: str) -> list[TurnRecord]:
        """All turns of the session, in the order they were inserted."""
        return await self._read(queries.list_turns, session_id)

    # ----------------------------------------------------------------------------- generations

    async def begin(
        self,
        turns: Sequence[TurnRecord],
        generation: GenerationRecord | None,
        *,
        head: tuple[str, str] | None,
        updated_at: float,
        idempotency: IdempotencyRecord | None = None,
        reopened: TurnRecord | None = None,
        session: SessionRecord | None = None,
    ) -> None:
        """Makes the `session`, if one is given; inserts the turns (parents first) and the
        generation, changes the turn that the generation goes on with (`reopened`), and moves the
        head of a session, (session id, turn id). StoreConflict also where the idempotency key is
        already used."""
        await self._write(
            operations.begin, turns, generation, head, updated_at, idempotency, reopened, session
        )

    async def log_tokens(self, chunks: Sequence[TokenChunk]) -> None:
        """Appends to logs. A chunk replaces one at the same position; one of a generation that is
        gone changes nothing."""
        await self._write(operations.log_tokens, chunks)

    async def finish(
        self,
        generation_id: str,
        *,
        status: GenerationStatus,
        finish_reason: str | None,
        error: dict[str, Any] | None,
        usage: dict[str, Any] | None,
        ended_at: float,
        turn: TurnRecord | None,
        blocks: Sequence[bytes],
        chunks: Sequence[TokenChunk] = (),
        head: str | None = None,
    ) -> None:
        """Ends a generation: its whole log (in place of what there is), its turn as it is now, and
        its session's new `head`. `blocks` are the keys of all full blocks of its sequence from the
        root on; the turn gets those that none above it has, and without a turn nobody does.
        StoreConflict where it is gone: then `drop_blocks` tells which to forget."""
        operation = partial(
            operations.finish,
            generation_id=generation_id,
            status=status,
            finish_reason=finish_reason,
            error=error,
            usage=usage,
            ended_at=ended_at,
            final=turn,
            keys=blocks,
            chunks=chunks,
            head=head,
        )
        await self._write(operation)

    async def generation(self, owner: str, id: str) -> GenerationRecord | None:
        return await self._read(queries.find_generation, owner, id)

    async def generation_log(self, id: str) -> GenerationLog:
        """The token ids in order, as far as there is no gap and nothing twice, and the logprobs of
        those chunks that have some."""
        return await self._read(queries.find_log, id)

    async def running(self) -> list[tuple[GenerationRecord, list[int], list[bytes]]]:
        """All generations that did not end, oldest first, each with its log."""
        return await self._read(queries.list_running)

    async def set_crashes(self, crashes: Mapping[str, int]) -> None:
        """How many deaths of the engine each of these generations was running at."""
        await self._write(operations.set_crashes, crashes)

    async def expire(self, before: float, gone_before: float) -> int:
        """Deletes the logs of generations that ended before that time, and older idempotency keys;
        how many generations. Their turns stay. What ended before `gone_before` is deleted whole;
        until then a generation without `usage` is known to have been."""
        return await self._write(operations.expire, before, gone_before)

    async def delete_response(self, owner: str, generation_id: str) -> list[bytes]:
        """Deletes an ended generation and its turns, as far as nothing else builds on them and no
        listed session shows them, and an unlisted session that nothing is left of. Those blocks
        that no turn has any more are dropped, as by `drop_blocks`."""
        return await self._write(operations.delete_response, owner, generation_id)

    async def old_unlisted(self, before: float) -> list[tuple[str, str]]:
        """(owner, id) of unlisted sessions that nothing happened in since that time."""
        return await self._read(queries.list_old_unlisted, before)

    async def idempotent(self, owner: str, key: str) -> IdempotencyRecord | None:
        return await self._read(queries.find_idempotency, owner, key)

    # --------------------------------------------------------------------------------- blocks

    async def drop_blocks(self, keys: Sequence[bytes]) -> list[bytes]:
        """Of KV blocks whose turn is gone, those that no turn has: they are returned for the engine
        to forget, and are among `dropped_blocks` until `blocks_forgotten`, or a turn has them."""
        return await self._write(blocks.drop, keys)

    async def dropped_blocks(self) -> list[bytes]:
        """Keys of blocks that no turn has and the engine must still forget."""
        return await self._read(queries.list_dropped_blocks)

    async def blocks_forgotten(self, keys: Sequence[bytes]) -> None:
        await self._write(blocks.forgotten, keys)

    # ---------------------------------------------------------------------------------------

    async def _write(self, operation: Callable[..., T], *arguments: Any) -> T:
        return await self._writer.run(lambda connection: operation(connection, *arguments))

    async def _read(self, query: Callable[..., T], *arguments: Any) -> T:
        if self._closed:
            raise StoreError("the store is closed")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._run_query, query, arguments)

    def _run_query(self, query: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        give_up = time.monotonic() + self._database.patience
        while True:
            try:
                with self._database.reading.connect() as connection:
                    return query(connection, *arguments)
            except (SQLAlchemyError, sqlite3.Error) as error:
                if not is_unreachable(error) or time.monotonic() >= give_up:
                    raise store_error(error, self._database.where) from error
            time.sleep(RETRY_INTERVAL)
