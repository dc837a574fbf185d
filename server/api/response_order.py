"""From the body of a request for a response to an order."""

from __future__ import annotations

from typing import Any

import msgspec

from model.engine.request import SamplingParams
from server.api.response_fields import ResponseRequest, TextFormat
from server.api.tool_fields import ToolFields, ToolUse
from server.errors import InvalidRequest
from server.services import Services
from server.sessions import Wish
from server.stored_responses import Order
from server.text.answer_text import Markup
from server.text.tool_template import ToolTemplate


def order_of(services: Services, body: ResponseRequest) -> Order:
    """What the body asks for. Raises InvalidRequest and UnsupportedParameter."""
    use = _tool_use(body)
    try:
        tools = msgspec.json.encode(use.tools).decode() if use.tools else ""
    except UnicodeEncodeError:
        raise InvalidRequest("`tools` have half of a surrogate pair", param="tools") from None
    for token in services.tokenizer.special_tokens:
        if token in tools:
            raise InvalidRequest(
                f"`tools` spell {token!r}, which is a control token of this model", param="tools"
            )
    top_logprobs = body.wanted_logprobs
    conversation = body.conversation_id

    def params(max_tokens: int) -> SamplingParams:
        return body.sampling_params(services, max_tokens=max_tokens, top_logprobs=top_logprobs)

    async def applied(prompt: list[int], drawn: SamplingParams) -> tuple[SamplingParams, Markup]:
        drawn, markup = use.applied(services.template, services.tokenizer, prompt, drawn)
        await services.grammars.check(drawn.grammar, param=next(iter(body.grammars()), "tools"))
        return drawn, markup

    drawn = params(max(body.min_tokens or 1, 1))
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


def _tool_use(body: ResponseRequest) -> ToolUse:
    """The tools, which this wire writes flatter than chat does."""
    choice: Any = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    flat = [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        for tool in body.tools or []
    ]
    fields = ToolFields.model_validate(
        {
            "tools": [{"type": "function", "function": tool} for tool in flat],
            "tool_choice": choice,
            "parallel_tool_calls": body.parallel_tool_calls,
        }
    )
    try:
        return fields.tool_use()
    except InvalidRequest as error:
        error.message = error.message.replace(".function.", ".")
        error.param = (error.param or "").replace(".function.", ".")
        raise
