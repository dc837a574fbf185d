"""The Responses wire: a response, its items and its events, as a function of an answer's log.

`ResponseEvents` is fed the log's pieces of text one by one and gives the events that each of them
makes. Their numbers count up from 0, so the number of an event depends on nothing but the log, and
a stream that is read again has the same events with the same numbers. The whole response comes out
of the same walk, so that both modes say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from server.answer_runs import Kind, Run, runs_of
from server.part_reader import ShownTokens
from server.store.records import TurnRecord
from server.store.schema import text_of
from server.text.answer_text import AnswerReader, Markup
from server.text.tool_calls import call_id
from server.turns import drawn_by

Event = dict[str, Any]
ItemStatus = Literal["completed", "incomplete", "in_progress"]


def item_bits(turn: TurnRecord) -> str:
    """What the ids of a turn's items are made of; a copy has those of the turn it is a copy of."""
    return str(turn.notes.get("item") or turn.id.removeprefix("turn_"))


def echo_of(turn: TurnRecord) -> dict[str, Any]:
    """What a response says about its request: it is kept in the notes of its turn."""
    echo: dict[str, Any] = turn.notes["response"]
    return echo


def markup_of(echo: dict[str, Any]) -> Markup:
    """How the text of a response's answer is to be read."""
    return msgspec.convert(echo["markup"], Markup)


def input_items(turn: TurnRecord) -> list[dict[str, Any]]:
    """The items of a turn that was put in."""
    bits, text = item_bits(turn), text_of(turn.content)
    beside = turn.notes.get("message", {})
    items: list[dict[str, Any]] = []
    if turn.role == "tool":
        call_id = beside.get("tool_call_id", "")
        items.append(
            {
                "id": f"fco_{bits}",
                "type": "function_call_output",
                "status": "completed",
                "call_id": call_id,
                "output": text,
            }
        )
        return items
    calls = beside.get("tool_calls", [])
    if text or not calls:
        items.append(_message(f"msg_{bits}", turn.role, text, "completed"))
    for i, call in enumerate(calls):
        items.append(_call(_call_item_id(bits, i), call["id"], call["function"], "completed"))
    return items


def turn_items(turn: TurnRecord) -> list[dict[str, Any]]:
    """The items of any turn that has ended."""
    if "response" not in turn.notes:
        return input_items(turn)
    generation = drawn_by(turn) or turn.id  # an old transcript does not tell
    events = ResponseEvents({}, item_bits(turn), generation, markup_of(echo_of(turn)))
    events.feed(text_of(turn.content))
    complete = turn.status == "complete" and turn.finish_reason == "stop"
    events.end("completed" if complete else "incomplete")
    return events.output


