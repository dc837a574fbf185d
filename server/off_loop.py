"""Work that takes long, beside the event loop: no stream waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

INLINE_CHARACTERS, LARGE_CHARACTERS = 16_384, 1 << 18  # to encode: some 5 ms, and 80 ms
# To encode so many takes as long as to render a message, and to read a token of a log.
CHARACTERS_PER_MESSAGE, CHARACTERS_PER_LOGGED_TOKEN = 100, 16

_one_thread = ThreadPoolExecutor(1, "large")


async def off_loop(num_characters: int, work: Callable[[], T]) -> T:
    """Run `work` here when it is small, else in a thread. Of what is large one runs at a time: it
    may take a gigabyte. The measure is a text of `num_characters` that is encoded."""
    if num_characters <= INLINE_CHARACTERS:
        return work()
    threads = _one_thread if num_characters > LARGE_CHARACTERS else None
    return await asyncio.get_running_loop().run_in_executor(threads, work)
