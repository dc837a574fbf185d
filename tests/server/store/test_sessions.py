"""Sessions and their turns: what goes in comes out, to its owner, in order."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from server.store.errors import StoreConflict, StoreError
from server.store.records import SessionRecord, TurnRecord
from server.store.store import Store
from tests.server.store.conftest import Place
from tests.server.store.making import a_generation, a_session, a_text_turn, a_turn

pytestmark = pytest.mark.anyio

NASTY = 'it\'s "50%" of a_b \\ / \0 \ud800 ½ Ünï 🙂'


async def add(store: Store, *turns: TurnRecord) -> None:
    await store.begin(turns, None, head=None, updated_at=1500.0)


class TestRoundTrip:
    async def test_a_session(self, store: Store) -> None:
        record = SessionRecord(
            id="sess_1",
            owner="ann",
            title=NASTY,
            instructions=NASTY,
            metadata={"n": [1, None, 2.5, {"deep": NASTY}]},
            defaults={"temperature": 0.1},
            overflow="drop_oldest",
            head="turn_1",
            listed=False,
            created_at=1764000000.123456,
            updated_at=1764000001.654321,
        )
        await store.create_session(record)
        assert await store.session("ann", "sess_1") == record
        await store.create_session(a_session("sess_2"))
        assert await store.session("ann", "sess_2") == a_session("sess_2")

    async def test_a_turn(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        root = a_turn("t1")
        record = TurnRecord(
            id="t2",
            session="s",
            parent="t1",
            role="assistant",
            content=[{"type": "text", "text": NASTY}, {"type": "function_call", "n": 1.5}],
            prompt_token_ids=[0, 1, 49151],
            token_ids=[2**32 - 1, 7],
            replaces_history=True,
            status="interrupted",
            finish_reason="length",
            generation="gen_1",
            tokenizer="abc",
            notes={"dropped": ["t0"]},
            created_at=1764000000.123456,
        )
        await add(store, root, record)
        found = await store.turn("s", "t2")
        assert found is not None and found.number > 0
        assert dataclasses.replace(found, number=0) == record
        assert [found.id for found in await store.turns("s")] == ["t1", "t2"]

    async def test_it_outlives_its_server(self, place: Place) -> None:
        store = place.open()
        await store.create_session(a_session("s", title="kept"))
        store.close()
        store = place.open()
        try:
            assert await store.session("ann", "s") == a_session("s", title="kept")
        finally:
            store.close()

    async def test_numbers_only_grow(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await add(store, a_turn("t1"))
        first = await store.turns("s")
        await store.delete_session("ann", "s")
        await store.create_session(a_session("s"))
        await add(store, a_turn("t1"))
        assert (await store.turns("s"))[0].number > first[0].number


class TestChanges:
    async def test_each_field(self, store: Store) -> None:
        await store.create_session(a_session("s", title="old", metadata={"a": 1}))
        changes: dict[str, Any] = {
            "title": "new",
            "metadata": {"b": 2},
            "defaults": {"seed": 3},
            "head": "t9",
            "updated_at": 1700.0,
        }
        for name, value in changes.items():
            assert await store.update_session("s", **{name: value}) is True
        assert await store.session("ann", "s") == a_session("s", **changes)
        assert await store.update_session("s", title=None) is True
        assert await store.session("ann", "s") == a_session("s", **changes | {"title": None})
        assert await store.update_session("nobody", title="x") is False

    async def test_other_fields_are_refused(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        with pytest.raises(TypeError, match="a session's owner cannot be set"):
            await store.update_session("s", owner="bob")

    async def test_an_id_twice(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        with pytest.raises(StoreConflict):
            await store.create_session(a_session("s", owner="bob"))
        assert await store.session("bob", "s") is None

    async def test_what_cannot_be_stored(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        with pytest.raises(StoreError):
            await add(store, a_turn("t1"), a_turn("t2", token_ids=[2**32]))
        assert await store.turns("s") == []


class TestTree:
    async def test_paths_siblings_and_rewinding(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await add(store, a_turn("a"), a_turn("b", parent="a"), a_turn("c", parent="b"))
        await add(store, a_turn("b2", parent="a"), a_turn("c2", parent="b2"), a_turn("root2"))

        async def path(at: str | None) -> list[str]:
            return [turn.id for turn in await store.path("s", at)]

        assert await path("c") == ["a", "b", "c"]
        assert await path("c2") == ["a", "b2", "c2"]
        assert await path("root2") == ["root2"]
        assert await path(None) == [] and await path("nothing") == []
        turns = await store.turns("s")
        assert [turn.id for turn in turns if turn.parent == "a"] == ["b", "b2"]
        await store.update_session("s", head="b")
        session = await store.session("ann", "s")
        assert session is not None and await path(session.head) == ["a", "b"]

    async def test_a_long_path(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        names = [f"t{n:04}" for n in range(1500)]
        parents = [None, *names[:-1]]
        await add(store, *(a_turn(n, parent=p) for n, p in zip(names, parents, strict=True)))
        assert [turn.id for turn in await store.path("s", names[-1])] == names

    async def test_a_tree_is_one_session(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await store.create_session(a_session("other"))
        await add(store, a_turn("a"))
        with pytest.raises(StoreConflict):
            await add(store, a_turn("b", "other", parent="a"))
        with pytest.raises(StoreConflict):
            await add(store, a_turn("b", parent="missing"))
        assert await store.turn("other", "a") is None
        assert await store.path("other", "a") == [] and await store.turns("other") == []

    async def test_begin_moves_the_head(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await store.begin(
            [a_turn("a"), a_turn("b", parent="a", status="running", generation="g")],
            a_generation("g", session="s", turn="b"),
            head=("s", "b"),
            updated_at=1234.5,
        )
        session = await store.session("ann", "s")
        assert session is not None and (session.head, session.updated_at) == ("b", 1234.5)
        with pytest.raises(StoreConflict, match="the session gone is gone"):
            await store.begin([a_turn("c")], None, head=("gone", "c"), updated_at=1.0)
        assert await store.turn("s", "c") is None

    async def test_copies(self, store: Store) -> None:
        await store.create_session(a_session("s"))
        await add(store, a_text_turn("a", "hello"), a_turn("b", parent="a"))
        fork = a_session("fork", head="b'")
        await store.copy_path(
            [a_text_turn("a'", "hello", "fork"), a_turn("b'", "fork", parent="a'")],
            fork,
            [("a", "a'"), ("b", "b'")],
            0,
        )
        assert await store.session("ann", "fork") == fork
        assert [turn.id for turn in await store.path("fork", "b'")] == ["a'", "b'"]
        await store.delete_session("ann", "s")
        assert [turn.id for turn in await store.path("fork", "b'")] == ["a'", "b'"]


class TestLists:
    async def ids(self, store: Store, query: str | None = None) -> list[str]:
        found, more = await store.sessions("ann", limit=100, query=query)
        assert not more
        return [session.id for session in found]

    async def test_pages_are_stable(self, store: Store) -> None:
        """Also where many sessions have the same time, and new ones come between two pages."""
        for n in range(25):
            await store.create_session(a_session(f"s{n:02}", updated_at=1000.0 + n // 10))
        await store.create_session(a_session("hidden", listed=False))
        seen: list[str] = []
        after: str | None = None
        more = True
        while more:
            page, more = await store.sessions("ann", limit=4, after=after)
            seen += [session.id for session in page]
            after = seen[-1]
            await store.create_session(a_session(f"new{len(seen)}", updated_at=2000.0))
        assert seen == [f"s{n:02}" for n in reversed(range(25))]
        page, more = await store.sessions("ann", limit=25 + 7)
        assert len(page) == 32 and not more

    async def test_a_last_page_that_is_full(self, store: Store) -> None:
        for n in range(4):
            await store.create_session(a_session(f"s{n}"))
        page, more = await store.sessions("ann", limit=4)
        assert len(page) == 4 and not more
        page, more = await store.sessions("ann", limit=3)
        assert len(page) == 3 and more
        assert await store.sessions("ann", limit=3, after="s0") == ([], False)

    async def test_after_a_session_that_is_not_there(self, store: Store) -> None:
        await store.create_session(a_session("bobs", owner="bob"))
        for missing in ("nothing", "bobs"):
            with pytest.raises(LookupError, match=missing):
                await store.sessions("ann", limit=5, after=missing)

    @pytest.mark.parametrize(
        "query", ["50%", "A_B", "it's", '"50', "\\", "/", "½ ÜNÏ", "🙂", "\0", "\ud800"]
    )
    async def test_search_takes_every_character_as_itself(self, store: Store, query: str) -> None:
        plain = "50 ab its none"
        await store.create_session(a_session("s1", title=NASTY))
        await store.create_session(a_session("s2", title=plain))
        await store.create_session(a_session("s3"))
        await add(store, a_text_turn("t1", plain, "s3"), a_text_turn("t2", NASTY, "s3", "t1"))
        assert await self.ids(store, query) == ["s3", "s1"]

    async def test_search_follows_changes(self, store: Store) -> None:
        await store.create_session(a_session("s", title="Apples"))
        assert await self.ids(store, "aPPle") == ["s"]
        await store.update_session("s", title="Pears", updated_at=1.0)
        assert await self.ids(store, "apple") == []
        assert await self.ids(store, "pear") == ["s"] and await self.ids(store, "") == ["s"]
        assert await self.ids(store, "text") == []  # a word of the format, in no turn
        await add(store, a_turn("t", content=[{"type": "message", "content": [{"text": "Plums"}]}]))
        assert await self.ids(store, "plum") == ["s"]


class TestOwners:
    async def test_nothing_of_somebody_else(self, store: Store) -> None:
        await store.create_session(a_session("s", title="secret"))
        await store.begin(
            [a_text_turn("t", "secret")],
            a_generation("g", session="s", turn="t"),
            head=("s", "t"),
            updated_at=1.0,
        )
        assert await store.session("bob", "s") is None
        assert await store.sessions("bob", limit=9) == ([], False)
        assert await store.sessions("bob", limit=9, query="secret") == ([], False)
        assert await store.generation("bob", "g") is None
        assert await store.idempotent("bob", "key") is None
        assert await store.delete_session("bob", "s") is None
        assert await store.session("ann", "s") is not None
        assert await store.generation("ann", "g") is not None

    @pytest.mark.parametrize("name", ["a\0", "\ud800", "it's", "%"])
    async def test_names_that_nobody_has(self, store: Store, name: str) -> None:
        """Not found, quickly, also where the database could not even ask for it."""
        await store.create_session(a_session("s"))
        assert await store.session("ann", name) is None
        assert await store.session(name, "s") is None
        assert await store.turn("s", name) is None and await store.path("s", name) == []
        assert await store.generation("ann", name) is None
        assert await store.idempotent("ann", name) is None
        assert await store.delete_session("ann", name) is None
        with pytest.raises(LookupError):
            await store.sessions("ann", limit=1, after=name)
        with pytest.raises(StoreConflict):
            await add(store, a_turn("t", parent=name))
