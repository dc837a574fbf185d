"""Journal: what is stored as running and not live; what cannot be stored; who waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.engine.messages import TokenOutput
from model.engine.request import SamplingParams
from model.hub import resolve
from server.events import Failed
from server.generation import Durable, Generation
from server.journal import Journal
from server.owners import Owners
from server.services import Services
from server.settings import Settings
from server.store.records import SessionRecord, TokenChunk, TurnRecord
from server.store.store import Store

READERS = 8


@pytest.mark.parametrize("in_session", [False, True])
def test_readers_at_once_take_it_up_once(
    tiny_model: Path, tmp_path: Path, in_session: bool
) -> None:
    """The answer to the commit of its beginning was lost, and its readers come back."""

    async def run() -> None:
        services = Services.create(Settings(), resolve(str(tiny_model)), Owners(b"x" * 32), opened)
        owner = services.owners.local
        generation = services.generations.make([1, 2, 3], SamplingParams(), owner=owner)
        session = SessionRecord.new(owner.name)
        turn = TurnRecord.new(session.id, None, "assistant", status="running", tokenizer="x")
        generation.durable = Durable("turn", session.id, turn) if in_session else Durable("chat")
        record = services.journal._record(generation)
        await opened.begin(
            [turn] if in_session else [],
            record,
            head=None,
            updated_at=time.time(),
            session=session if in_session else None,
        )
        journal = services.journal
        found = await asyncio.gather(
            *(journal.load(owner.name, generation.id) for _ in range(READERS))
        )
        (live,) = services.generations.live
        assert all(one is live for one in found)
        assert live.id == generation.id and live is not generation

    with contextlib.closing(Store.open(None, tmp_path)) as opened:
        asyncio.run(run())


def journal_of(services: Services) -> Journal:
    """Its journal, and an engine that takes all and says nothing."""
    services.client.attach(1)
    services.client.state = "ready"
    return services.journal


def running(services: Services) -> Generation:
    """A durable generation that is live."""
    generation = services.generations.make([1, 2, 3], SamplingParams(), owner=services.owners.local)
    generation.durable = Durable("chat")
    services.generations._live[generation.id] = generation
    return generation


async def stored(services: Services) -> Generation:
    """One that the store has, as running."""
    generation = running(services)
    record = services.journal._record(generation)
    await services.store.begin([], record, head=None, updated_at=0.0)
    return generation


def with_services(
    tiny_model: Path, folder: Path, work: Callable[[Services], Awaitable[None]]
) -> None:
    async def run(store: Store) -> None:
        services = Services.create(Settings(), resolve(str(tiny_model)), Owners(b"x" * 32), store)
        await work(services)

    with contextlib.closing(Store.open(None, folder)) as store:
        asyncio.run(run(store))


def test_an_end_that_cannot_be_written_is_told(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong with it: its readers do not wait for ever, and its place is free again."""

    async def work(services: Services) -> None:
        journal_of(services)
        generation = running(services)
        monkeypatch.setattr(generation, "counts", lambda: 1 // 0)
        generation.left_engine.set()
        generation.cancel()
        await asyncio.wait_for(services.generations.settled(), 10)
        assert isinstance(generation.outcome, Failed)
        assert generation.outcome.error.code == "internal"
        assert services.generations.live == []

    with_services(tiny_model, tmp_path, work)


def test_a_log_that_cannot_be_written_does_not_hold_up_the_others(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.journal.RETRY_SECONDS", 0.01)

    async def work(services: Services) -> None:
        journal = journal_of(services)
        log_tokens, tries = services.store.log_tokens, 0

        async def once_not(chunks: list[TokenChunk]) -> None:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise RuntimeError("nobody thought of this")
            await log_tokens(chunks)

        monkeypatch.setattr(services.store, "log_tokens", once_not)
        generation = await stored(services)
        generation.feed(TokenOutput(generation.id, token_ids=[5, 6]))
        await journal.start()
        durable = generation.durable
        assert durable is not None
        async with asyncio.timeout(10):
            while durable.num_stored == 0:
                await asyncio.sleep(0.01)
        assert tries > 1
        await journal.stop()

    with_services(tiny_model, tmp_path, work)


def test_a_token_that_must_be_stored_first_does_not_wait_for_the_clock(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.journal.FLUSH_SECONDS", 3600.0)

    async def work(services: Services) -> None:
        journal = journal_of(services)
        services.client.model = SimpleNamespace(reproducible=False, block_size=16)  # type: ignore
        await journal.start()
        while not journal._waited_for._waiters:  # until it sleeps
            await asyncio.sleep(0)
        generation = await stored(services)
        for start in range(3):
            generation.feed(TokenOutput(generation.id, token_ids=[5]))
            assert generation.delta(start) is None
            async with asyncio.timeout(10):
                while (delta := generation.delta(start)) is None:
                    await asyncio.sleep(0.005)
            assert delta.token_ids == [5]
        await journal.stop()

    with_services(tiny_model, tmp_path, work)
