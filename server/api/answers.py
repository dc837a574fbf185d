"""What the OpenAI routes share: waiting for generations, usage, ids, the end of streams."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response

from server.generation import Failed, Generation, Generations, read

T = TypeVar("T")

LOWEST_LOGPROB = -9999.0  # how minus infinity is sent: JSON has none
TOKENIZE_INLINE_CHARACTERS = 16_384


def new_id(prefix: str) -> str:
    """`prefix` and 128 random bits."""
    return prefix + secrets.token_hex(16)


def finite(logprob: float) -> float:
    """A log-probability as it is sent."""
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def usage(generations: Sequence[Generation], *, num_choices: int) -> dict[str, Any]:
    """Token counts of an answer; a prompt counts once, however many choices it has."""
    firsts = generations[::num_choices]
    prompt = sum(len(g.prompt_token_ids) for g in firsts)
    completion = sum(g.num_output_tokens for g in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(g.num_reused_tokens for g in firsts)},
    }


async def off_loop(num_characters: int, work: Callable[[], T]) -> T:
    """Run `work` here when it is small, else in a thread, so that no stream waits for it."""
    if num_characters <= TOKENIZE_INLINE_CHARACTERS:
        return work()
    return await asyncio.to_thread(work)


async def wait_for_all(
    request: Request, generations: Sequence[Generation], service: Generations
) -> bool:
    """Wait until all have ended. False when the client left first: they are cancelled then, and
    so are the others when one fails. Raises the error of the first that failed."""

    async def ended() -> None:
        async for batch in read(generations):
            for _, event in batch:
                if isinstance(event, Failed):
                    raise event.error

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(_run(ended())), asyncio.ensure_future(_run(left()))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return False
        tasks[0].result()
        return True
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        service.cancel(generations)


async def _run(work: Awaitable[None]) -> None:
    await work


def client_left() -> Response:
    """What is 'answered' to a client that is gone; it only shows in the log."""
    return Response(status_code=499)
