"""The writer: one commit for many operations, and a failure that stays where it belongs."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, event, text

from server.store import operations
from server.store.database import open_database
from server.store.errors import StoreConflict, StoreError
from server.store.store import Store
from server.store.writer import Writer
from tests.server.store.conftest import Place
from tests.server.store.making import a_session, a_turn

pytestmark = pytest.mark.anyio


@contextmanager
def on_commit(heard: Callable[[], None]) -> Iterator[None]:
    """`heard` is called before each commit of any engine."""

    def committing(_connection: Connection) -> None:
        heard()

    event.listen(Engine, "commit", committing)
    try:
        yield
    finally:
        event.remove(Engine, "commit", committing)


class Gate:
    """Holds the writer inside an operation until it is opened, so that a queue can form."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def operation(self, _connection: Connection) -> None:
        self.entered.set()
        assert self.opened.wait(30)


@contextmanager
def writing(place: Place, capacity: int) -> Iterator[Writer]:
    database, connection = open_database(place.url, place.folder, None)
    writer = Writer(database, connection, capacity)
    try:
        yield writer
    finally:
        writer.close()
        database.close()


class TestGroupCommit:
    async def test_many_writers_share_commits(self, place: Place) -> None:
        commits: list[None] = []
        store = place.open()
        with on_commit(lambda: commits.append(None)):
            await asyncio.gather(
                *(store.create_session(a_session(f"s{n:04}")) for n in range(1000))
            )
        try:
            assert 1 <= len(commits) <= 20
            page, more = await store.sessions("ann", limit=1000)
            assert len(page) == 1000 and not more
        finally:
            store.close()

    async def test_in_the_order_they_were_given(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await asyncio.gather(
            *(store.update_session("s", title=str(n), updated_at=float(n)) for n in range(200))
        )
        session = await store.session("ann", "s")
        assert session is not None and session.title == "199"

    async def test_a_failure_is_alone(self, store: Store) -> None:
        commits: list[None] = []
        with on_commit(lambda: commits.append(None)):
            ends = await asyncio.gather(
                store.create_session(a_session("a")),
                store.create_session(a_session("a")),
                store.begin(
                    [a_turn("t", "a"), a_turn("bad", "a", token_ids=[-1])],
                    None,
                    head=None,
                    updated_at=1.0,
                ),
                store.create_session(a_session("b")),
                return_exceptions=True,
            )
        assert len(commits) <= 2
        assert ends[0] is None and ends[3] is None
        assert isinstance(ends[1], StoreConflict) and isinstance(ends[2], StoreError)
        assert [s.id for s in (await store.sessions("ann", limit=9))[0]] == ["b", "a"]
        assert await store.turns("a") == []

    async def test_a_commit_that_fails_fails_its_group(self, store: Store) -> None:
        def fail() -> None:
            raise OSError("no space left")

        with on_commit(fail):
            ends = await asyncio.gather(
                *(store.create_session(a_session(f"a{n}")) for n in range(5)),
                return_exceptions=True,
            )
        assert [type(end) for end in ends] == [StoreError] * 5
        assert all("no space left" in str(end) for end in ends)
        assert await store.sessions("ann", limit=9) == ([], False)
        await store.create_session(a_session("b"))
        assert [s.id for s in (await store.sessions("ann", limit=9))[0]] == ["b"]

    async def test_a_transaction_that_is_lost_fails_its_group(self, place: Place) -> None:
        """As SQLite does when it can't go on: it rolls back everything on its own."""

        def lose(connection: Connection) -> None:
            connection.exec_driver_sql("ROLLBACK")
            raise OSError("everything is lost")

        def create(name: str) -> Callable[[Connection], None]:
            return lambda connection: operations.create_session(connection, a_session(name), None)

        with writing(place, 10) as writer:
            gate = Gate()
            waiting = [asyncio.create_task(writer.run(gate.operation))]
            await asyncio.to_thread(gate.entered.wait, 30)
            jobs = [create("before"), lose, create("after")]
            waiting += [asyncio.create_task(writer.run(job)) for job in jobs]
            await asyncio.sleep(0)  # each task gets as far as the queue
            assert writer.queue_length == 4
            gate.opened.set()
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert ends[0] is None
            assert [str(end) for end in ends[1:]] == [f"{ends[1]}"] * 3
            assert all(isinstance(end, StoreError) for end in ends[1:])
            count = text("SELECT count(*) FROM session")
            assert await writer.run(lambda connection: connection.scalar(count)) == 0

    async def test_what_waits_is_bounded(self, place: Place) -> None:
        gate = Gate()
        with writing(place, 3) as writer:
            waiting = [asyncio.create_task(writer.run(gate.operation)) for _ in range(3)]
            await asyncio.to_thread(gate.entered.wait, 30)
            assert writer.queue_length == 3
            with pytest.raises(StoreError, match="3 operations are waiting for the store"):
                await writer.run(gate.operation)
            gate.opened.set()
            await asyncio.gather(*waiting)
            assert writer.queue_length == 0
            await writer.run(gate.operation)

    async def test_nobody_waits_any_more(self, place: Place) -> None:
        gate = Gate()
        with writing(place, 9) as writer:
            first = asyncio.create_task(writer.run(gate.operation))
            await asyncio.to_thread(gate.entered.wait, 30)
            second = asyncio.create_task(
                writer.run(lambda c: operations.create_session(c, a_session("s"), None))
            )
            await asyncio.sleep(0)
            assert writer.queue_length == 2
            second.cancel()
            gate.opened.set()
            await first
            count = text("SELECT count(*) FROM session")
            assert await writer.run(lambda connection: connection.scalar(count)) == 1
            assert second.cancelled()


class TestClosing:
    async def test_what_is_queued_is_written(self, place: Place) -> None:
        store = place.open()
        tasks = [asyncio.create_task(store.create_session(a_session(f"s{n}"))) for n in range(100)]
        await asyncio.sleep(0)  # each task gets as far as the queue
        store.close()
        store.close()
        await asyncio.gather(*tasks)
        with pytest.raises(StoreError, match="the store is closed"):
            await store.create_session(a_session("late"))
        with pytest.raises(StoreError, match="the store is closed"):
            await store.session("ann", "s1")
        store = place.open()
        try:
            assert len((await store.sessions("ann", limit=200))[0]) == 100
        finally:
            store.close()


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from server.store.errors import StoreError
from server.store.store import Store
from tests.server.store.making import a_session

async def main():
    store = Store.open(None, Path(sys.argv[1]))
    await store.create_session(a_session("before"))
    size = (Path(sys.argv[1]) / "headwater.db-wal").stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8192, hard))
    big = {"x": "y" * 100_000}
    ends = await asyncio.gather(
        *(store.create_session(a_session(f"s{n}", metadata=big)) for n in range(5)),
        return_exceptions=True,
    )
    assert all(isinstance(end, StoreError) for end in ends), ends
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    await store.create_session(a_session("after"))
    found, _ = await store.sessions("ann", limit=9)
    assert sorted(session.id for session in found) == ["after", "before"], found
    store.close()
    print(ends[0])

asyncio.run(main())
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """The file may grow no more, as on a full disk, and then may again."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "headwater.db cannot be used" in done.stdout
