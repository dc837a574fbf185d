"""Which KV blocks a deleted session leaves to nobody."""

from __future__ import annotations

import pytest

from server.store.records import TokenChunk
from server.store.store import Store
from tests.server.store.making import ENDED, a_generation, a_session, a_turn

pytestmark = pytest.mark.anyio


class TestBlocks:
    async def test_shared_ones_stay(self, store: Store) -> None:
        await store.create_session(a_session("s1"))
        await store.create_session(a_session("s2", owner="bob"))
        assert await store.add_blocks("s1", [b"own", b"shared", b"own"]) == []
        assert await store.add_blocks("s2", [b"shared", b"other"]) == []
        assert await store.add_blocks("s1", [b"own"]) == []
        assert await store.delete_session("ann", "s1") == [b"own"]
        assert await store.dropped_blocks() == [b"own"]
        assert await store.delete_session("bob", "s2") == [b"other", b"shared"]
        assert await store.dropped_blocks() == [b"other", b"own", b"shared"]
        await store.blocks_forgotten([b"own", b"shared", b"unknown"])
        assert await store.dropped_blocks() == [b"other"]

    async def test_a_session_goes_with_all_it_had(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await store.begin(
            [a_turn("a"), a_turn("b", parent="a")],
            a_generation("g", session="s", turn="b"),
            head=("s", "b"),
            updated_at=1.0,
        )
        await store.log_tokens([TokenChunk("g", 0, [1])])
        assert await store.delete_session("ann", "s") == []
        assert await store.session("ann", "s") is None
        assert await store.turns("s") == [] and await store.running() == []
        assert await store.generation("ann", "g") is None
        assert await store.generation_log("g") == ([], [])
        assert await store.delete_session("ann", "s") is None

    async def test_one_that_is_used_again_is_not_forgotten(self, store: Store) -> None:
        await store.create_session(a_session("s1"))
        await store.add_blocks("s1", [b"k", b"gone"])
        await store.delete_session("ann", "s1")
        await store.create_session(a_session("s2"))
        await store.begin([], a_generation("g", session="s2"), head=None, updated_at=1.0)
        await store.finish("g", **ENDED | {"blocks": [b"k"]})
        assert await store.dropped_blocks() == [b"gone"]
        assert await store.delete_session("ann", "s2") == [b"k"]

    async def test_those_that_come_after_the_deletion(self, store: Store) -> None:
        await store.create_session(a_session("s2"))
        await store.add_blocks("s2", [b"shared"])
        assert await store.add_blocks("deleted", [b"late", b"shared", b"late"]) == [b"late"]
        assert await store.dropped_blocks() == [b"late"]

    async def test_many(self, store: Store) -> None:
        keys = [n.to_bytes(32, "big") for n in range(40_000)]  # above SQLite's 32,766 parameters
        await store.create_session(a_session("s"))
        await store.add_blocks("s", keys)
        assert await store.delete_session("ann", "s") == keys
        await store.blocks_forgotten(keys[1:])
        assert await store.dropped_blocks() == keys[:1]
