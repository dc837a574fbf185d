"""From the body of a request for a response to an order."""

from __future__ import annotations

from typing import Any

import msgspec

from model.engine.request import SamplingParams
from server.api.response_fields import ResponseRequest, TextFormat
from server.errors import InvalidRequest
from server.services import Services
from server.sessions import Wish
from server.stored_responses import Order
from server.text.answer_text import Markup
from server.text.tool_template import ToolTemplate


async def order_of(services: Services, body: ResponseRequest) -> Order:
    """What the body asks for. Raises InvalidRequest and UnsupportedParameter, also for a grammar
    that cannot be followed."""
    use = body.tool_use()
    try:
        tools = msgspec.json.encode(use.tools).decode() if use.tools else ""
    except UnicodeEncodeError:
        raise InvalidRequest("`tools` have half of a surrogate pair", param="tools") from None
    top_logprobs = body.wanted_logprobs
    conversation = body.conversation_id
    drawn = body.unlimited_params(services, top_logprobs=top_logprobs)
    grammar = use.checkable(services.template, drawn.grammar)
    await services.grammars.check(grammar, param=use.asking(body.grammars()))

    def params(max_tokens: int) -> SamplingParams:
        return body.limited(drawn, max_tokens)

    def applied(prompt: list[int], params: SamplingParams) -> tuple[SamplingParams, Markup]:
        return use.applied(services.template, services.tokenizer, prompt, params)

    format = (body.text.format if body.text is not None else None) or TextFormat()
    if format.type != "json_schema":
        format = TextFormat(type=format.type)
    return Order(
        messages=body.input_messages(),
        wish=Wish(params, body.max_output_tokens, body.stop or []),
        applied=applied,
        echo={
            "background": bool(body.background),
            "conversation": conversation,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "store": body.stored,
            "temperature": drawn.temperature,
            "text": {"format": format.model_dump(exclude_none=True)},
            "tool_choice": _echoed(body.tool_choice),
            "tools": [tool.model_dump() for tool in body.tools or []],
            "top_logprobs": top_logprobs or 0,
            "top_p": drawn.top_p,
            "truncation": body.truncation or "disabled",
        },
        instructions=body.instructions,
        overflow="drop_oldest" if body.truncation == "auto" else "error",
        conversation=None if conversation is None else conversation.replace("conv_", "sess_", 1),
        previous=body.previous_response_id,
        store=body.stored,
        background=bool(body.background),
        template=ToolTemplate(services.template, use.tools),
        tools=tools,
    )


def _echoed(choice: str | dict[str, Any] | None) -> str | dict[str, Any]:
    """A choice that was found to be one, without what else it says."""
    if isinstance(choice, dict):
        return {"type": choice["type"], "name": choice["name"]}
    return choice or "auto"
