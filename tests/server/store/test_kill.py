"""kill -9: the lock goes with its holder, and what was acknowledged stays."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.store.errors import StoreError, StoreLocked
from server.store.lock import holder
from server.store.store import Store
from tests.server.store.conftest import Place
from tests.server.store.making import a_session
from tests.server.store.writing_child import NUM_WRITERS


@contextmanager
def child(place: Place, number: str) -> Iterator[subprocess.Popen[str]]:
    """The writing child; it is killed at the end, if not before."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.server.store.writing_child"),
            *(place.url or "", str(place.folder), number),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    return iter(process.stdout)


class TestLock:
    def test_the_second_names_the_first(self, place: Place) -> None:
        with child(place, "hold") as first:
            assert next(lines(first)) == "open\n"
            with pytest.raises(StoreLocked) as refused:
                place.open()
        said = str(refused.value)
        assert f"pid {first.pid} at http://127.0.0.1:8123 on " in said and " since 2" in said
        assert "\n" not in said and "password" not in said

    def test_it_ends_with_its_holder(self, place: Place) -> None:
        with child(place, "hold") as first:
            assert next(lines(first)) == "open\n"
            first.kill()
            first.wait()
            place.open().close()

    def test_also_in_one_process(self, place: Place) -> None:
        store = place.open()
        with pytest.raises(StoreLocked, match=holder(None)):
            place.open()
        store.close()
        place.open().close()

    def test_it_is_not_inherited(self, place: Place) -> None:
        store = place.open()
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
            store.close()
            place.open().close()
            other.kill()

    def test_its_file_is_private(self, tmp_path: Path) -> None:
        store = Store.open(None, tmp_path / "data")
        asyncio.run(store.create_session(a_session("s")))
        try:
            files = {path.name: path.stat().st_mode for path in (tmp_path / "data").iterdir()}
            assert {"headwater.db", "headwater.db-wal", "headwater.db-shm", "lock"} == set(files)
            assert {stat.S_IMODE(mode) for mode in files.values()} == {0o600}
            assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
        finally:
            store.close()

    def test_a_lock_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "lock").mkdir()
        with pytest.raises(StoreError, match=r"lock: Is a directory; choose another with HEADW"):
            Store.open(None, tmp_path)


class TestKill:
    @pytest.mark.parametrize("num_servers", [4, pytest.param(10, marks=pytest.mark.slow)])
    def test_nothing_acknowledged_is_lost(self, place: Place, num_servers: int) -> None:
        """Some servers in a row on one store, each killed while it writes."""
        acknowledged: dict[str, int] = {}
        chance = random.Random(7)
        for number in range(num_servers):
            with child(place, str(number)) as process:
                read = lines(process)
                for _ in range(chance.randrange(1, 60)):
                    self.note(acknowledged, next(read))
                process.kill()
                for line in read:  # what it said before it died
                    if line.endswith("\n"):
                        self.note(acknowledged, line)
            if place.url is None:
                self.check_file(place.folder / "headwater.db")
            store = place.open()
            try:
                asyncio.run(self.check(store, acknowledged))
            finally:
                store.close()
        assert len(acknowledged) >= NUM_WRITERS

    def note(self, acknowledged: dict[str, int], line: str) -> None:
        name, count = line.split()
        acknowledged[name] = int(count)

    def check_file(self, path: Path) -> None:
        connection = sqlite3.connect(path)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.close()

    async def check(self, store: Store, acknowledged: dict[str, int]) -> None:
        running = {record.id: log for record, log, _ in await store.running()}
        for name, count in acknowledged.items():
            log = running[name]
            assert len(log) >= count and log == list(range(len(log))), name
            assert await store.turn(f"s{name[1:]}", f"t{name[1:]}") is not None
