"""A PostgreSQL that goes away and comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from server.store.database import open_database
from server.store.errors import StoreError, StoreLocked
from server.store.lock import ADVISORY_KEY
from server.store.store import Store
from tests.server.store.making import a_session
from tests.server.store.postgresql import Cluster, find_programs, running

pytestmark = pytest.mark.anyio


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """Not the one of the other tests, whose connections would be lost as well."""
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server here: install the package postgresql")
    with running(programs) as cluster:
        yield cluster


async def test_it_is_killed_and_started_again(own_cluster: Cluster, tmp_path: Path) -> None:
    store = Store.open(own_cluster.make_database(), tmp_path)
    acknowledged: list[str] = []
    stop = asyncio.Event()
    progress = asyncio.Condition()

    async def write(writer: int) -> None:
        n = 0
        while not stop.is_set():
            name = f"s{writer}-{n}"
            try:
                await store.create_session(a_session(name))
            except StoreError:  # only one whose commit was under way
                n += 1
                continue
            n += 1
            async with progress:
                acknowledged.append(name)
                progress.notify_all()

    async def grow() -> None:
        wanted = len(acknowledged) + 20
        async with progress:
            await progress.wait_for(lambda: len(acknowledged) >= wanted)

    try:
        writers = [asyncio.create_task(write(n)) for n in range(4)]
        for _ in range(2):
            await asyncio.wait_for(grow(), 20)
            await asyncio.to_thread(own_cluster.stop)
            during = asyncio.create_task(store.sessions("ann", limit=1))
            await asyncio.to_thread(own_cluster.start)
            back = time.monotonic()
            await asyncio.wait_for(grow(), 10)
            assert time.monotonic() - back < 10
            assert len((await during)[0]) == 1  # a read waits, too
        stop.set()
        await asyncio.gather(*writers)
        found, _ = await store.sessions("ann", limit=1_000_000)
        names = [session.id for session in found]
        assert set(acknowledged) <= set(names) and len(names) == len(set(names))
    finally:
        stop.set()
        await asyncio.to_thread(store.close)


async def test_it_stays_away(own_cluster: Cluster, tmp_path: Path) -> None:
    database, connection = open_database(own_cluster.make_database(), tmp_path, None)
    assert database.patience == 10.0
    database.patience = 0.5
    store = Store(database, connection)
    try:
        await store.create_session(a_session("before"))
        await asyncio.to_thread(own_cluster.stop)
        begun = time.monotonic()
        with pytest.raises(StoreError, match=r"the store postgresql://.* cannot be used"):
            await store.create_session(a_session("s"))
        assert 0.5 <= time.monotonic() - begun < 5
        with pytest.raises(StoreError, match=r"the store postgresql://.* cannot be used"):
            await store.session("ann", "before")
        await asyncio.to_thread(own_cluster.start)
        await store.create_session(a_session("after"))
        found, _ = await store.sessions("ann", limit=9)
        assert {session.id for session in found} == {"before", "after"}
    finally:
        await asyncio.to_thread(store.close)


async def test_it_stands_still(
    own_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sockets are there, and nobody answers."""
    monkeypatch.setattr("server.store.postgresql.ANSWER_SECONDS", 1.0)
    database, connection = open_database(own_cluster.make_database(), tmp_path, None)
    database.patience = 0.5
    store = Store(database, connection)
    try:
        await store.create_session(a_session("before"))
        assert await store.session("ann", "before") is not None  # a reader has a connection
        with own_cluster.paused():
            begun = time.monotonic()
            for wanted in (store.create_session(a_session("s")), store.session("ann", "before")):
                with pytest.raises(StoreError, match=r"it does not answer|timeout expired"):
                    await wanted
            assert time.monotonic() - begun < 20  # a new connection has its own five seconds
        deadline = time.monotonic() + 10
        while True:  # the old connection's end, and the lock's, is seen a moment later
            try:
                await store.create_session(a_session("after"))
                break
            except StoreError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
        found, _ = await store.sessions("ann", limit=9)
        assert {"before", "after"} <= {session.id for session in found}
    finally:
        await asyncio.to_thread(store.close)


async def test_its_lock_is_taken_by_another(cluster: Cluster, tmp_path: Path) -> None:
    """Once the connection that holds the lock is gone, nothing is written without a new one."""
    url = cluster.make_database()
    store = Store.open(url, tmp_path)
    try:
        with psycopg.connect(url, autocommit=True, application_name="a thief") as other:
            await store.create_session(a_session("before"))
            holders = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND database = (%s)"
            database = "SELECT oid FROM pg_database WHERE datname = current_database()"
            (oid,) = other.execute(database).fetchone() or ()
            (pid,) = other.execute(holders, [oid]).fetchone() or ()
            other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
            other.execute("SELECT pg_advisory_lock(%s)", [ADVISORY_KEY])
            with pytest.raises(StoreLocked, match=r"another server uses .*: a thief since"):
                await store.create_session(a_session("s"))
            assert await store.session("ann", "s") is None
            other.execute("SELECT pg_advisory_unlock(%s)", [ADVISORY_KEY])
            await store.create_session(a_session("after"))
            locked = other.execute(holders, [oid]).fetchall()
            assert len(locked) == 1 and locked[0][0] != pid
    finally:
        store.close()
