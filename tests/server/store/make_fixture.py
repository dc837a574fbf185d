"""Writes the fixtures of today's schema, `fixtures/REVISION.sqlite.sql` and `.postgresql.sql`: run
`python -m tests.server.store.make_fixture` once for each new revision, and keep the old ones."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from server.store.records import TokenChunk
from server.store.store import Store
from tests.server.store.making import ENDED, a_generation, a_request, a_session, a_text_turn
from tests.server.store.postgresql import find_programs, running

FOLDER = Path(__file__).parent / "fixtures"
SESSION = a_session("s", title="It's 50% done", metadata={"a": [1, None]}, head="t2")
ANSWER = a_text_turn("t2", "hello", parent="t1")
END: dict[str, Any] = ENDED | {
    "turn": ANSWER,
    "blocks": [b"k1", b"k2"],
    "chunks": [TokenChunk("g1", 0, [5, 6], b"lp"), TokenChunk("g1", 2, [7])],
}


async def fill(store: Store) -> None:
    """What `check` finds in a store of any revision."""
    await store.create_session(SESSION)
    await store.begin(
        [a_text_turn("t1", "Grüße"), ANSWER],
        a_generation("g1", session="s", turn="t2"),
        head=("s", "t2"),
        updated_at=1500.0,
        idempotency=a_request("key"),
    )
    await store.finish("g1", **END)
    await store.begin([], a_generation("g2"), head=None, updated_at=1.0)
    await store.create_session(a_session("deleted"))
    await store.delete_session("ann", "deleted", [b"dropped"])


async def check(store: Store) -> None:
    """Finds everything that `fill` wrote."""
    session = await store.session("ann", "s")
    assert session is not None and session.title == SESSION.title
    assert (session.metadata, session.updated_at) == (SESSION.metadata, 2000.0)
    path = await store.path("s", session.head)
    assert [turn.content[0]["text"] for turn in path] == ["Grüße", "hello"]
    assert [s.id for s in (await store.sessions("ann", limit=9, query="grüsse"))[0]] == ["s"]
    assert await store.generation_log("g1") == ([5, 6, 7], [b"lp"])
    assert [record.id for record, _, _ in await store.running()] == ["g2"]
    assert await store.idempotent("ann", "key") == a_request("key")
    assert await store.dropped_blocks() == [b"dropped"]
    assert await store.delete_session("ann", "s") == [b"k1", b"k2"]


def main() -> None:
    programs = find_programs()
    assert programs is not None, "needs the package postgresql"
    with tempfile.TemporaryDirectory() as folder, running(programs) as cluster:
        url = cluster.make_database()
        for place in (None, url):
            store = Store.open(place, Path(folder))
            asyncio.run(fill(store))
            store.close()
        connection = sqlite3.connect(Path(folder) / "headwater.db")
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        lines = "\n".join(connection.iterdump()) + "\n"
        (FOLDER / f"{revision}.sqlite.sql").write_text(lines)
        connection.close()
        dump = subprocess.run(
            [programs / "pg_dump", "--inserts", "--no-owner", "--no-comments", url],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ,
        ).stdout
        # `\restrict` is psql's, and SQL comments name a version
        kept = [line for line in dump.splitlines() if line and not line.startswith(("\\", "--"))]
        (FOLDER / f"{revision}.postgresql.sql").write_text("\n".join(kept) + "\n")


if __name__ == "__main__":
    main()
