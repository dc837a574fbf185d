"""Readers of generations: each goes through the log from an offset of its own, at its own pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from server.events import Done, Event, Paused, Progress, Started
from server.generation import Generation

TOKENS_AT_ONCE = 256  # of a log that is read from its beginning


class _Cursor:
    """How far one reader is in one log."""

    __slots__ = ("_admitted", "_generation", "_offset", "_pauses", "_progress")

    def __init__(self, generation: Generation, offset: int | None) -> None:
        self._generation = generation
        self._offset = offset or 0
        self._admitted = offset is not None
        self._pauses = generation.pauses
        self._progress: Progress | None = None

    @property
    def is_behind(self) -> bool:
        """Whether there is more of the log than was taken at once."""
        return self._offset < self._generation.num_readable

    def news(self) -> list[Event]:
        generation = self._generation
        events: list[Event] = []
        if generation.pauses != self._pauses and not generation.ended:
            self._pauses = generation.pauses
            events.append(Paused())
        if generation.progress is not self._progress:
            self._progress = generation.progress
            if self._progress is not None and not generation.drawn_token_ids:
                events.append(self._progress)
        if not self._admitted and (generation.admitted or generation.token_ids):
            self._admitted = True
            events.append(Started())
        delta = generation.delta(self._offset, TOKENS_AT_ONCE)
        if delta is not None:
            self._offset = delta.end
            events.append(delta)
        if self.is_behind:
            return events
        end = generation.outcome
        # A reader that is beyond the end is not sent back to it: its stream ends without a word.
        if isinstance(end, Done) and self._offset > len(generation.output_token_ids):
            return events
        if end is not None:
            events.append(end)
        return events


async def read(
    generations: Sequence[Generation], after: int | None = None
) -> AsyncIterator[list[tuple[int, Event]]]:
    """The events of several generations as they come, as (index, event). One batch a wake-up, so
    that a step costs one write however many choices it served. `after` is the number of output
    tokens that the reader has; None: not even that it started. Where it is beyond the end, there is
    no `Done`."""
    news = asyncio.Event()
    cursors = {i: _Cursor(generation, after) for i, generation in enumerate(generations)}
    for generation in generations:
        generation.listen(news)
    try:
        while cursors:
            await news.wait()
            news.clear()
            batch = [(i, event) for i, cursor in cursors.items() for event in cursor.news()]
            for i, generation in enumerate(generations):
                if generation.ended and i in cursors and not cursors[i].is_behind:
                    del cursors[i]
            if batch:
                yield batch
            if any(cursor.is_behind for cursor in cursors.values()):
                news.set()
                await asyncio.sleep(0)  # others have their turn
    finally:
        for generation in generations:
            generation.unlisten(news)
