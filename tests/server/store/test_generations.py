"""Generations, their logs, idempotency keys and expiry."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert, text

from server.store import operations
from server.store.database import open_database
from server.store.errors import StoreConflict
from server.store.records import GenerationRecord, IdempotencyRecord, TokenChunk
from server.store.schema import generation
from server.store.store import Store
from tests.server.store.conftest import Place
from tests.server.store.making import (
    ENDED,
    a_generation,
    a_request,
    a_session,
    a_text_turn,
    a_turn,
)

pytestmark = pytest.mark.anyio


async def start(store: Store, *records: GenerationRecord) -> None:
    for record in records:
        await store.begin([], record, head=None, updated_at=1500.0)


class TestRoundTrip:
    async def test_a_generation(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        record = GenerationRecord(
            id="gen_1",
            owner="ann",
            session="s",
            turn="t",
            kind="turn",
            status="interrupted",
            prompt_token_ids=list(range(5000)),
            resumed_token_ids=[3, 2**32 - 1],
            params=bytes(range(256)),
            extra={"stop": ["\n", "\0"], "seed": 2**63},
            crashes=2,
            finish_reason="length",
            error={"code": "engine_crash"},
            usage={"total_tokens": 7},
            created_at=1764000000.123456,
            ended_at=1764000001.5,
        )
        await start(store, record, a_generation("gen_2", kind="chat"))
        assert await store.generation("ann", "gen_1") == record
        assert await store.generation("ann", "gen_2") == a_generation("gen_2", kind="chat")
        session = await store.session("ann", "s")
        assert session is not None and session.updated_at == 1500.0

    async def test_the_end(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        running = a_turn("b", parent="a", status="running", generation="g")
        await store.begin(
            [a_text_turn("a", "hi"), running],
            a_generation("g", session="s", turn="b"),
            head=("s", "b"),
            updated_at=1500.0,
        )
        await store.log_tokens([TokenChunk("g", 0, [5, 6])])
        final = dataclasses.replace(
            running,
            content=[{"type": "text", "text": "Grüße"}],
            prompt_token_ids=[9],
            token_ids=[5, 6, 7],
            status="complete",
            finish_reason="stop",
            notes={"n": 1},
        )
        end: dict[str, Any] = {
            "status": "complete",
            "finish_reason": "stop",
            "error": {"code": "none"},
            "usage": {"completion_tokens": 3},
            "ended_at": 1600.5,
        }
        await store.finish(
            "g", **end, turn=final, blocks=[b"k"], chunks=[TokenChunk("g", 0, [5, 6, 7], b"lp")]
        )
        assert await store.generation("ann", "g") == a_generation("g", session="s", turn="b", **end)
        assert await store.generation_log("g") == ([5, 6, 7], [b"lp"])
        found = await store.turn("s", "b")
        assert found is not None and dataclasses.replace(found, number=0) == final
        session = await store.session("ann", "s")
        assert session is not None and session.updated_at == 1600.5
        assert [s.id for s in (await store.sessions("ann", limit=5, query="grÜSSE"))[0]] == ["s"]
        assert await store.running() == []
        assert await store.delete_session("ann", "s") == [b"k"]

    async def test_the_end_of_one_that_is_gone(self, store: Store) -> None:
        with pytest.raises(StoreConflict, match="the generation g is gone"):
            await store.finish("g", **ENDED)
        await start(store, a_generation("g"))
        with pytest.raises(StoreConflict, match="the turn t is gone"):
            await store.finish("g", **ENDED | {"turn": a_turn("t")})
        assert await store.generation("ann", "g") == a_generation("g")


class TestLogs:
    async def test_order_and_repetition(self, store: Store) -> None:
        await start(store, a_generation("g"), a_generation("h"))
        await store.log_tokens([TokenChunk("g", 2, [12], b"c"), TokenChunk("h", 0, [99])])
        await store.log_tokens([TokenChunk("g", 0, [10, 11], b"ab")])
        await store.log_tokens([TokenChunk("g", 0, [10, 11], b"ab"), TokenChunk("g", 3, [13])])
        await store.log_tokens([])
        assert await store.generation_log("g") == ([10, 11, 12, 13], [b"ab", b"c"])
        assert await store.generation_log("h") == ([99], [])
        assert await store.generation_log("nothing") == ([], [])
        # A commit that was thought to have failed: the next chunk begins where that one did.
        await store.log_tokens([TokenChunk("h", 0, [99, 100, 101], b"later")])
        assert await store.generation_log("h") == ([99, 100, 101], [b"later"])

    @pytest.mark.parametrize("position", [1, 3])  # an overlap, a gap
    async def test_what_does_not_follow_is_left_out(self, store: Store, position: int) -> None:
        await start(store, a_generation("g"))
        await store.log_tokens([TokenChunk("g", 0, [10, 11], b"ab")])
        await store.log_tokens([TokenChunk("g", position, [7], b"c")])
        await store.log_tokens([TokenChunk("g", position + 1, [8], b"d")])
        assert await store.generation_log("g") == ([10, 11], [b"ab"])
        assert [log for _, *log in await store.running()] == [[[10, 11], [b"ab"]]]

    async def test_a_deleted_generation_takes_no_others_tokens(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await start(store, a_generation("g", session="s"), a_generation("h"))
        await store.delete_session("ann", "s")
        await store.log_tokens([TokenChunk("g", 0, [1]), TokenChunk("h", 0, [2])])
        assert await store.generation_log("g") == ([], [])
        assert await store.generation_log("h") == ([2], [])

    async def test_what_was_running(self, store: Store) -> None:
        old, new, done = (
            a_generation("z", created_at=1.0),
            a_generation("a", created_at=2.0, resumed_token_ids=[4]),
            a_generation("m", created_at=1.5),
        )
        await start(store, new, old, done)
        await store.log_tokens([TokenChunk("z", 0, [1, 2], b"x"), TokenChunk("m", 0, [3])])
        await store.finish("m", **ENDED)
        assert await store.running() == [(old, [1, 2], [b"x"]), (new, [], [])]

    async def test_crashes_are_counted(self, store: Store) -> None:
        await start(store, a_generation("a"), a_generation("b"), a_generation("c"))
        await store.set_crashes({"a": 1, "b": 1})
        await store.set_crashes({"b": 2, "gone": 1})
        await store.set_crashes({})
        crashes = {record.id: record.crashes for record, _, _ in await store.running()}
        assert crashes == {"a": 1, "b": 2, "c": 0}


async def begin_with(store: Store, request: IdempotencyRecord) -> None:
    await store.begin([], None, head=None, updated_at=1.0, idempotency=request)


async def create_with(store: Store, request: IdempotencyRecord) -> None:
    await store.create_session(a_session("made"), request)


async def copy_with(store: Store, request: IdempotencyRecord) -> None:
    await store.copy_path([], a_session("made"), [], 0, request)


class TestIdempotency:
    async def test_a_key_is_used_once(self, store: Store) -> None:
        request = a_request("key")
        await store.begin([], a_generation("gen_1"), head=None, updated_at=1.0, idempotency=request)
        assert await store.idempotent("ann", "key") == request
        assert await store.idempotent("ann", "KEY") is None
        with pytest.raises(StoreConflict):
            await store.begin(
                [],
                a_generation("gen_2"),
                head=None,
                updated_at=1.0,
                idempotency=a_request("key", target="gen_2"),
            )
        assert await store.idempotent("ann", "key") == request
        assert await store.generation("ann", "gen_2") is None
        other = a_request("key", owner="bob", target="gen_3")
        await store.begin([], None, head=None, updated_at=1.0, idempotency=other)
        assert await store.idempotent("bob", "key") == other

    @pytest.mark.parametrize("made_by", [begin_with, create_with, copy_with])
    async def test_one_that_expired_is_replaced(
        self, store: Store, made_by: Callable[[Store, IdempotencyRecord], Awaitable[None]]
    ) -> None:
        for owner in ("ann", "bob"):
            first = a_request("key", owner=owner, created_at=1003.0)
            await store.begin([], None, head=None, updated_at=1.0, idempotency=first)
        second = a_request("key", target="second", created_at=2000.0)
        second.replaces_before = 1003.0
        with pytest.raises(StoreConflict):
            await made_by(store, second)
        second.replaces_before = 1003.1
        await made_by(store, second)
        found = await store.idempotent("ann", "key")
        assert found == dataclasses.replace(second, replaces_before=0.0)
        assert await store.idempotent("bob", "key") == a_request("key", owner="bob")

    async def test_nothing_replaces_it_where_the_rest_fails(self, store: Store) -> None:
        first = a_request("key")
        await store.create_session(a_session("s"), first)
        second = a_request("key", created_at=2000.0, replaces_before=2000.0)
        with pytest.raises(StoreConflict):
            await store.create_session(a_session("s"), second)
        assert await store.idempotent("ann", "key") == first


class TestExpiry:
    async def test_turns_stay(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await store.begin(
            [a_turn("t", generation="old")],
            a_generation("old", session="s", turn="t"),
            head=("s", "t"),
            updated_at=1.0,
            idempotency=a_request("old", created_at=1000.0),
        )
        await store.log_tokens([TokenChunk("old", 0, [1])])
        new = a_request("new", created_at=2000.0)
        await store.begin([], a_generation("new"), head=None, updated_at=1.0, idempotency=new)
        await start(store, a_generation("running", created_at=1.0))
        usage = {"completion_tokens": 1}
        await store.finish("old", **ENDED | {"ended_at": 1999.9, "usage": usage})
        await store.finish("new", **ENDED | {"ended_at": 2000.0, "usage": usage})
        assert await store.expire(2000.0, 1000.0) == 1
        known = await store.generation("ann", "old")
        assert known is not None and known.usage is None and known.prompt_token_ids == []
        assert await store.generation_log("old") == ([], [])
        assert await store.generation("ann", "new") is not None
        assert [record.id for record, _, _ in await store.running()] == ["running"]
        assert [turn.id for turn in await store.turns("s")] == ["t"]
        assert await store.idempotent("ann", "old") is None
        assert await store.idempotent("ann", "new") == new
        assert await store.expire(2000.0, 1999.0) == 0
        assert await store.generation("ann", "old") is not None
        assert await store.expire(2000.0, 2000.0) == 0
        assert await store.generation("ann", "old") is None

    def test_it_looks_at_no_more_than_it_must(self, place: Place) -> None:
        """Of a month of generations, only at those whose log is to be deleted."""
        database, connection = open_database(place.url, place.folder, None)
        row = dataclasses.asdict(a_generation("g", status="complete", ended_at=1500.0))
        with connection.begin():
            rows = [row | {"id": f"g{n}"} for n in range(2000)]
            connection.execute(insert(generation), [*rows, row | {"usage": {"n": 1}}])
            if place.url is not None:
                connection.execute(text("ANALYZE generation"))
        explain = "EXPLAIN QUERY PLAN " if place.url is None else "EXPLAIN "
        plans: list[str] = []

        def executing(of: Connection, cursor: Any, statement: str, given: Any, *_: Any) -> None:
            if "usage IS NOT NULL" in statement:
                cursor.execute(explain + statement, given)
                plans.append(str(cursor.fetchall()))

        event.listen(connection, "before_cursor_execute", executing)
        with connection.begin():
            assert operations.expire(connection, 2000.0, 1000.0) == 1
        assert len(plans) == 2 and all("generation_with_log" in plan for plan in plans), plans
        connection.close()
        database.close()
