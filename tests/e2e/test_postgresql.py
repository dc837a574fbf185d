"""The server on PostgreSQL: kill -9 of everything, and a database that is gone for a while."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest

from tests.e2e.listeners import Ask, answers, engine_changed, listen, new_session, wait_heard
from tests.e2e.session_client import Session, connected
from tests.fixtures.server import Server, serving, wait_until
from tests.server.store.postgresql import Cluster, find_programs, running

pytestmark = pytest.mark.e2e

QUESTION = "Tell me of rivers."
LONG = {"max_tokens": 400, "ignore_eos": True, "seed": 5, "temperature": 1}
SHORT = {**LONG, "max_tokens": 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server here: install the package postgresql")
    with running(programs) as cluster:
        yield cluster


def next_engine(server: Server, engine: psutil.Process) -> psutil.Process:
    """The engine that comes after that one, which is killed; stopped while it loads."""
    engine.kill()
    wait_until(lambda: engine_changed(server, engine.pid), 20, "no new engine")
    loading: psutil.Process = server.engine
    loading.suspend()
    return loading


def ask(server: Server) -> Ask:
    return Ask(f"/v1/sessions/{new_session(server)}/turns", {**LONG, "input": QUESTION})


def test_a_turn_goes_on_after_kill_9_of_everything(
    tiny_server: Server, tiny_model: Path, cluster: Cluster, tmp_path: Path
) -> None:
    (expected,) = answers(listen(tiny_server, [ask(tiny_server)]))
    env = {"HEADWATER_STORE": cluster.make_database(), "HEADWATER_DATA": str(tmp_path)}
    with serving(str(tiny_model), env=env) as server, connected(server) as client:
        session = Session(client)
        before = session.turn(QUESTION, **SHORT)
        running = Session(client)
        reader = running.begin(QUESTION, **LONG)
        reader.read(30)
        server.engine.suspend()
        assert running.get()["generating"] == reader.generation, "too late"
        server.kill_all()
    assert not (tmp_path / "headwater.db").exists()
    with serving(str(tiny_model), env=env) as server, connected(server) as client:
        num_read = len(reader.token_ids)
        assert 0 < num_read < len(expected.token_ids)
        reader.client = client
        reader.read_all()
        assert (reader.text, reader.token_ids) == (expected.text, expected.token_ids)
        assert reader.done is not None and reader.done["finish_reason"] == "length"
        # What was acknowledged is there, and the session goes on.
        kept = Session(client, session.id)
        assert kept.last()["content"] == before["content"]
        assert kept.turn("And?", **SHORT)["status"] == "complete"
        server.wait_idle()


def test_a_database_that_is_gone_while_an_engine_gets_ready(
    tiny_server: Server, tiny_model: Path, cluster: Cluster, tmp_path: Path
) -> None:
    """What runs goes on, and what was deleted is forgotten, as soon as it is back."""
    (expected,) = answers(listen(tiny_server, [ask(tiny_server)]))
    url = cluster.make_database()
    env = {"HEADWATER_STORE": url, "HEADWATER_DATA": str(tmp_path)}

    def files() -> set[str]:
        return {file.name for file in (tmp_path / "kv").glob("??/*.kv")}

    def num_dropped() -> int:
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT count(*) FROM dropped_block").fetchone()
            assert row is not None
            return int(row[0])

    with serving(str(tiny_model), env=env) as server, connected(server) as client:
        deleted = Session(client)
        deleted.turn(QUESTION * 8, **SHORT)
        num_blocks = (len(deleted.tokens()) - 1) // 16
        wait_until(lambda: len(files()) == num_blocks, 20, "the blocks are not written")
        unwanted = files()

        running = listen(server, [ask(server)])
        wait_heard(running, 30)
        engine = server.engine
        engine.suspend()
        assert running[0].answer.finish_reason is None, "too late"
        loading = next_engine(server, engine)
        deleted.delete()
        assert num_dropped() == num_blocks
        loading = next_engine(server, loading)  # nobody is left that was told to forget its blocks
        cluster.stop()
        try:
            loading.resume()
            wait_until(lambda: "store_failed" in server.log, 40, "nobody missed the database")
            assert server.process.poll() is None
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert unwanted <= files()
            assert running[0].is_alive()
        finally:
            cluster.start()
        assert answers(running) == [expected]
        wait_until(lambda: not unwanted & files(), 10, "deleted blocks stay on disk")
        wait_until(lambda: num_dropped() == 0, 10, "the engine's answer is not stored")
        assert Session(client).turn("Hi", **SHORT)["status"] == "complete"
        assert server.metric("headwater_engine_restarts_total") == 2
        assert "Traceback" not in server.log
        server.wait_idle()
