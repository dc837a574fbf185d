"""Inspections: who may look into the model now. One at a time; a few wait for their turn."""

from __future__ import annotations

import asyncio
from collections import Counter

from model.engine.messages import Inspected, Inspection
from server.engine_client import EngineClient, Found
from server.errors import HeadwaterError, QueueFull, RateLimited, from_engine
from server.owners import Owner

MAX_OF_OWNER = 4  # running or waiting
MAX_OF_ALL = 16
RETRY_SECONDS = 2.0


class Inspections:
    """The inspections of one server."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._turn = asyncio.Lock()  # those who wait get it in order
        self._of_owner: Counter[str] = Counter()

    async def run(self, owner: Owner, token_ids: list[int], what: Inspection) -> list[Inspected]:
        """What was found, part by part. To be cancelled when nobody waits for it any more: that
        ends it in the engine too. Raises RateLimited, QueueFull, an Overloaded error when the
        engine dies or takes nothing now, ServerError when the inspection fails."""
        self._check_room(owner)
        self._of_owner[owner.name] += 1
        try:
            async with self._turn:
                return await self._look(token_ids, what)
        finally:
            self._of_owner[owner.name] -= 1

    def _check_room(self, owner: Owner) -> None:
        self._client.check_ready()
        if self._of_owner[owner.name] >= MAX_OF_OWNER:
            raise RateLimited(
                f"{MAX_OF_OWNER} inspections are running or waiting already, and one runs at a "
                "time; try again when one has ended",
                retry_after=RETRY_SECONDS,
            )
        if self._of_owner.total() >= MAX_OF_ALL:
            raise QueueFull(
                f"{MAX_OF_ALL} inspections are running or waiting already, and one runs at a time; "
                "try again later",
                retry_after=RETRY_SECONDS,
            )

    async def _look(self, token_ids: list[int], what: Inspection) -> list[Inspected]:
        arrived: asyncio.Queue[Found] = asyncio.Queue()
        inspect_id = self._client.inspect(token_ids, what, arrived.put_nowait)
        parts: list[Inspected] = []
        try:
            while True:
                found = await arrived.get()
                if isinstance(found, HeadwaterError):
                    raise found
                if found.error is not None:
                    raise from_engine(found.error)
                if found.done:
                    return parts
                parts.append(found)
        finally:
            self._client.end_inspection(inspect_id)
