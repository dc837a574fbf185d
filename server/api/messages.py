"""/v1/messages: Anthropic's wire."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import wait_for_all
from server.api.chat import prompt_token_ids
from server.api.message_fields import CountTokensRequest, MessagesRequest
from server.events import Delta, Done, Failed, Paused
from server.generation import Generation
from server.messages_wire import MessageEvents
from server.prompt import room_for_answer
from server.reader import read
from server.responses import anthropic_error, json_response
from server.services import Caller, Services, Shared
from server.sse import EventStream, comment_frame, event_frame

router = APIRouter()


@router.post("/v1/messages", operation_id="create_message")
async def create_message(
    body: MessagesRequest, request: Request, services: Shared, owner: Caller
) -> Response:
    """An answer to a conversation, whole or as a stream of server-sent events."""
    body.check()
    use = body.tool_use()
    model = services.client.check_ready()
    prompt = await prompt_token_ids(
        services,
        body.in_chat(),
        continue_final_message=body.goes_on,
        tools=use.tools,
        keywords=body.keywords(),
    )
    max_tokens = room_for_answer(model, len(prompt), body.max_tokens, param="messages")
    params = body.sampling_params(services, max_tokens=max_tokens, top_logprobs=None)
    params, markup = use.applied(services.template, services.tokenizer, prompt, params)
    await services.grammars.check(params.grammar, param=use.asking(body.grammars()))
    async with services.idempotency.once(request, owner) as once:
        if once.made is None:
            once.made = services.generations.start(
                [prompt], params, owner=owner, stop=body.stop_sequences or [], markup=markup
            )
        assert isinstance(once.made, list)  # nothing here is stored
        (generation,) = once.made
    events = MessageEvents(generation, services.files.name)
    headers = {"x-headwater-generation": generation.id}
    if body.stream:
        request_id = request.scope["state"]["request_id"]
        return EventStream(
            _frames(services, generation, events, request_id),
            on_close=lambda: services.generations.leave([generation]),
            send_timeout=services.settings.send_timeout,
            headers=headers,
        )
    if not await wait_for_all(request, [generation], services.generations):
        return Response(status_code=499)
    return json_response(events.whole(), headers=headers)


@router.post("/v1/messages/count_tokens", operation_id="count_message_tokens")
async def count_message_tokens(body: CountTokensRequest, services: Shared) -> Response:
    """How many tokens a request's prompt has, its tools with it."""
    body.check()
    prompt = await prompt_token_ids(
        services,
        body.in_chat(),
        continue_final_message=body.goes_on,
        tools=body.tool_use().tools,
        keywords=body.keywords(),
    )
    return json_response({"input_tokens": len(prompt)})


async def _frames(
    services: Services, generation: Generation, events: MessageEvents, request_id: str
) -> AsyncIterator[bytes]:
    """message_start, the blocks, message_delta, message_stop; or an error."""
    yield b"".join([event_frame(event["type"], event) for event in events.start()])
    async for batch in read([generation], 0):
        made = []
        for _, event in batch:
            match event:
                case Delta():
                    made += events.feed(event.text)
                case Paused():
                    yield comment_frame("the engine is being restarted")
                case Done():
                    made += events.end(event)
                case Failed():
                    services.metrics.errors.labels(event.error.code).inc()
                    made.append(anthropic_error(event.error, request_id))
        if made:
            yield b"".join([event_frame(event["type"], event) for event in made])
