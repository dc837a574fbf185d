"""Tools on their way into a prompt: definitions, earlier calls, and what they gave.

Where the model's chat template knows tools they go through it. Where it does not, a system prompt
of our own tells of them, before the request's own, in the notation of Hermes, which most models
with tools have seen: calls between `<tool_call>` marks, results between `<tool_response>` marks as
the user's words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import msgspec
from blake3 import blake3

from server.text.chat_template import ChatTemplate, Message, TemplateError
from server.text.tool_calls import HERMES, MISTRAL, PYTHON_TAG

Notation = Literal["hermes", "llama", "mistral"]

SYSTEM_PROMPT = """\
You may call functions to help with the user's request. They are described between <tools> and \
</tools>, one a line:
<tools>
{tools}
</tools>
To call a function, answer with its name and its arguments as JSON between these marks, once for \
each call:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""

_PROBE = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


@lru_cache(maxsize=16)
def knows_tools(template: ChatTemplate) -> bool:
    """Whether the template shows the tools that it is given."""
    messages = [{"role": "user", "content": "Hello"}]
    try:
        return template.render(messages, tools=[_PROBE]) != template.render(messages)
    except TemplateError:
        return False


def notation(template: ChatTemplate) -> Notation:
    """How the model writes its calls."""
    source = template.source
    if not knows_tools(template) or HERMES in source:
        return "hermes"
    if MISTRAL in source:
        return "mistral"
    return "llama" if PYTHON_TAG in source or '"parameters"' in source else "hermes"


def with_tools(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[Message], list[Mapping[str, Any]] | None]:
    """Messages and tools as the template takes them. `messages` are OpenAI's, with calls'
    arguments as text; `tools` are OpenAI's definitions."""
    if knows_tools(template):
        short = notation(template) == "mistral"
        return [_for_template(message, short) for message in messages], list(tools) or None
    told: list[Message] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            result = f"<tool_response>\n{content}\n</tool_response>"
            if told and told[-1].get("role") == "tool":
                told[-1]["content"] += "\n" + result
            else:
                told.append({"role": "tool", "content": result})
            continue
        calls = [_spelled(call["function"]) for call in message.get("tool_calls", ())]
        content = "\n".join([*filter(None, [content]), *calls])
        told.append({**_without_calls(message), "content": content})
    for message in told:
        if message["role"] == "tool":
            message["role"] = "user"
    if tools:
        lines = [msgspec.json.encode(tool).decode() for tool in tools]
        prompt = SYSTEM_PROMPT.format(tools="\n".join(lines))
        if told and told[0]["role"] == "system":
            told[0]["content"] = f"{prompt}\n\n{told[0]['content']}"
        else:
            told.insert(0, {"role": "system", "content": prompt})
    return told, None


def _without_calls(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "tool_calls"}


def _spelled(function: Mapping[str, Any]) -> str:
    """A call as the model wrote it, to the letter where this server enforced it."""
    head = f'{{"name": "{function["name"]}", "arguments": '
    return f"<tool_call>\n{head}{function['arguments']}}}\n</tool_call>"


def _for_template(message: Message, short_ids: bool) -> Message:
    """Templates expect a call's arguments as an object; Mistral's ids of nine letters."""
    result = dict(message)
    if "tool_calls" in result:
        result["tool_calls"] = [
            {
                **call,
                "id": _short(call["id"]) if short_ids else call["id"],
                "function": {
                    **call["function"],
                    "arguments": _as_object(call["function"]["arguments"]),
                },
            }
            for call in result["tool_calls"]
        ]
    if short_ids and "tool_call_id" in result:
        result["tool_call_id"] = _short(result["tool_call_id"])
    return result


def _as_object(arguments: str) -> Any:
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _short(id: str) -> str:
    return blake3(id.encode("utf-8", "surrogatepass")).hexdigest()[:9]
