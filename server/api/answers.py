"""What the OpenAI routes share: waiting for generations, usage, ids, the end of streams."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response

from server.api.sampling import SamplingFields
from server.generation import Failed, Generation, Generations, read
from server.responses import json_response
from server.services import Services
from server.sse import EventStream

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

    tasks = [asyncio.create_task(ended()), asyncio.create_task(left())]
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


class Answer(Protocol):
    """A wire's view of a request's generations."""

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, once all have ended."""

    def frames(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events, while they run."""


async def respond(
    request: Request,
    services: Services,
    generations: Sequence[Generation],
    answer: Answer,
    body: SamplingFields,
) -> Response:
    """The answer as the body asks for it. When the client leaves, its generations are cancelled;
    the 499 that is then 'answered' shows in the log only."""
    headers = {"x-headwater-generation": generations[0].id}
    if body.stream:
        return EventStream(
            answer.frames(body.wants_usage()),
            on_close=lambda: services.generations.cancel(generations),
            send_timeout=services.settings.send_timeout,
            headers=headers,
        )
    if not await wait_for_all(request, generations, services.generations):
        return Response(status_code=499)
    return json_response(answer.whole(), headers=headers)
