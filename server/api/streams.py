"""GET and DELETE /v1/streams/{generation}: attach to a generation, from anywhere in it; cancel it.

An event's id is a place in the output: 1 + the number of output tokens up to its end. What comes
after a place is a function of the place, so a reader that comes back, to this process or the next,
gets exactly what it has not got.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from model.engine.messages import TokenLogprob
from server.api.answers import find_generation, finite, usage
from server.api.chat_answer import ChatAnswer
from server.errors import InvalidRequest
from server.events import Delta, Done, Failed, Paused, Progress, Started
from server.generation import Generation
from server.reader import read
from server.responses import json_response
from server.services import Caller, Services, Shared
from server.sse import EventStream, comment_frame, event_frame

router = APIRouter()


@router.get("/v1/streams/{id}", operation_id="read_stream")
async def read_stream(
    id: str,
    services: Shared,
    owner: Caller,
    after: Annotated[int | None, Query(ge=0)] = None,
    format: Literal["events", "chat"] = "events",
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """The events after `Last-Event-ID` or `after`; all of them without. 204 after the last one."""
    generation = await find_generation(services, owner, id)
    place = _place(last_event_id, after)
    if isinstance(generation.outcome, Done) and place > 1 + len(generation.output_token_ids):
        return Response(status_code=204)
    return stream_response(services, generation, place, chat=format == "chat")


@router.delete("/v1/streams/{id}", operation_id="cancel_stream")
async def cancel_stream(id: str, services: Shared, owner: Caller) -> Response:
    """Stop the generation; what it said is kept."""
    generation = await find_generation(services, owner, id)
    return json_response(await cancelled(services, generation))


async def cancelled(services: Services, generation: Generation) -> dict[str, Any]:
    """Cancel it if it runs, wait until its end is stored, and tell how it ended."""
    services.generations.cancel(generation)
    async for _ in read([generation], len(generation.token_ids)):
        pass
    turn = generation.durable.turn if generation.durable is not None else None
    end = generation.outcome
    return {
        "id": generation.id,
        "object": "generation",
        "finish_reason": end.finish_reason if isinstance(end, Done) else "error",
        "session": None if generation.durable is None else generation.durable.session,
        "turn": None if turn is None else turn.id,
    }


def stream_response(
    services: Services, generation: Generation, place: int, *, chat: bool = False
) -> Response:
    """An answer that streams the generation's events after `place`."""
    after = place - 1 if place else None
    if chat:
        top = generation.params.top_logprobs
        frames = ChatAnswer(services, [generation], top, resumable=True).frames(False, after)
    else:
        frames = event_frames(services, generation, after)
    return EventStream(
        frames,
        on_close=lambda: services.generations.leave([generation]),
        send_timeout=services.settings.send_timeout,
        headers={"x-headwater-generation": generation.id},
    )


def _place(last_event_id: str | None, after: int | None) -> int:
    """The header wins: a browser that reconnects sends it beside the query it began with."""
    if not last_event_id:
        return after or 0
    if not last_event_id.isdecimal() or len(last_event_id) > 12:
        raise InvalidRequest(
            "`Last-Event-ID` must be the id of an event of this stream, a number",
            param="Last-Event-ID",
        )
    return int(last_event_id)


async def event_frames(
    services: Services, generation: Generation, after: int | None
) -> AsyncIterator[bytes]:
    """The wire of sessions and streams; `after` as in `read`."""
    async for batch in read([generation], after):
        frames = []
        for _, event in batch:
            match event:
                case Started():
                    frames.append(event_frame("start", _start(services, generation), 1))
                case Progress():
                    frames.append(event_frame("progress", _progress(event)))
                case Paused():
                    frames.append(comment_frame("the engine is being restarted"))
                case Delta():
                    frames.append(event_frame("delta", _delta(services, event), 1 + event.end))
                case Done():
                    place = 2 + len(generation.output_token_ids)
                    frames.append(event_frame("done", _done(generation, event), place))
                case Failed():
                    services.metrics.errors.labels(event.error.code).inc()
                    frames.append(event_frame("error", event.error.body()))
        yield b"".join(frames)


def _start(services: Services, generation: Generation) -> dict[str, Any]:
    durable, counts = generation.durable, generation.counts()
    turn = durable.turn if durable is not None else None
    return {
        "generation": generation.id,
        "session": None if durable is None else durable.session,
        "turn": None if turn is None else turn.id,
        "model": services.files.name,
        "seed": generation.params.seed,
        "prompt_tokens": counts["prompt_tokens"],
        "cached_tokens": counts["cached_tokens"],
    }


def _progress(event: Progress) -> dict[str, Any]:
    if event.prefill is not None:
        done, total = event.prefill
        return {"prefill": {"done": done, "total": total}}
    return {"queue_position": event.queue_position}


def _delta(services: Services, event: Delta) -> dict[str, Any]:
    document: dict[str, Any] = {"text": event.text, "token_ids": event.token_ids}
    if event.logprobs:
        document["logprobs"] = [_logprob(services, entry) for entry in event.logprobs]
    return document


def _logprob(services: Services, entry: TokenLogprob) -> dict[str, Any]:
    def named(token_id: int, logprob: float) -> dict[str, Any]:
        token = services.tokenizer.piece(token_id)
        return {"token_id": token_id, "token": token, "logprob": finite(logprob)}

    return {
        **named(entry.token_id, entry.logprob),
        "top": [named(token_id, logprob) for token_id, logprob in entry.top],
    }


def _done(generation: Generation, event: Done) -> dict[str, Any]:
    counts = generation.counts()
    turn = generation.durable.turn if generation.durable is not None else None
    return {
        "finish_reason": event.finish_reason,
        "usage": usage_of(generation),
        "timings": counts["timings"],
        "turn": None if turn is None else turn.id,
    }


def usage_of(generation: Generation) -> dict[str, Any]:
    """Token counts in the words of the OpenAI wire, and the cached ones by tier."""
    told = usage([generation], num_choices=1)
    told["prompt_tokens_details"] |= generation.counts()["cached_tokens"]
    return told
