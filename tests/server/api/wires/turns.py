"""Turns of sessions, and streams: events whose ids are places in the output."""

from __future__ import annotations

from tests.server.api.wires.checker import (
    Answer,
    BrokenStream,
    Checker,
    Json,
    Said,
    need,
    spent,
)


class TurnStream(Checker):
    """`place` is the id of the last event that has one."""

    has_ids = True

    def __init__(self) -> None:
        super().__init__()
        self.place = 0
        self._said = Said()
        self._usage: tuple[int, int] | None = None

    @property
    def answer(self) -> Answer:
        return Answer([self._said], self._usage)

    def _take(self, document: Json) -> None:
        id = self.frame.id
        match self.frame.event:
            case "progress":
                need(id is None and self.place <= 1, "progress in that place")
            case "start":
                need(self.place == 0 and id == 1, "the start in that place")
            case "delta":
                need(self.place > 0, "a delta before the start")
                expected = self.place + len(document["token_ids"])
                need(id == expected and document["token_ids"], "the id of a delta")
                self._said.text += document["text"]
                self._said.logprobs += document.get("logprobs", [])
            case "done":
                need(self.place > 0 and id is not None, "the end in that place")
                assert id is not None
                need(id in (self.place + 1, self.place + 2), "the id of the end")
                self._said.num_tokens = id - 2
                self._said.reason = document["finish_reason"]
                self._usage, self.ended = spent(document["usage"]), True
            case "error":
                need(id is None, "an error with an id")
                self.error, self.ended = document["error"], True
            case other:
                raise BrokenStream(f"an event {other!r}")
        self.place = self.place if id is None else id


def whole_turn(document: Json) -> Answer:
    text = "".join(item["text"] for item in document["content"])
    reason, num_tokens = document["finish_reason"], document["num_tokens"]
    return Answer([Said(text, reason=reason, num_tokens=num_tokens)], None)
