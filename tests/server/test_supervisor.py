"""Supervisor: engines that cannot be started, or never get ready."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from model.engine.messages import Heartbeat
from model.hub import resolve
from server.engine_client import EngineClient
from server.engine_process import EngineProcess
from server.metrics import Metrics
from server.owners import Owners
from server.services import Services
from server.settings import Settings
from server.store.store import Store
from server.supervisor import MAX_DEATHS, Supervisor


def test_no_process_to_be_had_is_a_death_like_others(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = EngineProcess.spawn
    refusals: list[OSError] = []

    async def sometimes() -> EngineProcess:
        if refusals:
            raise refusals.pop()
        return await spawn()

    async def run(store: Store) -> None:
        services = Services.create(Settings(), resolve(str(tiny_model)), Owners(b"x" * 32), store)
        supervisor, client = services.supervisor, services.client
        await services.start()
        await asyncio.wait_for(client.ready.wait(), 60)
        # Twice there is none; then there is one again.
        refusals.extend([BlockingIOError("no more processes")] * 2)
        assert supervisor._engine is not None
        supervisor._engine.signal(9)
        while client.state == "ready":
            await asyncio.sleep(0.01)
        await asyncio.wait_for(client.ready.wait(), 60)
        assert (client.state, refusals) == ("ready", [])
        # Never again: the server is told to end, and can.
        refusals.extend([BlockingIOError("no more processes")] * MAX_DEATHS)
        supervisor._engine.signal(9)
        await asyncio.wait_for(supervisor.failed.wait(), 60)
        assert client.state == "failed"
        await asyncio.wait_for(services.stop(), 20)

    monkeypatch.setattr(EngineProcess, "spawn", staticmethod(sometimes))
    with contextlib.closing(Store.open(None, tmp_path)) as store:
        asyncio.run(run(store))


def test_an_engine_that_falls_silent_while_it_loads_hangs(tiny_model: Path) -> None:
    async def run() -> None:
        client = EngineClient()
        files = resolve(str(tiny_model))
        supervisor = Supervisor(Settings(), files, client, Metrics(client))
        client.attach(1)
        long_ago = time.monotonic() - Settings().engine_timeout - 1
        client.last_heartbeat = client.last_progress = long_ago
        assert not supervisor._hangs()  # it still imports what it needs
        client._receive(Heartbeat(1, 0, False))
        client.last_progress = long_ago
        assert not supervisor._hangs()  # it loads, and tells so
        client.last_heartbeat = long_ago
        assert supervisor._hangs()

    asyncio.run(run())
