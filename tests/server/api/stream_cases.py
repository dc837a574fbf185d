"""Random requests for streams, of all wires, and how each of their streams is read."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.server.api.wires.checker import Answer, Checker
from tests.server.api.wires.chunks import (
    ChatStream,
    CompletionStream,
    whole_chat,
    whole_completion,
)
from tests.server.api.wires.messages import MessageStream, whole_message
from tests.server.api.wires.responses import ResponseStream, whole_response
from tests.server.api.wires.turns import TurnStream, whole_turn

Json = dict[str, Any]
Way = Literal["read", "leave", "cancel"]
Wire = Literal["chat", "resumable", "completions", "responses", "background", "messages", "turns"]

WIRES: tuple[Wire, ...] = (
    *("chat", "resumable", "completions", "responses"),
    *("background", "messages", "turns"),
)
GOES_ON: tuple[Wire, ...] = ("resumable", "background", "turns")
PATHS: dict[Wire, str] = {
    "chat": "/v1/chat/completions",
    "resumable": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "background": "/v1/responses",
    "messages": "/v1/messages",
    "turns": "/v1/sessions/{session}/turns",
}
WHOLE: dict[Wire, Callable[[Json], Answer]] = {
    "chat": whole_chat,
    "resumable": whole_chat,
    "completions": whole_completion,
    "responses": whole_response,
    "background": whole_response,
    "messages": whole_message,
    "turns": whole_turn,
}
_LENGTH: dict[Wire, str] = {"responses": "max_output_tokens", "background": "max_output_tokens"}
_QUESTIONS = ("Why?", "Tell me of rivers.", "日本語 😀, please", "Is it warm in Bern?", "x" * 90)
_STOPS = ("e", " a", "th", "\n", "in the", "é", "qu")
_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "name": {"type": "string", "maxLength": 12},
    },
    "required": ["kind", "name"],
    "additionalProperties": False,
}
_FUNCTIONS: list[Json] = [
    {"name": "weather", "description": "The weather.", "parameters": _SCHEMA},
    {"name": "now", "description": "The time.", "parameters": {"type": "object"}},
]


@dataclass(frozen=True)
class Case:
    """`at`: how many frames are read before it is left or cancelled; `size`: the most bytes that
    are read at once."""

    number: int
    wire: Wire
    body: Json = field(default_factory=dict)
    way: Way = "read"
    at: int = 0
    size: int = 65_536

    @property
    def whole_body(self) -> Json:
        """The same request for an answer in one piece, made where its client waits for it."""
        left_out = ("stream", "stream_options", "resumable", "background")
        return {key: value for key, value in self.body.items() if key not in left_out}

    def checker(self) -> Checker:
        n = self.body.get("n", 1)
        usage = "stream_options" in self.body
        match self.wire:
            case "chat" | "resumable":
                return ChatStream(n, usage=usage, resumable=self.wire == "resumable")
            case "completions":
                return CompletionStream(n * len(self.body["prompt"]), usage=usage)
            case "responses" | "background":
                return ResponseStream()
            case "messages":
                return MessageStream()
            case "turns":
                return TurnStream()


def drawn(number: int, *, whole: bool = False, on: Wire | None = None) -> Case:
    """The case of that number, `on` that wire. `whole`: a longer one that is read to its end."""
    rng = random.Random(number)
    wire = rng.choice(WIRES) if on is None else on
    tools = wire not in ("completions", "turns") and rng.random() < 0.3
    length = rng.randint(150, 300) if whole else rng.randint(1, 120 if tools else 40)
    body: Json = {
        _LENGTH.get(wire, "max_tokens"): length,
        "seed": rng.getrandbits(32),
        "temperature": rng.choice([0, 1, 1, 1.5]),
        "ignore_eos": whole or rng.random() < 0.7,
        "stream": True,
    }
    question = rng.choice(_QUESTIONS)
    if wire in ("responses", "background", "turns"):
        body["input"] = question
    elif wire == "completions":
        body["prompt"] = rng.sample(_QUESTIONS, rng.choice([1, 1, 2]))
        body["echo"] = rng.random() < 0.3
    else:
        body["messages"] = [{"role": "user", "content": question}]
    if wire in ("chat", "completions"):
        body["n"] = rng.choice([1, 1, 2, 3])
        if rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
    if wire == "resumable":
        body["resumable"] = True
    if wire == "background":
        body["background"] = True
    if wire == "responses" and rng.random() < 0.3:
        body["store"] = False
    if rng.random() < 0.4:
        body |= _logprobs(wire, rng)
    if tools:
        body |= _tools(wire, rng)
    elif not whole and rng.random() < 0.4:
        body |= _format(wire, rng)
    elif not whole and rng.random() < 0.5:
        name = "stop_sequences" if wire == "messages" else "stop"
        body[name] = rng.sample(_STOPS, rng.randint(1, 3))
    way: Way = "read" if whole else rng.choice(["read", "read", "read", "leave", "cancel"])
    return Case(number, wire, body, way, rng.randint(0, 30), rng.choice([1, 7, 60, 700, 65_536]))


def _logprobs(wire: Wire, rng: random.Random) -> Json:
    top = rng.choice([0, 2])
    match wire:
        case "completions":
            return {"logprobs": top}
        case "responses" | "background":
            return {"include": ["message.output_text.logprobs"], "top_logprobs": top}
        case "messages":
            return {}
        case _:
            return {"logprobs": True, "top_logprobs": top}


def _tools(wire: Wire, rng: random.Random) -> Json:
    choice = rng.choice(["auto", "required", "named"])
    parallel = rng.random() < 0.5
    if wire == "messages":
        named: Any = {"type": "tool", "name": "weather"}
        chosen = {"auto": {"type": "auto"}, "required": {"type": "any"}, "named": named}[choice]
        tools = [
            {
                "name": f["name"],
                "description": f["description"],
                "input_schema": f["parameters"],
            }
            for f in _FUNCTIONS
        ]
        return {
            "tools": tools,
            "tool_choice": {**chosen, "disable_parallel_tool_use": not parallel},
        }
    if wire in ("responses", "background"):
        tools = [{"type": "function", **f} for f in _FUNCTIONS]
        named = {"type": "function", "name": "weather"}
    else:
        tools = [{"type": "function", "function": f} for f in _FUNCTIONS]
        named = {"type": "function", "function": {"name": "weather"}}
    return {
        "tools": tools,
        "tool_choice": named if choice == "named" else choice,
        "parallel_tool_calls": parallel,
    }


def _format(wire: Wire, rng: random.Random) -> Json:
    if wire == "completions" or rng.random() < 0.4:
        return rng.choice(
            [{"regex": "([a-z ]{2,9}[0-9]){3}"}, {"grammar": 'start: x{2,9} "!"\nx: "ab" | "cd"'}]
        )
    format_ = {"type": "json_schema", "name": "pet", "schema": _SCHEMA}
    match wire:
        case "responses" | "background":
            return {"text": {"format": format_}}
        case "messages":
            return {"output_config": {"format": {"type": "json_schema", "schema": _SCHEMA}}}
        case _:
            named = {"name": "pet", "schema": _SCHEMA}
            return {"response_format": {"type": "json_schema", "json_schema": named}}
