"""Journal: what is stored as running and not live."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from model.engine.request import SamplingParams
from model.hub import resolve
from server.generation import Durable
from server.owners import Owners
from server.services import Services
from server.settings import Settings
from server.store.records import SessionRecord, TurnRecord
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
