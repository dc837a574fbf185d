"""Anthropic's messages: a ping, blocks and their deltas, the reason and the usage."""

from __future__ import annotations

import json

from tests.server.api.wires.checker import Answer, BrokenStream, Checker, Json, Said, need

_BLOCKS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


class MessageStream(Checker):
    def __init__(self) -> None:
        super().__init__()
        self._said = Said()
        self._usage: tuple[int, int] | None = None
        self._block: Json | None = None
        self._text = ""
        self._num_blocks = 0
        self._next = "message_start"

    @property
    def answer(self) -> Answer:
        return Answer([self._said], self._usage)

    def _take(self, document: Json) -> None:
        name = document["type"]
        if name == "error":
            need(self.num_frames > 0, "an error before the beginning")
            self.error, self.ended = document["error"], True
            return
        need(not self._next or name == self._next, f"{name} in that place")
        match name:
            case "message_start":
                need(self._next == name and document["message"]["content"] == [], "the beginning")
                self._next = "ping"
            case "ping":
                need(self._next == name, "a ping in that place")
                self._next = ""
            case "content_block_start":
                need(self._block is None, "a block within a block")
                need(document["index"] == self._num_blocks, "the index of a block")
                self._block, self._text = document["content_block"], ""
            case "content_block_delta":
                self._delta(document)
            case "content_block_stop":
                need(self._block is not None, "the end of a block that is none")
                need(document["index"] == self._num_blocks, "the index of a block")
                self._stop()
            case "message_delta":
                need(self._block is None, "the end within a block")
                self._said.reason = _reason(document["delta"])
                self._usage = _spent(document["usage"])
                self._next = "message_stop"
            case "message_stop":
                need(self._next == name, "the end in that place")
                self.ended = True
            case other:
                raise BrokenStream(f"an event {other!r}")

    def _delta(self, document: Json) -> None:
        need(self._block is not None, "a delta outside of a block")
        assert self._block is not None
        need(document["index"] == self._num_blocks, "the index of a block")
        type, field_ = _BLOCKS[self._block["type"]]
        delta = document["delta"]
        need(delta["type"] == type and delta[field_], "a delta of another kind, or an empty one")
        self._text += delta[field_]

    def _stop(self) -> None:
        assert self._block is not None
        match self._block["type"]:
            case "text":
                self._said.text += self._text
            case "thinking":
                self._said.reasoning += self._text
            case "tool_use":
                self._said.calls.append((self._block["name"], _spelled(self._text)))
        self._block = None
        self._num_blocks += 1


def whole_message(document: Json) -> Answer:
    said = Said(reason=_reason(document))
    for block in document["content"]:
        if block["type"] == "tool_use":
            made = block["input"]
            arguments = made["invalid_json"] if "invalid_json" in made else _compact(made)
            said.calls.append((block["name"], arguments))
        elif block["type"] == "text":
            said.text += block["text"]
        else:
            said.reasoning += block["thinking"]
    return Answer([said], _spent(document["usage"]))


def _spelled(arguments: str) -> str:
    """Arguments in one spelling, since a message in one piece has them as an object. What was cut
    has its own, as far as that is the same."""
    try:
        return _compact(json.loads(arguments or "{}"))
    except ValueError:
        return arguments


def _compact(value: object) -> str:
    """As enforced calls are spelled, but for what can be escaped in several ways."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _reason(document: Json) -> str:
    return f"{document['stop_reason']} {document['stop_sequence']}"


def _spent(usage: Json) -> tuple[int, int]:
    return usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]
