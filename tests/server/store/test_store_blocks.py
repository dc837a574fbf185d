"""Which turns have which KV blocks, and which a deletion leaves to nobody."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sqlalchemy import select

from server.store.records import TokenChunk, TurnRecord
from server.store.schema import turn_block
from server.store.store import Store
from tests.server.store.making import ENDED, a_generation, a_session, a_turn

pytestmark = pytest.mark.anyio


async def begin(store: Store, session: str, id: str, parent: str | None = None) -> TurnRecord:
    """A turn that is being written by the generation `g-{id}`."""
    turn = a_turn(id, session, parent)
    generation = a_generation(f"g-{id}", session=session, turn=id)
    await store.begin([turn], generation, head=None, updated_at=1.0)
    return turn


async def answer(
    store: Store, session: str, id: str, keys: Sequence[bytes], parent: str | None = None
) -> None:
    """A turn whose generation ended with these blocks."""
    turn = await begin(store, session, id, parent)
    await store.finish(f"g-{id}", **ENDED | {"turn": turn, "blocks": keys})


async def rows(store: Store, turn: str) -> list[tuple[int, bytes]]:
    query = select(turn_block.c.position, turn_block.c.key).where(turn_block.c.turn == turn)
    return await store._read(lambda connection: sorted(map(tuple, connection.execute(query))))


class TestEnds:
    async def test_a_turn_has_what_is_new(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await answer(store, "s", "a", [b"k0", b"k1"])
        await answer(store, "s", "b", [b"k0", b"k1", b"k2", b"k3"], parent="a")
        await answer(store, "s", "c", [b"k0", b"k1", b"k2", b"k3", b"k4"], parent="b")
        await answer(store, "s", "b2", [b"k0", b"k1", b"k2"], parent="a")
        await answer(store, "s", "rewritten", [b"k0", b"r1", b"r2"], parent="b")
        assert await rows(store, "a") == [(0, b"k0"), (1, b"k1")]
        assert await rows(store, "b") == [(2, b"k2"), (3, b"k3")]
        assert await rows(store, "c") == [(4, b"k4")]
        assert await rows(store, "b2") == [(2, b"k2")]
        assert await rows(store, "rewritten") == [(1, b"r1"), (2, b"r2")]

    async def test_without_a_turn(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await begin(store, "s", "a")
        await store.finish("g-a", **ENDED | {"blocks": [b"k"]})
        assert await rows(store, "a") == []
        assert await store.delete_session("ann", "s") == []

    async def test_again(self, store: Store) -> None:
        """An answer that is gone on with; at last by an engine whose blocks have other keys."""
        await store.create_session(a_session("s"))
        turn = await begin(store, "s", "a")
        end = ENDED | {"turn": turn}
        await store.finish("g-a", **end | {"blocks": [b"k0", b"k1"]})
        await store.finish("g-a", **end | {"blocks": [b"k0"]})
        assert await rows(store, "a") == [(0, b"k0"), (1, b"k1")]
        await store.finish("g-a", **end | {"blocks": [b"k0", b"k1", b"k2"]})
        assert await rows(store, "a") == [(0, b"k0"), (1, b"k1"), (2, b"k2")]
        await store.create_session(a_session("s2"))
        await answer(store, "s2", "other", [b"k0"])
        assert await store.dropped_blocks() == []
        await store.finish("g-a", **end | {"blocks": [b"o0", b"o1"]})
        assert await rows(store, "a") == [(0, b"o0"), (1, b"o1"), (2, b"k2")]
        assert await store.dropped_blocks() == [b"k1"]

    async def test_one_that_is_used_again_is_not_forgotten(self, store: Store) -> None:
        await store.drop_blocks([b"k", b"gone"])
        await store.create_session(a_session("s"))
        await answer(store, "s", "a", [b"k"])
        assert await store.dropped_blocks() == [b"gone"]
        assert await store.delete_session("ann", "s") == [b"k"]

    async def test_one_that_comes_after_the_deletion(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await answer(store, "s", "a", [b"shared"])
        assert await store.drop_blocks([b"late", b"shared", b"late"]) == [b"late"]
        assert await store.drop_blocks([b"late"]) == [b"late"]
        assert await store.dropped_blocks() == [b"late"]


class TestCopies:
    async def test_as_far_as_they_go(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await answer(store, "s", "a", [b"k0", b"k1"])
        await answer(store, "s", "b", [b"k0", b"k1", b"k2", b"k3"], parent="a")
        turns = [a_turn("a'", "fork"), a_turn("b'", "fork", "a'")]
        copied = [("a", "a'"), ("b", "b'")]
        await store.copy_path(turns, a_session("fork"), copied, 3)
        assert await rows(store, "a'") == [(0, b"k0"), (1, b"k1")]
        assert await rows(store, "b'") == [(2, b"k2")]
        assert await store.delete_session("ann", "s") == [b"k3"]
        await answer(store, "fork", "c", [b"k0", b"k1", b"k2", b"k4"], parent="b'")
        assert await rows(store, "c") == [(3, b"k4")]
        assert sorted(await store.delete_session("ann", "fork") or []) == [
            *(b"k0", b"k1", b"k2", b"k4")
        ]

    async def test_an_import(self, store: Store) -> None:
        await store.copy_path([a_turn("a", "imported")], a_session("imported"), [], 0)
        assert await rows(store, "a") == []
        assert await store.delete_session("ann", "imported") == []


class TestSessions:
    async def test_shared_ones_stay(self, store: Store) -> None:
        await store.create_session(a_session("s1"))
        await store.create_session(a_session("s2", owner="bob"))
        await answer(store, "s1", "a", [b"own", b"shared"])
        await answer(store, "s1", "b", [b"own", b"shared"])
        await answer(store, "s2", "c", [b"shared", b"other"])
        known = [b"known", b"other", b"own", b"known"]
        assert await store.delete_session("ann", "s1", known) == [b"own", b"known"]
        assert await store.dropped_blocks() == [b"known", b"own"]
        assert await store.delete_session("bob", "s2") == [b"shared", b"other"]
        assert await store.dropped_blocks() == [b"known", b"other", b"own", b"shared"]
        await store.blocks_forgotten([b"own", b"shared", b"unknown"])
        assert await store.dropped_blocks() == [b"known", b"other"]

    async def test_one_goes_with_all_it_had(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await begin(store, "s", "a")
        await answer(store, "s", "b", [b"k"], parent="a")
        await store.log_tokens([TokenChunk("g-a", 0, [1])])
        assert await store.delete_session("ann", "s") == [b"k"]
        assert await store.session("ann", "s") is None
        assert await store.turns("s") == [] and await store.running() == []
        assert await rows(store, "b") == []
        assert await store.generation("ann", "g-a") is None
        assert await store.generation_log("g-a") == ([], [])
        assert await store.delete_session("ann", "s") is None

    async def test_many(self, store: Store) -> None:
        keys = [n.to_bytes(32, "big") for n in range(40_000)]  # above SQLite's 32,766 parameters
        await store.create_session(a_session("s"))
        await answer(store, "s", "a", keys)
        assert sorted(await store.delete_session("ann", "s") or []) == keys
        await store.blocks_forgotten(keys[1:])
        assert await store.dropped_blocks() == keys[:1]


class TestResponses:
    async def test_the_last_takes_all_with_it(self, store: Store) -> None:
        await store.create_session(a_session("s", listed=False))
        await answer(store, "s", "a", [b"k0", b"shared"])
        await answer(store, "s", "b", [b"k0", b"shared", b"k2"], parent="a")
        await answer(store, "s", "c", [b"k0", b"shared", b"k2", b"k3"], parent="b")
        await store.create_session(a_session("other"))
        await answer(store, "other", "d", [b"shared"])
        assert await store.delete_response("ann", "g-b") == []  # c builds on it
        assert [turn.id for turn in await store.turns("s")] == ["a", "b", "c"]
        assert sorted(await store.delete_response("ann", "g-c")) == [b"k2", b"k3"]
        assert [turn.id for turn in await store.turns("s")] == ["a"]
        assert await store.session("ann", "s") is not None
        assert await store.delete_response("ann", "g-a") == [b"k0"]
        assert await store.session("ann", "s") is None
        assert await store.dropped_blocks() == [b"k0", b"k2", b"k3"]
        assert [turn.id for turn in await store.turns("other")] == ["d"]

    async def test_in_a_listed_session_the_turn_stays(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await answer(store, "s", "a", [b"k"])
        assert await store.delete_response("ann", "g-a") == []
        assert await store.generation("ann", "g-a") is None
        assert await rows(store, "a") == [(0, b"k")]
        assert await store.dropped_blocks() == []