class ResponseEvents:
    """The events of one response, from its `head` (the response as it is at its start)."""

    def __init__(self, head: dict[str, Any], bits: str, generation_id: str, markup: Markup) -> None:
        self._head = head
        self._bits = bits
        self._generation_id = generation_id
        self._reader = AnswerReader(markup)
        self._number = -1
        self._events: list[Event] = []
        self._shown = ShownTokens()
        self._held: list[Sequence[dict[str, Any]]] = []  # log-probabilities of what is not shown
        self._held_begun = False  # some of the first one's text was said
        self._said = not markup.tools and markup.thinking == "no"  # by the last token
        self._logprobs: list[dict[str, Any]] = []  # of what is said, to be told with the text
        self._text = ""
        self._num_calls = 0
        self._open: Kind | None = None
        self.output: list[dict[str, Any]] = []
        self.num_reasoning_tokens = 0

    @property
    def number(self) -> int:
        """The number of the last event."""
        return self._number

    def start(self) -> list[Event]:
        """The events that every response begins with."""
        for name in ("created", "in_progress"):
            self._emit(f"response.{name}", response=self._head)
        return self._taken()

    def feed(self, piece: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """What the text of one token makes. Log-probabilities are told of the tokens whose text is
        in messages, once all of it is."""
        runs = runs_of(self._reader.feed(piece))
        self._held.append(logprobs)
        num_shown = self._shown.feed([piece], self._reader.num_held)
        says = any(run.kind == "text" for run in runs)
        # A token without text of its own is where the one before it is.
        self._release(num_shown, says or (not piece and self._said))
        self._held_begun |= says and self._shown.next_is_begun
        self._show(runs)
        if self._open == "reasoning":
            self.num_reasoning_tokens += 1
        return self._taken()

    def end(self, status: ItemStatus) -> list[Event]:
        """What is held back, and the end of the last item. An answer without words has an empty
        message."""
        runs = runs_of(self._reader.finish())
        self._release(len(self._held), any(run.kind == "text" for run in runs))
        self._show(runs)
        if not self.output:
            self._open_message()
        self._close(status)
        return self._taken()

    def last(self, name: str, response: dict[str, Any]) -> Event:
        """The event that ends the stream."""
        self._emit(f"response.{name}", response=response)
        return self._taken()[0]

    # -------------------------------------------------------------------------------- details

    def _emit(self, type: str, **fields: Any) -> None:
        self._number += 1
        self._events.append({"type": type, "sequence_number": self._number, **fields})

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _release(self, num_shown: int, said: bool) -> None:
        """Let the log-probabilities of the tokens that are shown now go with the text, if they
        are of what is said."""
        if num_shown:
            for logprobs in self._held[: None if said else int(self._held_begun)][:num_shown]:
                self._logprobs += logprobs
            del self._held[:num_shown]
            self._held_begun, self._said = False, said

    def _emit_item(self, type: str, **fields: Any) -> None:
        """An event of the open item."""
        at = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
        self._emit(type, **at, **fields)

    def _show(self, runs: Sequence[Run]) -> None:
        for run in runs:
            if run.name is not None:
                self._close("completed")
                self._open_call(run.name)
            elif run.kind != self._open:
                self._close("completed")
                if run.kind == "text":
                    self._open_message()
                else:
                    self._open_reasoning()
            if run.text:
                self._more(run.kind, run.text)

    def _more(self, kind: Kind, text: str) -> None:
        self._text += text
        match kind:
            case "text":
                logprobs, self._logprobs = self._logprobs, []
                self.output[-1]["content"][0]["logprobs"] += logprobs
                self._emit_item(
                    "response.output_text.delta", content_index=0, delta=text, logprobs=logprobs
                )
            case "reasoning":
                self._emit_item("response.reasoning_text.delta", content_index=0, delta=text)
            case "call":
                self._emit_item("response.function_call_arguments.delta", delta=text)

    def _add(self, item: dict[str, Any]) -> None:
        self.output.append(item)
        self._text = ""
        shown = {**item, "status": "in_progress"}
        self._emit("response.output_item.added", output_index=len(self.output) - 1, item=shown)

    def _open_message(self) -> None:
        self._open = "text"
        item = _message(f"msg_{self._bits}{self._suffix('message')}", "assistant", "", "completed")
        part, item["content"] = item["content"][0], []
        self._add(item)
        self._emit_item("response.content_part.added", content_index=0, part=dict(part))
        item["content"] = [part | {"logprobs": []}]

    def _open_reasoning(self) -> None:
        self._open = "reasoning"
        self._add(
            {
                "id": f"rs_{self._bits}{self._suffix('reasoning')}",
                "type": "reasoning",
                "status": "completed",
                "summary": [],
                "content": [],
            }
        )
        part = {"type": "reasoning_text", "text": ""}
        self._emit_item("response.content_part.added", content_index=0, part=part)

    def _open_call(self, name: str) -> None:
        self._open = "call"
        id = call_id(self._generation_id, self._num_calls)
        function = {"name": name, "arguments": ""}
        item_id = _call_item_id(self._bits, self._num_calls)
        self._num_calls += 1
        self._add(_call(item_id, id, function, "completed"))

    def _suffix(self, type: str) -> str:
        count = sum(item["type"] == type for item in self.output)
        return f"_{count}" if count else ""

    def _close(self, status: ItemStatus) -> None:
        kind, self._open = self._open, None
        if kind is None:
            return
        item = {**self.output[-1], "status": status}
        if kind == "text":
            part = {**item["content"][0], "text": self._text}
            part["logprobs"] = part["logprobs"] + self._logprobs
            self._logprobs = []
            item["content"] = [part]
            self._emit_item(
                "response.output_text.done",
                content_index=0,
                text=self._text,
                logprobs=part["logprobs"],
            )
            self._emit_item("response.content_part.done", content_index=0, part=part)
        elif kind == "reasoning":
            part = {"type": "reasoning_text", "text": self._text}
            item["content"] = [part]
            self._emit_item("response.reasoning_text.done", content_index=0, text=self._text)
            self._emit_item("response.content_part.done", content_index=0, part=part)
        else:
            item["arguments"] = self._text
            self._emit_item(
                "response.function_call_arguments.done", name=item["name"], arguments=self._text
            )
        self.output[-1] = item
        self._emit("response.output_item.done", output_index=len(self.output) - 1, item=item)


def usage_of(counts: dict[str, Any], num_reasoning_tokens: int) -> dict[str, Any]:
    """`Generation.counts` in the words of this wire."""
    prompt, completion = counts["prompt_tokens"], counts["completion_tokens"]
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": sum(counts["cached_tokens"].values()),
            "cache_write_tokens": 0,
        },
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
        "total_tokens": prompt + completion,
    }


def _message(id: str, role: str, text: str, status: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": id, "type": "message", "status": status, "role": role, "content": [part]}


def _call(id: str, call_id: str, function: dict[str, Any], status: str) -> dict[str, Any]:
    return {
        "id": id,
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": function["name"],
        "arguments": function["arguments"],
    }


def _call_item_id(bits: str, index: int) -> str:
    return f"fc_{bits}_{index}" if index else f"fc_{bits}"
