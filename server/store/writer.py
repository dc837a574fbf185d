"""The one thread that writes: a queue, and one commit for all that is queued.

Each operation runs in a savepoint of its own, so that one that fails takes no other with it. Its
future resolves after the commit; on SQLite and PostgreSQL alike that means it is on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from server.store.database import Database
from server.store.errors import StoreError
from server.store.failures import is_unreachable, store_error

T = TypeVar("T")
CAPACITY = 10_000
RETRY_INTERVAL = 0.2


@dataclass(slots=True)
class _Job:
    """An operation, who waits for it, and how it ended."""

    operation: Callable[[Connection], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    queued_at: float = field(default_factory=time.monotonic)
    result: Any = None
    error: Exception | None = None


class Writer:
    """Writes through `connection`, and through a new one of `database` when that is lost."""

    def __init__(
        self, database: Database, connection: Connection, capacity: int = CAPACITY
    ) -> None:
        self._database = database
        self._connection: Connection | None = connection
        self._capacity = capacity
        self._queue: deque[_Job] = deque()
        self._num_in_flight = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """Operations that were accepted and are not yet committed."""
        return len(self._queue) + self._num_in_flight

    async def run(self, operation: Callable[[Connection], T]) -> T:
        """What `operation` returns, once that is committed; cancelling the wait does not undo it.

        Raises StoreError where it failed, the commit failed, or too many are waiting."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        with self._changed:
            if self._closing:
                raise StoreError("the store is closed")
            if self.queue_length >= self._capacity:
                raise StoreError(
                    f"{self._capacity} operations are waiting for the store "
                    f"{self._database.where}; its disk is too slow, or it does not answer"
                )
            self._queue.append(_Job(operation, future, loop))
            self._changed.notify()
        return await future

    def close(self) -> None:
        """Writes what is queued, and ends the thread and its connection."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self._connection is not None:
            self._connection.close()

    def _work(self) -> None:
        while group := self._take():
            self._write(group)
            with self._changed:
                self._num_in_flight = 0
            _resolve(group)

    def _take(self) -> list[_Job]:
        """All that is queued; empty once the writer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            group = list(self._queue)
            self._queue.clear()
            self._num_in_flight = len(group)
        return group

    def _write(self, group: list[_Job]) -> None:
        """Gives every job its result or its error."""
        give_up = group[0].queued_at + self._database.patience
        while True:
            committing = False
            try:
                if self._connection is None:
                    self._connection = self._database.connect()
                transaction = self._connection.begin()
                for job in group:
                    self._run(self._connection, job)
                committing = True
                transaction.commit()
            except Exception as error:
                self._drop_connection()
                # A commit whose answer was lost may have happened: it is not tried again.
                if not committing and is_unreachable(error) and time.monotonic() < give_up:
                    time.sleep(RETRY_INTERVAL)
                    continue
                failure = store_error(error, self._database.where)
                if not isinstance(failure, StoreError):
                    why = f"the store {self._database.where} cannot be used: {error!r}"
                    failure = StoreError(why)
                for job in group:
                    job.error = failure
            return

    def _run(self, connection: Connection, job: _Job) -> None:
        """Raises only what ends the whole transaction."""
        job.error = None
        savepoint = connection.begin_nested()
        try:
            job.result = job.operation(connection)
        except Exception as error:
            if connection.invalidated:
                raise
            try:
                savepoint.rollback()
            except Exception:
                # Some failures (a full disk) make SQLite roll back everything at once.
                raise error from None
            job.error = store_error(error, self._database.where)
        else:
            savepoint.commit()

    def _drop_connection(self) -> None:
        """Really ends it: that rolls back, whatever state the transaction is in. SQLAlchemy would
        hand a connection whose commit failed to the next group, with the changes still in it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError):  # it may be broken in any way
                connection.invalidate()
                connection.close()


def _resolve(group: list[_Job]) -> None:
    """One wake-up for each event loop that waits for something in the group."""
    jobs_of: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
    for job in group:
        jobs_of.setdefault(job.loop, []).append(job)
    for loop, jobs in jobs_of.items():
        with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits any more
            loop.call_soon_threadsafe(_settle, jobs)


def _settle(jobs: Iterable[_Job]) -> None:
    for job in jobs:
        if job.future.done():  # cancelled
            continue
        if job.error is not None:
            job.future.set_exception(job.error)
        else:
            job.future.set_result(job.result)
