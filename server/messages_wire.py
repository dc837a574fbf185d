"""Anthropic's wire: a message and its events, as a function of a generation's log."""

from __future__ import annotations

from typing import Any

import msgspec

from server.answer_runs import Kind, Run, runs_of
from server.events import Done
from server.generation import Generation
from server.text.answer_text import AnswerReader
from server.text.tool_calls import call_id

Event = dict[str, Any]

_DELTAS: dict[Kind, tuple[str, str]] = {  # of a kind: the delta's type, and the field of its text
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


class MessageEvents:
    """The events of one message. `content` is what they made so far, as blocks."""

    def __init__(self, generation: Generation, model: str) -> None:
        self._generation = generation
        self._model = model
        self._reader = AnswerReader(generation.markup)
        self._open: Kind | None = None
        self._text = ""
        self._num_calls = 0
        self.content: list[dict[str, Any]] = []

    def start(self) -> list[Event]:
        """The beginning; what is found in the cache is told at the end."""
        num_tokens = len(self._generation.prompt_token_ids)
        usage = {"input_tokens": num_tokens, "output_tokens": 0}
        return [
            {"type": "message_start", "message": self._message(None, None, [], usage)},
            {"type": "ping"},
        ]

    def feed(self, text: str) -> list[Event]:
        """What more of the text makes."""
        return self._show(runs_of(self._reader.feed(text)))

    def end(self, event: Done) -> list[Event]:
        """What is held back, and the end."""
        events = [*self._show(runs_of(self._reader.finish())), *self._close()]
        reason, sequence = self._stop(event)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return [
            *events,
            {"type": "message_delta", "delta": delta, "usage": self._usage()},
            {"type": "message_stop"},
        ]

    def whole(self) -> dict[str, Any]:
        """The message in one piece, once it has ended."""
        self.feed(self._generation.text)
        end = self._generation.end
        self.end(end)
        return self._message(*self._stop(end), self.content, self._usage())

    # -------------------------------------------------------------------------------- details

    def _show(self, runs: list[Run]) -> list[Event]:
        events: list[Event] = []
        for run in runs:
            if run.name is not None or run.kind != self._open:
                events += self._close()
                events.append(self._begin(run))
            if run.text:
                self._text += run.text
                type, field = _DELTAS[run.kind]
                events.append(
                    self._at("content_block_delta", delta={"type": type, field: run.text})
                )
        return events

    def _begin(self, run: Run) -> Event:
        self._open, self._text = run.kind, ""
        block: dict[str, Any]
        match run.kind:
            case "text":
                block = {"type": "text", "text": ""}
            case "reasoning":
                block = {"type": "thinking", "thinking": "", "signature": ""}
            case "call":
                id = call_id(self._generation.id, self._num_calls)
                self._num_calls += 1
                block = {"type": "tool_use", "id": id, "name": run.name, "input": {}}
        self.content.append(block)
        return self._at("content_block_start", content_block=block)

    def _close(self) -> list[Event]:
        kind, self._open = self._open, None
        match kind:
            case None:
                return []
            case "text":
                said: dict[str, Any] = {"text": self._text}
            case "reasoning":
                said = {"thinking": self._text}
            case "call":
                said = {"input": _input(self._text)}
        self.content[-1] = {**self.content[-1], **said}
        return [self._at("content_block_stop")]

    def _at(self, type: str, **fields: Any) -> Event:
        return {"type": type, "index": len(self.content) - 1, **fields}

    def _stop(self, event: Done) -> tuple[str, str | None]:
        if event.finish_reason == "length":
            return "max_tokens", None
        sequence = self._generation.stop_string
        if sequence is not None:
            return "stop_sequence", sequence
        return ("tool_use" if self._num_calls else "end_turn"), None

    def _usage(self) -> dict[str, Any]:
        counts = self._generation.counts()
        cached = sum(counts["cached_tokens"].values())
        return {
            "input_tokens": counts["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": counts["completion_tokens"],
        }

    def _message(
        self,
        reason: str | None,
        sequence: str | None,
        content: list[dict[str, Any]],
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        return {
            "id": "msg_" + self._generation.id.removeprefix("gen_"),
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage,
        }


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object. What a model wrote that is none is kept under a name."""
    try:
        value = msgspec.json.decode(arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"invalid_json": arguments}
