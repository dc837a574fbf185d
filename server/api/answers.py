"""What the OpenAI routes share: waiting for generations, usage, the end of streams."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from server.api.leaving import unless_left
from server.api.sampling import SamplingFields
from server.errors import NotFound, StreamExpired
from server.events import Done, Failed
from server.generation import Generation
from server.generations import Generations
from server.off_loop import CHARACTERS_PER_LOGGED_TOKEN, off_loop
from server.owners import Owner
from server.reader import read
from server.responses import json_response
from server.services import Services
from server.sse import EventStream

GENERATION_ID = re.compile(r"gen_[0-9a-f]{32}")
TOKENS_PER_LOGPROB = 16  # a token's log-probabilities take as long to tell as the text of so many
LOWEST_LOGPROB = -9999.0  # how minus infinity is sent: JSON has none


def finite(logprob: float) -> float:
    """A log-probability as it is sent."""
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def wire_reason(event: Done) -> str:
    """The finish reason in OpenAI's words, which have none for a cancelled answer."""
    return "stop" if event.finish_reason == "abort" else event.finish_reason


def usage(generations: Sequence[Generation], *, num_choices: int) -> dict[str, Any]:
    """Token counts of an answer; a prompt counts once, however many choices it has."""
    counts = [g.counts() for g in generations]
    firsts = counts[::num_choices]
    prompt = sum(c["prompt_tokens"] for c in firsts)
    completion = sum(c["completion_tokens"] for c in counts)
    cached = sum(sum(c["cached_tokens"].values()) for c in firsts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def find_generation(services: Services, owner: Owner, id: str) -> Generation:
    """The generation of that id, live or ended. Raises NotFound, also for somebody else's, and
    StreamExpired."""
    live = services.generations[id]
    if live is not None and live.owner.name == owner.name:
        return live
    if GENERATION_ID.fullmatch(id) and live is None:
        ended = await services.journal.load(owner.name, id)
        if ended is not None:
            return ended
        if await services.store.generation(owner.name, id) is not None:
            raise StreamExpired(
                f"the stream {id} ended too long ago to be read again, or was made with another "
                "model; its turn, if it belongs to a session, is kept"
            )
    raise NotFound(f"there is no stream {id[:64]!r}")


async def wait_for_all(
    request: Request, generations: Sequence[Generation], service: Generations
) -> bool:
    """Wait until all have ended. False when the client left first: they are cancelled then, and
    so are the others when one fails. Raises the error of the first that failed."""

    async def ended() -> bool:
        async for batch in read(generations):
            for _, event in batch:
                if isinstance(event, Failed):
                    raise event.error
        return True

    try:
        return await unless_left(request, ended()) is not None
    finally:
        service.leave(generations)


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
            on_close=lambda: services.generations.leave(generations),
            send_timeout=services.settings.send_timeout,
            headers=headers,
        )
    if not await wait_for_all(request, generations, services.generations):
        return Response(status_code=499)
    size = sum(
        len(g.token_ids) + TOKENS_PER_LOGPROB * (len(g.logprobs) + len(g.prompt_logprobs))
        for g in generations
    )
    return await off_loop(
        CHARACTERS_PER_LOGGED_TOKEN * size, lambda: json_response(answer.whole(), headers=headers)
    )
